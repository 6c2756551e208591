"""The plain vision transformer that T2T-ViT is compared with (chapter 10; Dosovitskiy et al. 2021)."""

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from t2t_ref.arguments import pair
from t2t_ref.models.backbone import Block
from t2t_ref.models.classifier import TokenClassifier, init_weights
from t2t_ref.models.soft_split import grid_size


class PatchEmbed(nn.Module):
    """Hard split: the image is cut into squares that do not overlap, and each becomes one token.

    Shapes:  image   b c h w
             return  b n d     n = h w / patch_size ** 2
    Raises:  ValueError if patch_size does not divide h and w, or the number of channels is wrong
    Source:  state-dict names as in timm
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.in_chans = in_chans
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def grid_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the tokens of an image of (h, w) pixels.

        Raises:  ValueError if the patches do not tile the image
        """
        h, w = size
        if h % self.patch_size or w % self.patch_size:
            raise ValueError(f"patches of {self.patch_size} pixels do not tile an image of {h}x{w}")
        return grid_size(size, self.patch_size, self.patch_size, 0)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        if image.shape[1] != self.in_chans:
            raise ValueError(f"the image has {image.shape[1]} channels, expected in_chans={self.in_chans}")
        self.grid_size((image.shape[-2], image.shape[-1]))  # refuses what the patches do not tile
        return rearrange(self.proj(image), "b d h w -> b (h w) d")


class ViT(TokenClassifier):
    """Vision Transformer, with a hard split and a learned position table.

    Shapes:  image   b c h w
             return  b classes   logits; with num_classes=0 the class feature, b d
    Units:   as :class:`T2TViT`; patch_size is pixels
    Raises:  ValueError for a wrong number of channels, a size that the patches do not tile, a size other than img_size
             unless dynamic_img_size resizes the position table to it
    Source:  Dosovitskiy et al. 2021; state-dict names and layer norms (epsilon 1e-6) as in timm
    """

    block_class = Block  # chapter 13 derives models with others

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
        super().__init__()
        self.img_size = pair(img_size)
        self.num_classes = num_classes
        self.embed_dim = self.num_features = embed_dim
        self.dynamic_img_size = dynamic_img_size

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.grid = self.token_grid(self.img_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        drop_path_rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            self.block_class(embed_dim, num_heads, mlp_ratio, qkv_bias, qk_scale, drop_rate, attn_drop_rate, rate)
            for rate in drop_path_rates
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()

        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_weights)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6  # timm's, where the authors' T2T-ViT has 1e-5

    def embed(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Image to the tokens that enter the first block.

        Shapes:  image   b c h w
                 return  b n d     n counts the class token, which is row 0
        """
        self.check_image(image)
        tokens = self.patch_embed(image)
        cls_tokens = repeat(self.cls_token, "1 1 d -> b 1 d", b=tokens.shape[0])
        tokens = torch.cat([cls_tokens, tokens], dim=1)
        return self.pos_drop(tokens + self.position_table(image))

    def forward_features(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Image to tokens after the last norm.

        Shapes:  image   b c h w
                 return  b n d     n counts the class token, which is row 0
        """
        tokens = self.embed(image)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def token_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the tokens of an image of (h, w) pixels."""
        return self.patch_embed.grid_size(size)
