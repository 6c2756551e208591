"""What holds for every image size from 16 to 400 pixels: grids, position tables, the model."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from t2t_ref import T2TViT, grid_size, load_checkpoint, resize_position_table, sinusoid_table, token_grid

sides = st.integers(16, 400)
sizes = st.tuples(sides, sides)
grids = st.tuples(st.integers(1, 25), st.integers(1, 25))  # those of 1 to 400 pixels
TINY = dict(embed_dim=8, depth=1, num_heads=2, mlp_ratio=1.0, num_classes=3, token_dim=8)


def examples(number):
    """The same examples in every run, so that a reader's run is ours."""
    return settings(max_examples=number, deadline=None, derandomize=True, database=None)


def tiny(size, **arguments):
    torch.manual_seed(0)
    return T2TViT(img_size=size, **(TINY | arguments)).eval()


# grids


@examples(300)
@given(size=sizes, kernel=st.integers(1, 40), stride=st.integers(1, 8), padding=st.integers(0, 7))
def test_a_grid_counts_the_windows_that_fit(size, kernel, stride, padding):
    if min(size) + 2 * padding < kernel:
        with pytest.raises(ValueError, match="does not fit"):
            grid_size(size, kernel, stride, padding)
        return
    for side, count in zip(size, grid_size(size, kernel, stride, padding), strict=True):
        starts = range(-padding, side + padding - kernel + 1, stride)  # of every window, from the left
        assert count == len(starts)


@examples(300)
@given(size=sizes)
@example(size=(224, 224))
@example(size=(112, 448))
def test_the_three_splits_leave_a_sixteenth(size):
    grid = token_grid(size)
    for side, count in zip(size, grid, strict=True):
        # ceil((side - 2) / 4), then halved twice, rounding up: a sixteenth, but for the first split's missing margin
        assert count == math.ceil((side - 2) / 16)
        assert abs(count - side / 16) <= 1
    assert token_grid(size[::-1]) == grid[::-1]
    assert token_grid(size[0]) == (grid[0], grid[0])
    assert all(now <= wider for now, wider in zip(grid, token_grid((size[0] + 1, size[1] + 1)), strict=True))


@examples(60)
@given(size=sizes)
def test_a_grid_is_what_unfold_gives(size):
    image = torch.zeros(1, 1, *size)
    for kernel, stride, padding in ((7, 4, 2), (3, 2, 1), (3, 2, 1)):
        grid = grid_size((image.shape[-2], image.shape[-1]), kernel, stride, padding)
        assert F.unfold(image, kernel, stride=stride, padding=padding).shape[-1] == math.prod(grid)
        image = torch.zeros(1, 1, *grid)
    assert grid == token_grid(size)


# position tables


@examples(60)
@given(grid=grids, new_grid=grids, dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_resizing_keeps_the_class_row_and_constants(grid, new_grid, dtype):
    table = torch.full((1, 1 + math.prod(grid), 4), 0.5, dtype=dtype)
    table[:, 0] = torch.arange(4)
    resized = resize_position_table(table, grid, new_grid)
    assert resized.shape == (1, 1 + math.prod(new_grid), 4) and resized.dtype == dtype
    assert torch.equal(resized[:, 0], table[:, 0])
    torch.testing.assert_close(resized[:, 1:], torch.full_like(resized[:, 1:], 0.5))
    assert torch.equal(resize_position_table(table, grid, grid), table)


@examples(60)
@given(grid=grids, new_grid=grids)
def test_rows_and_columns_are_resized_alike(grid, new_grid):
    """To turn the picture on its side and then resize it is to resize it and then turn it."""
    torch.manual_seed(0)
    table = torch.randn(1, 1 + math.prod(grid), 3, dtype=torch.float64)

    def turned(table, grid):
        cells = table[0, 1:].reshape(*grid, 3).transpose(0, 1).reshape(1, -1, 3)
        return torch.cat([table[:, :1], cells], dim=1)

    resized = resize_position_table(table, grid, new_grid)
    sideways = resize_position_table(turned(table, grid), grid[::-1], new_grid[::-1])
    torch.testing.assert_close(turned(resized, new_grid), sideways)


@examples(60)
@given(grid=grids, new_grid=grids, factor=st.floats(-3, 3))
def test_resizing_is_linear(grid, new_grid, factor):
    torch.manual_seed(0)
    first, second = torch.randn(2, 1, 1 + math.prod(grid), 3, dtype=torch.float64)
    together = resize_position_table(first + factor * second, grid, new_grid)
    apart = resize_position_table(first, grid, new_grid) + factor * resize_position_table(second, grid, new_grid)
    torch.testing.assert_close(together, apart)


@examples(60)
@given(n=st.integers(1, 626), dim=st.integers(1, 64))
def test_a_longer_table_begins_as_a_shorter_one(n, dim):
    table = sinusoid_table(n, dim)
    assert table.shape == (1, n, dim) and table.abs().max() <= 1
    assert torch.equal(table, sinusoid_table(n + 7, dim)[:, :n])


# the model


@examples(25)
@given(size=sizes, tokens_type=st.sampled_from(["performer", "convolution"]), batch=st.integers(1, 2))
@example(size=(400, 400), tokens_type="performer", batch=1)
@example(size=(16, 400), tokens_type="performer", batch=1)
@example(size=(17, 16), tokens_type="transformer", batch=2)
@example(size=(101, 190), tokens_type="transformer", batch=1)
def test_the_model_takes_every_size(size, tokens_type, batch):
    model = tiny(size, tokens_type=tokens_type)
    rows, columns = token_grid(size)
    image = torch.randn(batch, 3, *size)
    with torch.no_grad():
        features = model.forward_features(image)
        logits = model(image)
    assert features.shape == (batch, 1 + rows * columns, 8)
    assert logits.shape == (batch, 3) and logits.isfinite().all()
    torch.testing.assert_close(model(image[:1]), logits[:1], atol=1e-5, rtol=1e-4)  # samples do not mix
    with pytest.raises(ValueError, match=f"{size[0] + 1}x{size[1]} pixels"):
        model(torch.randn(1, 3, size[0] + 1, size[1]))


@examples(15)
@given(size=sizes, other=sizes)
def test_dynamic_size_is_a_model_of_that_size_with_the_table_resized(size, other):
    """Three ways to another size: on the fly, by load_checkpoint into a model of that size, and back again."""
    dynamic, fixed = tiny(size, dynamic_img_size=True), tiny(other)
    grid = token_grid(size)
    report = load_checkpoint(fixed, dynamic.state_dict(), grid=grid)
    assert bool(report.adapted) == (grid != token_grid(other))
    image = torch.randn(1, 3, *other)
    with torch.no_grad():
        torch.testing.assert_close(dynamic(image), fixed(image))
