"""PVT v2: overlapping patches, a convolution in the MLP, keys and values of 7x7 (chapter 21; Wang et al. 2022)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from t2t_ref.models.backbone import DropPath
from t2t_ref.models.classifier import init_weights, remember_arguments
from t2t_ref.models.relatives.pvt import PVTVariant, SpatialReductionAttention
from t2t_ref.models.relatives.pyramid import ConvEmbed, Pyramid, check_stages


class PooledAttention(SpatialReductionAttention):
    """Attention to a grid that is averaged to 7x7, whatever its size: linear in the number of pixels.

    A grid smaller than 7x7 is stretched: its tokens are repeated among the 49 keys.

    Shapes:
        tokens: ``b n d``, on a grid of rows and columns
        return: ``b n d``

    Source:
        ``linear=True`` of the authors' code; norm and GELU behind the convolution are not in the paper
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

    Shapes:
        tokens: ``b n f``, on a grid of rows and columns
        return: ``b n f``

    Source:
        authors' code
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

    Shapes:
        tokens: ``b n d``, on a grid of rows and columns
        return: ``b n d``

    Args:
        linear: put a ReLU before the convolution, as in the models with pooled attention

    Source:
        paper, Fig. 2; the ReLU is in the authors' code only
    """

    def __init__(self, dim: int, hidden_dim: int, *, drop_rate: float = 0.0, linear: bool = False):
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

    Shapes:
        tokens: ``b n d``, on a grid of rows and columns
        return: ``b n d``

    Args:
        linear: pool to 7x7, whatever sr_ratio says

    Source:
        authors' code
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: int | float = 4.0,
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
            self.attn = SpatialReductionAttention(dim, num_heads, sr_ratio=sr_ratio, drop_rate=drop_rate, **attention)
        self.drop_path = DropPath(drop_path_rate)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), drop_rate=drop_rate, linear=linear)

    def forward(self, tokens: Float[Tensor, "b n d"], grid: tuple[int, int]) -> Float[Tensor, "b n d"]:
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), grid))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens), grid))


def init_conv(module: nn.Module) -> None:
    """Convolutions: normal of variance 2 / (outputs of one input, kernel included), bias 0. Linear layers as elsewhere.

    Source:
        authors' code
    """
    init_weights(module)
    if isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        nn.init.zeros_(module.bias)


class PVTv2(Pyramid):
    """Pyramid Vision Transformer v2: overlapping patches, no position tables, no class token, a norm after each stage.

    Shapes:
        image: ``b c h w``
        return: ``b classes``, logits; with num_classes=0 the mean of the last tokens, b d

    Args:
        img_size: an int or (height, width), says what the model is meant for: it takes any other size, too, unless
            dynamic_img_size is False
        patch_size: the authors', changes nothing
        linear: pool keys and values to 7x7, whatever sr_ratios says

    Units:
        img_size is pixels

    Raises:
        ValueError: for a wrong number of channels or stages, an image too small for sr_ratios

    Source:
        paper; ``PyramidVisionTransformerV2`` of the authors' code, with the same state-dict names
    """

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
        linear: bool = False,
        dynamic_img_size: bool = True,
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
        self.embed_dim = self.num_features = embed_dims[-1]
        self.reductions = (1, 1, 1, 1) if linear else tuple(sr_ratios)

        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        for stage, dim in enumerate(embed_dims):
            below, kernel, stride = (embed_dims[stage - 1], 3, 2) if stage else (in_chans, 7, 4)
            embed = ConvEmbed(below, dim, kernel=kernel, stride=stride, padding=kernel // 2)
            blocks = nn.ModuleList(
                PVTv2Block(
                    dim,
                    num_heads[stage],
                    mlp_ratio=mlp_ratios[stage],
                    sr_ratio=sr_ratios[stage],
                    linear=linear,
                    qkv_bias=qkv_bias,
                    qk_scale=qk_scale,
                    drop_rate=drop_rate,
                    attn_drop_rate=attn_drop_rate,
                    drop_path_rate=next(rates),
                )
                for _ in range(depths[stage])
            )
            self.add_module(f"patch_embed{stage + 1}", embed)
            self.add_module(f"block{stage + 1}", blocks)
            self.add_module(f"norm{stage + 1}", nn.LayerNorm(dim, eps=1e-6))
        self.norm = nn.Identity()  # each stage has its own
        self.head = self.make_head()
        self.grids = self.grids_of(self.img_size)
        self.apply(init_conv)

    def run_stage(self, stage: int, below: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """One stage, counted from 0: embedding, blocks, norm.

        Shapes:
            below: ``b c h w``, the image, or the stage below laid out as one
            return: ``b n d``
        """
        embed, blocks = getattr(self, f"patch_embed{stage + 1}"), getattr(self, f"block{stage + 1}")
        grid = embed.grid_size((below.shape[-2], below.shape[-1]))
        tokens = embed(below)
        for block in blocks:
            tokens = block(tokens, grid)
        return getattr(self, f"norm{stage + 1}")(tokens)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone, beside biases and norms: none."""
        return set()


@dataclass(frozen=True)
class PVTv2Variant(PVTVariant):
    """The sizes that tell one PVT v2 from another: arguments of its class, ``model``."""

    linear: bool = False
    model: type[Pyramid] = PVTv2


VARIANTS = {  # paper, Table 1
    "pvt_v2_b0": PVTv2Variant(depths=(2, 2, 2, 2), embed_dims=(32, 64, 160, 256)),
    "pvt_v2_b1": PVTv2Variant(depths=(2, 2, 2, 2)),
    "pvt_v2_b2": PVTv2Variant(depths=(3, 4, 6, 3)),
    "pvt_v2_b2_li": PVTv2Variant(depths=(3, 4, 6, 3), linear=True),
    "pvt_v2_b3": PVTv2Variant(depths=(3, 4, 18, 3)),
    "pvt_v2_b4": PVTv2Variant(depths=(3, 8, 27, 3)),
    "pvt_v2_b5": PVTv2Variant(depths=(3, 6, 40, 3), mlp_ratios=(4, 4, 4, 4)),
}
