"""The questions of chapters 12 and 13 at full image size, for a machine with a GPU: CIFAR at 224 pixels.

    python -m t2t_ref.experiments --gpu-plan                          what would be run, and what it would cost
    python -m t2t_ref.experiments --gpu-plan cifar10:FOLDER           the same; where a GPU is, it is run
    python -m t2t_ref.experiments --gpu-plan cifar10:FOLDER positions one question of it

The arms are those of the digits, four times as wide with twice the heads: what is equal in size stays so to an eighth.
Five seeds, two rates with two seeds of their own, judged on the last tenth of the training images.
"""

import torch

from t2t_ref.arguments import check_known
from t2t_ref.experiments.arms import ABLATIONS, CLASSES, Experiment, build_model
from t2t_ref.experiments.runs import HELD_BACK, images_seen
from t2t_ref.inspection import count_macs
from t2t_ref.train import Recipe, find_recipe

TIMES = {"embed_dim": 4, "growth_rate": 4, "num_heads": 2, "token_dim": 2}
PASSES = 3  # a backward pass costs about two forward ones
# TFLOP/s: what small models may reach on a GPU of a data centre in bfloat16; a guess, not a measurement
SUSTAINED = 30.0
IMAGES = 50_000  # to train on, in either CIFAR


def recipe_for(data: str) -> Recipe:
    """Thirty epochs of CIFAR at 224 pixels, crops and flips alone: what differs shall be the arms.

    Raises:
        ValueError: for another data set
    """
    name = data.partition(":")[0]
    check_known("data set of the plan", name, list(CLASSES))
    changes = dict(
        data=data, epoch_samples=IMAGES - IMAGES // HELD_BACK, img_size=224, epochs=30, warmup_epochs=2,
        cooldown_epochs=0, min_lr=0.0, precision="bf16", clip_grad=1.0, drop_path=0.0, ema_decay=0.0, smoothing=0.0,
        mixup=0.0, cutmix=0.0, rand_augment=0.0, erasing=0.0, pad_crop=28, evaluate_every=30, save_every=0,
        test_split="val",
    )  # fmt: skip
    return find_recipe(name, changes)


def enlarged(values: dict) -> dict:
    """An arm of the digits for images of 224 pixels."""
    return {name: value * TIMES[name] if name in TIMES else value for name, value in values.items()}


def plan(data: str, questions: tuple[str, ...] = ()) -> dict[str, Experiment]:
    """The experiments by the names of their files, such as gpu_cifar10_positions.

    Args:
        data: "cifar10" or "cifar100", with ":FOLDER" for a local copy
        questions: of chapters 12 and 13; none for all

    Raises:
        ValueError: for another data set or an unknown question
    """
    recipe, found = recipe_for(data), {}
    for question in questions or ABLATIONS:
        check_known("question of the plan", question, list(ABLATIONS))
        name = data.partition(":")[0]
        about = dict(command=f"python -m t2t_ref.experiments --gpu-plan {name}:FOLDER {question}")
        if torch.cuda.is_available():
            about["device"] = torch.cuda.get_device_name()
        arms = {label: enlarged(values) for label, values in ABLATIONS[question].items()}
        found[f"gpu_{name}_{question}"] = Experiment(arms, recipe, cpu=False, about=about)
    return found


def petaflops(experiment: Experiment) -> float:
    """The work of all runs of an experiment.

    Units:
        10^15 floating-point operations, two for each multiply-accumulate
    """
    total, recipe = 0.0, experiment.recipe
    for values in experiment.arms.values():
        with torch.device("meta"):
            model = build_model(values, img_size=recipe.img_size)
            macs = count_macs(model, torch.zeros(1, 3, recipe.img_size, recipe.img_size))
        runs = len(experiment.rates) * len(experiment.search_seeds) + len(experiment.seeds)
        total += 2 * PASSES * macs * images_seen(recipe) * runs
    return total / 1e15


def costs(plan: dict[str, Experiment], sustained: float = SUSTAINED) -> str:
    """A line for each experiment, and their sum: the work, and the hours that it takes at a given speed.

    Units:
        sustained is 10^12 operations in a second

    Raises:
        ValueError: for a speed that is not positive
    """
    if not sustained > 0:
        raise ValueError(f"sustained is {sustained} TFLOP/s, expected more than 0")
    work = {name: petaflops(experiment) for name, experiment in plan.items()}
    lines = [
        f"{name}: {len(plan[name].arms)} arms, {amount:,.0f} PFLOP, {amount / sustained / 3.6:.1f} hours"
        for name, amount in work.items()
    ]
    total = sum(work.values())
    return "\n".join([*lines, f"together {total / sustained / 3.6:.0f} hours, at {sustained:g} TFLOP/s sustained"])
