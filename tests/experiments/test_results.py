"""The stored experiments are complete and are those of the code; their intervals are what SciPy computes."""

import copy
import json
import random
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from scipy import stats

from t2t_ref.experiments import (
    EXPERIMENTS,
    accuracies,
    build_model,
    mean_interval,
    paired_interval,
    runs,
    show_runs,
    summary,
)
from t2t_ref.inspection import count_macs, count_parameters

RESULTS = Path(__file__).resolve().parents[2] / "results"


def problems(name: str, result: dict) -> list[str]:
    """What is missing in the file of an experiment, or differs from the code that should have made it."""
    experiment, found = EXPERIMENTS[name], []
    fresh = runs.describe(name, experiment)
    if result["experiment"] != name or result["command"] != fresh["command"]:
        found.append("command")
    found += [key for key in runs.TERMS if result[key] != fresh[key]]
    if not all(result["versions"].get(key) for key in ("python", "torch")) or "thread" not in result["device"]:
        found.append("versions or device")
    if list(result["arms"]) != list(experiment.arms):
        return [*found, "labels"]
    for label, arm in result["arms"].items():
        if arm["values"] != experiment.arms[label]:
            found.append(f"{label}: values")
        if sorted(run["seed"] for run in arm["runs"]) != sorted(experiment.seeds):
            found.append(f"{label}: seeds")
        rates = experiment.rates if len(experiment.rates) > 1 else ()
        if set(arm["search"]) != {str(rate) for rate in rates}:
            found.append(f"{label}: search")
        elif arm["rate"] != runs.best_rate(arm["search"], experiment.rates):
            found.append(f"{label}: rate")
        seeds = [[run["seed"] for run in entry["runs"]] for entry in arm["search"].values()]
        if any(own != list(experiment.search_seeds) for own in seeds):
            found.append(f"{label}: search seeds")
        recipe = runs.recipe_of(arm["values"], 1.0, 0, experiment.recipe)
        for run in arm["runs"]:
            whole = len(run["curve"]) == recipe.epochs and run["curve"][-1][0] == runs.images_seen(recipe)
            whole = whole and ("before" in run and "after" in run or not experiment.look)
            if not (whole and 0 <= run["accuracy"] <= 100 and run.get("loss", 1) > 0 and run["seconds"] > 0):
                found.append(f"{label}: run of seed {run['seed']}")
        if not all(run["seconds"] > 0 for run in arm["search"].values()):
            found.append(f"{label}: seconds of the search")
    return found


@pytest.fixture(params=EXPERIMENTS)
def stored(request):
    path = RESULTS / f"{request.param}.json"
    assert path.exists(), f"python -m t2t_ref.experiments {request.param} writes it"
    return request.param, json.loads(path.read_text(encoding="utf-8"))


def test_the_experiment_is_complete(stored):
    name, result = stored
    assert problems(name, result) == []


def test_the_sizes_are_those_of_the_models(stored):
    _, result = stored
    for label, arm in result["arms"].items():
        model = build_model(arm["values"])
        assert arm["parameters"] == count_parameters(model, trainable_only=True), label
        assert arm["macs"] == count_macs(model, torch.zeros(1, 3, 64, 64)), label


def test_an_arm_in_two_files_has_the_same_numbers():
    seen = {}
    for name, experiment in EXPERIMENTS.items():
        result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for label, arm in result["arms"].items() if not experiment.look else ():
            # seconds may differ: two processes may have run it; and one file may have more seeds
            numbers = {run["seed"]: (run["accuracy"], run.get("curve")) for run in arm["runs"]}
            key = json.dumps([arm["values"], *(result[term] for term in runs.TERMS)], sort_keys=True)
            first, rate, known = seen.setdefault(key, (f"{name}: {label}", arm["rate"], numbers))
            same = all(numbers[seed] == known[seed] for seed in numbers.keys() & known.keys())
            assert same and rate == arm["rate"], (first, f"{name}: {label}")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda result: result.update(command="python -m t2t_ref.experiments other"),
        lambda result: result["training"].update(samples=10),
        lambda result: result.update(versions={}),
        lambda result: result["arms"].pop("hard split"),
        lambda result: result["arms"]["hard split"]["values"].update(depth=7),
        lambda result: result["arms"]["hard split"]["runs"].pop(),
        lambda result: result["arms"]["hard split"]["runs"][0].update(seed=1),
        lambda result: result["arms"]["hard split"]["runs"][0]["curve"].pop(),
        lambda result: result["arms"]["hard split"]["runs"][0].update(seconds=0),
        lambda result: result["arms"]["hard split"]["search"].popitem(),
        lambda result: result["arms"]["hard split"].update(rate=0.5),
        lambda result: result.update(recipe={"smoothing": 0.1}),
    ],
)
def test_the_check_finds_what_is_wrong(spoil):
    result = json.loads((RESULTS / "tokenisers.json").read_text(encoding="utf-8"))
    spoiled = copy.deepcopy(result)
    spoil(spoiled)
    assert problems("tokenisers", spoiled) != problems("tokenisers", result)


# intervals


def made_up(scores: list[float], seeds: list[int]) -> dict:
    runs = [dict(seed=seed, accuracy=score, seconds=2.5) for seed, score in zip(seeds, scores, strict=True)]
    return dict(parameters=7, macs=9, rate=1e-3, search={"0.001": dict(accuracy=1.0, seconds=1.0)}, runs=runs)


@pytest.mark.parametrize("n", [2, 5, 11])
def test_mean_interval_is_that_of_the_t_test(n):
    draw = random.Random(n)
    values = [draw.gauss(60, 5) for _ in range(n)]
    mean, half = mean_interval(values)
    low, high = stats.t.interval(0.95, n - 1, loc=sum(values) / n, scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_paired_interval_pairs_by_seed_whatever_the_order():
    ours, theirs = [81.0, 77.5, 83.0, 80.0, 79.0], [70.0, 69.5, 71.0, 72.5, 66.0]
    low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    shuffled = [3, 0, 4, 1, 2]
    arm = made_up([ours[seed] for seed in shuffled], shuffled)
    mean, half = paired_interval(arm, made_up(theirs, [0, 1, 2, 3, 4]))
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert accuracies(arm) == dict(enumerate(ours))


def test_intervals_refuse_what_has_none():
    with pytest.raises(ValueError, match=r"found 1 value\(s\), expected at least 2"):
        mean_interval([80.0])
    with pytest.raises(ValueError, match=r"seeds \[0, 1\] and \[0, 2\] do not pair up"):
        paired_interval(made_up([1.0, 2.0], [0, 1]), made_up([1.0, 2.0], [0, 2]))


def test_summary_has_a_row_for_each_arm():
    result = dict(arms={"one": made_up([70.0, 74.0], [0, 1]), "other": made_up([50.0, 50.0], [0, 1])})
    one, other = summary(result)
    assert one["label"] == "one" and one["mean"] == 72.0 and one["seconds"] == 1.0 + 2 * 2.5
    assert one["half"] == pytest.approx(stats.t.ppf(0.975, 1) * 2.0)
    assert (other["half"], other["parameters"], other["macs"], other["rate"]) == (0.0, 7, 9, 1e-3)


def test_runs_are_drawn_with_their_mean_and_none_outside(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: None)
    runs = [dict(seed=seed, accuracy=accuracy) for seed, accuracy in enumerate((70.0, 72.0, 75.0))]
    arms = {"arm": dict(runs=runs)}
    with pytest.raises(ValueError, match="a run of 'arm' has 70.0 %, left of the axis, which begins at 71"):
        show_runs(arms, lambda label: ("black", "o"), low=71)
    plt.close("all")
    show_runs(arms, lambda label: ("black", "o"), low=60)
    interval, mean, points = plt.gca().lines
    centre = (70 + 72 + 75) / 3
    assert list(mean.get_xdata()) == pytest.approx([centre] * 2)
    low, high = interval.get_xdata()
    assert low < 70 and high > 75 and (low + high) / 2 == pytest.approx(centre)
    assert list(points.get_xdata()) == [70.0, 72.0, 75.0]
    plt.close("all")
