"""One driver for all experiments: runs by ``t2t_ref.train.fit``, and a file that is written anew after each of them.

Every arm gets the same budget and the same search for its learning rate: each of the rates, with seeds of its own,
judged on validation digits. The best rate then trains one model a seed. The seed fixes the first weights and the stream
of images, so that arms can be compared seed by seed. Test digits are looked at once, at the end of each of these runs.
The same command goes on where it was interrupted. One thread, so that the numbers do not depend on the number of cores.
"""

import json
import math
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import lru_cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from statistics import fmean

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

import t2t_ref
from t2t_ref import train
from t2t_ref.data.digits import SPLITS, ScatteredDigits
from t2t_ref.data.sources import TEST_SAMPLES, Data, open_data
from t2t_ref.experiments.arms import CLASSES, LONG, Experiment, build_model, recipe_of
from t2t_ref.inspection import count_macs, count_parameters
from t2t_ref.train.evaluate import evaluate
from t2t_ref.train.recipes import Recipe
from t2t_ref.train.sampling import generators_kept

CHUNK = 250  # images that are drawn together
HELD_BACK = 10  # one in so many of CIFAR's training images chooses the rate
WATCHED = 500  # validation digits that are looked at after each epoch

# data


class Stream(Dataset):
    """Images in memory, epoch after epoch a new part; with ``distinct``, only the first, again and again in new order.

    Shapes:
        images: ``n c h w``, bytes
        labels: ``n``

    Units:
        length is samples in an epoch
    """

    def __init__(self, images: UInt8[Tensor, "n c h w"], labels: Int[Tensor, "n"], order: list[int], length: int):
        self.images, self.labels, self.order, self.length, self.epoch = images, labels, order, length, 0

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Show the samples of another epoch from now on."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "c h w"], int]:
        (item,) = self.__getitems__([index])
        return item

    def __getitems__(self, indices: list[int]) -> list[tuple[UInt8[Tensor, "c h w"], int]]:
        """Several samples at once, as torch's DataLoader asks for them."""
        numbers = [self.order[self.epoch * self.length + index] for index in indices]
        return list(zip(self.images[numbers], self.labels[numbers].tolist(), strict=True))


@lru_cache(maxsize=220)  # 55,000 images: the arms of one seed follow each other and share them
def chunk(split: str, seed: int, number: int, size: int, options: tuple) -> tuple[Tensor, Tensor]:
    """Some scattered digits, in bytes so that a whole run fits into memory, and their labels.

    Shapes:
        return: ``(b c h w, b)``, b = CHUNK
    """
    digits = ScatteredDigits(split, seed=seed, size=size, **dict(options))
    images, labels = digits.draw(range(number * CHUNK, (number + 1) * CHUNK))
    return (images * 255).round().byte(), labels


def first_digits(
    split: str, seed: int, samples: int, recipe: Recipe = LONG
) -> tuple[UInt8[Tensor, "n c h w"], Int[Tensor, "n"]]:
    """The first scattered digits of a seed, in bytes, and their labels.

    Shapes:
        return: ``(n c h w, n)``, n = samples
    """
    numbers = range(math.ceil(samples / CHUNK))
    parts = [chunk(split, seed, number, recipe.img_size, recipe.data_options) for number in numbers]
    images, labels = (torch.cat(part)[:samples] for part in zip(*parts, strict=True))
    return images, labels


def held_out(split: str, samples: int = TEST_SAMPLES, recipe: Recipe = LONG) -> Dataset:
    """Validation or test images and their labels, the same for every arm and seed.

    Units:
        samples counts scattered digits

    Note:
        of the centred digits there is a fixed number
    """
    if recipe.data == "digits":
        return open_data(replace(recipe, test_split=split), training=False).test
    return TensorDataset(*first_digits(split, 0, samples, recipe))


def open_stream(recipe: Recipe, distinct: int | None = None, watched: int = WATCHED) -> Data:
    """The data of a run: its stream of images, and validation digits to look at after each epoch."""
    if recipe.data == "digits":
        return open_data(recipe)
    if from_files(recipe):
        return open_files(recipe, distinct)
    samples = recipe.epochs * recipe.epoch_samples
    order = list(range(samples))
    if distinct is not None:
        shuffle = torch.Generator().manual_seed(recipe.seed)
        passes = [torch.randperm(distinct, generator=shuffle) for _ in range(math.ceil(samples / distinct))]
        order = torch.cat(passes)[:samples].tolist()
    images, labels = first_digits("train", recipe.seed, distinct or samples, recipe)
    test = held_out(recipe.test_split, watched, recipe)
    return Data(Stream(images, labels, order, recipe.epoch_samples), test, 10, tuple("0123456789"))


def from_files(recipe: Recipe) -> bool:
    """Whether the images are CIFAR's."""
    return recipe.data.partition(":")[0] in CLASSES


def open_files(recipe: Recipe, distinct: int | None = None) -> Data:
    """CIFAR without the last tenth of its training images, which are "val". With ``distinct``, an epoch shows the first
    ones again and again.
    """
    data = open_data(recipe)
    kept = len(data.train) - len(data.train) // HELD_BACK
    held_back = Subset(data.train, range(kept, len(data.train)))
    train = Subset(data.train, [number % (distinct or kept) for number in range(kept)])
    return replace(data, train=train, test=data.test if recipe.test_split == "test" else held_back)


def normalise(
    images: UInt8[Tensor, "b c h w"] | Float[Tensor, "b c h w"], recipe: Recipe = LONG
) -> Float[Tensor, "b c h w"]:
    """Images as a model of this recipe takes them: of about mean 0 and deviation 1.

    Shapes:
        images: ``b c h w``, bytes, or floats from 0 to 1
        return: ``b c h w``
    """
    pixels = images if images.is_floating_point() else images / 255
    return (pixels - recipe.mean[0]) / recipe.std[0]  # the same for all channels


def images_seen(recipe: Recipe) -> int:
    """Images that a run trains on, incomplete batches left out."""
    epoch = recipe.epoch_samples or SPLITS["train"][1]
    return recipe.epochs * (epoch // recipe.batch_size) * recipe.batch_size


# one run


def train_arm(
    values: dict,
    recipe: Recipe,
    model: nn.Module | None = None,
    watch: Callable[[nn.Module, int], object] | None = None,
    watched: int = WATCHED,
    cpu: bool = True,
) -> "train.Result":
    """Train one arm by its recipe. ``watch(model, update)`` looks after each update.

    Args:
        model: what is trained, in place; None builds it from the recipe's seed
        watched: the number of validation digits that are looked at after each epoch; the recipe's evaluate_every=0
            looks at none
        cpu: True keeps off any GPU
    """
    data = open_stream(recipe, values.get("distinct"), watched)
    model = seeded_model(values, recipe) if model is None else model
    return train.fit(recipe, data=data, model=model, cpu=cpu, after_update=watch)


def seeded_model(values: dict, recipe: Recipe) -> nn.Module:
    """The model of an arm with the first weights of the recipe's seed."""
    with generators_kept():
        torch.manual_seed(recipe.seed)
        return build_model(values, CLASSES.get(recipe.data.partition(":")[0], 10), recipe.img_size)


def score(model: nn.Module, recipe: Recipe, split: str, samples: int = TEST_SAMPLES) -> tuple[float, float]:
    """Accuracy in percent, and the mean loss, on held-out digits of a split."""
    digits = held_out(split, samples, recipe)
    with generators_kept():  # a DataLoader draws a seed
        found = evaluate(model, digits, lambda images: normalise(images, recipe), 10, batch_size=250)
    return round(100 * found.top1, 2), round(found.loss, 4)


def run(
    experiment: Experiment, label: str, rate: float, seed: int, split: str = "test", folder: Path | None = None
) -> dict:
    """Train one model and describe the run: accuracy, losses, processor seconds, and what the experiment looks at.

    Units:
        accuracy in percent

    Note:
        ``losses`` are pairs (updates, mean training loss since the pair before), ``curve`` are triples (images, mean
        training loss of an epoch, validation accuracy after it)
    """
    start = time.process_time()
    values = experiment.arms[label]
    recipe = recipe_of(values, rate, seed, experiment.recipe)
    if from_files(recipe):
        recipe = replace(recipe, test_split=split)
    model, seen = seeded_model(values, recipe), []

    def watch(model: nn.Module, update: int) -> None:
        numbers = experiment.watch(model, update) if experiment.watch else None
        if numbers:
            seen.append(dict(update=update) | numbers)

    is_final = split == "test"
    found = dict(before=experiment.look(model.eval())) if experiment.look and is_final else {}
    result = train_arm(values, recipe, model, watch, min(WATCHED, experiment.tested), experiment.cpu)
    curve = []
    for line in (line for line in result.epochs if "test_accuracy" in line):
        losses = [step["loss"] for step in result.steps if line["epoch"] - 1 < step["epoch"] <= line["epoch"]]
        images = line["update"] * recipe.batch_size
        curve.append([images, round(fmean(losses), 4) if losses else None, round(100 * line["test_accuracy"], 2)])
    if from_files(recipe):
        accuracy, loss = curve[-1][2], round(result.epochs[-1]["test_loss"], 4)
    else:
        accuracy, loss = score(result.model, recipe, split, experiment.tested)
    numbers = dict(
        seed=seed, accuracy=accuracy, loss=loss, training_loss=curve[-1][1], curve=curve,
        losses=[[step["update"], round(step["loss"], 4)] for step in result.steps],
        seconds=round(time.process_time() - start, 1),
    )  # fmt: skip
    if seen:
        numbers["watched"] = seen
    if experiment.look and is_final:
        found["after"] = experiment.look(result.model)
    if experiment.keep and is_final and folder and seed == experiment.seeds[0]:
        experiment.keep(label, result.model, recipe, numbers, folder)
    return numbers | found


# an experiment


def describe(name: str, experiment: Experiment) -> dict:
    """Where the numbers come from: what was done, with what. Plain values, as in the file."""
    recipe = {key: value for key, value in asdict(experiment.recipe).items() if key not in ("model", "model_options")}
    recipe["data"] = recipe["data"].partition(":")[0]  # without a folder, which may be another when the runs go on
    training = dict(
        samples=images_seen(experiment.recipe), batch_size=recipe["batch_size"], rates=experiment.rates,
        search_seeds=experiment.search_seeds, tested=experiment.tested,
    )  # fmt: skip
    found = dict(
        experiment=name,
        command=f"python -m t2t_ref.experiments {name}",
        versions=dict(python=platform.python_version(), torch=str(torch.__version__), t2t_ref=t2t_ref.__version__),
        device=f"{platform.machine()} processor, 1 thread",
        data=dict(name=recipe["data"].replace("-", " "), size=recipe["img_size"], **dict(recipe["data_options"])),
        training=training,
        recipe={key: value for key, value in recipe.items() if key not in ("lr", "seed")},
    )
    return json.loads(json.dumps(found | experiment.about))


TERMS = ("data", "training", "recipe")  # what two files, or a file and its continuation, must agree in


def run_experiment(
    name: str,
    experiment: Experiment,
    folder: Path,
    seeds: tuple[int, ...] | None = None,
    say: Callable[[str], object] = print,
    jobs: int = 1,
) -> dict:
    """Run what is missing of an experiment and keep ``folder/name.json`` up to date after each run.

    An arm that another file in the folder has already (the same values, on the same terms) is taken over from there.

    Args:
        seeds: instead of those of the experiment
        jobs: runs at a time, each in a process with one thread

    Raises:
        ValueError: for a file made on other terms
    """
    torch.set_num_threads(1)
    if seeds:
        experiment = replace(experiment, seeds=tuple(seeds))
    path, fresh = folder / f"{name}.json", describe(name, experiment)
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else fresh | {"arms": {}}
    differing = [key for key in TERMS if result.get(key) != fresh[key]]
    differing += [label for label, arm in result["arms"].items() if arm["values"] != experiment.arms.get(label)]
    if differing:
        raise ValueError(f"{path} was made with another {differing[0]}; move it away to start afresh")

    for label, values in experiment.arms.items():
        if label not in result["arms"]:
            elsewhere = found_elsewhere(folder, values, fresh)
            if elsewhere:  # it may have more seeds than are asked for here
                runs = [done for done in elsewhere["runs"] if done["seed"] in experiment.seeds]
                elsewhere = elsewhere | dict(runs=runs)
            if elsewhere and (experiment.look or experiment.keep or experiment.watch):
                elsewhere = elsewhere | dict(rate=None, runs=[])  # the search holds; what is looked at is missing
            result["arms"][label] = elsewhere or new_arm(values, experiment.recipe)
    arms = result["arms"] = {label: result["arms"][label] for label in experiment.arms}
    write(path, result)

    if len(experiment.rates) > 1:
        searches = [
            (label, rate, seed, "val")
            for seed in experiment.search_seeds  # outermost, so that the runs of a seed share its images
            for label, arm in arms.items()
            for rate in experiment.rates
            if seed not in seeds_in(arm["search"].get(str(rate), {}).get("runs", []))
        ]
        for (label, rate, seed, _), found in run_all(experiment, searches, folder, jobs):
            brief = {key: found[key] for key in ("seed", "accuracy", "loss", "seconds")}
            add_to_search(arms[label]["search"].setdefault(str(rate), dict(runs=[])), brief)
            write(path, result)
            say(f"{name}: {label}: rate {rate}, seed {seed}: {found['accuracy']} % of validation")
    for arm in arms.values():
        arm["rate"] = best_rate(arm["search"], experiment.rates)

    finals = [
        (label, arms[label]["rate"], seed, "test")
        for seed, label in in_turn(experiment)
        if seed not in seeds_in(arms[label]["runs"])
    ]
    for (label, _, seed, _), found in run_all(experiment, finals, folder, jobs):
        arms[label]["runs"] = sorted([*arms[label]["runs"], found], key=lambda done: done["seed"])
        write(path, result)
        say(f"{name}: {label}: seed {seed}: {found['accuracy']} % of test")
    write(path, result)
    return result


def seeds_in(runs: list[dict]) -> list[int]:
    """The seeds of runs that are done."""
    return [done["seed"] for done in runs]


def add_to_search(entry: dict, found: dict) -> None:
    """One more search seed at a rate: the runs, and their means."""
    runs = sorted([*entry["runs"], found], key=lambda done: done["seed"])
    means = {key: round(fmean(done[key] for done in runs), 4) for key in ("accuracy", "loss")}
    entry |= means | dict(seconds=round(sum(done["seconds"] for done in runs), 1), runs=runs)


def best_rate(search: dict[str, dict], rates: tuple[float, ...]) -> float:
    """The rate with the best accuracy on validation digits; 200 of them leave ties, which the smaller loss decides."""
    if len(rates) == 1:
        return rates[0]
    return min(rates, key=lambda rate: (-search[str(rate)]["accuracy"], search[str(rate)].get("loss", 0.0)))


def in_turn(experiment: Experiment) -> list[tuple[int, str]]:
    """(seed, label) of all runs, seed after seed, so that the arms share the images of a seed."""
    return [(seed, label) for seed in experiment.seeds for label in experiment.arms]


def run_all(
    experiment: Experiment, runs: list[tuple[str, float, int, str]], folder: Path, jobs: int
) -> Iterator[tuple[tuple, dict]]:
    """Each run (label, rate, seed, split) with what came of it, as they end; ``jobs`` at a time, one thread each."""
    if jobs == 1:
        for which in runs:
            yield which, run(experiment, *which, folder)
        return
    # spawned, not forked: a fork of a process in which torch has computed can hang
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), begin_process)
    try:
        futures = {pool.submit(run, experiment, *which, folder): which for which in runs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def begin_process() -> None:
    """One thread; and a process whose parent was killed ends, where it would wait for work for ever."""
    torch.set_num_threads(1)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def new_arm(values: dict, recipe: Recipe) -> dict:
    """An arm before its first run, with its size."""
    with generators_kept():
        model = seeded_model(values, recipe)
    macs = count_macs(model, torch.zeros(1, 3, recipe.img_size, recipe.img_size))
    parameters = count_parameters(model, trainable_only=True)
    return dict(values=values, parameters=parameters, macs=macs, search={}, rate=None, runs=[])


def found_elsewhere(folder: Path, values: dict, fresh: dict) -> dict | None:
    """The same arm in another experiment's file, if it was trained on the same terms."""
    for path in sorted(folder.glob("*.json")):
        other = json.loads(path.read_text(encoding="utf-8"))
        if all(other.get(key) == fresh[key] for key in TERMS):
            for arm in other["arms"].values():
                if arm["values"] == values and arm["runs"]:
                    return arm
    return None


def write(path: Path, content: dict) -> None:
    """Replace the file in one step, so that an interruption leaves the old one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".json.part")
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)
