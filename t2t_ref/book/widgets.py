"""Two things to be moved by hand: the soft-split explorer (chapters 3 and 6) and the feature viewer (chapter 15).

The pages themselves are soft_split_explorer.html and feature_viewer.html: plain JavaScript that loads nothing. This
module puts the pictures, the maps and the start values into them.
"""

import base64
import html
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from t2t_ref.models.soft_split import grid_size
from t2t_ref.models.tokens_to_token import SPLITS, token_grid

MODES = ("one", "three")
SIDES = (8, 64)  # the smallest and the largest picture, in pixels
MAX_STRIDE, MAX_PADDING, MORE_KERNEL = 16, 8, 4  # ends of the sliders; the kernel may outgrow the picture by 4
WIDE, TALL = 680, 1250  # heights of the frame in pixels: columns from 660 pixels of width on, else one below the other
VIEWER_WIDE, VIEWER_TALL = 830, 920
LARGEST_VIEWER = 400_000  # bytes of a feature viewer in a notebook


@dataclass(frozen=True)
class Widget:
    """An HTML page in a frame of its own, and what it shows in words."""

    title: str
    page: str
    description: str
    wide: int = WIDE
    tall: int = TALL

    def _repr_html_(self) -> str:
        # everything is escaped, < and > too: Sphinx's search index then takes the frame for one tag and skips it
        return (
            f'<div style="container-type: inline-size"><iframe title="{html.escape(self.title)}" '
            f'sandbox="allow-scripts" loading="lazy" width="100%" height="{self.wide}" '
            f'style="display: block; border: 0; border-radius: 8px; '
            f'height: clamp({self.wide}px, (660px - 100cqw) * 9999, {self.tall}px)" '
            f'srcdoc="{escape(self.page)}"></iframe></div>'
        )

    def __repr__(self) -> str:
        return self.description


def soft_split_explorer(
    image=None,
    *,
    mode: str = "one",
    kernel: int = 7,
    stride: int = 4,
    padding: int = 2,
    token: int | None = None,
) -> Widget:
    """A widget that shows which pixels a token is made of.

    Mode "one": one soft split whose kernel, stride and padding can be moved. Mode "three": the three splits of the
    model, and what a final token grew from. The reader can change from one to the other.

    Shapes:
        image: ``3 h w``, red, green, blue, or 1 3 h w; None for a drawn picture

    Args:
        token: the number of the token shown first, row by row from 0 (None: one in the middle)

    Units:
        image between 0 and 1, each side 8 to 64 pixels; kernel, stride and padding are pixels of ``image``

    Raises:
        ValueError: for another kind of image, an unknown mode, a start value out of range

    Source:
        paper, Sec. 3.1 and Fig. 3; the receptive field of 31 pixels at stride 16 follows from ``SPLITS``
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}: known are {', '.join(MODES)}")
    pictures = [drawn_picture(32), drawn_picture(64)] if image is None else [one_picture(image)]
    h, w = (pictures[-1] if mode == "three" else pictures[0]).shape[-2:]
    limits = {"kernel": min(pictures[0].shape[-2:]) + MORE_KERNEL, "stride": MAX_STRIDE, "padding": MAX_PADDING}
    check_range("kernel", kernel, 1, limits["kernel"])
    check_range("stride", stride, 1, limits["stride"])
    check_range("padding", padding, 0, limits["padding"])

    try:
        rows, columns = token_grid((h, w)) if mode == "three" else grid_size((h, w), kernel, stride, padding)
    except ValueError as error:  # the page says it in words, too
        rows, columns, token, seen = 1, 1, 0, str(error)
    else:
        token = (rows - 1) // 2 * columns + (columns - 1) // 2 if token is None else token
        check_range("token", token, 0, rows * columns - 1)
        row, column = divmod(token, columns)
        splits = SPLITS if mode == "three" else ((kernel, stride, padding),)
        seen = (
            f"{rows} x {columns} = {rows * columns} tokens; token {token} (row {row}, column {column}) is made of "
            f"pixel rows {span(row, h, splits)} and columns {span(column, w, splits)}"
        )
    how = "the model's three splits" if mode == "three" else f"kernel {kernel}, stride {stride}, padding {padding}"
    description = f"Soft-split explorer: {h} x {w} pixels, {how}: {seen}"

    start = {"mode": mode, "kernel": kernel, "stride": stride, "padding": padding, "token": token}
    start |= {"limits": limits, "splits": SPLITS}
    start["pictures"] = [
        {"height": p.shape[-2], "width": p.shape[-1], "bytes": base64.b64encode(pixel_bytes(p)).decode()}
        for p in pictures
    ]
    page = filled(template(), start, description)
    return Widget("Soft-split explorer: move a token over a picture", page, description)


def span(index: int, size: int, splits: tuple[tuple[int, int, int], ...]) -> str:
    """The pixels along one side, inside the picture, that a token after these splits is made of: "2 to 32"."""
    sides = [size]
    for kernel, stride, padding in splits:
        sides.append((sides[-1] + 2 * padding - kernel) // stride + 1)
    first = last = index
    for (kernel, stride, padding), side in zip(reversed(splits), reversed(sides[:-1]), strict=True):
        first, last = max(first * stride - padding, 0), min(last * stride - padding + kernel, side) - 1
    return f"{first} to {last}" if first <= last else "of padding only"


def one_picture(image) -> Float[Tensor, "3 h w"]:
    """The picture, once it is clear that it can be shown.

    Shapes:
        image: ``3 h w``, or 1 3 h w
        return: ``3 h w``

    Raises:
        ValueError: for anything but a float tensor of such a shape, size and range
    """
    expected = "expected a float tensor of shape (3, h, w) or (1, 3, h, w) with values between 0 and 1"
    if not isinstance(image, Tensor):
        raise ValueError(f"found {type(image).__name__}, {expected}")
    if not image.is_floating_point():
        raise ValueError(f"found values of type {image.dtype}, {expected}")
    shape = tuple(image.shape)
    if shape[:-2] not in ((3,), (1, 3)):
        raise ValueError(f"found an image of shape {shape}, {expected}")
    if not SIDES[0] <= min(shape[-2:]) <= max(shape[-2:]) <= SIDES[1]:
        raise ValueError(f"found an image of {shape[-2]}x{shape[-1]} pixels, expected {SIDES[0]} to {SIDES[1]} a side")
    low, high = image.min().item(), image.max().item()
    if not 0 <= low <= high <= 1:  # also refuses NaN
        raise ValueError(f"found values from {low:.3g} to {high:.3g}, {expected}; is the picture normalised already?")
    return image if image.ndim == 3 else rearrange(image, "1 c h w -> c h w")


def check_range(name: str, value: int, low: int, high: int) -> None:
    """Refuse a value out of range.

    Raises:
        ValueError: with the range
    """
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, expected {low} to {high}")


def pixel_bytes(image: Float[Tensor, "3 h w"]) -> bytes:
    """The picture as bytes in (row, column, channel) order, as a canvas wants it.

    Shapes:
        image: ``3 h w``, between 0 and 1
    """
    pixels: UInt8[Tensor, hwc] = rearrange((image.detach().cpu().float() * 255).round().byte(), "c h w -> (h w c)")
    return bytes(pixels.tolist())


def drawn_picture(side: int) -> Float[Tensor, "3 h w"]:
    """A house on a hill, drawn in whole numbers, so that every machine draws the same bytes.

    Shapes:
        return: ``3 h w``, h = w = side

    Units:
        side is pixels; the result is between 0 and 1
    """
    fine = 4 * side  # 16 samples a pixel; below, y and x run from 0 to 64
    y = (torch.arange(fine).float() + 0.5) * 64 / fine
    y, x = torch.meshgrid(y, y, indexing="ij")
    shapes: list[tuple[tuple[int, int, int], Bool[Tensor, "h w"]]] = [
        ((126, 182, 224), y >= 0),  # sky
        ((158, 204, 234), y > 14),
        ((190, 222, 242), y > 26),
        ((250, 214, 92), (y - 12) ** 2 + (x - 50) ** 2 < 49),  # sun
        ((112, 142, 104), (y - 62) ** 2 + (x - 50) ** 2 < 900),  # hills
        ((132, 170, 98), (y - 96) ** 2 + (x - 22) ** 2 < 3136),
        ((104, 78, 58), (abs(x - 50) < 1.5) & (y > 38) & (y < 52)),  # tree
        ((62, 110, 74), (y - 34) ** 2 + (x - 50) ** 2 < 50),
        ((240, 230, 210), (abs(x - 22) < 10) & (y > 28) & (y < 48)),  # house
        ((168, 66, 58), (y > 16) & (y < 28) & (abs(x - 22) < y - 15)),
        ((92, 70, 62), (abs(x - 26) < 2.5) & (y > 37) & (y < 48)),
        ((86, 120, 150), (abs(x - 17) < 3) & (abs(y - 35) < 3)),
    ]
    canvas = torch.zeros(3, fine, fine, dtype=torch.int64)
    for colour, mask in shapes:
        canvas = torch.where(mask, rearrange(torch.tensor(colour), "c -> c 1 1"), canvas)
    return reduce(canvas, "c (h i) (w j) -> c h w", "sum", i=4, j=4).div(16, rounding_mode="floor").float() / 255


def feature_viewer(
    views: Mapping[str, tuple[Float[Tensor, "3 h w"], Mapping[str, Float[Tensor, "c rows columns"]]]],
    *,
    view: int = 0,
    layer: int = 0,
    channel: int = 0,
    common: bool = False,
    channels: int = 24,
) -> Widget:
    """A widget to leaf through feature maps: a menu of models and pictures, sliders for layer and channel.

    Each map is shown from its own smallest to its own largest value, or on one scale for its whole layer.

    Shapes:
        views: name -> (picture 3 h w, layers); layers: name -> maps c rows columns

    Args:
        view: which one is shown first, counted from 0 among what is there
        layer: likewise
        channel: likewise
        common: start with one scale for the layer
        channels: at most so many of a layer are shown, evenly spaced

    Units:
        pictures are between 0 and 1

    Note:
        maps are stored in 256 steps from their smallest to their largest value

    Raises:
        ValueError: for no view or layer, values that are not finite, a start value out of range, or more than fits into
            ``LARGEST_VIEWER`` bytes
    """
    if not views or not all(layers for _, layers in views.values()):
        raise ValueError("expected at least one view, and at least one layer in each")
    packed = []
    for name, (picture, layers) in views.items():
        low, high = picture.min().item(), picture.max().item()
        if not 0 <= low <= high <= 1:  # also refuses NaN
            raise ValueError(f"the picture of {name!r} has values from {low:.3g} to {high:.3g}, expected 0 to 1")
        h, w = picture.shape[-2:]
        picture_bytes = base64.b64encode(pixel_bytes(picture)).decode()
        packed.append({"name": name, "height": h, "width": w, "bytes": picture_bytes, "layers": []})
        for label, maps in layers.items():
            if not maps.isfinite().all():
                raise ValueError(f"layer {label!r} of {name!r} has values that are not finite")
            packed[-1]["layers"].append({"name": label} | pack_maps(maps, channels))

    check_range("view", view, 0, len(packed) - 1)
    check_range("layer", layer, 0, len(packed[view]["layers"]) - 1)
    shown = packed[view]["layers"][layer]
    check_range("channel", channel, 0, len(shown["channels"]) - 1)
    description = (
        f"Feature viewer: {', '.join(views)}. First shown: {packed[view]['name']}, layer {shown['name']}, "
        f"channel {shown['channels'][channel]}, {shown['height']} x {shown['width']} values from "
        f"{shown['low'][channel]:.3g} to {shown['high'][channel]:.3g}"
    )
    start = {"view": view, "layer": layer, "channel": channel, "common": common, "views": packed}
    page = filled(template("feature_viewer.html"), start, html.escape(description))
    title = "Feature viewer: leaf through layers and channels"
    widget = Widget(title, page, description, VIEWER_WIDE, VIEWER_TALL)
    size = len(widget._repr_html_().encode())
    if size > LARGEST_VIEWER:
        raise ValueError(
            f"the viewer would have {size:,} bytes, at most {LARGEST_VIEWER:,} are allowed: show fewer channels, "
            "layers or views, or smaller maps"
        )
    return widget


def pack_maps(maps: Float[Tensor, "c h w"], most: int) -> dict:
    """At most so many channels, each in bytes from its smallest to its largest value: channel, row, column.

    Shapes:
        maps: ``c h w``
    """
    count, h, w = maps.shape
    numbers = [i * count // most for i in range(most)] if count > most else list(range(count))
    maps = maps[numbers].detach().cpu().double()
    low, high = (reduce(maps, "c h w -> c 1 1", how) for how in ("min", "max"))
    steps: UInt8[Tensor, "c h w"] = ((maps - low) / (high - low).clamp_min(1e-300) * 255).round().byte()
    ends = ([float(f"{value:.4g}") for value in rearrange(end, "c 1 1 -> c").tolist()] for end in (low, high))
    packed = dict(zip(("low", "high"), ends, strict=True))
    text = base64.b64encode(bytes(rearrange(steps, "c h w -> (c h w)").tolist())).decode()
    return packed | {"height": h, "width": w, "channels": numbers, "bytes": text}


@cache
def template(name: str = "soft_split_explorer.html") -> str:
    """The text of one of the two pages, before it is filled in."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def filled(page: str, start: dict, description: str) -> str:
    """A template with its start values and its description in words."""
    text = json.dumps(start).replace("<", "\\u003c")  # a name with </script> in it must not end the script
    return page.replace(">START<", f">{text}<").replace(">DESCRIPTION<", f">{description}<")


def escape(page: str) -> str:
    """Text for an attribute in double quotes."""
    return html.escape(page, quote=False).replace('"', "&quot;")
