"""TNT: every patch is an image of its own, with a small transformer inside (chapter 19; Han et al. 2021)."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Float
from torch import Tensor, nn

from t2t_ref.models.backbone import Attention, DropPath, Mlp
from t2t_ref.models.classifier import TokenClassifier, init_weights, remember_arguments
from t2t_ref.models.soft_split import check_channels, grid_size


class PixelEmbed(nn.Module):
    """Cut the image into patches, and each patch into words: a 7x7 convolution that sees its own patch alone.

    The cut comes first. So zeros, not the neighbour's pixels, stand around each patch when it is convolved.

    Shapes:
        image: ``b c h w``
        return: ``patches words e``, patches = (b n), those of one image side by side; words row by row

    Units:
        patch_size and inner_stride are pixels

    Note:
        a patch has ceil(patch_size / inner_stride) ** 2 words

    Raises:
        ValueError: if patch_size does not divide h and w, or the number of channels is wrong

    Source:
        authors' second release; their first convolved the whole image and cut afterwards
    """

    def __init__(self, patch_size: int, in_chans: int, inner_dim: int, inner_stride: int):
        super().__init__()
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.proj = nn.Conv2d(in_chans, inner_dim, 7, stride=inner_stride, padding=3)
        rows, columns = grid_size((patch_size, patch_size), 7, inner_stride, 3)
        self.num_words = rows * columns

    def grid_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the patches of an image of (h, w) pixels.

        Raises:
            ValueError: if the patches do not tile the image
        """
        h, w = size
        if h % self.patch_size or w % self.patch_size:
            raise ValueError(f"patches of {self.patch_size} pixels do not tile an image of {h}x{w}")
        return grid_size(size, self.patch_size, self.patch_size, 0)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "patches words e"]:
        check_channels(image, self.in_chans)
        self.grid_size((image.shape[-2], image.shape[-1]))  # refuses what the patches do not tile
        patches = rearrange(image, "b c (h kh) (w kw) -> (b h w) c kh kw", kh=self.patch_size, kw=self.patch_size)
        return rearrange(self.proj(patches), "patches e h w -> patches (h w) e")


class TNTAttention(Attention):
    """Self-attention with one linear layer for queries and keys, and another for values.

    Shapes:
        tokens: ``b n d``
        return: ``b n d``

    Source:
        authors' code
    """

    def make_qkv(self, dim: int, *, bias: bool) -> None:
        """Make the layers that ``split_heads`` uses."""
        self.qk = nn.Linear(dim, 2 * dim, bias=bias)
        self.v = nn.Linear(dim, dim, bias=bias)

    def split_heads(
        self, tokens: Float[Tensor, "b n d"]
    ) -> tuple[Float[Tensor, "b g n e"], Float[Tensor, "b g n e"], Float[Tensor, "b g n e"]]:
        """Queries, keys and values, one set for each of the g heads.

        Shapes:
            tokens: ``b n d``
            return: ``(b g n e, b g n e, b g n e)``, e = d / g, the width of a head
        """
        queries, keys = rearrange(self.qk(tokens), "b n (two g e) -> two b g n e", two=2, g=self.num_heads)
        values = rearrange(self.v(tokens), "b n (g e) -> b g n e", g=self.num_heads)
        return queries, keys, values


class TanhGate(nn.Module):
    """Weigh the channels by gates between -1 and 1, made from the mean over all tokens. No released model has it.

    Shapes:
        tokens: ``b n d``
        return: ``b n d``

    Source:
        authors' code, their ``se`` option
    """

    def __init__(self, dim: int):
        super().__init__()
        hidden = dim // 4
        self.fc = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim), nn.Tanh())

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return tokens * self.fc(reduce(tokens, "b n d -> b 1 d", "mean"))


class TNTBlock(nn.Module):
    """A transformer block on the words of each patch, and one on the sentences, with the words added in between.

    Shapes:
        words: ``patches words e``, patches = (b n), the words of one patch see each other alone
        sentences: ``b n d``, n counts the class token, row 0, to which no words are added
        return: ``(patches words e, b n d)``

    Args:
        drop_path_rate: one for all four branches; the addition of the words is never dropped

    Source:
        paper, Eqs. (3) to (7); the two norms around ``proj`` are in the authors' code only
    """

    def __init__(
        self,
        outer_dim: int,
        inner_dim: int,
        *,
        outer_num_heads: int,
        inner_num_heads: int,
        num_words: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        se: int = 0,
    ):
        super().__init__()
        options = dict(qkv_bias=qkv_bias, qk_scale=qk_scale, drop_rate=drop_rate, attn_drop_rate=attn_drop_rate)
        self.inner_norm1 = nn.LayerNorm(inner_dim)
        self.inner_attn = TNTAttention(inner_dim, inner_num_heads, **options)
        self.inner_norm2 = nn.LayerNorm(inner_dim)
        self.inner_mlp = Mlp(inner_dim, int(inner_dim * mlp_ratio), drop_rate=drop_rate)

        self.proj_norm1 = nn.LayerNorm(num_words * inner_dim)
        self.proj = nn.Linear(num_words * inner_dim, outer_dim, bias=False)
        self.proj_norm2 = nn.LayerNorm(outer_dim)

        self.outer_norm1 = nn.LayerNorm(outer_dim)
        self.outer_attn = TNTAttention(outer_dim, outer_num_heads, **options)
        self.drop_path = DropPath(drop_path_rate)
        self.outer_norm2 = nn.LayerNorm(outer_dim)
        self.outer_mlp = Mlp(outer_dim, int(outer_dim * mlp_ratio), drop_rate=drop_rate)
        self.se_layer = TanhGate(outer_dim) if se > 0 else None

    def forward(
        self, words: Float[Tensor, "patches words e"], sentences: Float[Tensor, "b n d"]
    ) -> tuple[Float[Tensor, "patches words e"], Float[Tensor, "b n d"]]:
        words = words + self.drop_path(self.inner_attn(self.inner_norm1(words)))
        words = words + self.drop_path(self.inner_mlp(self.inner_norm2(words)))

        flat = rearrange(words, "(b n) words e -> b n (words e)", b=sentences.shape[0])
        news = self.proj_norm2(self.proj(self.proj_norm1(flat)))
        # a new tensor: the authors write into the sentences they were given
        sentences = torch.cat([sentences[:, :1], sentences[:, 1:] + news], dim=1)

        sentences = sentences + self.drop_path(self.outer_attn(self.outer_norm1(sentences)))
        change = self.outer_mlp(self.outer_norm2(sentences))
        if self.se_layer is not None:
            change = change + self.se_layer(change)
        return words, sentences + self.drop_path(change)


class TNT(TokenClassifier):
    """Transformer in Transformer: words inside patches, sentences for patches.

    Shapes:
        image: ``b c h w``
        return: ``b classes``, logits; with num_classes=0 the class feature, b d

    Args:
        outer_dim: the width of a sentence
        inner_dim: the width of a word
        inner_stride: from one word to the next
        se: above 0, add :class:`TanhGate`

    Units:
        inner_stride is pixels

    Note:
        other arguments and their units as :class:`ViT`

    Raises:
        ValueError: for a wrong number of channels, a size that the patches do not tile, a size other than img_size
            unless dynamic_img_size resizes the position table of the sentences to it

    Source:
        Han et al. 2021; ``TNT`` of the authors' code, with the same state-dict names. Their ``outer_tokens``, zeros
        that were once the sentences' start, is kept, frozen and never read
    """

    preprocessing = TokenClassifier.preprocessing | dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

    @remember_arguments
    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        outer_dim: int = 768,
        inner_dim: int = 48,
        depth: int = 12,
        outer_num_heads: int = 12,
        inner_num_heads: int = 4,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        inner_stride: int = 4,
        se: int = 0,
        dynamic_img_size: bool = False,
    ):
        super().__init__(img_size, num_classes, dynamic_img_size)
        self.embed_dim = self.num_features = outer_dim

        self.patch_embed = PixelEmbed(patch_size, in_chans, inner_dim, inner_stride)
        num_words = self.patch_embed.num_words
        self.grid = rows, columns = self.grid_of(self.img_size)
        self.proj_norm1 = nn.LayerNorm(num_words * inner_dim)
        self.proj = nn.Linear(num_words * inner_dim, outer_dim)
        self.proj_norm2 = nn.LayerNorm(outer_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, outer_dim))
        self.outer_tokens = nn.Parameter(torch.zeros(1, rows * columns, outer_dim), requires_grad=False)
        self.outer_pos = nn.Parameter(torch.zeros(1, 1 + rows * columns, outer_dim))
        self.inner_pos = nn.Parameter(torch.zeros(1, num_words, inner_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        block = partial(
            TNTBlock,
            inner_dim=inner_dim,
            outer_num_heads=outer_num_heads,
            inner_num_heads=inner_num_heads,
            num_words=num_words,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            se=se,
        )
        self.blocks = self.make_blocks(block, depth, drop_path_rate)
        self.norm = nn.LayerNorm(outer_dim)
        self.head = self.make_head()

        for learned in (self.cls_token, self.outer_pos, self.inner_pos):
            nn.init.trunc_normal_(learned, std=0.02)
        self.apply(init_weights)

    def embed(self, image: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "patches words e"], Float[Tensor, "b n d"]]:
        """Image to the words and the sentences that enter the first block.

        Shapes:
            image: ``b c h w``
            return: ``(patches words e, b n d)``, n counts the class token, which is row 0
        """
        self.check_image(image)
        words = self.patch_embed(image) + self.inner_pos
        flat = rearrange(words, "(b n) words e -> b n (words e)", b=image.shape[0])
        sentences = self.proj_norm2(self.proj(self.proj_norm1(flat)))
        cls_tokens = repeat(self.cls_token, "1 1 d -> b 1 d", b=image.shape[0])
        sentences = torch.cat([cls_tokens, sentences], dim=1)
        return words, self.pos_drop(sentences + self.position_table(image))

    def forward_features(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Image to sentences after the last norm.

        Shapes:
            image: ``b c h w``
            return: ``b n d``, n counts the class token, which is row 0
        """
        words, sentences = self.embed(image)
        for block in self.blocks:
            words, sentences = block(words, sentences)
        return self.norm(sentences)

    def block_outputs(
        self, image: Float[Tensor, "b c h w"]
    ) -> Iterator[tuple[Float[Tensor, "b n d"], tuple[int, int]]]:
        """The sentences after each block in turn, class token first, and their grid, (rows, columns)."""
        (words, sentences), grid = self.embed(image), self.grid_of((image.shape[-2], image.shape[-1]))
        for block in self.blocks:
            words, sentences = block(words, sentences)
            yield sentences, grid

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the patches of an image of (h, w) pixels."""
        return self.patch_embed.grid_size(size)

    def position_table(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "1 n d"]:
        """The position table of the sentences for the grid of this image: the trained one, or resized.

        Shapes:
            image: ``b c h w``
            return: ``1 n d``, n counts the class token, which is row 0
        """
        if not self.dynamic_img_size:
            return self.outer_pos
        grid = self.grid_of((image.shape[-2], image.shape[-1]))
        return self.resize_table("outer_pos", self.outer_pos, self.grid, grid)

    def position_tables(self, size: tuple[int, int] | None = None) -> dict[str, tuple[int, int]]:
        """The table of the sentences and its (rows, columns): at this model's size, or at another."""
        return {"outer_pos": self.grid if size is None else self.grid_of(size)}

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone, beside biases and norms."""
        return {"cls_token", "outer_pos", "inner_pos"}


@dataclass(frozen=True)
class TNTVariant:
    """The sizes that tell one TNT from another: arguments of its class, ``model``."""

    outer_dim: int
    inner_dim: int
    outer_num_heads: int
    inner_num_heads: int
    model: type[TNT] = TNT


VARIANTS = {  # paper, Table 1; the smallest is in the paper only, the name is ours
    "tnt_ti_patch16_224": TNTVariant(outer_dim=192, inner_dim=12, outer_num_heads=3, inner_num_heads=2),
    "tnt_s_patch16_224": TNTVariant(outer_dim=384, inner_dim=24, outer_num_heads=6, inner_num_heads=4),
    "tnt_b_patch16_224": TNTVariant(outer_dim=640, inner_dim=40, outer_num_heads=10, inner_num_heads=4),
}
