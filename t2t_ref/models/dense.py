"""Dense connections: a block adds to the width, and sees what all before it added (chapter 13; paper, Table 6)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from t2t_ref.models.backbone import Block
from t2t_ref.models.classifier import remember_arguments
from t2t_ref.models.t2t_vit import T2TViT
from t2t_ref.models.vit import ViT


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

    def block_sizes(self) -> dict[str, tuple[int, int]]:
        """As in every model; the width is another behind every block."""
        stages = dense_widths(self.embed_dim, self.depths, self.growth_rate)
        widths = [
            width for stage, (_, *behind) in enumerate(stages) for width in ([stages[stage][0]] * bool(stage) + behind)
        ]
        return {f"blocks.{number}": (width, self.stride) for number, width in enumerate(widths[: self.depth])}

    def keep_blocks(self, number: int) -> None:
        """Take away all blocks but the first ``number``; a transition counts as one."""
        self.blocks = self.blocks[:number]


class DenseT2TViT(DenseStages, T2TViT):
    """T2T-ViT of dense stages: tokens grow by ``growth_rate`` numbers in a block, and are halved between two stages.

    ``blocks`` holds the transitions too: entry 3 is the first one. ``num_features`` is the width at the end, where
    norm and head are; ``embed_dim`` is the width at the start.

    Shapes:
        image: ``b c h w``
        return: ``b classes``, logits; with num_classes=0 the class feature, b num_features

    Args:
        depths: the number of blocks of each stage
        drop_path_rate: the last of four stages gets 3/11 of it, the others less: see :class:`DenseStages`

    Note:
        other arguments and their units as :class:`T2TViT`

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


@dataclass(frozen=True)
class DenseVariant:
    """The sizes that tell one dense model from another: arguments of its class, ``model``."""

    embed_dim: int
    depths: tuple[int, ...]
    growth_rate: int
    num_heads: int
    mlp_ratio: float
    model: type[DenseT2TViT] | type[DenseViT] = DenseT2TViT
