"""Numbers for what one sees in feature maps and attention maps (chapter 15).

Maps are b c h w: images, channels, rows, columns. Maps of tokens come from :func:`t2t_ref.inspection.token_maps`.
All is computed in float64, since sums over many small numbers cost nothing beside a run of the model.
"""

import math
from collections.abc import Callable, Sequence

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float
from torch import Tensor

FLAT, LOUD = 0.05, 10.0  # where channel_health draws its two lines


def channel_spread(maps: Float[Tensor, "b c h w"], *, count_places: bool = True) -> Float[Tensor, " c"]:
    """How much each channel varies: its standard deviation over all images and places.

    Shapes:
        maps: ``b c h w``
        return: ``c``

    Args:
        count_places: False takes the mean over the images away at each place first, so that only differences between
            images count: the same map for every image then has spread 0

    Units:
        those of the maps
    """
    maps = maps.double()
    centre = reduce(maps, "b c h w -> 1 c 1 1" if count_places else "b c h w -> 1 c h w", "mean")
    return reduce((maps - centre).square(), "b c h w -> c", "mean").sqrt()


def channel_health(
    maps: Float[Tensor, "b c h w"], *, flat: float = FLAT, loud: float = LOUD, count_places: bool = True
) -> tuple[float, float]:
    """The shares of dead and of saturated channels in one layer.

    Dead: its spread is at most ``flat`` times that of a lively channel, the one that 90 % do not exceed. So the measure
    holds while up to 90 % are dead. Saturated: its root mean square is more than ``loud`` times that of a typical
    channel, the median of those that are not 0 throughout.

    Shapes:
        maps: ``b c h w``, of one layer, for several images
        return: (dead, saturated), shares between 0 and 1

    Args:
        count_places: as in :func:`channel_spread`

    Note:
        where nothing varies, every channel is dead

    Source:
        the paper's Fig. 2 marks channels whose values are zero or too large; the definition is ours
    """
    spread = channel_spread(maps, count_places=count_places)
    dead = spread <= flat * spread.quantile(0.9)
    size = reduce(maps.double().square(), "b c h w -> c", "mean").sqrt()
    typical = size[size > 0].median() if size.any() else 1.0
    return dead.double().mean().item(), (size > loud * typical).double().mean().item()


def cosine_waves(length: int, **like) -> Float[Tensor, "k h"]:
    """The orthonormal cosine waves along a side of ``length`` cells.

    Shapes:
        return: ``k h``, h = length; row k has k half waves

    Args:
        **like: dtype and device
    """
    places = torch.arange(length, **like)
    waves = torch.cos(math.pi / length * einsum(places, places + 0.5, "k, h -> k h"))
    waves[0] /= math.sqrt(2)
    return waves * math.sqrt(2 / length)


def high_frequency_share(maps: Float[Tensor, "b c h w"], cutoff: float = 0.25) -> Float[Tensor, "b c"]:
    """The share of each map's variance that lies in fine waves.

    The spectrum is that of the cosine transform, which mirrors a map at its edges. The Fourier transform would join
    the left edge to the right one and take the jump for fine detail. The mean of the map is left out.

    Shapes:
        maps: ``b c h w``
        return: ``b c``, between 0 and 1; NaN for a map that is constant

    Units:
        cutoff is cycles per cell, between 0 and 1/2

    Note:
        a wave is fine if it has at least as many along rows or along columns. Of white noise 3/4 is fine at the
        default, and a little more on small maps
    """
    maps = maps.double()
    h, w = maps.shape[-2:]
    down, right = (cosine_waves(side, dtype=maps.dtype, device=maps.device) for side in (h, w))
    varying = maps - reduce(maps, "b c h w -> b c 1 1", "mean")
    power = einsum(down, varying, right, "k h, b c h w, l w -> b c k l").square()
    coarse = power[:, :, : math.ceil(2 * cutoff * h), : math.ceil(2 * cutoff * w)]  # wave k has k / 2h cycles per cell
    total, coarse, size = (reduce(x, "b c k l -> b c", "sum") for x in (power, coarse, maps.square()))
    return torch.where(total > 1e-20 * size, 1 - coarse / total, math.nan)  # below that, it is rounding


def channel_similarity(maps: Float[Tensor, "b c h w"]) -> float:
    """How alike the channels of a layer are: the mean of |correlation| over all pairs of channels.

    Shapes:
        maps: ``b c h w``
        return: 0 (all different) to 1 (all alike, up to scale and sign)

    Note:
        correlation over all images and places; channels that do not vary are left out; NaN for fewer than two
    """
    channels = rearrange(maps.double(), "b c h w -> c (b h w)")
    channels = channels - reduce(channels, "c n -> c 1", "mean")
    length = channels.norm(dim=1, keepdim=True)
    live = (length > 1e-10 * length.max())[:, 0]
    channels = channels[live] / length[live]
    count = len(channels)
    if count < 2:
        return math.nan
    total = einsum(channels, channels, "c n, other n -> c other").abs().sum()
    return ((total - count) / (count * (count - 1))).item()


def layer_similarity(layers: Sequence[Float[Tensor, "b ..."]]) -> Float[Tensor, "l l"]:
    """How alike the layers arrange the same images: linear centred kernel alignment (CKA) of each pair.

    For each layer, a table says how alike any two images look to it (an inner product). CKA is the cosine between two
    such tables, after centring them. The unbiased form is used: with few images and many features the plain one finds
    any two layers alike.

    Shapes:
        layers: for each layer its features of the same b images, b first; the other axes may differ
        return: ``l l``, 1 for the same arrangement up to rotation and scale, about 0 for unrelated ones

    Raises:
        ValueError: for fewer than four images, which the unbiased form needs

    Source:
        Kornblith et al. 2019; the centring is Székely and Rizzo's (2014)
    """
    tables = []
    for features in layers:
        n = len(features)
        if n < 4:
            raise ValueError(f"{n} images are too few to compare layers: at least 4 are needed")
        features = rearrange(features.double(), "b ... -> b (...)")
        table = einsum(features, features, "b f, other f -> b other").fill_diagonal_(0)
        row, column = (reduce(table, f"b other -> {shape}", "sum") / (n - 2) for shape in ("b 1", "1 other"))
        table = table - row - column + table.sum() / ((n - 1) * (n - 2))
        tables.append(rearrange(table.fill_diagonal_(0), "b other -> (b other)"))
    tables = torch.stack(tables)
    tables = tables / tables.norm(dim=1, keepdim=True)
    return einsum(tables, tables, "l n, other n -> l other")


def attention_distance(
    weights: Float[Tensor, "b g q k"], grid: tuple[int, int], cell: float = 1.0
) -> Float[Tensor, " g"]:
    """How far each head looks: the distance from patch to patch, weighted by attention.

    Shapes:
        weights: ``b g q k``, q = k = h w patches, or 1 + h w with a class token, which is left out
        grid: ``(h, w)``
        return: ``g``

    Units:
        those of ``cell``, the distance between neighbours: 1 gives patches, 16 the pixels of ViT-B/16

    Raises:
        ValueError: if the number of tokens does not fit the grid

    Source:
        Dosovitskiy et al. 2021, Fig. 7
    """
    h, w = grid
    if weights.shape[-1] not in (h * w, 1 + h * w):
        raise ValueError(
            f"{weights.shape[-1]} tokens do not fit a grid of {h}x{w} = {h * w}, with or without a class token"
        )
    weights = weights[..., -h * w :, -h * w :].double()
    weights = weights / reduce(weights, "b g q k -> b g q 1", "sum")
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    places = rearrange(torch.stack([rows, columns]).double().to(weights.device), "two h w -> (h w) two")
    distances = cell * torch.cdist(places, places)
    return reduce(einsum(weights, distances, "b g q k, q k -> b g q"), "b g q -> g", "mean")


def shift_response(
    features: Callable[[Tensor], Tensor], images: Float[Tensor, "b c h w"], size: int, shifts: Sequence[int]
) -> Float[Tensor, " s"]:
    """How much features change when the picture moves under them.

    A window of ``size`` columns is cut from the left edge of each image, and again so many pixels further right. The
    answer is the mean squared change of the features, relative to that between two unrelated images.

    Shapes:
        images: ``b c h w``, w of at least size + the largest shift; at least two images
        features: from b c h size to b and any other axes
        return: ``s``, 0: nothing changes; 1: as different as another image

    Units:
        size and shifts are pixels

    Raises:
        ValueError: if the images are too narrow
    """
    if images.shape[-1] < size + max(shifts):
        raise ValueError(
            f"images of {images.shape[-1]} columns have no room for {size} columns and a shift of {max(shifts)}"
        )
    base = features(images[..., :size]).double()
    unrelated = 2 * base.var(dim=0).sum()  # mean squared distance of two independent images
    moved = [features(images[..., shift : shift + size]).double() for shift in shifts]
    return torch.stack([(one - base).square().sum() / len(base) / unrelated for one in moved])
