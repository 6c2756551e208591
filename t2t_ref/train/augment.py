"""What happens to a batch of images on the device before the model sees it (chapter 11).

In the order of the authors' run: crop, flip, RandAugment, mixup or cutmix, normalisation, random erasing. kornia does
the work. Where its draw of the dice differs from the authors' (timm 0.3.4), theirs is here, and the docstring says how.

All chance comes from torch's global generators: after ``torch.manual_seed(s)`` the same batch gives the same result.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.distributions import Beta

from t2t_ref.arguments import pair
from t2t_ref.data.images import normalise
from t2t_ref.data.sources import crops_at_reading
from t2t_ref.train.recipes import Recipe

try:
    import kornia.augmentation as K
    import kornia.enhance as E
    from kornia.geometry.bbox import bbox_generator
    from kornia.geometry.transform import warp_affine
except ImportError as error:
    raise ImportError(f'augmentation needs the package {error.name}: pip install "t2t-ref[train]"') from error

BEYOND = 0.01  # of 0 and 1, where floats have been resized or rounded

Images = Float[Tensor, "b c h w"]
Factors = Float[Tensor, "b"]

# ---- RandAugment: an operation takes images, a level from 0 to 1 and a sign for each, and the colour of empty corners


def by(factor: Factors) -> Float[Tensor, "b 1 1 1"]:
    """A factor for each image, ready to multiply images.

    Shapes:
        factor: ``b``
        return: ``b 1 1 1``
    """
    return rearrange(factor, "b -> b 1 1 1")


def warp(images: Images, fill: Tensor, linear: list, fixed: tuple = (0, 0), shift: tuple = (0, 0)) -> Images:
    """Move what is at x to A (x - fixed) + fixed + shift, for A = [[a, b], [c, d]] = ``linear``, x = (column, row).

    Shapes:
        images: ``b c h w``
        fill: ``c``, colour of what comes in from outside
        return: ``b c h w``
    """
    ones = torch.ones(len(images), device=images.device)
    a, b, c, d = (entry * ones for entry in linear)
    x, y = fixed[0] - 0.5, fixed[1] - 0.5  # kornia counts from the centre of the first pixel, Pillow from its corner
    right, down = x - a * x - b * y + shift[0], y - c * x - d * y + shift[1]
    matrix = rearrange([a, b, right, c, d, down], "(i j) b -> b i j", i=2)
    return warp_affine(images, matrix, images.shape[-2:], padding_mode="fill", fill_value=fill)


def rotate(images: Images, level: Factors, sign: Factors, fill: Tensor) -> Images:
    """Turn each image about its middle, by up to 30 degrees at level 1.

    Shapes:
        images: ``b c h w``
        level, sign: ``b``
        fill: ``c``, colour of the corners
        return: ``b c h w``
    """
    angle = torch.deg2rad(30 * level * sign)  # counter-clockwise, about the middle
    cos, sin = angle.cos(), angle.sin()
    return warp(images, fill, [cos, sin, -sin, cos], fixed=(images.shape[-1] / 2, images.shape[-2] / 2))


def auto_contrast(images: Images) -> Images:
    """Stretch each channel from its own darkest value to its own brightest: 0 to 1.

    Shapes:
        images: ``b c h w``
        return: ``b c h w``
    """
    low, high = (reduce(images, "b c h w -> b c 1 1", how) for how in ("min", "max"))
    return torch.where(high > low, (images - low) / (high - low).clamp(min=1e-6), images)


def solarize_add(images: Images, level: Factors) -> Images:
    """Brighten the darker half of the values, by up to 110 / 255 at level 1.

    Shapes:
        images: ``b c h w``
        level: ``b``
        return: ``b c h w``
    """
    brighter = (images + by((110 * level).trunc() / 255)).clamp(max=1)
    return torch.where(images < 128 / 255, brighter, images)


OPERATIONS: dict[str, Callable[[Images, Factors, Factors, Tensor], Images]] = {
    "AutoContrast": lambda x, level, sign, fill: auto_contrast(x),
    "Equalize": lambda x, level, sign, fill: E.equalize(x),
    "Invert": lambda x, level, sign, fill: E.invert(x),
    "Rotate": rotate,
    "Posterize": lambda x, level, sign, fill: E.posterize(x, 4 - (4 * level).long()),
    "Solarize": lambda x, level, sign, fill: E.solarize(x, (256 - (256 * level).trunc()) / 255),
    "SolarizeAdd": lambda x, level, sign, fill: solarize_add(x, level),
    "Color": lambda x, level, sign, fill: E.adjust_saturation_with_gray_subtraction(x, 1 + 0.9 * level * sign),
    "Contrast": lambda x, level, sign, fill: E.adjust_contrast_with_mean_subtraction(x, 1 + 0.9 * level * sign),
    "Brightness": lambda x, level, sign, fill: E.adjust_contrast(x, 1 + 0.9 * level * sign),  # kornia's name for it
    "Sharpness": lambda x, level, sign, fill: E.sharpness(x, 1 + 0.9 * level * sign),
    "ShearX": lambda x, level, sign, fill: warp(x, fill, [1, -0.3 * level * sign, 0, 1]),
    "ShearY": lambda x, level, sign, fill: warp(x, fill, [1, 0, -0.3 * level * sign, 1]),
    "TranslateX": lambda x, level, sign, fill: warp(
        x, fill, [1, 0, 0, 1], shift=(-0.45 * level * sign * x.shape[-1], 0)
    ),
    "TranslateY": lambda x, level, sign, fill: warp(
        x, fill, [1, 0, 0, 1], shift=(0, -0.45 * level * sign * x.shape[-2])
    ),
}


class RandAugment(nn.Module):
    """A few operations for each image, drawn from fifteen, each done by an even chance: timm's rand-m9-mstd0.5-inc1.

    kornia has a RandAugment too, with another scale: it draws the operations once for a whole batch and always does
    them, its magnitude goes to 30 and is the same for all, colours go one way only (m = 9 makes an image greyer, never
    more colourful) and shifts go to 10 % of the side, not 45 %. So the operations are kornia's, draw and scale timm's.
    Left out: timm takes bilinear or bicubic pixels by chance where an image is turned or shifted, here bilinear.

    Shapes:
        images: ``b c h w``, c = 3, values from 0 to 1
        return: ``b c h w``

    Args:
        magnitude: the mean of the magnitudes drawn, which are from 0 to 10, cut off at both ends
        std: their standard deviation
        fill: the colour of what comes in from outside

    Raises:
        ValueError: for images without colour

    Source:
        E. D. Cubuk et al., "RandAugment", 2020; timm 0.3.4, auto_augment.py
    """

    def __init__(self, magnitude: float, std: float, operations: int, fill: tuple[float, ...]):
        super().__init__()
        self.magnitude, self.std, self.operations = float(magnitude), std, operations
        self.register_buffer("fill", torch.tensor(fill), persistent=False)

    def forward(self, images: Images) -> Images:
        b, c = images.shape[:2]
        if c != 3:
            raise ValueError(f"RandAugment works on images of 3 colours, found {c}: set rand_augment to 0")
        images = images.clone()
        for _ in range(self.operations):
            # drawn on the CPU, so that every device does the same, and no time is lost waiting for it
            choice = torch.where(torch.rand(b) < 0.5, torch.randint(len(OPERATIONS), (b,)), -1)
            level = (self.magnitude + self.std * torch.randn(b)).clamp(0, 10) / 10
            sign = torch.where(torch.rand(b) < 0.5, -1.0, 1.0)
            for number, operation in enumerate(OPERATIONS.values()):
                (rows,) = torch.where(choice == number)
                if len(rows):
                    factors = (factor[rows].to(images.device) for factor in (level, sign))
                    rows = rows.to(images.device)
                    images[rows] = operation(images[rows], *factors, self.fill)
        return images


# ---- mixing


class MixUp(K.RandomMixUpV2):
    """kornia's mixup with the authors' draw: one share from Beta(alpha, alpha) for the batch, last image with first."""

    def __init__(self, alpha: float):
        super().__init__(data_keys=["input", "class"])
        self.alpha = alpha

    def generate_parameters(self, batch_shape) -> dict[str, Tensor]:
        """The draw for one batch, in the form that kornia asks for."""
        b = batch_shape[0]
        share = Beta(self.alpha, self.alpha).sample()
        return {"mixup_pairs": torch.arange(b).flip(0), "mixup_lambdas": (1 - share) * torch.ones(b)}


class CutMix(K.RandomCutMixV2):
    """kornia's cutmix with the authors' draw: one box for the batch, about any pixel, so that an edge may clip it."""

    def __init__(self, alpha: float):
        super().__init__(data_keys=["input", "class"], use_correct_lambda=True)
        self.alpha = alpha

    def generate_parameters(self, batch_shape) -> dict[str, Tensor]:
        """The draw for one batch, in the form that kornia asks for."""
        b, _, h, w = batch_shape
        side = math.sqrt(1 - Beta(self.alpha, self.alpha).sample())
        starts, lengths = [], []
        for length in (w, h):
            half, centre = int(length * side) // 2, int(torch.randint(length, ()))
            start, end = max(0, centre - half), min(length, centre + half)
            starts.append(torch.full((b,), float(start)))
            lengths.append(torch.full((b,), float(end - start)))
        boxes = rearrange(bbox_generator(*starts, *lengths), "b corner xy -> 1 b corner xy")
        pairs = rearrange(torch.arange(b).flip(0), "b -> 1 b")
        return {"mix_pairs": pairs, "crop_src": boxes, "image_shape": torch.tensor([float(h), float(w)])}

    def apply_transform(self, input, params, maybe_flags=None) -> Tensor:
        """Put the box of the last image into the first one, and so on."""
        # with one box for all a slice does; kornia makes a mask of the size of the batch, on the CPU
        corners = params["crop_src"][0, 0].long()
        (left, top), (right, bottom) = corners[0].tolist(), corners[2].tolist()
        inside = (..., slice(top, bottom + 1), slice(left, right + 1))
        mixed = input.clone()
        mixed[inside] = input.flip(0)[inside]
        return mixed


def soft_targets(
    labels: Int[Tensor, "b"],
    num_classes: int,
    smoothing: float = 0.0,
    others: Int[Tensor, "b"] | None = None,
    share: Float[Tensor, "b"] | None = None,
) -> Float[Tensor, "b k"]:
    """Probabilities of the classes: ``share`` to the label, the rest to the other one, after smoothing.

    Shapes:
        labels: ``b``
        others: ``b``, None: no other label
        share: ``b``, between 0 and 1
        return: ``b k``, k = num_classes; rows sum to 1

    Source:
        timm 0.3.4, ``mixup_target``: with 1000 classes and smoothing 0.1 a class that is not there gets 0.0001
    """
    targets = F.one_hot(labels, num_classes).float()
    if others is not None:
        share = rearrange(share, "b -> b 1")
        targets = share * targets + (1 - share) * F.one_hot(others, num_classes)
    return targets * (1 - smoothing) + smoothing / num_classes


# ---- all together


class Augment(nn.Module):
    """Images as they come from a data set, made ready for the model; their labels, made ready for F.cross_entropy.

    In training mode everything that the recipe switches on; in evaluation mode ``normalise`` alone. Random crops of
    photographs have been cut already, where they were read (sources.py).

    Shapes:
        images: ``b c h w``, bytes, or floats from 0 to 1
        labels: ``b``
        return: ``(b c h w, b k)``, float32, k classes; h = w = img_size

    Units:
        the images returned are in standard deviations from the recipe's mean

    Raises:
        ValueError: for a number of channels other than that of the mean, for whole numbers that are not bytes, and for
            floats beyond 0 and 1 where something is done to them

    Source:
        the authors' main.py, whose mixup comes before the normalisation, and erasing after; F.cross_entropy takes such
        targets, so their SoftTargetCrossEntropy is not needed
    """

    def __init__(self, recipe: Recipe, num_classes: int):
        super().__init__()
        self.recipe, self.num_classes = recipe, num_classes
        self.size = pair(recipe.img_size)
        self.is_read_to_size = crops_at_reading(recipe.data)
        self.register_buffer("mean", torch.tensor(recipe.mean), persistent=False)
        self.register_buffer("std", torch.tensor(recipe.std), persistent=False)
        steps = []
        if not self.is_read_to_size and (recipe.crop_scale, recipe.crop_ratio) != ((1, 1), (1, 1)):
            kind = "bicubic" if recipe.train_interpolation == "random" else recipe.train_interpolation
            steps.append(K.RandomResizedCrop(self.size, recipe.crop_scale, recipe.crop_ratio, resample=kind))
        if recipe.pad_crop:
            steps.append(K.RandomCrop(self.size, padding=recipe.pad_crop))
        if recipe.flip:
            steps.append(K.RandomHorizontalFlip(p=recipe.flip))
        if recipe.rand_augment:
            options = recipe.rand_augment, recipe.rand_augment_std, recipe.rand_augment_ops
            steps.append(RandAugment(*options, fill=recipe.mean))
        self.steps = nn.ModuleList(steps)
        self.mixup = MixUp(recipe.mixup) if recipe.mixup else None
        self.cutmix = CutMix(recipe.cutmix) if recipe.cutmix else None
        # as timm, but for the shape: kornia tosses a coin for tall or wide, then draws evenly; timm in the logarithm
        self.hole = K.RandomErasing((0.02, 1 / 3), (0.3, 1 / 0.3), value=1.0, p=recipe.erasing)

    @torch.no_grad()
    def forward(
        self, images: Float[Tensor, "b c h1 w1"] | UInt8[Tensor, "b c h1 w1"], labels: Int[Tensor, "b"]
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b k"]]:
        if not self.training:
            return self.normalise(images), soft_targets(labels, self.num_classes)
        with torch.autocast(images.device.type, enabled=False):  # half precision would round places, not colours alone
            images = self.to_floats(images)
            if not (self.steps and isinstance(self.steps[0], K.RandomResizedCrop)):
                images = resize(images, self.size, self.recipe.interpolation)
            if self.steps:
                check_range(images)
            for step in self.steps:
                images = step(images).clamp(0, 1)
            images, targets = self.mix(images, labels)
            return self.erase(normalise(images, self.mean, self.std)), targets

    @torch.no_grad()
    def normalise(self, images: Float[Tensor, "b c h1 w1"] | UInt8[Tensor, "b c h1 w1"]) -> Float[Tensor, "b c h w"]:
        """Images for evaluation: resized, the centre cut out where the recipe says so, normalised.

        Shapes:
            images: ``b c h1 w1``, bytes, or floats from 0 to 1
            return: ``b c h w``, h = w = img_size
        """
        images = self.to_floats(images)
        if not self.is_read_to_size:
            whole = tuple(int(side / self.recipe.crop_pct) for side in self.size)
            images = resize(images, whole, self.recipe.interpolation)
            top, left = (round((a - b) / 2) for a, b in zip(images.shape[-2:], self.size, strict=True))
            images = images[..., top : top + self.size[0], left : left + self.size[1]]
        return normalise(images, self.mean, self.std)

    def to_floats(self, images: Tensor) -> Images:
        """Bytes become floats from 0 to 1, floats stay.

        Shapes:
            images: ``b c h w``
            return: ``b c h w``

        Raises:
            ValueError: for a number of channels other than that of the mean, and for whole numbers that are not bytes
        """
        if images.shape[1] != len(self.mean):
            raise ValueError(f"images have {images.shape[1]} channels, the recipe's mean {len(self.mean)}")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}: expected bytes (uint8), or floats from 0 to 1")
        return images.float() if images.is_floating_point() else images.float() / 255

    def mix(self, images: Images, labels: Int[Tensor, "b"]) -> tuple[Images, Float[Tensor, "b k"]]:
        """Mixup or cutmix, by chance, for the whole batch; targets that say how much of each class is there.

        Shapes:
            images: ``b c h w``
            labels: ``b``
            return: ``(b c h w, b k)``
        """
        recipe = self.recipe
        is_mixed, is_cut = torch.rand(()) < recipe.mix_probability, torch.rand(()) < recipe.switch_probability
        others = share = None
        if is_mixed and self.cutmix and (is_cut or not self.mixup):
            images, found = self.cutmix(images, labels)
            others, share = found[0, :, 1].long(), found[0, :, 2]
        elif is_mixed and self.mixup:
            images, found = self.mixup(images, labels)
            others, share = found[:, 1].long(), 1 - found[:, 2]
        return images, soft_targets(labels, self.num_classes, recipe.smoothing, others, share)

    def erase(self, images: Images) -> Images:
        """A rectangle of noise in some images, as wild as the normalised images themselves.

        Shapes:
            images: ``b c h w``
            return: ``b c h w``
        """
        if not self.recipe.erasing:
            return images
        hole = self.hole(torch.zeros_like(images[:, :1]))
        return torch.where(hole > 0, torch.randn_like(images), images)


def check_range(images: Images) -> None:
    """Refuse images that the clamp to 0 and 1, which follows, would cut: a dataset may have normalised its own.

    Raises:
        ValueError: for values beyond 0 and 1
    """
    low, high = (float(end) for end in images.aminmax())
    if low < -BEYOND or high > 1 + BEYOND:  # NaN passes: the loss will tell
        raise ValueError(
            f"images have values from {low:.4g} to {high:.4g}: what resizes or changes them expects bytes (uint8), or "
            "floats from 0 to 1, not normalised yet"
        )


def resize(images: Images, size: tuple[int, int], interpolation: str) -> Float[Tensor, "b c h2 w2"]:
    """Images of another size, still between 0 and 1.

    Shapes:
        images: ``b c h w``
        size: ``(h2, w2)``
        return: ``b c h2 w2``

    Raises:
        ValueError: for values beyond 0 and 1, if it resizes
    """
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    check_range(images)
    return F.interpolate(images, size, mode=interpolation, antialias=True).clamp(0, 1)
