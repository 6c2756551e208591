"""A photograph made ready for the model, as the authors evaluate (chapter 1).

Whatever the file or the array, the model is shown what an eye sees: on white, upright, in the right brightness. What
does not say how bright it is meant to be is refused. Colour profiles are not applied, and of an animation only the
first picture is taken, both as the authors do.
"""

import math
import os
import re
from collections.abc import Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from t2t_ref.arguments import pair

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # red, green, blue; of pixel values between 0 and 1
IMAGENET_STD = (0.229, 0.224, 0.225)
CROP_FRACTION = 0.9  # the authors' crop_pct: the crop's side as a share of the resized shorter side
SIXTEEN_BITS = ("PNG", "PPM")  # grey files of whole numbers that Pillow may give as 32 bits, though they hold 16
ORIENTATION = 0x0112  # EXIF's tag; 1 is upright, 5 to 8 are turned by a quarter
LOOKS_LIKE = {  # how files begin that are often met where an image should be
    rb"\Z": "the file is empty",
    rb"version https://git-lfs": "it is a pointer of git LFS, and the image itself has not been fetched",
    rb"....ftyp(hei|hev|mif1|msf1)": "it looks like HEIC: save it as JPEG or PNG",
    rb".*<svg": "it looks like SVG, a drawing: save it as PNG",
    rb"%PDF": "it looks like PDF: save its page as PNG",
    rb"\s*<": "it looks like a page of the web",
}


def preprocess(image, img_size: int | tuple[int, int] = 224) -> Float[Tensor, "1 3 h w"]:
    """Resize, crop the centre, normalise.

    Shapes:
        image: the path of an image file, a PIL image, or an array: h w or h w c, where c is 1 (grey), 2 (grey, alpha),
            3 or 4 (alpha); palettes, CMYK and all else as :func:`to_rgb` does
        return: ``1 3 h w``, h and w as in ``img_size``

    Args:
        img_size: an int or (height, width)

    Units:
        img_size is pixels; the result is in standard deviations from ImageNet's mean

    Note:
        an array's kind of number says what white is: 255 for bytes, 65535 for 16 bits, 1 for floats and booleans

    Raises:
        ValueError: for something that is no image
        FileNotFoundError: for a path that is not there
        ImportError: with the remedy, without Pillow or numpy

    Source:
        authors' evaluation: bicubic resize to size / 0.9, centre crop, ImageNet mean and standard deviation
    """
    try:
        import numpy as np
        from PIL import Image
    except ImportError as error:
        package = {"PIL": "pillow"}.get(error.name, error.name)
        raise ImportError(f"reading images needs the package {package}: pip install {package}") from error

    height, width = pair(img_size)
    if isinstance(image, np.ndarray):
        image = to_rgb(from_array(image))
    elif isinstance(image, Image.Image):
        with explained():
            image = to_rgb(image)
    elif isinstance(image, (str, os.PathLike)):
        try:
            with open(image, "rb") as file, opened(file) as stored:
                image = to_rgb(stored)
        except FileNotFoundError:
            raise
        except (ValueError, OSError) as error:
            raise ValueError(f"{os.fspath(image)} cannot be read as an image: {error}") from error
    else:
        hint = ": normalise() is for tensors" if isinstance(image, Tensor) else ""
        raise ValueError(f"expected a path, a PIL image or an array, found {type(image).__name__}{hint}")
    pixels = torch.from_numpy(np.array(centre_crop(image, height, width)))
    return normalise(rearrange(pixels, "h w c -> 1 c h w"))


def normalise(
    images: UInt8[Tensor, "*lead c h w"] | Float[Tensor, "*lead c h w"],
    mean: Sequence[float] | Float[Tensor, "c"] = IMAGENET_MEAN,
    std: Sequence[float] | Float[Tensor, "c"] = IMAGENET_STD,
) -> Float[Tensor, "*lead c h w"]:
    """Pixel values as standard deviations from the mean of their colour.

    Shapes:
        images: ``... c h w``, bytes, or floats from 0 to 1
        mean, std: ``c``, of values from 0 to 1
        return: ``... c h w``

    Raises:
        ValueError: for another kind of number, and for a number of channels other than that of the mean
    """
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"expected images of bytes (uint8), or of floats from 0 to 1, found {images.dtype}")
    if images.shape[-3] != len(mean):
        raise ValueError(f"images have {images.shape[-3]} channels, the mean {len(mean)}")
    values = images if images.is_floating_point() else images.float() / 255
    mean, std = (
        rearrange(torch.as_tensor(each, dtype=values.dtype, device=values.device), "c -> c 1 1") for each in (mean, std)
    )
    return (values - mean) / std


# ---- from a file or an array to red, green and blue


@contextmanager
def opened(file):
    """A PIL image of a file that is open, to be read inside ``with``.

    Raises:
        ValueError: that says why, whatever goes wrong inside
    """
    from PIL import Image

    with explained(file), Image.open(file) as image:
        yield image


@contextmanager
def explained(file=None):
    """Make one ValueError of whatever goes wrong while an image is read; it says what the file looks like instead.

    Raises:
        ValueError
    """
    try:
        yield
    except Exception as error:  # damaged bytes raise almost anything
        text = str(error)
        if file and type(error).__name__ == "UnidentifiedImageError":
            file.seek(0)
            head = file.read(512)
            known = (text for start, text in LOOKS_LIKE.items() if re.match(start, head, re.DOTALL))
            text = next(known, "it is of no kind that Pillow knows")
        raise ValueError(text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}") from error


def to_rgb(image):
    """A PIL image of any mode as red, green and blue bytes, as a viewer shows it on white. Reads the file to its end.

    Turned as its EXIF tag says; what is transparent shows the white behind it.

    Raises:
        ValueError: for pixels that do not say what white is, and for a mode that Pillow cannot convert
    """
    import numpy as np
    from PIL import Image, ImageOps

    sixteen_bits = ";16" in image.mode or (image.mode == "I" and image.format in SIXTEEN_BITS)
    if 0 in image.size:
        raise ValueError(f"an image of {image.width} x {image.height} pixels is empty")
    if orientation(image) != 1:  # cameras store a turned picture and say so in a tag
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # numbers of 16 or 32 bits, which convert("RGB") would cut off at 255
        pixels = np.asarray(image)
        image = Image.fromarray(in_bytes(pixels.astype("uint16") if sixteen_bits else pixels))
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def orientation(image) -> int:
    """How a camera was held, as the EXIF tag says: 1 is upright. A tag that cannot be read turns nothing."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged tags raise almost anything, and viewers show the picture
        return 1


def from_array(array):
    """A PIL image of an array: h w, or h w c with 1 to 4 channels (grey, grey and alpha, colour, colour and alpha).

    Raises:
        ValueError: for another shape, or pixels that do not say what white is
    """
    from PIL import Image

    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] > 4):
        hint = ', channels last: rearrange(array, "c h w -> h w c")' if array.ndim == 3 and array.shape[0] < 5 else ""
        raise ValueError(f"expected an array of h w or h w c with 1 to 4 channels{hint}; found {array.shape}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = rearrange(array, "h w 1 -> h w")
    return Image.fromarray(in_bytes(array))


def in_bytes(pixels):
    """Pixels of any kind of number as bytes. The kind says what white is.

    Units:
        white is 255 of bytes, 65535 of 16 bits, 1 of floats and booleans

    Raises:
        ValueError: for other kinds, which do not say it, and for floats beyond 0 and 1
    """
    white = {"u1": 255, "u2": 65535, "b1": 1}.get(pixels.dtype.str[1:], 1 if pixels.dtype.kind == "f" else None)
    if white == 255:
        return pixels
    found = f"pixels of {pixels.dtype}"
    if pixels.dtype.kind in "iuf":
        found += f" from {pixels.min():.6g} to {pixels.max():.6g}"
    if white is None:
        raise ValueError(f"{found} do not say what white is: expected bytes (0 to 255), uint16 or floats from 0 to 1")
    values = (pixels.astype("float64") / (white / 255)).round()
    if not (values.min() >= 0 and values.max() <= 255):  # NaN too
        raise ValueError(f"{found}: expected floats from 0 to 1")
    return values.astype("uint8")


# ---- crop


def centre_crop(image, height: int, width: int, fraction: float = CROP_FRACTION, interpolation: str = "bicubic"):
    """Resize a PIL image in its own proportions, then cut the centre out: its side is ``fraction`` of the whole."""
    from PIL import Image

    # of a very long strip only the middle: 1 x 5000 pixels, resized as a whole, would fill a gigabyte
    longest = math.ceil(16 * max(height, width) / min(height, width) * min(image.size))
    if max(image.size) > longest:
        left, top = (max(side - longest, 0) // 2 for side in image.size)
        image = image.crop((left, top, left + min(image.width, longest), top + min(image.height, longest)))
    # the smallest size, in the image's own proportions, that covers the crop and its margin
    rows, columns = int(height / fraction), int(width / fraction)
    if rows * image.width >= columns * image.height:
        columns = rows * image.width // image.height
    else:
        rows = columns * image.height // image.width
    image = image.resize((columns, rows), Image.Resampling[interpolation.upper()])
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


@cache
def imagenet_class_names() -> tuple[str, ...]:
    """The 1000 classes of ImageNet-1k in the order of the logits, in short English names."""
    text = Path(__file__).with_name("imagenet_classes.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())
