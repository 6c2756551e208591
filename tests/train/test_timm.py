"""What the authors took from timm, held against timm itself, with the same draws."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from einops import rearrange, repeat
from matplotlib.cbook import get_sample_data
from PIL import Image
from with_timm import import_timm

from t2t_ref import create_model
from t2t_ref.data.reading import draw_box
from t2t_ref.train.augment import OPERATIONS, Augment
from t2t_ref.train.optimizer import learning_rate, make_scheduler, parameter_groups
from t2t_ref.train.recipes import RECIPES, Recipe

timm = import_timm()
from timm.data import Mixup, auto_augment  # noqa: E402
from timm.data.random_erasing import RandomErasing  # noqa: E402
from timm.data.transforms import RandomResizedCropAndInterpolation  # noqa: E402
from timm.optim import param_groups_weight_decay  # noqa: E402
from timm.scheduler import CosineLRScheduler  # noqa: E402

PLAIN = Recipe(data="cifar10", img_size=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))  # everything is off
FILL = (124, 116, 104)
NAMES = {name.removesuffix("Increasing").removesuffix("Rel"): name for name in auto_augment._RAND_INCREASING_TRANSFORMS}


def restored(images):
    """Without the normalisation of ``PLAIN``."""
    mean, std = (rearrange(torch.tensor(x), "c -> c 1 1") for x in (PLAIN.mean, PLAIN.std))
    return images * std + mean


# RandAugment


def test_the_operations_and_their_draw_are_those_of_the_authors_setting():
    theirs = auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", {"img_mean": FILL})
    recipe = RECIPES["imagenet"]
    assert list(OPERATIONS) == list(NAMES)
    assert theirs.num_layers == recipe.rand_augment_ops
    for operation in theirs.ops:
        assert (operation.prob, operation.magnitude, operation.magnitude_std) == (0.5, recipe.rand_augment, 0.5)
        assert operation.magnitude_std == recipe.rand_augment_std and operation.magnitude_max is None


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_does_what_timm_does(name):
    with get_sample_data("grace_hopper.jpg") as file:
        photograph = Image.open(file).convert("RGB").resize((96, 80))
    photograph = photograph.point(lambda value: 30 + 0.7 * value)  # or there is no contrast left to stretch
    image = rearrange(torch.from_numpy(np.array(photograph)), "h w c -> c h w") / 255
    level, sign = torch.tensor([0.93, 0.93, 0.4, 0.7]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    out = OPERATIONS[name](repeat(image, "c h w -> b c h w", b=4), level, sign, torch.tensor(FILL) / 255)
    assert out.shape == (4, 3, 80, 96) and out.min() >= 0 and out.max() <= 1
    how = {"img_mean": FILL, "interpolation": Image.Resampling.BILINEAR}
    for got, a, s in zip(out, level.tolist(), sign.tolist(), strict=True):
        theirs = auto_augment.AugmentOp(NAMES[name], prob=1.0, magnitude=10 * a, hparams=how)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(auto_augment.random, "random", lambda s=s: 0.25 if s > 0 else 0.75)  # their draw of the sign
            expected = rearrange(torch.from_numpy(np.array(theirs(photograph))), "h w c -> c h w") / 255
        off = (got - expected).abs().amax(dim=0) > 2.5 / 255  # Pillow rounds to bytes, at times twice
        moves = name in ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
        assert off.float().mean() <= (0.03 if moves else 0)  # where it moves things, pixels on the edge may differ
        assert (expected - image).abs().amax() > 0.03  # and it is no small thing


# mixing


def mixed_by_both(lam, place, height, width, monkeypatch, **alphas):
    """(images, targets) of ours and of timm, where both draw the same share and the same place."""
    torch.manual_seed(0)
    images, labels = torch.rand(6, 3, height, width), torch.tensor([0, 1, 2, 3, 4, 4])
    recipe = replace(PLAIN, smoothing=0.1, **alphas)
    object.__setattr__(recipe, "img_size", (height, width))  # whose own check knows squares alone
    timms = {f"{name}_alpha": alphas.get(name, 0.0) for name in ("mixup", "cutmix")}
    theirs = Mixup(**timms, label_smoothing=0.1, num_classes=5)
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributions.Beta, "sample", lambda self: torch.tensor(lam))
        patch.setattr(np.random, "beta", lambda *alpha: lam)
        before = torch.randint
        patch.setattr(torch, "randint", lambda *a: torch.tensor(int(place * a[0])) if len(a) == 2 else before(*a))
        patch.setattr(np.random, "randint", lambda low, high, size=None: int(place * high))
        ours = Augment(recipe, 5)(images, labels)
        return (restored(ours[0]), ours[1]), theirs(images.clone(), labels)


@pytest.mark.parametrize("lam", [0.03, 0.4, 0.9])
def test_mixup(lam, monkeypatch):
    (images, targets), (their_images, their_targets) = mixed_by_both(lam, 0.5, 16, 24, monkeypatch, mixup=0.8)
    torch.testing.assert_close(images, their_images)
    torch.testing.assert_close(targets, their_targets)


@pytest.mark.parametrize("place", [0.0, 0.3, 0.5, 0.95])
@pytest.mark.parametrize("lam", [0.75, 0.9375, 0.4375])
def test_cutmix(lam, place, monkeypatch):
    """Boxes whose sides are even. Of odd ones timm 1 keeps the last row; timm 0.3.4, the authors', left it out."""
    (images, targets), (their_images, their_targets) = mixed_by_both(lam, place, 16, 24, monkeypatch, cutmix=1.0)
    torch.testing.assert_close(images, their_images)
    torch.testing.assert_close(targets, their_targets)


# boxes


@pytest.mark.parametrize("size", [(500, 300), (300, 500), (64, 64), (1000, 10), (10, 1000), (1, 1)])
def test_random_crops_have_the_sizes_that_timm_draws(size):
    """The same seed gives the same box; only its place comes from left and top in the other order."""
    image, scale, ratio = Image.new("L", size), (0.08, 1.0), (3 / 4, 4 / 3)
    for seed in range(200):
        random.seed(seed)
        _, _, height, width = RandomResizedCropAndInterpolation.get_params(image, scale, ratio)
        left, top, right, bottom = draw_box(*size, scale, ratio, random.Random(seed))
        assert (right - left, bottom - top) == (max(width, 1), max(height, 1))
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]


def test_erasing_takes_as_much_as_timm_does():
    """As many images, as large a hole, noise as wild. The shape is kornia's draw: evenly in w / h, not in its log."""
    ones = torch.ones(1500, 3, 32, 40)
    recipe = replace(PLAIN, erasing=0.25)
    random.seed(0)
    torch.manual_seed(0)
    ours = Augment(recipe, 3).erase(ones.clone())
    theirs = RandomErasing(0.25, mode="pixel", device="cpu")(ones.clone())
    shares, areas, noises = [], [], []
    for images in (ours, theirs):
        holes = (images != 1).all(dim=1)
        touched = holes.any(dim=(1, 2))
        shares.append(touched.float().mean())
        areas.append(holes[touched].float().mean(dim=(1, 2)))
        noises.append(images[touched][holes[touched][:, None].expand(-1, 3, -1, -1)].std())
    assert 0.2 < min(shares) and max(shares) < 0.3  # 0.25, with a standard deviation of 0.011
    torch.testing.assert_close(areas[0].mean(), areas[1].mean(), atol=0.03, rtol=0)  # 0.18, of about 0.005
    torch.testing.assert_close(areas[0].std(), areas[1].std(), atol=0.02, rtol=0)
    torch.testing.assert_close(noises[0], noises[1], atol=0.03, rtol=0)


# the learning rate and the groups


@pytest.mark.parametrize("name", ["imagenet", "cifar10", "cifar_transfer"])
def test_the_learning_rate_is_that_of_timm_in_every_epoch(name):
    recipe = replace(RECIPES[name], lr_per_update=False)
    optimizer, own = (torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.lr) for _ in range(2))
    theirs = CosineLRScheduler(
        optimizer,
        t_initial=recipe.epochs - recipe.cooldown_epochs,
        lr_min=recipe.min_lr,
        warmup_t=recipe.warmup_epochs,
        warmup_lr_init=recipe.warmup_lr,
    )
    ours = make_scheduler(own, recipe, updates_per_epoch=7)
    for epoch in range(recipe.epochs):
        theirs.step(epoch)
        (expected,) = (group["lr"] for group in optimizer.param_groups)
        assert learning_rate(recipe, epoch) == pytest.approx(expected, rel=1e-12)
        assert own.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-12)
        own.step()
        ours.step()


@pytest.mark.parametrize("name", ["t2t_vit_7", "t2t_vit_t_14", "vit_small_patch16", "t2t_vit_14_se"])
def test_the_groups_of_parameters_are_those_of_timm(name):
    model = create_model(name, depth=2, num_classes=7, img_size=64)
    theirs = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    ours = parameter_groups(model, replace(RECIPES["imagenet"], weight_decay=0.05))
    for groups in (theirs, ours):
        assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.05]
    for decay in (0.0, 0.05):
        (a,), (b,) = ([g["params"] for g in groups if g["weight_decay"] == decay] for groups in (theirs, ours))
        assert {id(parameter) for parameter in a} == {id(parameter) for parameter in b}
