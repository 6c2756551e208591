"""What the pyramids PVT, PVT v2 and Swin share: an embedding for each stage, and maps of several sizes (chapter 20)."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from operator import mul

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from t2t_ref.models.classifier import Classifier
from t2t_ref.models.soft_split import check_channels, grid_size
from t2t_ref.models.tokens_to_token import restructure


class ConvEmbed(nn.Module):
    """A convolution with a norm behind it: an image, or the tokens of the stage before laid out as one, to tokens.

    Shapes:
        image: ``b c h w``
        return: ``b n d``, row by row

    Units:
        kernel, stride and padding are pixels

    Note:
        rows and columns that fill no window are left out

    Raises:
        ValueError: if the number of channels is wrong

    Source:
        the authors of PVT, PVT v2 and Swin, all with an epsilon of 1e-5 in this norm
    """

    def __init__(
        self, in_chans: int, embed_dim: int, *, kernel: int, stride: int, padding: int = 0, patch_norm: bool = True
    ):
        super().__init__()
        self.in_chans = in_chans
        self.kernel, self.stride, self.padding = kernel, stride, padding
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel, stride=stride, padding=padding)
        self.norm = nn.LayerNorm(embed_dim) if patch_norm else nn.Identity()

    def grid_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the tokens of an image of (h, w) pixels."""
        return grid_size(size, self.kernel, self.stride, self.padding)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        check_channels(image, self.in_chans)
        return self.norm(rearrange(self.proj(image), "b d h w -> b (h w) d"))


def check_stages(num_stages: int, **lists: Sequence[int | float]) -> None:
    """Refuse lists that do not have a number for each of four stages.

    Raises:
        ValueError
    """
    if num_stages != 4:
        raise ValueError(f"num_stages is {num_stages}, expected 4")
    for name, numbers in lists.items():
        if len(numbers) != num_stages:
            raise ValueError(f"{name} is {tuple(numbers)}, expected {num_stages} numbers, one for each stage")


class Pyramid(Classifier):
    """A model in stages, each on a smaller grid of wider tokens than the one before.

    A subclass defines ``run_stage``, and sets ``reductions``, ``norm`` and ``head``.

    Shapes:
        image: ``b c h w``
        return: ``b classes``, logits; with num_classes=0 the class feature, b d
    """

    num_prefix_tokens = 0
    poolings, global_pool = ("avg", ""), "avg"
    reductions: tuple[int, ...]  # how many times each stage shrinks its grid for keys and values

    def run_stage(self, stage: int, below: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """One stage, counted from 0: the image, or the stage below laid out as one, to tokens."""
        raise NotImplementedError

    def grids_of(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """(rows, columns) of the tokens of every stage, for an image of (h, w) pixels.

        Raises:
            ValueError: if one of them is too small for its reduction
        """
        (h, w), grids = size, []
        for stage, ratio in enumerate(self.reductions, 1):
            size = rows, columns = getattr(self, f"patch_embed{stage}").grid_size(size)
            if min(size) < ratio:
                raise ValueError(
                    f"an image of {h}x{w} pixels is too small: stage {stage} has a grid of {rows}x{columns} tokens, "
                    f"which shall be reduced {ratio} times"
                )
            grids.append(size)
        return grids

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the tokens of the last stage, for an image of (h, w) pixels."""
        return self.grids_of(size)[-1]

    def forward_features(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Image to the tokens of the last stage, after the last norm.

        Shapes:
            image: ``b c h w``
            return: ``b n d``
        """
        self.check_image(image)
        grids = self.grids_of((image.shape[-2], image.shape[-1]))
        tokens = self.run_stage(0, image)
        for stage in range(1, self.depth):
            tokens = self.run_stage(stage, restructure(tokens, grids[stage - 1]))
        return self.norm(tokens)

    def block_outputs(
        self, image: Float[Tensor, "b c h w"]
    ) -> Iterator[tuple[Float[Tensor, "b n d"], tuple[int, int]]]:
        """The tokens after each stage in turn, prefix tokens first, and their grid, (rows, columns)."""
        self.check_image(image)
        below = image
        for stage, grid in enumerate(self.grids_of((image.shape[-2], image.shape[-1]))):
            tokens = self.run_stage(stage, below)
            yield tokens, grid
            if stage + 1 < self.depth:
                below = restructure(tokens, grid)

    @property
    def depth(self) -> int:
        """How many stages there are."""
        return len(self.reductions)

    def block_sizes(self) -> dict[str, tuple[int, int]]:
        """As in every model; what counts as a block is a stage."""
        if hasattr(self, "layers"):  # Swin: merging doubles width and distance
            sizes = ((self.embed_dim * 2**stage, self.patch_embed.stride * 2**stage) for stage in range(self.depth))
            return {f"layers.{stage}": size for stage, size in enumerate(sizes)}
        embeds = [getattr(self, f"patch_embed{stage + 1}") for stage in range(self.depth)]
        strides = accumulate((embed.stride for embed in embeds), mul)
        widths = (embed.proj.out_channels for embed in embeds)
        return {f"block{number}": size for number, size in enumerate(zip(widths, strides, strict=True), 1)}

    def keep_blocks(self, number: int) -> None:
        """Take away all stages but the first ``number``."""
        if hasattr(self, "layers"):
            self.layers = self.layers[:number]
            self.layers[-1].downsample = None
        for stage in range(number + 1, self.depth + 1):
            for name in (f"patch_embed{stage}", f"block{stage}", f"norm{stage}", f"pos_embed{stage}"):
                if hasattr(self, name):
                    delattr(self, name)
        if number < self.depth and hasattr(self, "cls_token"):
            del self.cls_token  # of the last stage
        self.reductions = self.reductions[:number]
        if hasattr(self, "grids"):
            self.grids = self.grids[:number]
