"""The plain vision transformer that T2T-ViT is compared with (chapter 10; Dosovitskiy et al. 2021)."""

from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from t2t_ref.models.backbone import Block
from t2t_ref.models.classifier import TokenClassifier, init_weights, remember_arguments
from t2t_ref.models.soft_split import check_channels, grid_size


class PatchEmbed(nn.Module):
    """Hard split: the image is cut into squares that do not overlap, and each becomes one token.

    Shapes:
        image: ``b c h w``
        return: ``b n d``, n = h w / patch_size ** 2

    Raises:
        ValueError: if patch_size does not divide h and w, or the number of channels is wrong

    Source:
        state-dict names as in timm
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.in_chans = in_chans
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def grid_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the tokens of an image of (h, w) pixels.

        Raises:
            ValueError: if the patches do not tile the image
        """
        h, w = size
        if h % self.patch_size or w % self.patch_size:
            raise ValueError(f"patches of {self.patch_size} pixels do not tile an image of {h}x{w}")
        return grid_size(size, self.patch_size, self.patch_size, 0)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        check_channels(image, self.in_chans)
        self.grid_size((image.shape[-2], image.shape[-1]))  # refuses what the patches do not tile
        return rearrange(self.proj(image), "b d h w -> b (h w) d")


class ViT(TokenClassifier):
    """Vision Transformer, with a hard split and a learned position table.

    Shapes:
        image: ``b c h w``
        return: ``b classes``, logits; with num_classes=0 the class feature, b d

    Units:
        patch_size is pixels

    Note:
        other arguments and their units as :class:`T2TViT`

    Raises:
        ValueError: for a wrong number of channels, a size that the patches do not tile, a size other than img_size
            unless dynamic_img_size resizes the position table to it

    Source:
        Dosovitskiy et al. 2021; state-dict names and layer norms (epsilon 1e-6) as in timm
    """

    block_class = Block  # chapter 13 derives models with others

    @remember_arguments
    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
    ):
        super().__init__(img_size, num_classes, dynamic_img_size)
        self.embed_dim = self.num_features = embed_dim

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.grid = self.grid_of(self.img_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        n = self.num_prefix_tokens + self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, n, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        block = partial(
            self.block_class,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            norm_eps=1e-6,  # timm's, where the authors' T2T-ViT has 1e-5
        )
        self.blocks = self.make_blocks(block, depth, drop_path_rate)
        self.norm = nn.LayerNorm(self.num_features, eps=1e-6)
        self.head = self.make_head()

        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_weights)

    def tokens(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Image to tokens, one for each place of the grid.

        Shapes:
            image: ``b c h w``
            return: ``b n d``
        """
        return self.patch_embed(image)

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the tokens of an image of (h, w) pixels."""
        return self.patch_embed.grid_size(size)


@dataclass(frozen=True)
class ViTVariant:
    """The sizes that tell one ViT from another: arguments of its class, ``model``."""

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    qkv_bias: bool = True
    model: type[ViT] = ViT


VARIANTS = {
    # the ViTs of Tables 1 and 2; the paper prints width 786 for ViT-S/16, its parameter count is that of 768
    "vit_small_patch16": ViTVariant(embed_dim=768, depth=8, num_heads=8, mlp_ratio=3.0, qkv_bias=False),
    "vit_base_patch16": ViTVariant(embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0),
    "vit_large_patch16": ViTVariant(embed_dim=1024, depth=24, num_heads=16, mlp_ratio=4.0),
    "deit_small_patch16": ViTVariant(embed_dim=384, depth=12, num_heads=6, mlp_ratio=4.0),
    # Table 6 on the side of ViT: the authors left no code, the names are ours. Deep-narrow, shallow-wide and ResNeXt
    # are ViT-S/16 with what the table prints; the MLP ratio of shallow-wide is the simple one next to its parameter
    # count
    "vit_small_patch16_dn": ViTVariant(embed_dim=384, depth=16, num_heads=6, mlp_ratio=3.0, qkv_bias=False),
    "vit_small_patch16_sw": ViTVariant(embed_dim=1024, depth=4, num_heads=16, mlp_ratio=3.5, qkv_bias=False),
    "vit_small_patch16_resnext": ViTVariant(embed_dim=768, depth=8, num_heads=32, mlp_ratio=3.0, qkv_bias=False),
}
