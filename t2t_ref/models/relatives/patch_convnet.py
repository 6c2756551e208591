"""PatchConvNet: convolutions on a grid of tokens, one attention step at the end (chapter 23; Touvron et al. 2021)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce, repeat
from jaxtyping import Float
from torch import Tensor, nn

from t2t_ref.models.backbone import Attention, DropPath, Mlp
from t2t_ref.models.classifier import Classifier, init_weights, remember_arguments
from t2t_ref.models.soft_split import check_channels, grid_size


class ConvStem(nn.Module):
    """Image to tokens by four convolutions of stride 2, with GELUs between them and no norms.

    Shapes:
        image: ``b c h w``
        return: ``b n d``, n = ceil(h / 16) ceil(w / 16), row by row

    Raises:
        ValueError: if the number of channels is wrong

    Source:
        authors' code
    """

    def __init__(self, in_chans: int, embed_dim: int):
        super().__init__()
        self.in_chans = in_chans
        widths = (in_chans, embed_dim // 8, embed_dim // 4, embed_dim // 2, embed_dim)
        layers = []
        for before, after in zip(widths[:-1], widths[1:], strict=True):
            convolution = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            layers += [nn.Sequential(convolution), nn.GELU()]  # a list of one, for the authors' names
        self.proj = nn.Sequential(*layers[:-1])

    def grid_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the tokens of an image of (h, w) pixels."""
        for _ in range(4):
            size = grid_size(size, 3, 2, 1)
        return size

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        check_channels(image, self.in_chans)
        return rearrange(self.proj(image), "b d h w -> b (h w) d")


class ConvSqueezeExcite(nn.Module):
    """Weigh the channels: each is multiplied by a gate between 0 and 1, made from the mean over the grid.

    As T2T-ViT's :class:`~t2t_ref.models.cnn_designs.SqueezeExcite`, but with biases, and squeezed to a quarter.

    Shapes:
        features: ``b d h w``
        return: ``b d h w``

    Source:
        Hu et al. 2018; state-dict names as in timm
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

    Shapes:
        tokens: ``b n d``, on a grid of rows and columns
        return: ``b n d``

    Source:
        ``Conv_blocks_se`` of the authors' code, which takes every grid for a square
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

    Shapes:
        tokens: ``b n d``, on a grid of rows and columns
        return: ``b n d``

    Args:
        init_scale: where the layer scale gamma starts, one number for each channel

    Source:
        authors' code
    """

    def __init__(self, dim: int, *, drop_path_rate: float = 0.0, init_scale: float = 1e-4):
        super().__init__()
        self.gamma_1 = nn.Parameter(torch.full((dim,), init_scale))
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = GridConvolution(dim)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, tokens: Float[Tensor, "b n d"], grid: tuple[int, int]) -> Float[Tensor, "b n d"]:
        return tokens + self.drop_path(self.gamma_1 * self.attn(self.norm1(tokens), grid))


class AggregationAttention(Attention):
    """Attention with a few learned queries: its weights are a map of what decided, one for each query.

    Shapes:
        asking: ``b q d``, class tokens
        asked: ``b k d``, tokens that keys and values are made of
        return: ``b q d``

    Source:
        paper, "attention-based aggregation"; ``Learned_Aggregation_Layer`` of the authors' code
    """

    def make_qkv(self, dim: int, *, bias: bool) -> None:
        """Make the layers that ``split_heads`` uses."""
        self.q = nn.Linear(dim, dim, bias=bias)
        self.k = nn.Linear(dim, dim, bias=bias)
        self.v = nn.Linear(dim, dim, bias=bias)

    def split_heads(
        self, asking: Float[Tensor, "b q d"], asked: Float[Tensor, "b k d"]
    ) -> tuple[Float[Tensor, "b g q e"], Float[Tensor, "b g k e"], Float[Tensor, "b g k e"]]:
        """Queries, keys and values, one set for each of the g heads.

        Shapes:
            asking: ``b q d``
            asked: ``b k d``
            return: ``(b g q e, b g k e, b g k e)``, e = d / g, the width of a head
        """
        parts = self.q(asking), self.k(asked), self.v(asked)
        queries, keys, values = (rearrange(x, "b n (g e) -> b g n e", g=self.num_heads) for x in parts)
        return queries, keys, values

    def attention_weights(
        self, asking: Float[Tensor, "b q d"], asked: Float[Tensor, "b k d"]
    ) -> Float[Tensor, "b g q k"]:
        """The weights that ``forward`` mixes the values by and never holds: the map of what decided.

        Shapes:
            asking: ``b q d``
            asked: ``b k d``
            return: ``b g q k``, rows sum to 1
        """
        queries, keys, _ = self.split_heads(asking, asked)
        return (einsum(queries, keys, "b g q e, b g k e -> b g q k") * self.scale).softmax(dim=-1)

    def forward(self, asking: Float[Tensor, "b q d"], asked: Float[Tensor, "b k d"]) -> Float[Tensor, "b q d"]:
        queries, keys, values = self.split_heads(asking, asked)
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, dropout_p=self.attn_drop_rate if self.training else 0.0, scale=self.scale
        )
        return self.proj_drop(self.proj(rearrange(mixed, "b g q e -> b q (g e)")))


class AggregationBlock(nn.Module):
    """The class token gathers from the patches, then goes through an MLP. The patches stay as they are.

    Shapes:
        tokens: ``b n d``, the patches
        cls_tokens: ``b q d``, one, or one for each class
        return: ``b q d``

    Args:
        own_keys: put the class tokens among the keys, as the authors do for one and not for many
        init_scale: where both layer scales start

    Source:
        authors' code
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        mlp_ratio: float = 3.0,
        init_scale: float = 1e-4,
        own_keys: bool = True,
        drop_rate: float = 0.0,
        **attention,
    ):
        super().__init__()
        self.own_keys = own_keys
        self.gamma_1 = nn.Parameter(torch.full((dim,), init_scale))
        self.gamma_2 = nn.Parameter(torch.full((dim,), init_scale))
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = AggregationAttention(dim, num_heads, drop_rate=drop_rate, **attention)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop_rate=drop_rate)

    def forward(self, tokens: Float[Tensor, "b n d"], cls_tokens: Float[Tensor, "b q d"]) -> Float[Tensor, "b q d"]:
        normed = self.norm1(torch.cat([cls_tokens, tokens], dim=1))
        q = cls_tokens.shape[1]
        attended = self.attn(normed[:, :q], normed if self.own_keys else normed[:, q:])
        cls_tokens = cls_tokens + self.gamma_1 * attended
        return cls_tokens + self.gamma_2 * self.mlp(self.norm2(cls_tokens))


class HeadForEachClass(nn.Module):
    """A linear layer to one number for each class, each on the token of its class.

    Shapes:
        features: ``b q d``, q classes
        return: ``b q``
    """

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        for number in range(num_classes):
            self.add_module(str(number), nn.Linear(dim, 1))

    def forward(self, features: Float[Tensor, "b q d"]) -> Float[Tensor, "b q"]:
        return torch.cat([head(features[:, number]) for number, head in enumerate(self.children())], dim=1)


class PatchConvNet(Classifier):
    """A convolutional stem, a trunk of convolutional blocks of one width, and one attention step to a class token.

    Shapes:
        image: ``b c h w``
        return: ``b classes``, logits; with num_classes=0 the class feature, b d

    Args:
        img_size: an int or (height, width), says what the model is meant for: it takes any other size, too, unless
            dynamic_img_size is False
        patch_size: the authors', changes nothing: the stem divides by 16
        drop_path_rate: that of every block, or of the last one if dpr_constant is False
        multiclass: give each class a class token and a head of its own

    Units:
        img_size is pixels

    Raises:
        ValueError: for a wrong number of channels

    Source:
        paper; ``PatchConvnet`` of the authors' code, which takes every grid for a square: 7 x 28 for 14 x 14
    """

    poolings = ("token",)

    @remember_arguments
    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 1,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dpr_constant: bool = True,
        init_scale: float = 1e-4,
        depth_token_only: int = 1,
        mlp_ratio_clstk: float = 3.0,
        multiclass: bool = False,
        dynamic_img_size: bool = True,
    ):
        super().__init__(img_size, num_classes, dynamic_img_size)
        self.embed_dim = self.num_features = embed_dim
        self.multiclass = multiclass

        self.patch_embed = ConvStem(in_chans, embed_dim)
        self.grid = self.grid_of(self.img_size)
        self.cls_token = self.make_cls_token()
        first_rate = drop_path_rate if dpr_constant else 0.0
        rates = torch.linspace(first_rate, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(ConvBlock(embed_dim, drop_path_rate=rate, init_scale=init_scale) for rate in rates)
        self.blocks_token_only = nn.ModuleList(
            AggregationBlock(
                embed_dim,
                num_heads,
                mlp_ratio=mlp_ratio_clstk,
                init_scale=init_scale,
                own_keys=not multiclass,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                drop_rate=drop_rate,
                attn_drop_rate=attn_drop_rate,
            )
            for _ in range(depth_token_only)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = self.make_head()

        self.apply(init_weights)

    def forward_features(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Image to tokens after the last norm.

        Shapes:
            image: ``b c h w``
            return: ``b n d``, class token first, or a class token for each class, then the patches
        """
        self.check_image(image)
        tokens, grid = self.patch_embed(image), self.grid_of((image.shape[-2], image.shape[-1]))
        for block in self.blocks:
            tokens = block(tokens, grid)
        return self.finish(tokens)

    def finish(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b m d"]:
        """What comes after the trunk: class tokens gather from the patches; a norm of all.

        Shapes:
            tokens: ``b n d``, the patches
            return: ``b m d``, class tokens first, then the patches
        """
        cls_tokens = repeat(self.cls_token, "1 q d -> b q d", b=tokens.shape[0])
        for block in self.blocks_token_only:
            cls_tokens = block(tokens, cls_tokens)
        return self.norm(torch.cat([cls_tokens, tokens], dim=1))

    def block_outputs(
        self, image: Float[Tensor, "b c h w"]
    ) -> Iterator[tuple[Float[Tensor, "b n d"], tuple[int, int]]]:
        """The tokens after each block of the trunk in turn, and their grid, (rows, columns)."""
        self.check_image(image)
        tokens, grid = self.patch_embed(image), self.grid_of((image.shape[-2], image.shape[-1]))
        for block in self.blocks:
            tokens = block(tokens, grid)
            yield tokens, grid

    @property
    def depth(self) -> int:
        """How many blocks the trunk has."""
        return len(self.blocks)

    @property
    def num_prefix_tokens(self) -> int:
        """How many class tokens there are."""
        return self.cls_token.shape[1]

    def pool(self, features: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"] | Float[Tensor, "b classes d"]:
        """What enters the head: the class token, or with multiclass those of all classes.

        Shapes:
            features: ``b n d``
            return: b d, or b classes d
        """
        return features[:, : self.num_classes] if self.multiclass and self.num_classes > 0 else features[:, 0]

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the tokens of an image of (h, w) pixels."""
        return self.patch_embed.grid_size(size)

    def make_cls_token(self) -> nn.Parameter:
        """A fresh class token; with multiclass one for each class."""
        last = list(self.parameters())[-1]
        n = max(1, self.num_classes) if self.multiclass else 1
        token = torch.zeros(1, n, self.embed_dim, device=last.device, dtype=last.dtype)
        return nn.Parameter(nn.init.trunc_normal_(token, std=0.02))

    def make_head(self) -> nn.Module:
        """As in every model; with multiclass a layer for each class."""
        if not self.multiclass or self.num_classes < 1:
            return super().make_head()
        last = list(self.parameters())[-1]
        return HeadForEachClass(self.embed_dim, self.num_classes).to(last.device, last.dtype)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a fresh head for ``num_classes`` classes in place of the old one; with multiclass, tokens too.

        It comes on the device and in the dtype of the last layer, with weights as at the start of training.
        """
        super().reset_classifier(num_classes, global_pool)
        if self.multiclass:
            self.cls_token = self.make_cls_token()

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone, beside biases, norms and layer scales."""
        return {"cls_token"}


@dataclass(frozen=True)
class PatchConvNetVariant:
    """The sizes that tell one PatchConvNet from another: arguments of its class, ``model``."""

    embed_dim: int
    depth: int
    init_scale: float
    multiclass: bool = False
    qkv_bias: bool = True
    model: type[PatchConvNet] = PatchConvNet


VARIANTS = {  # the authors' S60, S120, B60, B120, S60_multi
    "patchconvnet_s60": PatchConvNetVariant(embed_dim=384, depth=60, init_scale=1e-4),
    "patchconvnet_s120": PatchConvNetVariant(embed_dim=384, depth=120, init_scale=1e-6),
    "patchconvnet_b60": PatchConvNetVariant(embed_dim=768, depth=60, init_scale=1e-6),
    "patchconvnet_b120": PatchConvNetVariant(embed_dim=768, depth=120, init_scale=1e-6),
    "patchconvnet_s60_multi": PatchConvNetVariant(embed_dim=384, depth=60, init_scale=1e-4, multiclass=True),
}
