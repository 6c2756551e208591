"""The experiments of chapters 12 and 13: small models, from scratch, on scattered digits.

    python -m t2t_ref.experiments                    lists them
    python -m t2t_ref.experiments tokenisers         runs one and writes results/tokenisers.json

Every arm gets the same budget and the same search for its learning rate: each of ``RATES`` once, with a seed of its
own, judged on validation digits. Its best rate then trains one model a seed. The seed fixes the
first weights and the stream of images, so that arms can be compared seed by seed. Test digits are looked at once, at
the end of each of these runs. A file is written after every run; the same command goes on where it was interrupted.
One thread, so that the numbers do not depend on the machine's cores.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from t2t_ref.arguments import check_known
from t2t_ref.data.digits import ScatteredDigits
from t2t_ref.inspection.tables import count_macs, count_parameters, eval_without_gradients
from t2t_ref.models.cnn_designs import GhostT2TViT, GhostViT, SEViT
from t2t_ref.models.t2t_vit import T2TViT
from t2t_ref.models.token_performer import TokenPerformer
from t2t_ref.models.vit import ViT

DATA = dict(size=64, digit_size=(40, 56), polarity="light", contrast=0.7, clutter=0, noise=0.05)
TRAINING = dict(samples=12_000, batch_size=50, weight_decay=0.05, warmup=0.1, clip_grad=1.0)
RATES = (5e-4, 1e-3, 2e-3)
SEARCH_SEED = 100
SEEDS = (0, 1, 2, 3, 4)
BACKBONE = dict(img_size=64, num_classes=10, embed_dim=96, depth=4, num_heads=4, mlp_ratio=2.0)
# dropout in the performer alone would be one more difference between the arms
T2T = BACKBONE | dict(token_dim=32, performer_drop_rate=0.0)
DEEP, WIDE = dict(embed_dim=64, num_heads=2), dict(embed_dim=132, num_heads=4, depth=2)
SLIM = dict(embed_dim=80)  # about the parameters of a ghost model, without ghosts

MODELS = {"t2t": T2TViT, "t2t ghost": GhostT2TViT, "vit": ViT, "vit se": SEViT, "vit ghost": GhostViT}

# an arm is a table of plain values: "kind" picks the model, ARM_OPTIONS are read here, the rest are its arguments
ARM_OPTIONS = ("kind", "position", "features", "redraw", "distinct", "samples")
VIT_ARM = dict(kind="vit", qkv_bias=False, **BACKBONE)
PERFORMER = dict(kind="t2t", tokens_type="performer", **T2T)
TOKENISERS = {
    "hard split": VIT_ARM,
    "three convolutions": dict(kind="t2t", tokens_type="convolution", **T2T),
    "T2T, performer": PERFORMER,
    "T2T, transformer": dict(kind="t2t", tokens_type="transformer", **T2T),
}

EXPERIMENTS: dict[str, dict[str, dict]] = {
    "tokenisers": TOKENISERS,
    # over three times the budget: what is left of the first order once every arm has got going
    # and whether it was the tokens or the table, since T2T comes with a sinusoid and ViT with a learned table
    "tokenisers_long": {
        **{label: arm | dict(samples=40_000) for label, arm in TOKENISERS.items()},
        "hard split, sinusoid": VIT_ARM | dict(position="sinusoid", samples=40_000),
    },
    "deep_narrow": {
        "T2T, deep": PERFORMER | DEEP | dict(depth=9),
        "T2T, wide": PERFORMER | WIDE,
        "hard split, deep": VIT_ARM | DEEP | dict(depth=10),
        "hard split, wide": VIT_ARM | WIDE,
    },
    "positions": {
        "T2T, sinusoid": PERFORMER,
        "T2T, learned": PERFORMER | dict(position="learned"),
        "T2T, none": PERFORMER | dict(position="none"),
        "hard split, sinusoid": VIT_ARM | dict(position="sinusoid"),
        "hard split, learned": VIT_ARM,
        "hard split, none": VIT_ARM | dict(position="none"),
    },
    "performer": {
        "epsilon 1e-8": PERFORMER,
        "epsilon 0": PERFORMER | dict(performer_epsilon=0.0),
        "m = 8": PERFORMER | dict(features=8),
        "m = 32": PERFORMER | dict(features=32),
        "m = 64": PERFORMER | dict(features=64),
        "redrawn": PERFORMER | dict(redraw=True),
    },
    "sample_efficiency": {
        **{f"T2T, {n} images": PERFORMER | dict(distinct=n) for n in (1000, 2000, 4000)},
        "T2T, endless": PERFORMER,
        **{f"hard split, {n} images": VIT_ARM | dict(distinct=n) for n in (1000, 2000, 4000)},
        "hard split, endless": VIT_ARM,
    },
    "cnn_designs": {
        "hard split, plain": VIT_ARM,
        "hard split, SE": VIT_ARM | dict(kind="vit se"),
        "hard split, 12 heads": VIT_ARM | dict(num_heads=12),
        "hard split, ghost": VIT_ARM | dict(kind="vit ghost"),
        "hard split, slim": VIT_ARM | SLIM,
        "T2T, plain": PERFORMER,
        "T2T, ghost": PERFORMER | dict(kind="t2t ghost"),
        "T2T, slim": PERFORMER | SLIM,
    },
}


# models


def build_model(arm: dict) -> nn.Module:
    """The model of an arm, with fresh weights from torch's global generator."""
    arguments = {name: value for name, value in arm.items() if name not in ARM_OPTIONS}
    model = MODELS[arm["kind"]](**arguments)
    set_position(model, arm.get("position"))
    if "features" in arm:
        for layer in performers(model):
            layer.w = nn.Parameter(random_directions(arm["features"], layer.w.shape[1]), requires_grad=False)
    return model


def set_position(model: nn.Module, kind: str | None) -> None:
    """Give a model a fixed sinusoid, a learned table or none; None leaves the one it has."""
    if kind is None:
        return
    check_known("position", kind, ("sinusoid", "learned", "none"))
    _, n, dim = model.pos_embed.shape
    if kind == "sinusoid":
        from t2t_ref.models.position import sinusoid_table

        table = sinusoid_table(n, dim)
    else:
        table = torch.zeros(1, n, dim)
    if kind == "learned":
        nn.init.trunc_normal_(table, std=0.02)  # as ViT starts
    model.pos_embed = nn.Parameter(table, requires_grad=kind == "learned")


def performers(model: nn.Module) -> list[TokenPerformer]:
    """The T2T layers with random features, from the first to the last."""
    return [module for module in model.modules() if isinstance(module, TokenPerformer)]


def random_directions(m: int, dim: int) -> Float[Tensor, "m d"]:
    """m rows of norm sqrt(m), as the authors draw them: orthogonal, in blocks of at most ``dim`` rows.

    Shapes:  return  m d     d = dim
    """
    blocks = [nn.init.orthogonal_(torch.empty(min(dim, m - start), dim)) for start in range(0, m, dim)]
    return torch.cat(blocks) * math.sqrt(m)


def redraw_directions(model: nn.Module) -> None:
    """Fresh random directions for every performer, in place."""
    with torch.no_grad():
        for layer in performers(model):
            layer.w.copy_(random_directions(*layer.w.shape))


# data


@lru_cache(maxsize=1)  # the arms of one seed follow each other and share it
def stream(seed: int, samples: int) -> tuple[UInt8[Tensor, "n c h w"], Int[Tensor, "n"]]:
    """The training images of a seed, in bytes so that a whole run fits into memory, and their labels.

    Shapes:  return  (n c h w, n)    n = samples
    """
    return in_bytes(ScatteredDigits("train", seed=seed, **DATA), samples)


@lru_cache(maxsize=2)
def held_out(split: str, samples: int = 2000) -> tuple[UInt8[Tensor, "n c h w"], Int[Tensor, "n"]]:
    """Validation or test images and their labels, the same for every arm and seed.

    Shapes:  return  (n c h w, n)    n = samples, images in bytes
    """
    return in_bytes(ScatteredDigits(split, seed=0, **DATA), samples)


def in_bytes(digits: ScatteredDigits, samples: int) -> tuple[UInt8[Tensor, "n c h w"], Int[Tensor, "n"]]:
    """The first samples of a data set, stored in bytes.

    Shapes:  return  (n c h w, n)    n = samples
    """
    parts = [digits.draw(range(start, min(start + 500, samples))) for start in range(0, samples, 500)]
    images = torch.cat([(images * 255).round().byte() for images, _ in parts])
    return images, torch.cat([labels for _, labels in parts])


def normalise(images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Bytes to numbers of about mean 0 and deviation 1.

    Shapes:  images  b c h w
             return  b c h w
    """
    return (images / 255 - 0.4) / 0.25


def batches(seed: int, samples: int, batch_size: int, distinct: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """The stream in batches; with ``distinct``, only its first images, again and again in a new order."""
    images, labels = stream(seed, distinct or samples)
    order = torch.arange(samples)
    if distinct is not None:
        shuffle = torch.Generator().manual_seed(seed)
        passes = math.ceil(samples / distinct)
        order = torch.cat([torch.randperm(distinct, generator=shuffle) for _ in range(passes)])[:samples]
    for index in order.split(batch_size):
        yield normalise(images[index]), labels[index]


# one run


def train(arm: dict, rate: float, seed: int, samples: int, watch: Callable | None = None) -> nn.Module:
    """Train one arm: AdamW, linear warm-up, cosine to zero, gradients clipped. ``watch(model, step, loss)`` looks."""
    torch.manual_seed(seed)
    model = build_model(arm)
    trained = [p for p in model.parameters() if p.requires_grad]
    decay = [p for name, p in model.named_parameters() if p.requires_grad and decays(model, name, p)]
    plain = [p for name, p in model.named_parameters() if p.requires_grad and not decays(model, name, p)]
    groups = [dict(params=decay, weight_decay=TRAINING["weight_decay"]), dict(params=plain, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    batch_size = TRAINING["batch_size"]
    steps = math.ceil(samples / batch_size)
    warmup = TRAINING["warmup"] * steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    for step, (images, labels) in enumerate(batches(seed, samples, batch_size, arm.get("distinct")), start=1):
        if arm.get("redraw"):
            redraw_directions(model)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, TRAINING["clip_grad"])
        optimizer.step()
        schedule.step()
        if watch:
            watch(model, step, loss)
    return model


def decays(model: nn.Module, name: str, parameter: Tensor) -> bool:
    """Whether weight decay pulls on a parameter: not on vectors, the class token and the position table."""
    return parameter.ndim > 1 and name not in model.no_weight_decay()


def score(model: nn.Module, split: str, samples: int | None = None) -> tuple[float, float]:
    """Accuracy in percent, and the mean loss, on held-out digits; on the first ``samples`` of them for a quick look."""
    images, labels = (whole[:samples] for whole in held_out(split))
    with eval_without_gradients(model):
        logits = torch.cat([model(normalise(part)) for part in images.split(500)])
    accuracy = 100 * (logits.argmax(dim=-1) == labels).double().mean()
    return round(accuracy.item(), 2), round(F.cross_entropy(logits, labels).item(), 4)


def run(arm: dict, rate: float, seed: int, samples: int, split: str) -> dict:
    """Train one model and describe the run: accuracy, losses, processor seconds."""
    start = time.process_time()
    losses, curve = [], []
    every = max(1, math.ceil(samples / TRAINING["batch_size"]) // 8)

    def watch(model: nn.Module, step: int, loss: Tensor) -> None:
        losses.append(loss.item())
        if step % every == 0:
            curve.append(
                [step * TRAINING["batch_size"], round(sum(losses[-every:]) / every, 4), score(model, "val", 500)[0]]
            )

    model = train(arm, rate, seed, samples, watch)
    accuracy, loss = score(model, split)
    seconds = round(time.process_time() - start, 1)
    return dict(
        seed=seed, accuracy=accuracy, loss=loss, training_loss=curve[-1][1] if curve else None, curve=curve,
        seconds=seconds,
    )  # fmt: skip


# an experiment


def describe() -> dict:
    """Where the numbers come from."""
    return dict(
        versions=dict(python=platform.python_version(), torch=torch.__version__),
        device=f"{platform.machine()} processor, 1 thread",
        data=dict(name="scattered digits") | {k: list(v) if isinstance(v, tuple) else v for k, v in DATA.items()},
        training=dict(TRAINING, rates=list(RATES), search_seed=SEARCH_SEED),
    )


def run_experiment(
    name: str, folder: Path, seeds: tuple[int, ...] = SEEDS, say: Callable = print, jobs: int = 1
) -> dict:
    """Run what is missing of an experiment and keep ``folder/name.json`` up to date after each run.

    An arm that another file in the folder has already (the same values, data and training) is taken over from there.

    Raises:  ValueError for an unknown experiment, or a file made with other settings
    """
    check_known("experiment", name, list(EXPERIMENTS))
    torch.set_num_threads(1)
    path = folder / f"{name}.json"
    result = json.loads(path.read_text()) if path.exists() else None
    fresh = dict(experiment=name, command=f"python -m t2t_ref.experiments {name}", **describe(), arms={})
    if result is None:
        result = fresh
    elif any(result[key] != fresh[key] for key in ("data", "training")):
        raise ValueError(f"{path} was made with other data or training; move it away to start afresh")

    for label, values in EXPERIMENTS[name].items():
        if label not in result["arms"]:
            result["arms"][label] = found_elsewhere(folder, values, fresh) or new_arm(values)
    write(path, result)
    searches = [
        (arm, rate, SEARCH_SEED, "val")
        for arm in result["arms"].values()
        for rate in RATES
        if str(rate) not in arm["search"]
    ]
    labels = {id(arm): label for label, arm in result["arms"].items()}
    for (arm, rate, *_), found in run_all(searches, jobs):
        arm["search"][str(rate)] = dict(accuracy=found["accuracy"], seconds=found["seconds"])
        write(path, result)
        say(f"{name}: {labels[id(arm)]}: rate {rate}: {found['accuracy']} % of validation")
    for arm in result["arms"].values():
        arm["rate"] = max(RATES, key=lambda rate: arm["search"][str(rate)]["accuracy"])
    finals = [
        (arm, arm["rate"], seed, "test")
        for seed in seeds
        for arm in result["arms"].values()
        if seed not in [done["seed"] for done in arm["runs"]]
    ]
    for (arm, _, seed, _), found in run_all(finals, jobs):
        arm["runs"] = sorted([*arm["runs"], found], key=lambda done: done["seed"])
        write(path, result)
        say(f"{name}: {labels[id(arm)]}: seed {seed}: {found['accuracy']} % of test")
    return result


def run_all(runs: list[tuple[dict, float, int, str]], jobs: int) -> Iterator[tuple[tuple, dict]]:
    """Each run (arm, rate, seed, split) with what came of it, as they end; ``jobs`` at a time, one thread each."""
    tasks = [
        (arm["values"], rate, seed, arm["values"].get("samples", TRAINING["samples"]), split)
        for arm, rate, seed, split in runs
    ]
    if jobs == 1:
        for which, task in zip(runs, tasks, strict=True):
            yield which, run(*task)
        return
    # spawned, not forked: a fork of a process in which torch has computed can hang
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(run, *task): which for which, task in zip(runs, tasks, strict=True)}
        for future in as_completed(futures):
            yield futures[future], future.result()


def new_arm(values: dict) -> dict:
    """An arm before its first run, with its size."""
    model = build_model(values)
    macs = count_macs(model, torch.zeros(1, 3, DATA["size"], DATA["size"]))
    parameters = count_parameters(model, trainable_only=True)
    return dict(values=values, parameters=parameters, macs=macs, search={}, rate=None, runs=[])


def found_elsewhere(folder: Path, values: dict, fresh: dict) -> dict | None:
    """The same arm in another experiment's file, if it was trained in the same way."""
    for path in sorted(folder.glob("*.json")):
        other = json.loads(path.read_text())
        if all(other.get(key) == fresh[key] for key in ("data", "training")):
            for arm in other["arms"].values():
                if arm["values"] == values and arm["runs"]:
                    return arm
    return None


def write(path: Path, result: dict) -> None:
    """Replace the file in one step, so that an interruption leaves the old one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".json.part")
    draft.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(draft, path)


# reading results


def accuracies(arm: dict) -> dict[int, float]:
    """Accuracy in percent of each seed of an arm."""
    return {run["seed"]: run["accuracy"] for run in arm["runs"]}


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean of a few values, and half the width of its 95 % interval.

    Units:   both in those of ``values``
    Raises:  ValueError for fewer than two values, which have no spread
    Source:  Student, "The probable error of a mean", Biometrika 6, 1908
    """
    from scipy.special import stdtrit

    n = len(values)
    if n < 2:
        raise ValueError(f"found {n} value(s), expected at least 2: a single run has no spread")
    mean = sum(values) / n
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, float(stdtrit(n - 1, 0.975)) * deviation / math.sqrt(n)


def paired_interval(arm: dict, base: dict) -> tuple[float, float]:
    """By how many points an arm is ahead of another, seed by seed: mean, and half the width of its 95 % interval.

    Units:   points of accuracy
    Raises:  ValueError if the two were not run with the same seeds, or with fewer than two
    """
    ours, theirs = accuracies(arm), accuracies(base)
    if ours.keys() != theirs.keys():
        raise ValueError(f"seeds {sorted(ours)} and {sorted(theirs)} do not pair up")
    return mean_interval([ours[seed] - theirs[seed] for seed in ours])


def summary(result: dict) -> list[dict]:
    """A row for each arm of an experiment: size, chosen rate, accuracy with its interval, seconds of all its runs."""
    rows = []
    for label, arm in result["arms"].items():
        mean, half = mean_interval(list(accuracies(arm).values()))
        seconds = sum(run["seconds"] for run in [*arm["search"].values(), *arm["runs"]])
        sizes = dict(parameters=arm["parameters"], macs=arm["macs"], rate=arm["rate"])
        rows.append(dict(label=label, **sizes, mean=mean, half=half, seconds=seconds))
    return rows


def main(arguments: list[str]) -> int:
    """Run the command line. Returns the exit status: 2 for an unknown experiment."""
    parser = argparse.ArgumentParser(prog="python -m t2t_ref.experiments", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(EXPERIMENTS)}; none lists them")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder of the results files")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with one thread")
    options = parser.parse_args(arguments)
    if not options.names:
        for name, arms in EXPERIMENTS.items():
            print(f"{name}: {'; '.join(arms)}")
    try:
        for name in options.names:
            run_experiment(name, options.output, tuple(options.seeds), jobs=options.jobs)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
