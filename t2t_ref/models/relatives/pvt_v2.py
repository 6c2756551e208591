"""PVT v2: overlapping patches, a convolution in the MLP, keys and values from 7x7 means (chapter 21; Wang et al. 2022)."""

import math

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from t2t_ref.models.backbone import DropPath
from t2t_ref.models.relatives.pvt import SpatialReductionAttention
from t2t_ref.models.relatives.pyramid import ConvEmbed


class PooledAttention(SpatialReductionAttention):
    """Attention to a grid that is averaged to 7x7, whatever its size: linear in the number of pixels.

    A grid smaller than 7x7 is stretched: its tokens are repeated among the 49 keys.

    Shapes:  tokens  b n d     on a grid of rows and columns
             return  b n d
    Source:  ``linear=True`` of the authors' code; norm and GELU behind the convolution are not in the paper
    """

    def __init__(self, dim: int, num_heads: int, **options):
        super().__init__(dim, num_heads, **options)
        self.pool = nn.AdaptiveAvgPool2d(7)
        self.sr = nn.Conv2d(dim, dim, 1)
        self.norm = nn.LayerNorm(dim)
        self.act = nn.GELU()

    def reduced(self, tokens: Float[Tensor, "b n d"], grid: tuple[int, int]) -> Float[Tensor, "b k d"]:
        """The 49 tokens from which keys and values are made."""
        rows, columns = grid
        image = rearrange(tokens, "b (h w) d -> b d h w", h=rows, w=columns)
        pooled = rearrange(self.sr(self.pool(image)), "b d h w -> b (h w) d")
        return self.act(self.norm(pooled))


class DepthwiseConvolution(nn.Module):
    """A 3x3 convolution of each channel by itself, on tokens. Its zero padding tells a token where the border is.

    Shapes:  tokens  b n f     on a grid of rows and columns
             return  b n f
    Source:  authors' code
    """

    def __init__(self, dim: int):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, tokens: Float[Tensor, "b n f"], grid: tuple[int, int]) -> Float[Tensor, "b n f"]:
        rows, columns = grid
        image = rearrange(tokens, "b (h w) f -> b f h w", h=rows, w=columns)
        return rearrange(self.dwconv(image), "b f h w -> b (h w) f")


class ConvMlp(nn.Module):
    """An MLP with a depth-wise convolution before its GELU: here tokens meet their neighbours.

    Shapes:  tokens  b n d     on a grid of rows and columns
             return  b n d
    Units:   linear puts a ReLU before the convolution, as in the models with pooled attention
    Source:  paper, Fig. 2; the ReLU is in the authors' code only
    """

    def __init__(self, dim: int, hidden_dim: int, drop_rate: float = 0.0, *, linear: bool = False):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.relu = nn.ReLU() if linear else nn.Identity()
        self.dwconv = DepthwiseConvolution(hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, tokens: Float[Tensor, "b n d"], grid: tuple[int, int]) -> Float[Tensor, "b n d"]:
        hidden = self.dwconv(self.relu(self.fc1(tokens)), grid)
        return self.drop(self.fc2(self.drop(self.act(hidden))))


class PVTv2Block(nn.Module):
    """A transformer block with reduced or pooled attention, and a convolution in its MLP.

    Shapes:  tokens  b n d     on a grid of rows and columns
             return  b n d
    Units:   linear pools to 7x7, whatever sr_ratio says
    Source:  authors' code
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        sr_ratio: int = 1,
        linear: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        **attention,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        if linear:
            self.attn = PooledAttention(dim, num_heads, drop_rate=drop_rate, **attention)
        else:
            self.attn = SpatialReductionAttention(
                dim, num_heads, sr_ratio=sr_ratio, drop_rate=drop_rate, **attention
            )
        self.drop_path = DropPath(drop_path_rate)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), drop_rate, linear=linear)

    def forward(self, tokens: Float[Tensor, "b n d"], grid: tuple[int, int]) -> Float[Tensor, "b n d"]:
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), grid))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens), grid))
