"""What a few runs can say: means, differences seed by seed, their intervals, and a plot of them (chapter 12)."""

from collections.abc import Callable, Sequence


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


def show_runs(arms: dict[str, dict], marks: Callable[[str], tuple[str, str]], low: int | float) -> None:
    """A row for each arm of an experiment: its runs, their mean, and its 95 % interval (chapters 12 and 24).

    Args:
        arms: those of a file of results, by label
        marks: colour and symbol for a label

    Units:
        low is per cent, the left end of the axis

    Raises:
        ValueError: for a run left of the axis
    """
    import matplotlib.pyplot as plt

    _, axis = plt.subplots(figsize=(6.4, 0.9 + 0.36 * len(arms)))
    for row, (label, arm) in enumerate(arms.items()):
        runs, (colour, symbol) = list(accuracies(arm).values()), marks(label)
        if min(runs) < low:
            raise ValueError(f"a run of {label!r} has {min(runs)} %, left of the axis, which begins at {low}")
        mean, half = mean_interval(runs)
        axis.plot([mean - half, mean + half], [row, row], color=colour, linewidth=7, alpha=0.3)
        axis.plot([mean, mean], [row - 0.3, row + 0.3], color=colour, linewidth=2)
        axis.plot(runs, [row] * len(runs), symbol, color=colour, markersize=4)
    axis.set(xlabel="test accuracy, %", xlim=(low, 100), ylim=(len(arms) - 0.4, -0.6))
    axis.set_yticks(range(len(arms)), list(arms))
    plt.show()
