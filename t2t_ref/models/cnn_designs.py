"""Designs from CNNs in the blocks of a transformer: squeeze-and-excitation, ghost, dense (chapter 13; paper, Table 6).

A block of another design takes the place of :class:`Block`; everything around the blocks is T2TViT, or ViT, as it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from t2t_ref.models.backbone import Attention, Block
from t2t_ref.models.classifier import remember_arguments
from t2t_ref.models.t2t_vit import T2TViT, Variant
from t2t_ref.models.vit import ViT, ViTVariant

# ---- squeeze-and-excitation


class SqueezeExcite(nn.Module):
    """Weigh the channels: each is multiplied by a gate between 0 and 1, the same for all tokens of an image.

    The gates are computed from the mean over all tokens, the class token among them.

    Shapes:
        tokens: ``b n d``
        return: ``b n d``

    Units:
        the mean is squeezed to a ``reduction``-th of its d numbers, at least 1

    Source:
        Hu et al. 2018; ``SELayer`` of the authors' code
    """

    def __init__(self, dim: int, reduction: int = 16):
        super().__init__()
        squeezed = max(1, dim // reduction)
        self.fc = nn.Sequential(
            nn.Linear(dim, squeezed, bias=False), nn.ReLU(), nn.Linear(squeezed, dim, bias=False), nn.Sigmoid()
        )

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        gates = self.fc(reduce(tokens, "b n d -> b 1 d", "mean"))
        return tokens * gates


class SEAttention(Attention):
    """Attention whose output has its channels weighed before it is added to the tokens.

    Shapes:
        tokens: ``b n d``
        return: ``b n d``

    Source:
        authors' code: after ``proj``, before the dropout
    """

    def __init__(self, dim: int, num_heads: int, **options):
        super().__init__(dim, num_heads, **options)
        self.se_layer = SqueezeExcite(dim)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        queries, keys, values = self.split_heads(tokens)
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, dropout_p=self.attn_drop_rate if self.training else 0.0, scale=self.scale
        )
        mixed = self.proj(rearrange(mixed, "b g n e -> b n (g e)"))
        return self.proj_drop(self.se_layer(mixed))


class SEBlock(Block):
    """A block with :class:`SEAttention`. The MLP is the plain one.

    Shapes:
        tokens: ``b n d``
        return: ``b n d``
    """

    attention_class = SEAttention


class SET2TViT(T2TViT):
    """T2T-ViT with squeeze-and-excitation in every block. Arguments and shapes as :class:`T2TViT`.

    Source:
        paper, Table 6, "T2T-ViT-SE"; ``T2T_ViT_SE`` of the authors' code, with the same state-dict names
    """

    block_class = SEBlock


class SEViT(ViT):
    """ViT with squeeze-and-excitation in every block. Arguments and shapes as :class:`ViT`.

    Source:
        paper, Table 6, "ViT-SE"; the authors left no code for it
    """

    block_class = SEBlock


# ---- ghost


def ghost_operation(channels: int) -> nn.Conv1d:
    """The cheap operation: a convolution of width 1 in as many groups as channels, so one factor for each channel.

    The weights start as torch draws them, evenly between -1 and 1, as in the authors' code.
    """
    return nn.Conv1d(channels, channels, kernel_size=1, groups=channels, bias=False)


def ghost(operation: nn.Conv1d, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """The ghost of the tokens: every channel times its factor.

    Shapes:
        tokens: ``b n d``
        return: ``b n d``
    """
    channels_first = rearrange(tokens, "b n d -> b d n")
    return rearrange(operation(channels_first), "b d n -> b n d")


class GhostAttention(Attention):
    """Attention that computes half of its queries, keys and values, and takes ghosts of these for the other half.

    The ghosts come behind the real channels. So the first half of the heads is real, and the second half has the same
    queries, keys and values with other factors.

    Shapes:
        tokens: ``b n d``
        return: ``b n d``

    Raises:
        ValueError: if num_heads does not divide dim, or dim is not even

    Source:
        Han et al. 2020, "GhostNet"; ``Attention_ghost`` of the authors' code
    """

    def make_qkv(self, dim: int, *, bias: bool) -> None:
        """Make three linear layers of half the width, and the operations that double it."""
        if dim % 2:
            raise ValueError(f"a width of {dim} has no half for the ghosts")
        half = dim // 2
        self.q = nn.Linear(dim, half, bias=bias)
        self.k = nn.Linear(dim, half, bias=bias)
        self.v = nn.Linear(dim, half, bias=bias)
        self.cheap_operation_q = ghost_operation(half)
        self.cheap_operation_k = ghost_operation(half)
        self.cheap_operation_v = ghost_operation(half)

    def split_heads(
        self, tokens: Float[Tensor, "b n d"]
    ) -> tuple[Float[Tensor, "b g n e"], Float[Tensor, "b g n e"], Float[Tensor, "b g n e"]]:
        """Queries, keys and values, one set for each of the g heads, the ghosts behind the real ones.

        Shapes:
            tokens: ``b n d``
            return: ``(b g n e, b g n e, b g n e)``, e = d / g, the width of a head
        """
        both = []
        for linear, operation in (
            (self.q, self.cheap_operation_q),
            (self.k, self.cheap_operation_k),
            (self.v, self.cheap_operation_v),
        ):
            real = linear(tokens)
            together = torch.cat([real, ghost(operation, real)], dim=-1)
            both.append(rearrange(together, "b n (g e) -> b g n e", g=self.num_heads))
        queries, keys, values = both
        return queries, keys, values


class GhostMlp(nn.Module):
    """An MLP that computes d of its hidden numbers, and takes ghosts of these for the rest.

    With a hidden width of 3 d there are two ghosts, the only case that the authors' code can take. Here a hidden width
    that is no multiple of d has its last ghost of the first channels only, and one below d has no ghosts.

    Shapes:
        tokens: ``b n d``
        return: ``b n d``, through a hidden width f

    Source:
        Han et al. 2020; ``Mlp_ghost`` of the authors' code, where the ghosts are taken after the GELU and go through
        the GELU once more
    """

    def __init__(self, dim: int, hidden_dim: int, *, drop_rate: float = 0.0):
        super().__init__()
        real = min(dim, hidden_dim)
        self.fc1 = nn.Linear(dim, real)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop_rate)
        starts = range(real, hidden_dim, real)
        # the authors count from 2: number 1 would be the real part
        self.cheap_names = tuple(f"cheap_operation{number}" for number, _ in enumerate(starts, start=2))
        for name, start in zip(self.cheap_names, starts, strict=True):
            self.add_module(name, ghost_operation(min(real, hidden_dim - start)))

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        hidden = [self.act(self.fc1(tokens))]
        for name in self.cheap_names:
            operation = getattr(self, name)
            hidden.append(self.act(ghost(operation, hidden[0][..., : operation.in_channels])))
        return self.drop(self.fc2(self.drop(torch.cat(hidden, dim=-1))))


class GhostBlock(Block):
    """A block with :class:`GhostAttention` and :class:`GhostMlp`.

    Shapes:
        tokens: ``b n d``
        return: ``b n d``
    """

    attention_class, mlp_class = GhostAttention, GhostMlp


class GhostT2TViT(T2TViT):
    """T2T-ViT of ghost blocks. Arguments and shapes as :class:`T2TViT`.

    Source:
        paper, Table 6, "T2T-ViT-Ghost"; ``T2T_ViT_Ghost`` of the authors' code, with the same state-dict names
    """

    block_class = GhostBlock


class GhostViT(ViT):
    """ViT of ghost blocks. Arguments and shapes as :class:`ViT`.

    Source:
        paper, Table 6, "ViT-Ghost"; the authors left no code for it
    """

    block_class = GhostBlock


# ---- dense


class DenseBlock(Block):
    """A block that adds nothing to the tokens it was given: it appends ``growth_rate`` new channels to them.

    The new channels are a linear layer of what a plain block would put out.

    Shapes:
        tokens: ``b n d``
        return: ``b n e``, e = d + growth_rate, the first d as they came

    Source:
        Huang et al. 2017, "Densely connected convolutional networks"; authors' code
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, *, growth_rate: int, **options):
        super().__init__(dim, num_heads, mlp_ratio, **options)
        self.dense_linear = nn.Linear(dim, growth_rate)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
        new = self.dense_linear(super().forward(tokens))
        return torch.cat([tokens, new], dim=-1)


class Transition(nn.Module):
    """Between two dense stages: every token to half its width, then a GELU.

    Shapes:
        tokens: ``b n d``
        return: ``b n e``, e = d / 2

    Source:
        authors' code
    """

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim // 2)
        self.act = nn.GELU()

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
        return self.act(self.linear(tokens))


def dense_widths(embed_dim: int, depths: Sequence[int], growth_rate: int) -> list[list[int]]:
    """The width of the tokens before each block of each stage, and at its end: [[128, 192, 256, 320], [160, ...], ...].

    Raises:
        ValueError: if there is no stage, or one without blocks
    """
    if not depths or min(depths) < 1:
        raise ValueError(f"depths is {tuple(depths)}, expected a number of blocks, 1 or more, for each stage")
    widths = []
    for depth in depths:
        widths.append([embed_dim + growth_rate * block for block in range(depth + 1)])
        embed_dim = widths[-1][-1] // 2
    return widths


class DenseStages:
    """What makes a T2TViT or a ViT dense: stages of :class:`DenseBlock`, a :class:`Transition` between any two.

    All blocks of stage i drop their branches at the rate ``drop_path_rate * i / 11``: the authors draw the usual line
    of rates for 12 blocks, and then take from it by the number of the stage. With four stages the last one gets 3/11
    of the rate that was asked for.
    """

    block_class = DenseBlock

    def make_blocks(self, block: Callable[..., nn.Module], depth: int, drop_path_rate: float) -> nn.ModuleList:
        """The blocks of all stages, and the transitions. The width at the end becomes ``num_features``."""
        blocks, widths = nn.ModuleList(), dense_widths(self.embed_dim, self.depths, self.growth_rate)
        for stage, (*before, end) in enumerate(widths):
            rate = drop_path_rate * stage / 11
            for dim in before:
                blocks.append(block(dim, growth_rate=self.growth_rate, drop_path_rate=rate))
            if stage + 1 < len(widths):
                blocks.append(Transition(end))
        self.num_features = end
        return blocks


class DenseT2TViT(DenseStages, T2TViT):
    """T2T-ViT of dense stages: tokens grow by ``growth_rate`` numbers in a block, and are halved between two stages.

    ``blocks`` holds the transitions too: entry 3 is the first one. ``num_features`` is the width at the end, where
    norm and head are; ``embed_dim`` is the width at the start.

    Shapes:
        image: ``b c h w``
        return: ``b classes``, logits; with num_classes=0 the class feature, b num_features

    Units:
        as :class:`T2TViT`; depths is the number of blocks of each stage. Of drop_path_rate the last of four stages gets
        3/11, the others less: see :class:`DenseStages`

    Raises:
        ValueError: as :class:`T2TViT`, and if num_heads does not divide the width of every block

    Source:
        paper, Table 6, "T2T-ViT-Dense"; ``T2T_ViT_Dense`` of the authors' code, with the same state-dict names
    """

    @remember_arguments
    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        tokens_type: str = "performer",
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 128,
        depths: Sequence[int] = (3, 6, 6, 4),
        growth_rate: int = 64,
        num_heads: int = 8,
        mlp_ratio: float = 2.0,
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
        self.depths, self.growth_rate = tuple(depths), growth_rate  # make_blocks needs them before we are back
        super().__init__(
            img_size,
            tokens_type,
            in_chans,
            num_classes=num_classes,
            embed_dim=embed_dim,
            depth=sum(depths),
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            performer_drop_rate=performer_drop_rate,
            performer_epsilon=performer_epsilon,
            dynamic_img_size=dynamic_img_size,
            token_dim=token_dim,
        )


class DenseViT(DenseStages, ViT):
    """ViT of dense stages: see :class:`DenseT2TViT`.

    Shapes:
        image: ``b c h w``
        return: ``b classes``, logits; with num_classes=0 the class feature, b num_features

    Source:
        paper, Table 6, "ViT-Dense"; the authors left no code for it
    """

    @remember_arguments
    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 128,
        depths: Sequence[int] = (6, 7, 6),
        growth_rate: int = 64,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
    ):
        self.depths, self.growth_rate = tuple(depths), growth_rate  # make_blocks needs them before we are back
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            num_classes=num_classes,
            embed_dim=embed_dim,
            depth=sum(depths),
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            dynamic_img_size=dynamic_img_size,
        )


# ---- the variants


@dataclass(frozen=True)
class DenseVariant:
    """The sizes that tell one dense model from another: arguments of its class, ``model``."""

    embed_dim: int
    depths: tuple[int, ...]
    growth_rate: int
    num_heads: int
    mlp_ratio: float
    model: type[DenseT2TViT] | type[DenseViT] = DenseT2TViT


VARIANTS = {
    # paper, Table 6 (16 ghost blocks in the authors' code, where the table prints 14)
    "t2t_vit_14_se": Variant(embed_dim=384, depth=14, num_heads=6, mlp_ratio=3.0, model=SET2TViT),
    "t2t_vit_dense": DenseVariant(embed_dim=128, depths=(3, 6, 6, 4), growth_rate=64, num_heads=8, mlp_ratio=2.0),
    "t2t_vit_16_ghost": Variant(embed_dim=384, depth=16, num_heads=6, mlp_ratio=3.0, model=GhostT2TViT),
    # the same on the side of ViT: the authors left no code, the names are ours. SE and ghost are ViT-S/16; stages,
    # growth and MLP ratio of dense are the simple ones next to the parameter count of the table (chapter 13)
    "vit_small_patch16_se": ViTVariant(embed_dim=768, depth=8, num_heads=8, mlp_ratio=3.0, qkv_bias=False, model=SEViT),
    "vit_small_patch16_dense": DenseVariant(
        embed_dim=128, depths=(6, 7, 6), growth_rate=64, num_heads=8, mlp_ratio=4.0, model=DenseViT
    ),
    "vit_small_patch16_ghost": ViTVariant(
        embed_dim=768, depth=8, num_heads=8, mlp_ratio=3.0, qkv_bias=False, model=GhostViT
    ),
}
