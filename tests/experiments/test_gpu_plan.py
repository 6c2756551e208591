"""The plan for a machine with a GPU: its arms, its costs, and a small copy of it, run on the processor."""

from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch

from t2t_ref.experiments import build_model, gpu_plan, runs
from t2t_ref.experiments.__main__ import main
from t2t_ref.inspection import count_parameters

TINY = dict(kind="vit", qkv_bias=False, embed_dim=16, depth=1, num_heads=2, mlp_ratio=2.0)


@pytest.fixture
def folder(tmp_path):
    """A copy of a CIFAR of 40 and 20 images, whose first pixel says which image it is."""
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))})
    (tmp_path / "plain_text").mkdir()
    for split, count, first in (("train", 40, 0), ("test", 20, 100)):
        images = np.random.RandomState(count).randint(0, 255, (count, 32, 32, 3)).astype("uint8")
        images[:, 0, 0, 0] = first + np.arange(count)
        rows = {"img": list(images), "label": [number % 10 for number in range(count)]}
        table = datasets.Dataset.from_dict(rows, features)
        table.to_parquet(tmp_path / "plain_text" / f"{split}-00000-of-00001.parquet")
    return tmp_path


def numbers(data):
    return [int(image[0, 0, 0]) for image, _ in data]


def small(folder, **changes):
    few = dict(epochs=1, warmup_epochs=0, batch_size=4, img_size=32, evaluate_every=1, epoch_samples=36, pad_crop=2)
    return replace(gpu_plan.recipe_for(f"cifar10:{folder}"), workers=0, precision="no", **few | changes)


def test_arms_of_equal_size_stay_nearly_equal():
    for name, experiment in gpu_plan.plan("cifar10", ("deep_narrow", "cnn_designs")).items():
        with torch.device("meta"):
            models = {label: build_model(arm, img_size=224) for label, arm in experiment.arms.items()}
        sizes = {label: count_parameters(model, trainable_only=True) for label, model in models.items()}
        assert all(model.head.in_features >= 256 for model in models.values()), name
        if name.endswith("deep_narrow"):
            for kind in ("T2T", "hard split"):
                deep, wide = (sizes[f"{kind}, {shape}"] for shape in ("deep", "wide"))
                assert abs(deep / wide - 1) < 0.13


def test_the_rate_is_chosen_on_images_that_no_run_trains_on(folder):
    search, final = (runs.open_stream(small(folder, test_split=split)) for split in ("val", "test"))
    assert numbers(search.train) == numbers(final.train) == list(range(36))
    assert numbers(search.test) == [36, 37, 38, 39] and numbers(final.test) == list(range(100, 120))
    assert numbers(runs.open_stream(small(folder), distinct=5).train) == [n % 5 for n in range(36)]


def test_a_small_copy_of_the_plan_runs_and_goes_on(folder, tmp_path):
    (name, experiment), said = *gpu_plan.plan(f"cifar10:{folder}", ("positions",)).items(), []
    assert name == "gpu_cifar10_positions"
    few = replace(experiment, arms={"one": TINY}, recipe=small(folder), rates=(1e-3, 2e-3), seeds=(0, 1), cpu=True)
    result = runs.run_experiment(name, few, tmp_path / "out", say=said.append)
    assert len(said) == 2 * 2 + 2 and result["command"].endswith("--gpu-plan cifar10:FOLDER positions")
    arm = result["arms"]["one"]
    for entry in arm["search"].values():
        assert all(run["accuracy"] % 25 == 0 for run in entry["runs"])  # of four images
    assert all(run["accuracy"] % 5 == 0 and run["loss"] > 0 for run in arm["runs"])  # of twenty
    runs.run_experiment(name, few, tmp_path / "out", say=said.append)
    assert len(said) == 6
    elsewhere = replace(few, recipe=replace(few.recipe, data="cifar10:another/folder"))
    assert runs.describe(name, elsewhere) == runs.describe(name, few) and str(folder) not in str(result)


def test_the_work_is_what_a_pencil_gives(monkeypatch):
    (experiment,) = gpu_plan.plan("cifar100", ("deep_narrow",)).values()
    one = replace(experiment, arms={"vit": TINY | dict(embed_dim=64)}, rates=(1e-3,), seeds=(0,), search_seeds=())
    tokens, width = 197, 64
    block = tokens * (4 * width * width + 2 * width * 2 * width) + 2 * tokens * tokens * width
    macs = 196 * 768 * width + block + width * 10
    images = 30 * (45_000 // 128) * 128
    assert gpu_plan.petaflops(one) == pytest.approx(6 * macs * images / 1e15, rel=1e-3)
    assert gpu_plan.costs({"x": one}, 1.0).startswith(f"x: 1 arms, {gpu_plan.petaflops(one):,.0f} PFLOP, ")


def test_without_a_gpu_the_command_says_what_it_would_do(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--gpu-plan", "positions", "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "gpu_cifar10_positions: 6 arms, " in said and "hours, at 30 TFLOP/s" in said and "no GPU is here" in said
    assert list(tmp_path.iterdir()) == []
    for arguments, words in (
        (["--gpu-plan", "cifar11"], "did you mean 'cifar1"),
        (["--gpu-plan", "cifar10", "position"], "did you mean 'positions'"),
        (["--gpu-plan", "cifar10", "positions", "--sustained", "0"], "sustained is 0.0 TFLOP/s, expected more than 0"),
    ):
        assert main(arguments) == 2 and words in capsys.readouterr().err
