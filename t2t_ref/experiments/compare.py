"""T2T-ViT against ViT on the centred digits, from scratch (chapter 11)::

    python -m t2t_ref.train.compare

writes results/digits.json. Both arms follow the recipe ``digits`` with ``CHANGES``, and have the same backbone and the
same number of tokens. The learning rate of an arm is the one of ``RATES`` that does best on the validation digits, with
a seed of its own. Then each seed trains both arms; the test digits are looked at once, at the end of these runs. The
file is written after every run, and the same command goes on where it was interrupted. One thread.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from t2t_ref.experiments.runs import write
from t2t_ref.inspection.tables import count_macs, count_parameters
from t2t_ref.train.loop import build_model, fit, versions
from t2t_ref.train.recipes import Recipe, find_recipe

CHANGES = dict(epochs=10, evaluate_every=10, smoothing=0.0)
VIT = dict(
    model="vit_small_patch16",
    model_options=(("embed_dim", 96), ("depth", 6), ("num_heads", 3), ("mlp_ratio", 2.0)),
)
ARMS = {"hard split": VIT, "T2T, performer": {}}
RATES = (1e-3, 2e-3, 4e-3)
SEARCH_SEED = 100
SEEDS = (0, 1, 2, 3, 4)


def recipe_of(arm: str, **changes) -> Recipe:
    """The recipe of an arm, with further changes."""
    return find_recipe("digits", CHANGES | ARMS[arm] | changes)


def run(recipe: Recipe) -> dict:
    """Train by a recipe and describe the run.

    Units:   accuracy in percent; losses are pairs (updates, mean loss since the pair before) in nats; seconds of the
             processor
    """
    start = time.process_time()
    result = fit(recipe, cpu=True)
    last = result.epochs[-1]
    return {
        "seed": recipe.seed,
        "accuracy": round(100 * last["test_accuracy"], 2),
        "loss": round(last["test_loss"], 4),
        "losses": [[line["update"], round(line["loss"], 4)] for line in result.steps],
        "seconds": round(time.process_time() - start, 1),
    }


def describe() -> dict:
    """What was done, with what: a file made with something else is not gone on with."""
    recipe = {field: value for field, value in vars(recipe_of("T2T, performer")).items() if field != "lr"}
    return json.loads(
        json.dumps(
            {
                "experiment": "digits",
                "command": "python -m t2t_ref.train.compare",
                "recipe": recipe,
                "rates": RATES,
                "search_seed": SEARCH_SEED,
            }
        )
    )


def compare(folder: Path, seeds: tuple[int, ...] = SEEDS, say: Callable[[str], object] = print) -> dict:
    """Run what is missing, and keep ``folder/digits.json`` up to date after each run.

    Raises:  ValueError for a file that was made by another recipe or other rates
    """
    torch.set_num_threads(1)
    path, fresh = folder / "digits.json", describe()
    result = json.loads(path.read_text()) if path.exists() else fresh | {
        "versions": {"python": platform.python_version()} | versions(),
        "device": f"{platform.machine()} processor, 1 thread",
        "arms": {},
    }  # fmt: skip
    if any(result[key] != fresh[key] for key in fresh):
        raise ValueError(f"{path} was made by another recipe or other rates; move it away to start afresh")
    for name in ARMS:
        if name not in result["arms"]:
            result["arms"][name] = size_of(recipe_of(name)) | {"search": {}, "rate": None, "runs": []}
    for name, arm in result["arms"].items():
        for rate in RATES:
            if str(rate) not in arm["search"]:
                found = run(recipe_of(name, lr=rate, seed=SEARCH_SEED, test_split="val"))
                arm["search"][str(rate)] = {key: found[key] for key in ("accuracy", "loss", "seconds")}
                write(path, result)
                say(f"{name}: rate {rate}: {found['accuracy']} % of validation")
        # 200 digits leave ties: the smaller loss decides them
        arm["rate"] = min(
            RATES, key=lambda rate: (-arm["search"][str(rate)]["accuracy"], arm["search"][str(rate)]["loss"])
        )
    for seed in seeds:
        for name, arm in result["arms"].items():
            if seed not in [done["seed"] for done in arm["runs"]]:
                arm["runs"].append(run(recipe_of(name, lr=arm["rate"], seed=seed)))
                write(path, result)
                say(f"{name}: seed {seed}: {arm['runs'][-1]['accuracy']} % of test")
    return result


def size_of(recipe: Recipe) -> dict:
    """Trainable parameters and multiply-accumulates of a recipe's model."""
    model = build_model(replace(recipe, seed=0), num_classes=10).eval()
    image = torch.zeros(1, 3, recipe.img_size, recipe.img_size)
    return {"parameters": count_parameters(model, trainable_only=True), "macs": count_macs(model, image)}


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status."""
    parser = argparse.ArgumentParser("python -m t2t_ref.train.compare", description=__doc__.partition("::")[0])
    parser.add_argument("--output", type=Path, default=Path("results"), metavar="DIR", help="folder of digits.json")
    try:
        compare(parser.parse_args(argv).output)
    except ValueError as error:
        print(f"t2t_ref.train.compare: {error}", file=sys.stderr)
        return 2
    return 0
