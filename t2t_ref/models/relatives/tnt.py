"""TNT: every patch is an image of its own, with a small transformer inside (chapter 19; Han et al. 2021)."""

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from jaxtyping import Float
from torch import Tensor, nn

from t2t_ref.models.backbone import DropPath, Mlp
from t2t_ref.models.soft_split import grid_size


class PixelEmbed(nn.Module):
    """Cut the image into patches, and each patch into words: a 7x7 convolution that sees its own patch alone.

    The cut comes first. So zeros, not the neighbour's pixels, stand around each patch when it is convolved.

    Shapes:  image   b c h w
             return  patches words e     patches = (b n), those of one image side by side; words row by row
    Units:   patch_size and inner_stride are pixels; a patch has ceil(patch_size / inner_stride) ** 2 words
    Raises:  ValueError if patch_size does not divide h and w, or the number of channels is wrong
    Source:  authors' second release; their first convolved the whole image and cut afterwards
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

        Raises:  ValueError if the patches do not tile the image
        """
        h, w = size
        if h % self.patch_size or w % self.patch_size:
            raise ValueError(f"patches of {self.patch_size} pixels do not tile an image of {h}x{w}")
        return grid_size(size, self.patch_size, self.patch_size, 0)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "patches words e"]:
        if image.shape[1] != self.in_chans:
            raise ValueError(f"the image has {image.shape[1]} channels, expected in_chans={self.in_chans}")
        self.grid_size((image.shape[-2], image.shape[-1]))  # refuses what the patches do not tile
        patches = rearrange(image, "b c (h kh) (w kw) -> (b h w) c kh kw", kh=self.patch_size, kw=self.patch_size)
        return rearrange(self.proj(patches), "patches e h w -> patches (h w) e")


class TNTAttention(nn.Module):
    """Multi-head self-attention with one linear layer for queries and keys, and another for values.

    Shapes:  tokens  b n d
             return  b n d
    Units:   qk_scale multiplies the scores; None means head_dim ** -0.5
    Raises:  ValueError if num_heads does not divide dim
    Source:  authors' code
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide a width of {dim}")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.attn_drop_rate = attn_drop_rate
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop_rate)

    def split_heads(
        self, tokens: Float[Tensor, "b n d"]
    ) -> tuple[Float[Tensor, "b g n e"], Float[Tensor, "b g n e"], Float[Tensor, "b g n e"]]:
        """Queries, keys and values, one set for each of the g heads.

        Shapes:  tokens  b n d
                 return  (b g n e, b g n e, b g n e)    e = d / g, the width of a head
        """
        queries, keys = rearrange(self.qk(tokens), "b n (two g e) -> two b g n e", two=2, g=self.num_heads)
        values = rearrange(self.v(tokens), "b n (g e) -> b g n e", g=self.num_heads)
        return queries, keys, values

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        queries, keys, values = self.split_heads(tokens)
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, dropout_p=self.attn_drop_rate if self.training else 0.0, scale=self.scale
        )
        return self.proj_drop(self.proj(rearrange(mixed, "b g n e -> b n (g e)")))


class TanhGate(nn.Module):
    """Weigh the channels by gates between -1 and 1, made from the mean over all tokens. No released model has it.

    Shapes:  tokens  b n d
             return  b n d
    Source:  authors' code, their ``se`` option
    """

    def __init__(self, dim: int):
        super().__init__()
        hidden = dim // 4
        self.fc = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim), nn.Tanh()
        )

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return tokens * self.fc(reduce(tokens, "b n d -> b 1 d", "mean"))


class TNTBlock(nn.Module):
    """A transformer block on the words of each patch, and one on the sentences, with the words added in between.

    Shapes:  words      patches words e    patches = (b n), the words of one patch see each other alone
             sentences  b n d              n counts the class token, row 0, to which no words are added
             return     (patches words e, b n d)
    Units:   one drop_path_rate for all four branches; the addition of the words is never dropped
    Source:  paper, Eqs. (3) to (7); the two norms around ``proj`` are in the authors' code only
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
        self.inner_mlp = Mlp(inner_dim, int(inner_dim * mlp_ratio), drop_rate)

        self.proj_norm1 = nn.LayerNorm(num_words * inner_dim)
        self.proj = nn.Linear(num_words * inner_dim, outer_dim, bias=False)
        self.proj_norm2 = nn.LayerNorm(outer_dim)

        self.outer_norm1 = nn.LayerNorm(outer_dim)
        self.outer_attn = TNTAttention(outer_dim, outer_num_heads, **options)
        self.drop_path = DropPath(drop_path_rate)
        self.outer_norm2 = nn.LayerNorm(outer_dim)
        self.outer_mlp = Mlp(outer_dim, int(outer_dim * mlp_ratio), drop_rate)
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
