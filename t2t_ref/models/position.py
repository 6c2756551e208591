"""The fixed table of positions, and fitting it to another grid (chapter 7; paper, Sec. 3.3 and Eq. 5)."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def sinusoid_table(n: int, dim: int) -> Float[Tensor, "1 n d"]:
    """A row of sines and cosines for each of n positions: sin, cos, sin, cos, ... from fast to slow.

    Entry (i, 2j) is sin(i / 10000^(2j / d)) and entry (i, 2j + 1) the cosine of the same angle.

    Shapes:
        return: ``1 n d``, float32; the angles are formed in float64 and rounded once

    Raises:
        ValueError: unless n and dim are at least 1

    Source:
        Vaswani et al. 2017, Sec. 3.5; ``get_sinusoid_encoding`` of the authors' code. The index runs over the flattened
        grid, with the class token at position 0.
    """
    if n < 1 or dim < 1:
        raise ValueError(f"a table of {n} positions and width {dim} is empty")
    positions = torch.arange(n, dtype=torch.float64)
    channels = torch.arange(dim)
    frequencies = 10000.0 ** (-2.0 * (channels // 2).double() / dim)
    angles = rearrange(positions, "n -> n 1") * frequencies
    table = torch.where(channels % 2 == 0, angles.sin(), angles.cos())
    return rearrange(table.float(), "n d -> 1 n d")


def is_free(size: tuple[int, int]) -> bool:
    """Whether a graph is being made that leaves these sizes open: to compare them with a number would fix them."""
    return any(isinstance(side, torch.SymInt) for side in size)


def resize_position_table(
    table: Float[Tensor, "1 n d"],
    grid: tuple[int, int],
    new_grid: tuple[int, int],
    num_prefix_tokens: int = 1,
    mode: str = "bicubic",
) -> Float[Tensor, "1 n_new d"]:
    """Fit a position table to another grid of tokens, by interpolation. The rows in front stay as they are.

    Shapes:
        table: ``1 n d``, n = 1 + rows * columns of ``grid``, the class token first
        return: ``1 n_new d``, n_new = 1 + rows * columns of ``new_grid``; the same dtype

    Args:
        num_prefix_tokens: how many rows belong to no place: 1 for a class token, 0 for a table without
        mode: that of torch's interpolate

    Raises:
        ValueError: if ``grid`` does not fit the table

    Source:
        ``resize_pos_embed`` of the authors' code (bicubic, corners not aligned, no antialiasing)
    """
    rows, columns = grid
    if table.shape[1] != num_prefix_tokens + rows * columns:
        raise ValueError(
            f"a table of {table.shape[1]} rows does not fit a grid of {rows}x{columns}: "
            f"expected {num_prefix_tokens} + {rows * columns} rows"
        )
    if not is_free(new_grid) and tuple(grid) == tuple(new_grid):
        return table
    dtype = torch.promote_types(table.dtype, torch.float32)  # mix in float32, round once at the end
    prefix, rest = table[:, :num_prefix_tokens], table[:, num_prefix_tokens:]
    image = rearrange(rest.to(dtype), "one (h w) d -> one d h w", h=rows)
    image = F.interpolate(image, size=tuple(new_grid), mode=mode, align_corners=False)
    rest = rearrange(image, "one d h w -> one (h w) d").to(table.dtype)
    return torch.cat([prefix, rest], dim=1)
