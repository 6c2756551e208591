"""Soft split: an image becomes overlapping tokens (chapter 3; paper, Sec. 3.1)."""

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


def grid_size(size: tuple[int, int], kernel: int, stride: int, padding: int) -> tuple[int, int]:
    """Count the windows that fit down and across an image.

    floor((size + 2 padding - kernel) / stride) + 1 along each side.

    Shapes:
        size: ``(h, w)``, of the image
        return: ``(rows, columns)``, of the grid of windows

    Units:
        all arguments are pixels

    Raises:
        ValueError: if the padded image is smaller than one window

    Source:
        paper, Eq. (3), whose stride is k - s; the padding is in the authors' code only
    """
    rows, columns = ((side + 2 * padding - kernel) // stride + 1 for side in size)
    if min(rows, columns) < 1:
        h, w = size
        raise ValueError(
            f"a {kernel}x{kernel} window does not fit in an image of {h}x{w} pixels with padding {padding}: "
            f"height and width must each be at least {max(kernel - 2 * padding, 1)}"
        )
    return rows, columns


def check_channels(image: Float[Tensor, "b c h w"], in_chans: int) -> None:
    """Refuse an image of another number of channels, at the door of whatever makes tokens of it.

    Raises:
        ValueError: with both numbers
    """
    if image.shape[1] != in_chans:
        raise ValueError(f"the image has {image.shape[1]} channels, expected in_chans={in_chans}")


def soft_split(image: Float[Tensor, "b c h w"], kernel: int, stride: int, padding: int) -> Float[Tensor, "b n d"]:
    """Cut an image into overlapping windows and lay each one out as a token.

    Shapes:
        image: ``b c h w``
        return: ``b n d``, n windows, row by row; d = (c kh kw), channel slowest

    Units:
        kernel, stride and padding are pixels of ``image``

    Raises:
        ValueError: if the padded image is smaller than one window

    Source:
        paper, Sec. 3.1 "soft split"; the paper's overlap s is kernel - stride here
    """
    h, w = image.shape[-2:]
    grid_size((h, w), kernel, stride, padding)  # refuses an image with room for no window
    return rearrange(F.unfold(image, kernel, stride=stride, padding=padding), "b d n -> b n d")


class SoftSplit(nn.Module):
    """:func:`soft_split` as a layer that remembers its kernel, stride and padding. No parameters.

    Shapes:
        image: ``b c h w``
        return: ``b n d``, d = c * kernel * kernel
    """

    def __init__(self, kernel: int, stride: int, padding: int):
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, padding

    def grid_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the tokens of an image of (h, w) pixels."""
        return grid_size(size, self.kernel, self.stride, self.padding)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        return soft_split(image, self.kernel, self.stride, self.padding)

    def extra_repr(self) -> str:
        """The three settings, for print."""
        return f"kernel={self.kernel}, stride={self.stride}, padding={self.padding}"
