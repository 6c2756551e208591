"""A photograph made ready for the model, as the authors evaluate (chapter 1)."""

import math
import os
from functools import cache
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # red, green, blue; of pixel values between 0 and 1
IMAGENET_STD = (0.229, 0.224, 0.225)
CROP_FRACTION = 0.9  # the authors' crop_pct: the crop's side as a share of the resized shorter side


def preprocess(image, img_size: int | tuple[int, int] = 224) -> Float[Tensor, "1 3 h w"]:
    """Resize, crop the centre, normalise.

    Shapes:  image   a PIL image, an array of h w or h w c bytes, or the path of an image file; grey, palette, CMYK,
                     16-bit grey and RGBA (whose alpha is dropped) are converted, EXIF rotation is applied
             return  1 3 h w    h and w as in ``img_size``
    Units:   img_size is pixels, an int or (height, width); the result is in standard deviations from ImageNet's mean
    Raises:  ValueError for something that is no image; FileNotFoundError for a path that is not there
    Source:  authors' evaluation: bicubic resize to size / 0.9, centre crop, ImageNet mean and standard deviation
    """
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    if isinstance(image, (str, os.PathLike)):
        path = os.fspath(image)
        try:
            image = Image.open(path)
            image.load()  # a truncated file is found here
        except FileNotFoundError:
            raise
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise ValueError(f"{path} is not an image file that Pillow can read: {error}") from error
    elif isinstance(image, np.ndarray):
        if image.dtype not in (np.uint8, np.uint16) or image.ndim not in (2, 3):
            raise ValueError(f"expected an array of bytes, h w or h w c, found {image.dtype} of shape {image.shape}")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise ValueError(f"expected a PIL image, an array or a path, found {type(image).__name__}")

    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    image = centre_crop(to_rgb(image), height, width)
    pixels = torch.from_numpy(np.array(image)).float() / 255
    normalised = (pixels - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    return rearrange(normalised, "h w c -> 1 c h w")


def to_rgb(image):
    """A PIL image of any mode as red, green and blue bytes, turned as its EXIF tag says. Reads the file to its end."""
    import numpy as np
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)  # cameras store a turned picture and say so in a tag
    if image.mode.startswith("I"):  # 16 bits of grey, which convert("RGB") would cut off at 255
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype("uint8"))
    return image.convert("RGB")


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
