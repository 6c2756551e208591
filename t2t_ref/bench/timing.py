"""Taking times: candidates in turn, ratios within a round, and a verdict that knows the spread (chapter 16).

All candidates of one comparison run in turn, round after round, so that a neighbour who takes the machine for a second
slows all of them. A ratio is the median of the ratios within the rounds; its spread is their middle half. Where the
spread is wide, the verdict says so.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# of the wall, or what this process got of its core: on one thread that leaves out what neighbours took
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
WIDE = 0.25  # a middle half wider than this share of the median ratio says more about the machine than about the code


@dataclass(frozen=True)
class Timing:
    """One candidate against a reference. ``speed`` is time of the reference / own time: above 1 is faster."""

    seconds: float  # median
    speed: float
    speed_low: float  # a quarter of the rounds was below
    speed_high: float  # a quarter was above
    verdict: str


def interleave(
    runs: dict[str, Callable[[], object]],
    rounds: int = 15,
    warm_up: int = 2,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time candidates in turn, each round in another order: the seconds of each candidate, round by round.

    Raises:
        ValueError: for fewer than 3 rounds, from which no spread can be read
    """
    check_rounds(rounds)
    names, seconds = list(runs), {name: [] for name in runs}
    for name in names:
        for _ in range(warm_up):
            runs[name]()
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            wait(device)
            begin = clock()
            runs[name]()
            wait(device)
            seconds[name].append(clock() - begin)
    return seconds


def check_rounds(rounds: int) -> None:
    """Refuse too few rounds.

    Raises:
        ValueError: for fewer than 3
    """
    if rounds < 3:
        raise ValueError(f"rounds is {rounds}, expected at least 3: a spread needs several")


def compare(reference: list[float], seconds: list[float]) -> Timing:
    """The timing of a candidate, given the seconds of each round for the reference and for itself."""
    ratios = [a / b for a, b in zip(reference, seconds, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    if (high - low) / middle > WIDE:
        verdict = "too noisy to tell"
    elif low <= 1 <= high:
        verdict = "no difference seen"
    else:
        verdict = "faster" if middle > 1 else "slower"
    return Timing(statistics.median(seconds), middle, low, high, verdict)


def compare_with_first(seconds: dict[str, list[float]]) -> dict[str, Timing]:
    """The timings of all candidates, each against the first one."""
    first = next(iter(seconds.values()))
    return {name: compare(first, own) for name, own in seconds.items()}


def wait(device: str) -> None:
    """Let a GPU finish: its work is only queued when a call returns."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
