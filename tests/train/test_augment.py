"""Augmentation on the device: mixed targets against what the image shows. Each operation against timm: test_timm.py."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from t2t_ref.train.augment import OPERATIONS, Augment, RandAugment, soft_targets
from t2t_ref.train.recipes import RECIPES, Recipe

PLAIN = Recipe(data="cifar10", img_size=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))  # everything is off


def photographs(count=8, height=32, width=32, seed=0):
    """Smooth random images, so that a shift by a fraction of a pixel changes little."""
    torch.manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 7)
    return F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False).clamp(0, 1)


def sized(recipe, size):
    """A recipe for images that are not square, which its own check does not foresee."""
    recipe = replace(recipe)
    object.__setattr__(recipe, "img_size", size)
    return recipe


def denormalise(images, recipe=PLAIN):
    mean, std = (torch.tensor(x)[:, None, None] for x in (recipe.mean, recipe.std))
    return images * std + mean


def as_pil(image):
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


# nothing, and normalisation


@pytest.mark.parametrize("size", [32, (24, 40)])
def test_with_everything_off_images_are_only_normalised(size):
    recipe = sized(PLAIN, size)
    height, width = (size, size) if isinstance(size, int) else size
    images, labels = photographs(4, height, width), torch.tensor([0, 2, 1, 2])
    for augment in (Augment(recipe, 3).train(), Augment(recipe, 3).eval()):
        out, targets = augment(images, labels)
        for channel, (mean, std) in enumerate(zip(PLAIN.mean, PLAIN.std, strict=True)):
            torch.testing.assert_close(out[:, channel], (images[:, channel] - mean) / std)
        assert torch.equal(targets, torch.eye(3)[labels])


def test_bytes_and_floats_are_the_same():
    bytes_ = (photographs() * 255).byte()
    augment, labels = Augment(PLAIN, 3), torch.zeros(8, dtype=torch.int64)
    torch.testing.assert_close(augment(bytes_, labels)[0], augment(bytes_.float() / 255, labels)[0])
    assert bytes_.dtype == torch.uint8


def test_evaluation_resizes_and_cuts_the_centre():
    recipe = replace(PLAIN, img_size=28, crop_pct=0.875, pad_crop=4, flip=1.0, mixup=1.0, erasing=1.0)
    images = photographs(2)
    out = Augment(recipe, 3).normalise(images)  # 28 / 0.875 = 32: no resizing, the middle 28 pixels
    torch.testing.assert_close(denormalise(out), images[:, :, 2:30, 2:30])
    assert torch.equal(Augment(recipe, 3).eval()(images, torch.tensor([0, 1]))[0], out)
    large = denormalise(Augment(replace(PLAIN, img_size=64), 3).normalise(images))
    pillow = np.stack([np.asarray(as_pil(x).resize((64, 64), Image.Resampling.BICUBIC)) for x in images])
    assert (large - torch.from_numpy(pillow).permute(0, 3, 1, 2) / 255).abs().max() < 2 / 255


def test_photographs_come_cropped_and_are_not_cropped_again():
    recipe = replace(RECIPES["imagenet"], img_size=32, erasing=0.0, rand_augment=0.0, mixup=0.0, cutmix=0.0, flip=0.0)
    images = photographs()
    augment = Augment(recipe, 3)
    out, _ = augment(images, torch.zeros(8, dtype=torch.int64))
    torch.testing.assert_close(denormalise(out, recipe), images)
    torch.testing.assert_close(denormalise(augment.normalise(images), recipe), images)


def test_a_wrong_number_of_channels_is_named():
    with pytest.raises(ValueError, match="images have 1 channels, the recipe's mean 3"):
        Augment(PLAIN, 3)(torch.zeros(2, 1, 32, 32), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="3 colours, found 1: set rand_augment to 0"):
        RandAugment(9.0, 0.5, 2, (0.5,))(torch.zeros(2, 1, 32, 32))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("recipe", [replace(PLAIN, flip=0.5), replace(PLAIN, img_size=40)], ids=["flip", "resize"])
def test_images_of_another_scale_are_refused_where_they_would_be_cut(recipe, training):
    """Of a dataset of one's own, which may have normalised them. Cut off at 1 they would still train to something."""
    if not training:
        recipe = replace(recipe, img_size=40)  # a flip is for training alone
    augment, plain, labels = Augment(recipe, 3).train(training), Augment(PLAIN, 3), torch.zeros(2, dtype=torch.int64)
    for images, found in (
        (torch.full((2, 3, 32, 32), 255.0), "255 to 255"),
        (torch.randn(2, 3, 32, 32).half(), "-.* to"),
    ):
        with pytest.raises(
            ValueError, match=f"values from {found}.*expects bytes .uint8., or floats from 0 to 1, not norm"
        ):
            augment(images, labels)
        assert torch.equal(plain(images, labels)[0], plain.eval()(images, labels)[0])  # nothing is done, nothing cut
        plain.train()
    with pytest.raises(ValueError, match="images are torch.int64: expected bytes .uint8., or floats from 0 to 1"):
        augment.to_floats(torch.full((2, 3, 32, 32), 200))
    slightly = torch.tensor([-0.004, 1.004]).repeat(2, 3, 32, 16)  # as resizing leaves them
    assert augment(slightly, labels)[0].isfinite().all()


# crops and flips


def test_flips_turn_a_share_of_the_images_around():
    images = photographs(400, 8, 8)
    out = denormalise(Augment(replace(PLAIN, img_size=8, flip=0.25), 3)(images, torch.zeros(400, dtype=torch.int64))[0])
    kept = (out - images).abs().amax(dim=(1, 2, 3)) < 1e-5
    turned = (out - images.flip(3)).abs().amax(dim=(1, 2, 3)) < 1e-5
    assert (kept ^ turned).all() and 60 < turned.sum() < 140


def test_padded_crops_are_windows_of_the_padded_image():
    images = photographs(60, 12, 12)
    out = denormalise(
        Augment(replace(PLAIN, img_size=12, pad_crop=2), 3)(images, torch.zeros(60, dtype=torch.int64))[0]
    )
    windows = F.pad(images, [2] * 4).unfold(2, 12, 1).unfold(3, 12, 1)  # b c 5 5 12 12
    differences = (windows - out[:, :, None, None]).abs().amax(dim=(1, 4, 5))
    assert (differences.flatten(1).amin(dim=1) < 1e-5).all()
    places = differences.flatten(1).argmin(dim=1)
    assert len(places.unique()) > 15  # of 25: images move on their own


def test_images_are_enlarged_before_the_padded_crop():
    recipe = replace(RECIPES["cifar_transfer"], img_size=64, pad_crop=8)
    out, _ = Augment(recipe, 10)(photographs(2), torch.tensor([1, 2]))
    assert out.shape == (2, 3, 64, 64)


def test_random_resized_crops_show_a_part_enlarged():
    """On an image whose colour says where a pixel comes from, the crop's corners tell its area and shape."""
    n = 64
    place = (torch.arange(n) + 0.5) / n
    image = torch.stack([place.expand(n, n), place.expand(n, n).T, torch.zeros(n, n)])
    images = image.expand(300, 3, n, n)
    recipe = replace(PLAIN, img_size=48, crop_scale=(0.2, 0.6), crop_ratio=(0.5, 2.0), train_interpolation="bilinear")
    out = denormalise(Augment(recipe, 3)(images, torch.zeros(300, dtype=torch.int64))[0])
    assert out.shape == (300, 3, 48, 48)
    width = (out[:, 0, 24, 40] - out[:, 0, 24, 8]) * 48 / 32
    height = (out[:, 1, 40, 24] - out[:, 1, 8, 24]) * 48 / 32
    area, shape = width * height, width / height
    assert 0.17 < area.min() < 0.25 and 0.5 < area.max() < 0.65
    assert 0.45 < shape.min() < 0.6 and 1.7 < shape.max() < 2.2


# RandAugment


def test_auto_contrast_leaves_one_colour_alone():
    flat = torch.full((1, 3, 8, 8), 0.3)
    assert torch.equal(OPERATIONS["AutoContrast"](flat, torch.ones(1), torch.ones(1), flat), flat)


def test_each_image_gets_its_own_operations():
    """One layer, half of the images: 15 operations, so each does 1/30 of them. Invert is easy to recognise."""
    torch.manual_seed(0)
    images = photographs(1, 16, 16).expand(3000, 3, 16, 16)
    out = RandAugment(9.0, 0.5, 1, (0.5, 0.5, 0.5))(images)
    kept = (out == images).all(dim=(1, 2, 3))
    inverted = ((out - (1 - images)).abs().amax(dim=(1, 2, 3)) < 1e-6).sum()
    assert 0.46 < kept.float().mean() < 0.54
    assert 60 < inverted < 140
    assert (images == photographs(1, 16, 16)).all()  # the input stays


def test_magnitudes_vary_and_stay_in_range():
    """Turn a half-white image: how far says the magnitude. Mean 9, standard deviation 0.5, at most 10."""
    levels = []
    before = OPERATIONS["Brightness"]
    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setitem(
                OPERATIONS, name, lambda x, level, sign, fill: levels.append(level) or before(x, level, sign, 0)
            )
        torch.manual_seed(0)
        RandAugment(9.0, 0.5, 2, (0.5, 0.5, 0.5))(torch.rand(1000, 3, 4, 4))
    levels = torch.cat(levels)
    assert 0.89 < levels.mean() < 0.91 and 0.035 < levels.std() < 0.055 and levels.max() == 1
    assert 900 < len(levels) < 1100


# mixing


def test_mixup_is_a_weighted_sum_of_an_image_and_its_opposite():
    images, labels = photographs(6), torch.tensor([0, 1, 2, 3, 4, 4])
    shares = []
    augment = Augment(replace(PLAIN, mixup=0.8), 5)
    for seed in range(40):
        torch.manual_seed(seed)
        out, targets = augment(images, labels)
        share = targets[0, 0]  # of the first image; the last has another label
        mixed = torch.stack([share * images[i] + (1 - share) * images[5 - i] for i in range(6)])
        torch.testing.assert_close(denormalise(out), mixed)
        by_hand = torch.stack(
            [share * torch.eye(5)[labels[i]] + (1 - share) * torch.eye(5)[labels[5 - i]] for i in range(6)]
        )
        torch.testing.assert_close(targets, by_hand)
        shares.append(share)
    shares = torch.stack(shares)
    assert shares.min() < 0.2 and shares.max() > 0.8 and 0.25 < shares.std() < 0.38  # Beta(0.8, 0.8): 0.31


@pytest.mark.parametrize("height, width", [(16, 16), (12, 20)])
def test_cutmix_targets_are_the_shares_of_the_pixels(height, width):
    """Black and white images: the mean of a mixed one is the share of white pixels, so the target of class 1."""
    images = torch.zeros(4, 3, height, width)
    images[2:] = 1  # the opposite of 0 is 3, of 1 is 2
    labels = torch.tensor([0, 0, 1, 1])
    recipe = sized(replace(PLAIN, cutmix=1.0), (height, width))
    augment, clipped, areas = Augment(recipe, 2), 0, []
    for seed in range(60):
        torch.manual_seed(seed)
        out, targets = augment(images, labels)
        white = denormalise(out)[:, 0].round()
        torch.testing.assert_close(targets[:, 1], white.mean(dim=(1, 2)))
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(4))
        rows, columns = torch.where(white[0] == 1)
        areas.append(len(rows) / (height * width))
        if len(rows):  # a full rectangle, the same in every image
            box = white[0, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert (box == 1).all() and (white[3] == 1 - white[0]).all() and (white[1] == white[0]).all()
            sides = len(box) / height, box.shape[1] / width
            clipped += abs(sides[0] - sides[1]) > 0.25  # one side was cut off, the other was not
    assert clipped > 5 and min(areas) < 0.05 and max(areas) > 0.5


def test_one_or_the_other_or_neither():
    images = torch.zeros(4, 3, 8, 8)
    images[2:] = 1
    labels = torch.tensor([0, 0, 1, 1])

    def kinds(**changes):
        augment, found = Augment(replace(PLAIN, img_size=8, mixup=0.8, cutmix=1.0, **changes), 2), []
        for seed in range(200):
            torch.manual_seed(seed)
            pixels = denormalise(augment(images, labels)[0])[0].unique()
            grey = ((pixels > 0.01) & (pixels < 0.99)).any()
            found.append("mixup" if grey else "cutmix" if len(pixels) > 1 else "neither")
        return [found.count(kind) for kind in ("mixup", "cutmix", "neither")]

    mixup, cutmix, neither = kinds()
    assert 75 < mixup < 125 and 60 < cutmix and neither < 30  # a box may be empty, a share nearly 1
    assert kinds(mix_probability=0.0) == [0, 0, 200]
    assert kinds(switch_probability=0.0)[1] == 0
    assert kinds(switch_probability=1.0)[0] == 0
    assert 130 < kinds(mix_probability=0.25)[2] < 180


def test_smoothing_as_the_authors_smooth():
    """0.1 / 1000 for a class that is not there, 0.9 + 0.1 / 1000 for the one that is."""
    targets = soft_targets(torch.tensor([3]), 1000, 0.1)
    torch.testing.assert_close(targets[0, 3], torch.tensor(0.9001))
    torch.testing.assert_close(targets[0, 4], torch.tensor(0.0001))
    logits, labels = torch.randn(5, 10), torch.arange(5)
    soft = F.cross_entropy(logits, soft_targets(labels, 10, 0.1))
    torch.testing.assert_close(soft, F.cross_entropy(logits, labels, label_smoothing=0.1))
    torch.testing.assert_close(soft, (-soft_targets(labels, 10, 0.1) * logits.log_softmax(1)).sum(1).mean())
    mixed = soft_targets(torch.tensor([0]), 4, 0.2, torch.tensor([1]), torch.tensor([0.75]))
    torch.testing.assert_close(mixed, torch.tensor([[0.8 * 0.75 + 0.05, 0.8 * 0.25 + 0.05, 0.05, 0.05]]))
    _, targets = Augment(replace(PLAIN, mixup=0.8, smoothing=0.1), 10)(photographs(4), torch.arange(4))
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    torch.testing.assert_close(targets.min(), torch.tensor(0.01))


# erasing


def test_erasing_puts_noise_into_a_rectangle_of_some_images():
    images = torch.full((400, 3, 24, 32), 0.5)
    recipe = sized(replace(PLAIN, erasing=0.25), (24, 32))
    torch.manual_seed(0)
    out, _ = Augment(recipe, 3)(images, torch.zeros(400, dtype=torch.int64))
    plain = (0.5 - torch.tensor(PLAIN.mean)) / torch.tensor(PLAIN.std)
    erased = (out != plain[:, None, None]).all(dim=1)
    touched = erased.any(dim=(1, 2))
    assert 70 < touched.sum() < 130
    for image in erased[touched]:
        rows, columns = torch.where(image)
        assert image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
    area = erased[touched].float().mean(dim=(1, 2))
    assert 0.01 < area.min() < 0.06 and 0.25 < area.max() < 0.36  # 2 % to a third
    noise = torch.cat([image[:, hole].flatten() for image, hole in zip(out[touched], erased[touched], strict=True)])
    assert abs(noise.mean()) < 0.03 and 0.97 < noise.std() < 1.03  # in normalised units, a value for each pixel


# all of it


FULL = replace(RECIPES["cifar10"], img_size=32, pad_crop=4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    images, labels = photographs(16), torch.arange(16) % 10
    augment = Augment(FULL, 10)
    torch.manual_seed(3)
    plain = augment(images, labels)
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype):
        cast = augment(images, labels)
    assert plain[0].isfinite().all() and plain[0].dtype == cast[0].dtype == torch.float32
    assert torch.equal(plain[0], cast[0]) and torch.equal(plain[1], cast[1])
    small, _ = augment(images.to(dtype), labels)  # images that come in half precision
    assert small.isfinite().all() and small.dtype == torch.float32


def test_a_step_is_a_function_of_the_seed():
    images, labels = photographs(16), torch.arange(16) % 10
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(Augment(FULL, 10)(images, labels)[0])
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert not runs[0].requires_grad


def test_every_recipe_augments():
    for name, recipe in RECIPES.items():
        size = recipe.img_size
        images = photographs(2, size, size) if name == "imagenet" else photographs(2)
        out, targets = Augment(recipe, 10)(images, torch.tensor([3, 7]))
        assert out.shape == (2, 3, size, size) and targets.shape == (2, 10), name
        assert out.isfinite().all() and Augment(recipe, 10).state_dict() == {}, name
