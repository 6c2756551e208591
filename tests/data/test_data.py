"""The digit sets: what a sample depends on, where the digit lies, and that colour alone does not give it away."""

import pytest
import torch
from einops import rearrange, reduce
from torch.utils.data import DataLoader

from t2t_ref.data.digits import SPLITS, Digits, ScatteredDigits, handwritten_digits, place


def test_the_splits_cover_every_digit_once():
    ink, labels = handwritten_digits()
    assert ink.shape == (1797, 8, 8) and len(labels) == 1797
    covered = [number for first, end in SPLITS.values() for number in range(first, end)]
    assert sorted(covered) == list(range(1797))
    assert 0 <= ink.min() and ink.max() == 1


def test_centred_digits_are_the_digits_enlarged():
    digits = Digits("val", size=32)
    image, label = digits[3]
    ink, labels = handwritten_digits()
    first, end = SPLITS["val"]
    assert len(digits) == end - first and image.shape == (3, 32, 32) and label == labels[first + 3]
    small = reduce(image, "c (h i) (w j) -> c h w", "mean", i=4, j=4)
    assert (small[0] - ink[first + 3]).abs().max() < 0.35 and torch.equal(image[0], image[2])
    flat = torch.stack([rearrange(small[0], "h w -> (h w)"), rearrange(ink[first + 3], "h w -> (h w)")])
    assert torch.corrcoef(flat)[0, 1] > 0.95


def test_a_sample_depends_on_seed_and_number_alone():
    digits = ScatteredDigits(length=10, seed=3)
    images, labels = digits.draw([0, 7, 123456789])
    again, _ = ScatteredDigits(length=99, seed=3).draw([7])
    assert images.shape == (3, 3, 64, 64) and torch.equal(images[1], again[0])
    torch.testing.assert_close(digits[7][0], images[1])
    assert digits[7][1] == labels[1]
    other, _ = ScatteredDigits(seed=4).draw([7])
    assert not torch.equal(other[0], images[1])


def test_an_epoch_ends_and_the_next_one_is_new():
    digits = ScatteredDigits(length=4)
    assert len(list(digits)) == len(digits) == 4
    first = next(iter(DataLoader(digits, batch_size=4)))[0]
    digits.set_epoch(1)
    second = next(iter(DataLoader(digits, batch_size=4)))[0]
    assert not torch.equal(first, second)
    torch.testing.assert_close(second, digits.draw(range(4, 8))[0])


def test_train_and_test_share_no_handwritten_digit(monkeypatch):
    ink, _ = handwritten_digits()
    for split, (first, end) in SPLITS.items():  # labels that say which digit was drawn
        monkeypatch.setattr("t2t_ref.data.digits.handwritten_digits", lambda: (ink, torch.arange(len(ink))))
        _, drawn = ScatteredDigits(split, size=8, digit_size=(8, 8), clutter=2).draw(range(3000))
        assert first <= drawn.min() and drawn.max() < end
        assert len(drawn.unique()) > 0.8 * (end - first)


def test_a_glyph_fills_its_box_and_nothing_else():
    canvas = place(torch.ones(1, 1, 8, 8), torch.tensor([[[16.0], [8.0], [40.0]]]), 64)
    expected = torch.zeros(1, 1, 64, 64)
    expected[..., 8:24, 40:56] = 1
    # bilinear interpolation fades over the outer half pixel of the glyph: one pixel of the canvas here
    differs = (canvas - expected).abs() > 1e-5
    assert not differs[..., 10:22, 42:54].any() and not differs[..., :7, :].any() and not differs[..., :, :39].any()
    assert abs(canvas.sum() / expected.sum() - 1) < 0.1


def test_a_glyph_is_not_turned_or_mirrored():
    glyph = torch.zeros(1, 1, 8, 8)
    glyph[..., 0, :] = 1  # its upper edge
    glyph[..., :, 7] = 1  # and its right edge
    canvas = place(glyph, torch.tensor([[[32.0], [0.0], [0.0]]]), 32)[0, 0]
    assert canvas[2, 16] > 0.8 and canvas[16, 29] > 0.8 and canvas[29, 16] == 0 and canvas[16, 2] == 0


@pytest.mark.parametrize("polarity, light", [("light", [True]), ("dark", [False]), ("both", [True, False])])
def test_ink_and_ground_are_as_far_apart_as_asked(polarity, light):
    digits = ScatteredDigits(polarity=polarity, contrast=0.5, noise=0.0, digit_size=(40, 64))
    images, _ = digits.draw(range(60))
    brightness = reduce(images, "b c h w -> b h w", "mean")
    ground = brightness[:, 0, 0]
    seen = set()
    for sample, start in zip(brightness, ground, strict=True):
        gap = rearrange(sample, "h w -> (h w)") - start
        strongest = gap[gap.abs().argmax()]
        assert strongest.abs() > 0.35  # thin strokes do not reach the full colour
        seen.add(bool(strongest > 0))
    assert seen == set(light)


def test_colour_alone_says_little():
    from sklearn.linear_model import LogisticRegression

    def statistics(split):
        images, labels = ScatteredDigits(split, polarity="both").draw(range(1500))
        means, deviations = (reduce(images, "b c h w -> b c", kind) for kind in ("mean", torch.std))
        return torch.cat([means, deviations], dim=1).numpy(), labels.numpy()

    def pixels(split):
        digits = Digits(split, size=8)
        return rearrange(digits.images, "n c h w -> n (c h w)").numpy(), digits.labels.numpy()

    classifier = LogisticRegression(max_iter=2000)
    assert classifier.fit(*statistics("train")).score(*statistics("test")) < 0.2  # chance is 0.1
    assert classifier.fit(*pixels("train")).score(*pixels("test")) > 0.9  # the same classifier is able to learn


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(split="valid"), "unknown split 'valid': known are train, val, test"),
        (dict(polarity="grey"), "unknown polarity 'grey': known are light, dark, both"),
        (dict(digit_size=(40, 80)), r"digit_size is \(40, 80\), expected 8 <= smallest <= largest <= size = 64"),
        (dict(contrast=0.95), "contrast=0.95"),
        (dict(length=0), "length=0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ScatteredDigits(**arguments)


def test_a_size_below_the_digits_is_refused():
    with pytest.raises(ValueError, match="size is 4 pixels"):
        Digits(size=4)


def test_without_scikit_learn_the_remedy_is_named(monkeypatch):
    import sys

    handwritten_digits.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"t2t-ref\[train\]"):
        handwritten_digits()
