"""Designs from CNNs in the blocks of a transformer: squeeze-and-excitation, ghost (chapter 13; paper, Table 6).

A block of another design takes the place of :class:`Block`; everything around the blocks is T2TViT, or ViT, as it is.
The dense design, whose width grows, has a file of its own; the variants of all three are in the table below.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from t2t_ref.models.backbone import Attention, Block
from t2t_ref.models.dense import DenseVariant, DenseViT
from t2t_ref.models.t2t_vit import T2TViT, Variant
from t2t_ref.models.vit import ViT, ViTVariant

# ---- squeeze-and-excitation


class SqueezeExcite(nn.Module):
    """Weigh the channels: each is multiplied by a gate between 0 and 1, the same for all tokens of an image.

    The gates are computed from the mean over all tokens, the class token among them.

    Shapes:
        tokens: ``b n d``
        return: ``b n d``

    Args:
        reduction: the mean is squeezed to a ``reduction``-th of its d numbers, at least 1

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


# ---- the variants

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
