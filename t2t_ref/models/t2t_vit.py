"""T2T-ViT: the tokens-to-token module in front of a deep, narrow transformer (chapter 9; paper, Sec. 3)."""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from t2t_ref.models.backbone import Block
from t2t_ref.models.classifier import TokenClassifier, init_weights, remember_arguments
from t2t_ref.models.position import sinusoid_table
from t2t_ref.models.tokens_to_token import TokensToToken, token_grid


class T2TViT(TokenClassifier):
    """Tokens-to-Token Vision Transformer.

    Shapes:
        image: ``b c h w``
        return: ``b classes``, logits; with num_classes=0 the class feature, b d

    Args:
        img_size: an int or (height, width)
        qk_scale: reaches the backbone only, None means head_dim ** -0.5
        performer_drop_rate: goes to the T2T layers of tokens_type "performer"; on in training unless set to 0, as in
            the authors' code
        performer_epsilon: goes to the same layers

    Units:
        img_size is pixels; rates are probabilities

    Raises:
        ValueError: for an unknown tokens_type, a size that leaves no token, a wrong number of channels, a size other
            than img_size unless dynamic_img_size resizes the position table to it

    Source:
        paper, Sec. 3 and Fig. 4; ``T2T_ViT`` of the authors' code, with the same state-dict names and numbers
    """

    block_class = Block  # chapter 13 derives models with others

    @remember_arguments
    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        tokens_type: str = "performer",
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        performer_drop_rate: float = 0.1,
        performer_epsilon: float = 1e-8,
        dynamic_img_size: bool = False,
        token_dim: int = 64,
    ):
        super().__init__(img_size, num_classes, dynamic_img_size)
        self.embed_dim = self.num_features = embed_dim
        self.tokens_to_token = TokensToToken(
            img_size,
            tokens_type,
            in_chans,
            embed_dim=embed_dim,
            token_dim=token_dim,
            performer_drop_rate=performer_drop_rate,
            performer_epsilon=performer_epsilon,
        )
        self.grid = self.grid_of(self.img_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        n = self.num_prefix_tokens + self.grid[0] * self.grid[1]
        self.register_buffer("pos_embed", sinusoid_table(n, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        block = partial(
            self.block_class,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
        )
        self.blocks = self.make_blocks(block, depth, drop_path_rate)
        self.norm = nn.LayerNorm(self.num_features)
        self.head = self.make_head()

        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_weights)

    def tokens(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Image to tokens, one for each place of the grid.

        Shapes:
            image: ``b c h w``
            return: ``b n d``
        """
        return self.tokens_to_token(image)

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the tokens of an image of (h, w) pixels."""
        return token_grid(size)


@dataclass(frozen=True)
class Variant:
    """The sizes that tell one T2T-ViT from another: arguments of its class, ``model``."""

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    tokens_type: str = "performer"
    model: type[T2TViT] = T2TViT


VARIANTS = {
    # paper, Table 1 and Table 4; the paper prints depth 8 for T2T-ViT-7, code and weights have 7
    "t2t_vit_7": Variant(embed_dim=256, depth=7, num_heads=4, mlp_ratio=2.0),
    "t2t_vit_10": Variant(embed_dim=256, depth=10, num_heads=4, mlp_ratio=2.0),
    "t2t_vit_12": Variant(embed_dim=256, depth=12, num_heads=4, mlp_ratio=2.0),
    "t2t_vit_14": Variant(embed_dim=384, depth=14, num_heads=6, mlp_ratio=3.0),
    "t2t_vit_19": Variant(embed_dim=448, depth=19, num_heads=7, mlp_ratio=3.0),
    "t2t_vit_24": Variant(embed_dim=512, depth=24, num_heads=8, mlp_ratio=3.0),
    # exact attention in the T2T layers: the paper's T2T-ViT_t
    "t2t_vit_t_14": Variant(embed_dim=384, depth=14, num_heads=6, mlp_ratio=3.0, tokens_type="transformer"),
    "t2t_vit_t_19": Variant(embed_dim=448, depth=19, num_heads=7, mlp_ratio=3.0, tokens_type="transformer"),
    "t2t_vit_t_24": Variant(embed_dim=512, depth=24, num_heads=8, mlp_ratio=3.0, tokens_type="transformer"),
    # three convolutions instead of the T2T module: T2T-ViT_c of Table 7; the name is ours
    "t2t_vit_c_14": Variant(embed_dim=384, depth=14, num_heads=6, mlp_ratio=3.0, tokens_type="convolution"),
    # Table 6: more heads; shallow and wide (depth 4 by its parameter count, where the table prints 14)
    "t2t_vit_14_resnext": Variant(embed_dim=384, depth=14, num_heads=32, mlp_ratio=3.0),
    "t2t_vit_14_wide": Variant(embed_dim=768, depth=4, num_heads=12, mlp_ratio=3.0),
}
