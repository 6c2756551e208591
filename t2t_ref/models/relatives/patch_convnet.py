"""PatchConvNet: convolutions on a grid of tokens, and one attention step at the end (chapter 23; Touvron et al. 2021)."""

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from jaxtyping import Float
from torch import Tensor, nn

from t2t_ref.models.backbone import DropPath, Mlp
from t2t_ref.models.soft_split import grid_size


def conv3x3(in_chans: int, out_chans: int) -> nn.Sequential:
    """A convolution that halves height and width, rounding up. In a list of its own, for the authors' names."""
    return nn.Sequential(nn.Conv2d(in_chans, out_chans, 3, stride=2, padding=1, bias=False))


class ConvStem(nn.Module):
    """Image to tokens by four convolutions of stride 2, with GELUs between them and no norms.

    Shapes:  image   b c h w
             return  b n d     n = ceil(h / 16) ceil(w / 16), row by row
    Raises:  ValueError if the number of channels is wrong
    Source:  authors' code
    """

    def __init__(self, in_chans: int, embed_dim: int):
        super().__init__()
        self.in_chans = in_chans
        widths = (in_chans, embed_dim // 8, embed_dim // 4, embed_dim // 2, embed_dim)
        layers = []
        for before, after in zip(widths[:-1], widths[1:], strict=True):
            layers += [conv3x3(before, after), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def grid_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the tokens of an image of (h, w) pixels."""
        for _ in range(4):
            size = grid_size(size, 3, 2, 1)
        return size

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        if image.shape[1] != self.in_chans:
            raise ValueError(f"the image has {image.shape[1]} channels, expected in_chans={self.in_chans}")
        return rearrange(self.proj(image), "b d h w -> b (h w) d")


class ConvSqueezeExcite(nn.Module):
    """Weigh the channels: each is multiplied by a gate between 0 and 1, made from the mean over the grid.

    As T2T-ViT's :class:`~t2t_ref.models.cnn_designs.SqueezeExcite`, but with biases, and squeezed to a quarter.

    Shapes:  features  b d h w
             return    b d h w
    Source:  Hu et al. 2018; state-dict names as in timm
    """

    def __init__(self, dim: int):
        super().__init__()
        self.conv_reduce = nn.Conv2d(dim, dim // 4, 1)
        self.conv_expand = nn.Conv2d(dim // 4, dim, 1)

    def forward(self, features: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        squeezed = self.conv_reduce(reduce(features, "b d h w -> b d 1 1", "mean"))
        return features * self.conv_expand(squeezed.relu()).sigmoid()


class GridConvolution(nn.Module):
    """What stands where a transformer has its attention: three convolutions and a squeeze-and-excitation.

    ``qkv_pos`` is the authors' name. There are no queries, keys, values or positions in it.

    Shapes:  tokens  b n d     on a grid of rows and columns
             return  b n d
    Source:  ``Conv_blocks_se`` of the authors' code, which takes every grid for a square
    """

    def __init__(self, dim: int):
        super().__init__()
        self.qkv_pos = nn.Sequential(
            nn.Conv2d(dim, dim, 1),
            nn.GELU(),
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim),
            nn.GELU(),
            ConvSqueezeExcite(dim),
            nn.Conv2d(dim, dim, 1),
        )

    def forward(self, tokens: Float[Tensor, "b n d"], grid: tuple[int, int]) -> Float[Tensor, "b n d"]:
        rows, columns = grid
        features = rearrange(tokens, "b (h w) d -> b d h w", h=rows, w=columns)
        return rearrange(self.qkv_pos(features), "b d h w -> b (h w) d")


class ConvBlock(nn.Module):
    """One block of the trunk: tokens + gamma * convolutions(norm(tokens)).

    Shapes:  tokens  b n d     on a grid of rows and columns
             return  b n d
    Units:   init_scale is where the layer scale gamma starts, one number for each channel
    Source:  authors' code
    """

    def __init__(self, dim: int, *, drop_path_rate: float = 0.0, init_scale: float = 1e-4):
        super().__init__()
        self.gamma_1 = nn.Parameter(torch.full((dim,), init_scale))
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = GridConvolution(dim)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, tokens: Float[Tensor, "b n d"], grid: tuple[int, int]) -> Float[Tensor, "b n d"]:
        return tokens + self.drop_path(self.gamma_1 * self.attn(self.norm1(tokens), grid))


class AggregationAttention(nn.Module):
    """Attention with queries from the first tokens alone: a map of what decided, one for each query.

    With one query the class token is among the keys, with one a class it is not.

    Shapes:  tokens  b n d     ``num_queries`` class tokens, then the patches
             return  b q d     q = num_queries
    Units:   qk_scale multiplies the scores; None means head_dim ** -0.5
    Raises:  ValueError if num_heads does not divide dim
    Source:  paper, "attention-based aggregation"; ``Learned_Aggregation_Layer`` and its ``_multi`` of the authors' code
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        num_queries: int = 1,
        own_keys: bool = True,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide a width of {dim}")
        self.num_heads = num_heads
        self.num_queries = num_queries
        self.first_key = 0 if own_keys else num_queries
        self.scale = (dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.attn_drop_rate = attn_drop_rate
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.k = nn.Linear(dim, dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop_rate)

    def split_heads(
        self, tokens: Float[Tensor, "b n d"]
    ) -> tuple[Float[Tensor, "b g q e"], Float[Tensor, "b g k e"], Float[Tensor, "b g k e"]]:
        """Queries, keys and values, one set for each of the g heads.

        Shapes:  tokens  b n d
                 return  (b g q e, b g k e, b g k e)    e = d / g, the width of a head
        """
        asking, asked = tokens[:, : self.num_queries], tokens[:, self.first_key :]
        queries = rearrange(self.q(asking), "b q (g e) -> b g q e", g=self.num_heads)
        keys, values = (rearrange(x, "b k (g e) -> b g k e", g=self.num_heads) for x in (self.k(asked), self.v(asked)))
        return queries, keys, values

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b q d"]:
        queries, keys, values = self.split_heads(tokens)
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, dropout_p=self.attn_drop_rate if self.training else 0.0, scale=self.scale
        )
        return self.proj_drop(self.proj(rearrange(mixed, "b g q e -> b q (g e)")))


class AggregationBlock(nn.Module):
    """The class token gathers from the patches, then goes through an MLP. The patches stay as they are.

    Shapes:  tokens      b n d    the patches
             cls_tokens  b q d
             return      b q d
    Units:   init_scale is where both layer scales start
    Source:  authors' code
    """

    def __init__(self, dim: int, num_heads: int = 1, *, mlp_ratio: float = 3.0, init_scale: float = 1e-4, **attention):
        super().__init__()
        self.gamma_1 = nn.Parameter(torch.full((dim,), init_scale))
        self.gamma_2 = nn.Parameter(torch.full((dim,), init_scale))
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = AggregationAttention(dim, num_heads, **attention)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), attention.get("drop_rate", 0.0))

    def forward(
        self, tokens: Float[Tensor, "b n d"], cls_tokens: Float[Tensor, "b q d"]
    ) -> Float[Tensor, "b q d"]:
        everything = torch.cat([cls_tokens, tokens], dim=1)
        cls_tokens = cls_tokens + self.gamma_1 * self.attn(self.norm1(everything))
        return cls_tokens + self.gamma_2 * self.mlp(self.norm2(cls_tokens))
