"""Which images make up a batch, and where the randomness of a step comes from (chapters 11 and 17).

Both are functions of the position; there is no state to keep.

The order of an epoch is a function of (seed, epoch), the draws of a step of (seed, epoch, step, rank), the draws that
read an image of (seed, epoch, index). So a run that goes on from a saved position needs no state of a generator.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from t2t_ref.data.workers import read_batches

ORDER, SAMPLE, AUGMENT, FORWARD = range(4)  # what a seed is for


def mixed(*numbers: int) -> int:
    """One seed of 64 bits from several small numbers; neighbours give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def seed_all(*numbers: int, devices: bool = True) -> None:
    """Seed the generators of Python, numpy and torch: all devices' (0.1 ms), or that of the CPU alone (0.02 ms)."""
    seed = mixed(*numbers)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    (torch.manual_seed if devices else torch.default_generator.manual_seed)(seed)


@contextmanager
def generators_kept():
    """Leave the global generators as they were: training inside a notebook does not change what its reader draws."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class Reproducible(Dataset):
    """A dataset whose random transforms depend on (seed, epoch, index), not on the worker that reads the image.

    One with ``__getitems__`` is asked for a whole batch, and seeds what it draws itself. One that draws nothing says
    so by ``draws = False``, and is not wrapped.
    """

    def __init__(self, data, seed: int, epoch: int):
        self.data, self.key = data, (SAMPLE, seed, epoch)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        seed_all(*self.key, index, devices=False)
        return self.data[index]

    def __getitems__(self, indices: list[int]) -> list:
        fetch = getattr(self.data, "__getitems__", None)
        return fetch(indices) if fetch else [self[index] for index in indices]


def batch_indices(length: int, seed: int, epoch: int, size: int, rank: int, world: int, first: int) -> list[list[int]]:
    """The indices of the batches of one process, from batch ``first`` on. Incomplete batches are left out.

    The batches of all processes together are those of one process with ``world * size`` images a batch.
    """
    order = torch.randperm(length, generator=torch.Generator().manual_seed(mixed(ORDER, seed, epoch))).tolist()
    starts = range((first * world + rank) * size, length // (world * size) * (world * size), world * size)
    return [order[start : start + size] for start in starts]


def training_batches(
    data, seed: int, epoch: int, size: int, rank: int, world: int, first: int = 0, workers: int = 0
) -> Iterator:
    """Batches of one epoch for one process, from batch ``first`` on.

    Args:
        data: with a length and an index it is shuffled and shared out here; a stream does both itself
    """
    if hasattr(data, "set_epoch"):
        data.set_epoch(epoch)
    # a loader an epoch: its workers see the epoch that was set, and starting them is cheap beside it
    options = dict(workers=workers, pin_memory=torch.cuda.is_available())
    if isinstance(data, IterableDataset):  # no index to start from: what was seen before is read again, and left out
        yield from islice(read_batches(data, batch_size=size, drop_last=True, **options), first, None)
        return
    indices = batch_indices(len(data), seed, epoch, size, rank, world, first)
    draws = getattr(data, "draws", type(data) is not TensorDataset)
    yield from read_batches(Reproducible(data, seed, epoch) if draws else data, batch_sampler=indices, **options)


def evaluation_batches(data, size: int, rank: int, world: int, workers: int) -> Iterator:
    """Every image once, in batches; each process has its share, and a stream sees to that itself."""
    if not isinstance(data, IterableDataset):
        data = Subset(data, range(rank, len(data), world))
    yield from read_batches(data, batch_size=size, workers=workers)
