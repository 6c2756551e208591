"""PVT: a pyramid of tokens, whose keys and values come from a smaller grid (chapter 20; Wang et al. 2021)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from t2t_ref.models.backbone import Attention, DropPath, Mlp
from t2t_ref.models.classifier import init_weights, remember_arguments
from t2t_ref.models.position import resize_position_table
from t2t_ref.models.relatives.pyramid import ConvEmbed, Pyramid, check_stages


class SpatialReductionAttention(Attention):
    """Attention of all tokens to a grid that a convolution has shrunk ``sr_ratio`` times in each direction.

    Shapes:
        tokens: ``b n d``, on a grid of rows and columns; with sr_ratio=1 any tokens
        return: ``b n d``

    Args:
        **options: those of :class:`~t2t_ref.models.backbone.Attention`

    Raises:
        ValueError: if the grid is smaller than sr_ratio

    Source:
        paper, Sec. 3.3; authors' code, whose norm here has an epsilon of 1e-5
    """

    def __init__(self, dim: int, num_heads: int, *, sr_ratio: int = 1, **options):
        super().__init__(dim, num_heads, **options)
        self.sr_ratio = sr_ratio
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim)

    def make_qkv(self, dim: int, *, bias: bool) -> None:
        """Make the layers that ``split_heads`` uses."""
        self.q = nn.Linear(dim, dim, bias=bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=bias)

    def reduced(self, tokens: Float[Tensor, "b n d"], grid: tuple[int, int]) -> Float[Tensor, "b k d"]:
        """The tokens from which keys and values are made."""
        if self.sr_ratio == 1:
            return tokens
        rows, columns = grid
        if min(grid) < self.sr_ratio:
            raise ValueError(f"a grid of {rows}x{columns} tokens is too small to be reduced {self.sr_ratio} times")
        image = rearrange(tokens, "b (h w) d -> b d h w", h=rows, w=columns)
        return self.norm(rearrange(self.sr(image), "b d h w -> b (h w) d"))

    def split_heads(
        self, tokens: Float[Tensor, "b n d"], grid: tuple[int, int]
    ) -> tuple[Float[Tensor, "b g n e"], Float[Tensor, "b g k e"], Float[Tensor, "b g k e"]]:
        """Queries, keys and values, one set for each of the g heads.

        Shapes:
            tokens: ``b n d``
            return: ``(b g n e, b g k e, b g k e)``, e = d / g, the width of a head; k keys of the reduced grid
        """
        queries = rearrange(self.q(tokens), "b n (g e) -> b g n e", g=self.num_heads)
        both = self.kv(self.reduced(tokens, grid))
        keys, values = rearrange(both, "b k (two g e) -> two b g k e", two=2, g=self.num_heads)
        return queries, keys, values

    def attention_weights(self, tokens: Float[Tensor, "b n d"], grid: tuple[int, int]) -> Float[Tensor, "b g q k"]:
        """The weights that ``forward`` mixes the values by and never holds, for those who want to see them.

        Shapes:
            tokens: ``b n d``
            return: ``b g q k``, q = n, k keys of the reduced grid; rows sum to 1
        """
        queries, keys, _ = self.split_heads(tokens, grid)
        return (einsum(queries, keys, "b g q e, b g k e -> b g q k") * self.scale).softmax(dim=-1)

    def forward(self, tokens: Float[Tensor, "b n d"], grid: tuple[int, int]) -> Float[Tensor, "b n d"]:
        queries, keys, values = self.split_heads(tokens, grid)
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, dropout_p=self.attn_drop_rate if self.training else 0.0, scale=self.scale
        )
        return self.proj_drop(self.proj(rearrange(mixed, "b g n e -> b n (g e)")))


class PVTBlock(nn.Module):
    """A transformer block with :class:`SpatialReductionAttention`.

    Shapes:
        tokens: ``b n d``, on a grid of rows and columns
        return: ``b n d``

    Source:
        paper, Fig. 3; authors' code
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: int | float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        **attention,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SpatialReductionAttention(dim, num_heads, drop_rate=drop_rate, **attention)
        self.drop_path = DropPath(drop_path_rate)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop_rate=drop_rate)

    def forward(self, tokens: Float[Tensor, "b n d"], grid: tuple[int, int]) -> Float[Tensor, "b n d"]:
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), grid))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))


class PVT(Pyramid):
    """Pyramid Vision Transformer: four stages, a position table for each, and a class token in the last.

    Shapes:
        image: ``b c h w``
        return: ``b classes``, logits; with num_classes=0 the class feature, b d

    Args:
        img_size: an int or (height, width)
        patch_size: that of the first stage, the others halve the grid

    Units:
        img_size and patch_size are pixels

    Note:
        lists have a number for each of the four stages

    Raises:
        ValueError: for a wrong number of channels or stages, an image too small for sr_ratios, a size other than
            img_size unless dynamic_img_size resizes the position tables to it

    Source:
        paper, Sec. 3; ``PyramidVisionTransformer`` of the authors' code, with the same state-dict names. There
        every stage compares its *number* of tokens with that of stage 1, so that 28 x 112 passes for 56 x 56
    """

    num_prefix_tokens = 1  # in the last stage
    poolings, global_pool = ("token", "avg", ""), "token"

    @remember_arguments
    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratios: Sequence[int | float] = (4, 4, 4, 4),
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        depths: Sequence[int] = (3, 4, 6, 3),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        num_stages: int = 4,
        dynamic_img_size: bool = False,
    ):
        super().__init__(img_size, num_classes, dynamic_img_size)
        check_stages(
            num_stages,
            embed_dims=embed_dims,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            depths=depths,
            sr_ratios=sr_ratios,
        )
        if sr_ratios[-1] != 1:
            raise ValueError(f"sr_ratios ends in {sr_ratios[-1]}, expected 1: the last stage has a class token")
        self.embed_dim = self.num_features = embed_dims[-1]
        self.reductions = tuple(sr_ratios)

        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        for stage, dim in enumerate(embed_dims):
            below, patch = (embed_dims[stage - 1], 2) if stage else (in_chans, patch_size)
            blocks = nn.ModuleList(
                PVTBlock(
                    dim,
                    num_heads[stage],
                    mlp_ratio=mlp_ratios[stage],
                    sr_ratio=sr_ratios[stage],
                    qkv_bias=qkv_bias,
                    qk_scale=qk_scale,
                    drop_rate=drop_rate,
                    attn_drop_rate=attn_drop_rate,
                    drop_path_rate=next(rates),
                )
                for _ in range(depths[stage])
            )
            self.add_module(f"patch_embed{stage + 1}", ConvEmbed(below, dim, kernel=patch, stride=patch))
            self.add_module(f"block{stage + 1}", blocks)
        self.pos_drop = nn.Dropout(drop_rate)
        self.norm = nn.LayerNorm(embed_dims[-1], eps=1e-6)
        self.head = self.make_head()

        self.grids = self.grids_of(self.img_size)
        for stage, (rows, columns) in enumerate(self.grids):
            n = rows * columns + int(stage == 3)
            table = nn.Parameter(torch.zeros(1, n, embed_dims[stage]))
            self.register_parameter(f"pos_embed{stage + 1}", nn.init.trunc_normal_(table, std=0.02))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dims[-1]))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_weights)

    def run_stage(self, stage: int, below: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """One stage, counted from 0: embedding, class token in the last stage, position table, blocks.

        Shapes:
            below: ``b c h w``, the image, or the stage below laid out as one
            return: ``b n d``
        """
        embed, blocks = getattr(self, f"patch_embed{stage + 1}"), getattr(self, f"block{stage + 1}")
        grid = embed.grid_size((below.shape[-2], below.shape[-1]))
        tokens = embed(below)
        if stage == 3:
            cls_tokens = repeat(self.cls_token, "1 1 d -> b 1 d", b=tokens.shape[0])
            tokens = torch.cat([cls_tokens, tokens], dim=1)
        tokens = self.pos_drop(tokens + self.position_table(stage, grid))
        for block in blocks:
            tokens = block(tokens, grid)
        return tokens

    def position_table(self, stage: int, grid: tuple[int, int]) -> Float[Tensor, "1 n d"]:
        """The position table of a stage for a grid: the trained one, resized if that is for another grid.

        Shapes:
            return: ``1 n d``
        """
        name = f"pos_embed{stage + 1}"
        return self.resize_table(name, getattr(self, name), self.grids[stage], grid)

    def position_tables(self, size: tuple[int, int] | None = None) -> dict[str, tuple[int, int]]:
        """The four tables and their (rows, columns): at this model's size, or at another."""
        grids = self.grids if size is None else self.grids_of(size)
        return {f"pos_embed{stage}": grid for stage, grid in enumerate(grids, 1)}

    def resize_table(
        self, name: str, table: Float[Tensor, "1 n d"], grid: tuple[int, int], new_grid: tuple[int, int]
    ) -> Float[Tensor, "1 n_new d"]:
        """A table fitted to another grid, bilinearly as in the authors' code. The class row, of the last, stays.

        Raises:
            ValueError: if ``grid`` does not fit the table
        """
        prefix = int(name == "pos_embed4")
        return resize_position_table(table, grid, new_grid, num_prefix_tokens=prefix, mode="bilinear")

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone, beside biases and norms.

        The position tables are not among them, as in the authors' code.
        """
        return {"cls_token"}


@dataclass(frozen=True)
class PVTVariant:
    """The sizes that tell one PVT from another, a number for each stage: arguments of its class, ``model``."""

    depths: tuple[int, ...]
    embed_dims: tuple[int, ...] = (64, 128, 320, 512)
    num_heads: tuple[int, ...] = (1, 2, 5, 8)
    mlp_ratios: tuple[int, ...] = (8, 8, 4, 4)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
    patch_size: int = 4
    qkv_bias: bool = True
    model: type[Pyramid] = PVT


VARIANTS = {  # authors' code; Table 1 of the paper has 3 where stage 2 has 4
    "pvt_tiny": PVTVariant(depths=(2, 2, 2, 2)),
    "pvt_small": PVTVariant(depths=(3, 4, 6, 3)),
    "pvt_medium": PVTVariant(depths=(3, 4, 18, 3)),
    "pvt_large": PVTVariant(depths=(3, 8, 27, 3)),
}
