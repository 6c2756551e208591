"""Images read one by one from files, cropped on the way; files that are no images are passed over (chapter 17).

This runs in the processes of a DataLoader. A file that is no whole image never stops a run: it is named in the log
once. In training another takes its place, in a test it is counted as unread. Everything here can be pickled, so the
processes may be spawned.
"""

import io
import logging
import math
import os
import random
import zlib
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import torch
from einops import rearrange
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from t2t_ref.data.images import centre_crop, opened, orientation, to_rgb

BAD_IN_A_ROW = 100  # then one that was good is read again, to see whether it is the files
SHUFFLE_BUFFER = 10_000  # photographs of a stream among which the next one is drawn

Prepare = Callable[[object, random.Random], object]  # what becomes of a PIL image that has not been read yet

log = logging.getLogger(__name__)


class Images(Dataset):
    """Images of a table with a label and either a path or the bytes of a file; any mode, any size.

    In training, a file that cannot be read is replaced by the next that can, so that lengths and order are the same in
    every process. In a test its label is -1. Random crops come from Python's generator, which sampling.py seeds.

    Shapes:
        item: ``(c h w, int)``, c = 3, h and w as ``prepare`` leaves them

    Raises:
        OSError: if no file can be read, or none any more
        IndexError
    """

    def __init__(self, rows, prepare: Prepare, training: bool):
        self.rows, self.prepare, self.training = rows, prepare, training
        self.bad = torch.zeros(len(rows), dtype=torch.bool).share_memory_()  # the DataLoader's processes share it
        self.good = torch.full((), -1).share_memory_()  # a place that could be read

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "c h w"], int]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")  # also what ends a loop over the images
        seed, found = random.random(), 0  # once: the crop shall not depend on how many bad files are known already
        place = index
        while True:
            place = self.not_known_as_bad(place)
            image = read(self.rows[place], self.prepare, random.Random(seed), place)
            if image is not None:
                self.good.fill_(place)
                return image, self.rows[place]["label"] if self.training or place == index else -1
            self.bad[place] = True
            found += 1
            if found % BAD_IN_A_ROW == 0 and self.good >= 0:
                check_still_there(self.rows[int(self.good)])

    def not_known_as_bad(self, place: int) -> int:
        """The next place, from this one on and round, that is not known as bad.

        Raises:
            OSError: if all are
        """
        if not self.bad[place]:
            return place
        (left,) = torch.where(~self.bad)
        if not len(left):
            raise OSError(f"none of the {len(self)} images can be read, such as {name_of(self.rows[place], place)}")
        return int(left[torch.searchsorted(left, place) % len(left)])


class Stream(IterableDataset):
    """Photographs read one after the other, of a data set too large to fetch first.

    In training it goes round without end and is cut to whole batches, so that every process sees as many. Order and
    crops depend on (seed, epoch) and the numbers of processes alone. In a test a bad image is blank, of label -1.

    Shapes:
        item: ``(c h w, int)``, c = 3, (h, w) = size

    Args:
        samples: the length of an epoch, over all processes

    Raises:
        ValueError: if nobody says how long an epoch is
        OSError: if no image can be read
        TypeError: for the length of a test set
    """

    def __init__(
        self,
        rows,
        prepare: Prepare,
        training: bool,
        *,
        size: tuple[int, int],
        batch_size: int = 1,
        samples: int | None = None,
        seed: int = 0,
    ):
        from datasets.distributed import split_dataset_by_node

        # torchrun and accelerate both say so in the environment
        self.rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.prepare, self.training, self.size = prepare, training, size
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0
        self.named = torch.zeros(2**16, dtype=torch.bool).share_memory_()  # bad images, by a hash of their names
        if training:
            if not samples:
                raise ValueError("the data does not say how many images it has: set epoch_samples")
            self.batches = samples // processes // batch_size
            rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        self.rows = split_dataset_by_node(rows, rank=self.rank, world_size=processes)

    def __len__(self) -> int:
        if not self.training:
            raise TypeError("a stream of test images ends when it ends")
        return self.batches * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Draw the order and the crops of another epoch from now on."""
        self.epoch = epoch
        self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[UInt8[Tensor, "c h w"], int]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        share = len(range(number, self.batches, workers)) * self.batch_size if self.training else None
        return islice(self.images(number), share)

    def images(self, worker: int) -> Iterator[tuple[UInt8[Tensor, "c h w"], int]]:
        """The images of one process that reads, round and round in training.

        Shapes:
            return: one (c h w, label) after the other
        """
        seen, found, last = 0, 0, None
        while True:
            before, good = seen, False
            for row in self.rows:  # the part of this process: the hub's library sees to it
                rng = random.Random(f"{self.seed} {self.epoch} {self.rank} {worker} {seen}")
                slot = zlib.crc32(name_of(row, seen).encode()) % len(self.named)
                image = read(row, self.prepare, rng, seen, quiet=bool(self.named[slot]))
                seen += 1
                if image is not None:
                    good, found, last = True, 0, row
                    yield image, row["label"]
                    continue
                self.named[slot], found = True, found + 1
                if found % BAD_IN_A_ROW == 0 and last:
                    check_still_there(last)
                if not self.training:
                    yield torch.zeros(3, *self.size, dtype=torch.uint8), -1
            if seen > before and not good:
                raise OSError(f"none of the {seen - before} images can be read, such as {name_of(row, seen)}")
            if not self.training or seen == before:  # the end, or nothing for this process
                return


# ---- one image


def name_of(row: dict, place: int) -> str:
    """What to call an image in the log: letters that can be written anywhere, even where a path is no UTF-8."""
    path = row.get("path") or (row.get("image") or {}).get("path")
    return printable(path) if path else f"image number {place}"


def check_still_there(row: dict) -> None:
    """After many bad images in a row: read one that was good, to see whether it is the images.

    Raises:
        OSError: if it cannot be read any more
    """
    if read(row, whole, random.Random(0), 0) is None:
        raise OSError(f"{BAD_IN_A_ROW} images in a row cannot be read, nor {name_of(row, 0)}, which could before")


def printable(path: str | bytes) -> str:
    """A path that can be printed and written as UTF-8: bytes that are no letters stand as \\xff."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def open_bytes(stored: dict):
    """A file to read from: of bytes, of a path, or of an address of the hub."""
    if stored.get("bytes"):
        return io.BytesIO(stored["bytes"])
    path = os.fsdecode(stored["path"])
    if "://" in path:
        from datasets.utils.file_utils import xopen

        return xopen(path, "rb")
    return open(path, "rb")


def read(
    row: dict, prepare: Prepare, rng: random.Random, place: int, quiet: bool = False
) -> UInt8[Tensor, "c h w"] | None:
    """Image of a row. None, with a line in the log, if it cannot be read.

    Shapes:
        return: ``c h w``, bytes
    """
    stored = row.get("image") or {"path": row.get("path")}
    try:
        with open_bytes(stored) as file, opened(file) as image:
            return rearrange(torch.from_numpy(np.array(prepare(image, rng))), "h w c -> c h w")
    except Exception as error:  # a hub that is away raises almost anything
        if not quiet:
            log.warning("%s cannot be read and is left out: %s", name_of(row, place), error)
        return None


# ---- what becomes of it


def whole(image, rng: random.Random):
    """All of a PIL image."""
    return to_rgb(image)


def middle(image, rng: random.Random, *, size: tuple[int, int], fraction: float, interpolation: str):
    """The middle of a PIL image, as :func:`t2t_ref.data.images.centre_crop` cuts it."""
    return centre_crop(to_rgb(image), *size, fraction, interpolation)


def random_crop(
    image,
    rng: random.Random,
    *,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    interpolation: str,
):
    """A random part of a PIL image that has not been read yet, resized.

    Args:
        size: (height, width)
        scale: as in :func:`draw_box`
        ratio: as in :func:`draw_box`
        interpolation: may be "random"

    Units:
        size is pixels
    """
    from PIL import Image

    rows, columns = size
    is_photograph = image.format in ("JPEG", "MPO")
    if not is_photograph:
        image = to_rgb(image)  # the way up is known now: a TIFF file turns while it is read
    width, height = image.size[::-1] if is_photograph and orientation(image) >= 5 else image.size
    left, top, right, bottom = draw_box(width, height, scale, ratio, rng)
    share = max(columns / (right - left), rows / (bottom - top))
    if is_photograph:
        if share < 1:  # it can be read at a half, a quarter or an eighth of its size: much faster
            image.draft(None, (math.ceil(image.width * share), math.ceil(image.height * share)))
        image = to_rgb(image)
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, min(right * across, image.width), min(bottom * down, image.height))
    kind = rng.choice(("bilinear", "bicubic")) if interpolation == "random" else interpolation
    return image.resize((columns, rows), Image.Resampling[kind.upper()], box=box)


def draw_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], rng: random.Random
) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random part of an image.

    Args:
        scale: the range of its share of the area
        ratio: the range of width / height, drawn evenly in its log

    Units:
        pixels

    Source:
        the authors' crop, timm 0.3.4's RandomResizedCropAndInterpolation: ten tries, else the middle
    """
    for _ in range(10):
        area = rng.uniform(*scale) * width * height
        shape = math.exp(rng.uniform(*map(math.log, ratio)))
        w, h = max(1, round(math.sqrt(area * shape))), max(1, round(math.sqrt(area / shape)))
        if w <= width and h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    w = max(1, min(width, round(height * ratio[1])))
    h = max(1, min(height, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
