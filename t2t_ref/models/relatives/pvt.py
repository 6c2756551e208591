"""PVT: a pyramid of tokens, whose keys and values come from a smaller grid (chapter 20; Wang et al. 2021)."""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from t2t_ref.models.backbone import DropPath, Mlp
from t2t_ref.models.relatives.pyramid import ConvEmbed


class SpatialReductionAttention(nn.Module):
    """Multi-head attention of all tokens to a grid that a convolution has shrunk sr_ratio times in each direction.

    Shapes:  tokens  b n d     on a grid of rows and columns; with sr_ratio=1 any tokens
             return  b n d
    Units:   qk_scale multiplies the scores; None means head_dim ** -0.5
    Raises:  ValueError if num_heads does not divide dim, or the grid is smaller than sr_ratio
    Source:  paper, Sec. 3.3; authors' code, with an epsilon of 1e-5 in this norm
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        sr_ratio: int = 1,
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
        self.sr_ratio = sr_ratio
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop_rate)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim)

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

        Shapes:  tokens  b n d
                 return  (b g n e, b g k e, b g k e)    e = d / g, the width of a head; k keys of the reduced grid
        """
        queries = rearrange(self.q(tokens), "b n (g e) -> b g n e", g=self.num_heads)
        both = self.kv(self.reduced(tokens, grid))
        keys, values = rearrange(both, "b k (two g e) -> two b g k e", two=2, g=self.num_heads)
        return queries, keys, values

    def forward(self, tokens: Float[Tensor, "b n d"], grid: tuple[int, int]) -> Float[Tensor, "b n d"]:
        queries, keys, values = self.split_heads(tokens, grid)
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, dropout_p=self.attn_drop_rate if self.training else 0.0, scale=self.scale
        )
        return self.proj_drop(self.proj(rearrange(mixed, "b g n e -> b n (g e)")))


class PVTBlock(nn.Module):
    """A transformer block with :class:`SpatialReductionAttention`.

    Shapes:  tokens  b n d     on a grid of rows and columns
             return  b n d
    Source:  paper, Fig. 3; authors' code
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        **attention,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SpatialReductionAttention(dim, num_heads, drop_rate=drop_rate, **attention)
        self.drop_path = DropPath(drop_path_rate)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop_rate)

    def forward(self, tokens: Float[Tensor, "b n d"], grid: tuple[int, int]) -> Float[Tensor, "b n d"]:
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), grid))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))
