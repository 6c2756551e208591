"""Weights for photographs in three colours, made to fit images of another number of channels (chapter 14)."""

import torch
from einops import einsum, rearrange, reduce, repeat
from torch import Tensor

KERNEL = 7  # of the first soft split: 49 pixels of each channel in a token
FIRST = "tokens_to_token.attention1."


def adapt_channels(weights: dict[str, Tensor], in_chans: int) -> dict[str, Tensor]:
    """The entries that meet the image, changed for ``in_chans`` channels; the others as they are.

    One channel gives what three equal channels gave. More channels are taken for red, green, blue, red, ... and all
    weights shrink by 3 / in_chans, so that their sum stays. Both are timm's ways with a convolution.

    Behind a soft split a layer norm sees all channels of a window together. With one channel it finds the mean and the
    spread that it found in three equal ones, so a performer's layer can be adapted exactly: the norm's scale and shift
    go into the linear layer. The transformer's linear layer has no bias that could take the shift: there it is the
    nearest that the norm can express, by least squares.

    Args:
        weights: by their names in the model, for three channels
    """
    adapted = dict(weights)
    for name, value in weights.items():
        if value.ndim == 4 and value.shape[1] == 3 and name.startswith(("patch_embed", "tokens_to_token.soft_split0")):
            adapted[name] = spread(value, in_chans)
    if FIRST + "norm1.weight" not in weights or in_chans == 3:
        return adapted

    linear = FIRST + ("kqv" if FIRST + "kqv.weight" in weights else "attn.qkv")
    scale, shift, weight = (
        weights[name] for name in (FIRST + "norm1.weight", FIRST + "norm1.bias", linear + ".weight")
    )
    if linear.endswith("qkv"):  # the transformer divides its scores by the root of the width, which is another now
        third = weight.shape[0] // 3
        weight = torch.cat([weight[:third] * (in_chans / 3) ** 0.5, weight[third:]])
    offset = einsum(weight, shift, "o d, d -> o")
    pattern = "o (c kh kw) -> o c kh kw"
    scaled = rearrange(weight * scale, pattern, kh=KERNEL, kw=KERNEL)
    weight = rearrange(spread(scaled, in_chans), "o c kh kw -> o (c kh kw)")
    adapted[linear + ".weight"] = weight
    adapted[FIRST + "norm1.weight"] = torch.ones(weight.shape[1], dtype=weight.dtype)
    adapted[FIRST + "norm1.bias"] = torch.zeros(weight.shape[1], dtype=weight.dtype)
    if linear + ".bias" in weights:
        adapted[linear + ".bias"] = weights[linear + ".bias"] + offset
    else:
        inverse = torch.linalg.pinv(weight.double())
        adapted[FIRST + "norm1.bias"] = einsum(inverse, offset.double(), "d o, o -> d").to(weight.dtype)
    return adapted


def spread(weight: Tensor, in_chans: int) -> Tensor:
    """The weights of a convolution on three channels, for another number of channels.

    Shapes:
        weight: o c kh kw, c = 3
        return: o in_chans kh kw
    """
    if in_chans == 3:
        return weight
    if in_chans == 1:
        return reduce(weight, "o c kh kw -> o 1 kh kw", "sum")
    many = repeat(weight, "o c kh kw -> o (times c) kh kw", times=-(-in_chans // 3))
    return many[:, :in_chans] * (3 / in_chans)
