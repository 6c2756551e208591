"""The data sets of the experiments: handwritten digits, centred and scattered (chapters 11 and 12).

Both are made from the 1797 handwritten digits of 8 x 8 pixels that scikit-learn ships, so they need no network.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset

SPLITS = {"train": (0, 1197), "val": (1197, 1397), "test": (1397, 1797)}  # of the digits, shuffled once and for all
POLARITIES = ("light", "dark", "both")  # of the ink on its ground
CHANNELS = 3


@cache
def handwritten_digits() -> tuple[Float[Tensor, "n h w"], Int[Tensor, "n"]]:
    """scikit-learn's digits in a fixed random order: ink from 0 to 1, and labels.

    Shapes:
        return: ``(n h w, n)``, n = 1797, h = w = 8

    Raises:
        ImportError: with the remedy, without scikit-learn

    Source:
        E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the digits come with scikit-learn: pip install "t2t-ref[train]"') from error
    bunch = load_digits()
    order = np.random.RandomState(0).permutation(len(bunch.target))
    ink = torch.from_numpy(bunch.images[order] / 16.0).float()
    return ink, torch.from_numpy(bunch.target[order]).long()


def split_bounds(split: str) -> tuple[int, int]:
    """First and last + 1 of the digits of a split.

    Raises:
        ValueError: for an unknown one
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: known are {', '.join(SPLITS)}")
    return SPLITS[split]


class Digits(Dataset):
    """The digits as they are: centred, grey, enlarged to ``size`` pixels. The easy set.

    Shapes:
        item: ``(c h w, int)``, c = 3, h = w = size; values from 0 to 1

    Args:
        split: "train" (1197 digits), "val" (200) or "test" (400)

    Units:
        size is pixels

    Raises:
        ValueError: for an unknown split or a size below 8
    """

    num_classes = 10
    draws = False  # an item is always the same: no generator needs a seed before it is read

    def __init__(self, split: str = "train", size: int = 32):
        first, end = split_bounds(split)
        if size < 8:
            raise ValueError(f"size is {size} pixels, expected at least the 8 of the digits")
        ink, labels = handwritten_digits()
        large = F.interpolate(rearrange(ink[first:end], "n h w -> n 1 h w"), size=(size, size), mode="bilinear")
        self.images = repeat(large, "n 1 h w -> n c h w", c=CHANNELS)
        self.labels = labels[first:end]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "c h w"], int]:
        return self.images[index], int(self.labels[index])


class ScatteredDigits(Dataset):
    """Handwritten digits at a random place, size and colour on a coloured canvas, drawn without end from a seed.

    A digit's place, size and colours say nothing of its class, so a model must find its strokes and how they meet.
    Most strokes fall across the cuts of a hard 16 x 16 split. Sample ``index`` is a function of (seed, index) alone.
    ``set_epoch`` moves on by whole epochs: epoch 1 starts at index ``length``. Splits share no handwritten digit.

    Shapes:
        item: ``(c h w, int)``, c = 3, h = w = size; values from 0 to 1

    Args:
        digit_size: (smallest, largest)
        polarity: whether the ink is "light" on a dark ground, "dark", or "both"
        contrast: the least difference of brightness between ink and ground, from 0 to 0.8
        clutter: the number of stray strokes, pieces of other digits
        noise: the standard deviation added to every value

    Units:
        length is samples in an epoch; size and digit_size are pixels

    Raises:
        ValueError: for an unknown split or polarity, digits that do not fit on the canvas, a negative number

    Source:
        ours; it asks the paper's question of local structure (Sec. 1) at a size that a laptop can train
    """

    num_classes = 10

    def __init__(
        self,
        split: str = "train",
        length: int = 12_000,
        seed: int = 0,
        size: int = 64,
        digit_size: tuple[int, int] = (28, 44),
        polarity: str = "light",
        contrast: float = 0.4,
        clutter: int = 0,
        noise: float = 0.05,
    ):
        self.first, self.end = split_bounds(split)
        if polarity not in POLARITIES:
            raise ValueError(f"unknown polarity {polarity!r}: known are {', '.join(POLARITIES)}")
        if not 8 <= digit_size[0] <= digit_size[1] <= size:
            raise ValueError(f"digit_size is {digit_size}, expected 8 <= smallest <= largest <= size = {size}")
        if not 0 <= contrast <= 0.8 or clutter < 0 or noise < 0 or length < 1:
            raise ValueError(
                f"found contrast={contrast}, clutter={clutter}, noise={noise}, length={length}; "
                "expected 0 <= contrast <= 0.8, clutter >= 0, noise >= 0, length >= 1"
            )
        self.split, self.length, self.seed, self.size = split, length, seed, size
        self.digit_size, self.polarity, self.contrast = tuple(digit_size), polarity, contrast
        self.clutter, self.noise = clutter, noise
        self.epoch = 0

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Draw the samples of another epoch from now on."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "c h w"], int]:
        if not 0 <= index < self.length:  # or "for image, label in digits" would never end
            raise IndexError(f"sample {index} of an epoch of {self.length}; draw() takes any number")
        (item,) = self.__getitems__([index])
        return item

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Float[Tensor, "c h w"], int]]:
        """Several samples at once, as torch's DataLoader asks for them."""
        images, labels = self.draw([self.epoch * self.length + index for index in indices])
        return list(zip(images, labels.tolist(), strict=True))

    def draw(self, numbers: Sequence[int]) -> tuple[Float[Tensor, "b c h w"], Int[Tensor, "b"]]:
        """The samples of these numbers in the endless sequence: images and labels.

        Shapes:
            return: ``(b c h w, b)``, values from 0 to 1
        """
        inks, labels = handwritten_digits()
        pieces = 1 + self.clutter
        digits, boxes, colours, noises = [], [], [], []
        for number in numbers:
            # one generator a sample, keyed by everything that tells this sample from others
            rng = np.random.Generator(
                np.random.Philox(key=[self.seed * len(SPLITS) + list(SPLITS).index(self.split), number])
            )
            digits.append(rng.integers(self.first, self.end, pieces))
            side = rng.uniform(*self.digit_size, pieces)
            boxes.append(np.stack([side, *(rng.uniform(0, 1, (2, pieces)) * (self.size - side))]))
            colours.append(self.draw_colours(rng))
            noises.append(rng.standard_normal((CHANNELS, self.size, self.size), dtype=np.float32))
        digits, boxes, colours = (torch.from_numpy(np.stack(x)) for x in (digits, boxes, colours))
        glyphs = inks[digits]  # b p h w: p pieces, the digit first
        if self.clutter:
            glyphs[:, 1:, 3:] = 0  # of the others only the upper strokes
        masks = place(glyphs, boxes.float(), self.size)
        mask = rearrange(masks.amax(dim=1), "b h w -> b 1 h w")
        ground, ink = rearrange(colours.float(), "b two c -> two b c 1 1")
        images = ground + (ink - ground) * mask
        images = images + self.noise * torch.from_numpy(np.stack(noises))
        return images.clamp(0, 1), labels[digits[:, 0]]

    def draw_colours(self, rng: np.random.Generator) -> Float[np.ndarray, "two c"]:
        """Colours of ground and ink, at least ``contrast`` apart in brightness (the mean of the three channels).

        Shapes:
            return: ``two c``, ground, ink
        """
        light_ink = self.polarity == "light" or (self.polarity == "both" and rng.uniform() < 0.5)
        while True:
            pairs = rng.uniform(0, 1, (64, 2, CHANNELS))  # many at once: most are too close to each other
            brightness = pairs.mean(axis=-1)
            ink_is_lighter_by = brightness[:, 1] - brightness[:, 0]
            gain = ink_is_lighter_by if light_ink else -ink_is_lighter_by
            (far_enough,) = np.nonzero(gain >= self.contrast)
            if len(far_enough):
                return pairs[far_enough[0]]


def place(glyphs: Float[Tensor, "b p gh gw"], boxes: Float[Tensor, "b three p"], size: int) -> Float[Tensor, "b p h w"]:
    """Put each small glyph into its square box on an empty canvas, by bilinear interpolation.

    Shapes:
        glyphs: ``b p gh gw``, p glyphs for each image
        boxes: ``b three p``, side, top and left of each box
        return: ``b p h w``, h = w = size

    Units:
        boxes and size are pixels of the canvas
    """
    side, top, left = rearrange(boxes, "b three p -> three (b p) 1")
    pixels = torch.arange(size) + 0.5  # centres

    def position(start: Tensor) -> Tensor:  # of the pixels in the box, -1 at its start and 1 at its end
        return 2 * (pixels - start) / side - 1

    rows, columns = position(top), position(left)
    where = torch.stack([repeat(columns, "n w -> n h w", h=size), repeat(rows, "n h -> n h w", w=size)], dim=-1)
    glyph = rearrange(glyphs, "b p gh gw -> (b p) 1 gh gw")
    masks = F.grid_sample(glyph, where, mode="bilinear", padding_mode="zeros", align_corners=False)
    return rearrange(masks, "(b p) 1 h w -> b p h w", p=glyphs.shape[1])
