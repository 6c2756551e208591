"""Soft split: windows, their order and their count."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from t2t_ref import SoftSplit, grid_size, soft_split


def test_first_token_is_the_top_left_window():
    image = rearrange(torch.arange(2 * 3 * 8 * 8.0), "(b c h w) -> b c h w", b=2, c=3, h=8)
    tokens = soft_split(image, kernel=3, stride=2, padding=1)
    corner = F.pad(image, [1] * 4)[:, :, :3, :3]
    torch.testing.assert_close(tokens[:, 0], rearrange(corner, "b c kh kw -> b (c kh kw)"))


@pytest.mark.parametrize("kernel, stride, padding", [(7, 4, 2), (3, 2, 1), (5, 1, 0), (4, 4, 0)])
@pytest.mark.parametrize("h, w", [(8, 8), (11, 30), (23, 9)])
def test_every_token_is_the_window_that_a_loop_cuts(h, w, kernel, stride, padding):
    image = torch.rand(2, 3, h, w)
    rows, columns = grid_size((h, w), kernel, stride, padding)
    tokens = SoftSplit(kernel, stride, padding)(image)
    assert tokens.shape == (2, rows * columns, 3 * kernel * kernel)
    padded = F.pad(image, [padding] * 4)
    for token in range(rows * columns):
        top, left = stride * (token // columns), stride * (token % columns)
        window = padded[:, :, top : top + kernel, left : left + kernel]
        torch.testing.assert_close(tokens[:, token], rearrange(window, "b c kh kw -> b (c kh kw)"))


def test_without_overlap_the_tokens_fold_back_into_the_image():
    image = torch.rand(2, 3, 8, 12)
    tokens = soft_split(image, kernel=4, stride=4, padding=0)
    back = rearrange(tokens, "b (rows columns) (c kh kw) -> b c (rows kh) (columns kw)", rows=2, c=3, kh=4)
    torch.testing.assert_close(back, image)


def test_the_counts_of_the_paper():
    assert grid_size((224, 224), 7, 4, 2) == (56, 56)
    assert grid_size((56, 56), 3, 2, 1) == (28, 28)
    assert grid_size((28, 28), 3, 2, 1) == (14, 14)


def test_an_image_smaller_than_one_window_is_refused():
    with pytest.raises(ValueError, match="a 7x7 window does not fit in an image of 2x30 pixels with padding 2"):
        soft_split(torch.rand(1, 3, 2, 30), kernel=7, stride=4, padding=2)
    assert soft_split(torch.rand(1, 3, 3, 30), kernel=7, stride=4, padding=2).shape == (1, 7, 147)
