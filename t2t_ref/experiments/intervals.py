"""What a few runs can say: means, differences seed by seed, and their intervals (chapter 12)."""

from collections.abc import Sequence


def accuracies(arm: dict) -> dict[int, float]:
    """Accuracy in percent of each seed of an arm."""
    return {run["seed"]: run["accuracy"] for run in arm["runs"]}


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean of a few values, and half the width of its 95 % interval.

    Units:
        both in those of ``values``

    Raises:
        ValueError: for fewer than two values, which have no spread

    Source:
        Student, "The probable error of a mean", Biometrika 6, 1908
    """
    from scipy.special import stdtrit  # not at the top: these take longer to import than all the rest
    from scipy.stats import sem

    n = len(values)
    if n < 2:
        raise ValueError(f"found {n} value(s), expected at least 2: a single run has no spread")
    # as ttest_1samp(values, 0).confidence_interval(), which warns of values that are all equal
    return sum(values) / n, float(sem(values) * stdtrit(n - 1, 0.975))


def paired_interval(arm: dict, base: dict) -> tuple[float, float]:
    """By how many points an arm is ahead of another, seed by seed: mean, and half the width of its 95 % interval.

    Units:
        points of accuracy

    Raises:
        ValueError: if the two were not run with the same seeds, or with fewer than two
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
