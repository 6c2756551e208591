"""Where the images come from: digits, CIFAR, folders of photographs, the Hugging Face hub (chapters 11 and 17).

``recipe.data`` says which:

    digits, scattered-digits    t2t_ref.data.digits, without files
    cifar10, cifar100           by name from the hub, or cifar10:FOLDER for a copy of that repository
    imagefolder:PATH            ImageNet's layout: PATH/train/CLASS/*.JPEG and PATH/val/CLASS/*.JPEG
    hub:NAME                    any image classification set of the hub, read while training; NAME may be a folder

Files are read and cropped in the processes of the DataLoader, the rest happens on the device (augment.py). A file that
is no whole image never stops a run: it is named in the log once, and another takes its place.
"""

import io
import logging
import math
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from t2t_ref.arguments import check_known, pair
from t2t_ref.data.digits import Digits, ScatteredDigits
from t2t_ref.data.images import centre_crop, imagenet_class_names, to_rgb
from t2t_ref.train.recipes import Recipe

KINDS = ("digits", "scattered-digits", "cifar10", "cifar100", "imagefolder", "hub")
ENDINGS = (".jpeg", ".jpg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
TEST_SAMPLES = 2000  # of the scattered digits, the same ones for every seed
BAD_IN_A_ROW = 100  # then it is not the files
SHUFFLE_BUFFER = 10_000  # photographs of a stream among which the next one is drawn
ORIENTATION = 0x0112  # EXIF's tag; 5 to 8 are turned by a quarter

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """Two data sets whose items are (image c h w, label); images hold bytes, or floats from 0 to 1.

    ``train`` may have ``set_epoch``, to be called before each epoch; it may be a torch IterableDataset, which yields
    len(train) samples in whole batches, as many in each process. A label of -1, in ``test`` only, is an image that
    could not be read: it is not to be counted.
    """

    train: Dataset | None
    test: Dataset
    num_classes: int
    class_names: tuple[str, ...]


def open_data(recipe: Recipe, training: bool = True) -> Data:
    """The data of a recipe. What is missing is found here, not at step 40,000.

    Units:   training=False opens the test set alone
    Raises:  ValueError for an unknown source and for folders that do not agree; FileNotFoundError; ConnectionError;
             ImportError without the packages of ``t2t-ref[train]``
    """
    kind, _, where = recipe.data.partition(":")
    kind = kind.replace("_", "-")
    check_known("data source", kind, KINDS)
    if kind in ("imagefolder", "hub") and not where:
        raise ValueError(f"{kind} needs a place: {kind}:{'PATH' if kind == 'imagefolder' else 'NAME'}")
    if kind in ("digits", "scattered-digits"):
        return open_digits(recipe, kind, training)
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise ImportError(f'files of images need the package {error.name}: pip install "t2t-ref[train]"') from error
    if kind == "imagefolder":
        return open_folder(recipe, Path(where).expanduser(), training)
    return open_hub(recipe, where or f"uoft-cs/{kind}", training, stream=kind == "hub")


def crops_at_reading(spec: str) -> bool:
    """Whether images of this source differ in size, so that they are cropped where they are read."""
    return spec.partition(":")[0] in ("imagefolder", "hub")


def open_digits(recipe: Recipe, kind: str, training: bool) -> Data:
    """The digits of :mod:`t2t_ref.data.digits`, by the options of the recipe."""
    options = dict(recipe.data_options) | {"size": recipe.img_size}
    if kind == "digits":
        train, test = (Digits(split, **options) for split in ("train", recipe.test_split))
    else:
        length = {"length": recipe.epoch_samples} if recipe.epoch_samples else {}
        train = ScatteredDigits("train", seed=recipe.seed, **options | length)
        test = ScatteredDigits(recipe.test_split, seed=0, **options | {"length": TEST_SAMPLES})
    return Data(train if training else None, test, 10, tuple("0123456789"))


# ---- folders


def open_folder(recipe: Recipe, root: Path, training: bool) -> Data:
    """Photographs in folders, one folder for each class.

    Raises:  FileNotFoundError without the folders train and val; ValueError if their classes differ, or one is empty
    """

    # datasets' own builder of image folders leaves out linked class folders without a word, stops at a stray zip file
    # and numbers the classes of what it found; so the files are listed here, and its table keeps them
    from datasets import ClassLabel, Features, Value
    from datasets import Dataset as Table

    test = next((root / name for name in ("val", "validation") if (root / name).is_dir()), root / "val")
    folders = [root / "train", test] if training else [test]
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"no folder {folder}: expected {root}/train/CLASS/*.JPEG and {root}/val/CLASS/*.JPEG"
            )
    files = [list_images(folder) for folder in folders]
    names = list(files[0])
    if files[-1].keys() != files[0].keys():
        alone = [sorted(a.keys() - b.keys()) for a, b in (files, files[::-1])]
        only = [
            f"{len(found)} are in {folder} only: {', '.join(found[:5])}{', ...' * (len(found) > 5)}"
            for found, folder in zip(alone, folders, strict=True)
            if found
        ]
        raise ValueError(f"the classes of {folders[0]} and {folders[1]} differ: {'; '.join(only)}")
    features = Features({"path": Value("string"), "label": ClassLabel(names=names)})
    tables = []
    for found in files:
        paths = [path for paths in found.values() for path in paths]
        labels = [label for label, paths in enumerate(found.values()) for _ in paths]
        tables.append(Table.from_dict({"path": paths, "label": labels}, features))
    train = Images(tables[0], recipe, training=True) if training else None
    return Data(train, Images(tables[-1], recipe, training=False), len(names), readable(names))


def list_images(folder: Path) -> dict[str, list[str]]:
    """The image files below each class folder, both in the order of their names. Other files are named in the log.

    Raises:  ValueError for a folder without class folders, and for a class without images
    """
    found, others = {}, []
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise ValueError(f"{folder} has no folders: expected one for each class, with images inside")
    for name in classes:
        paths = []
        for place, folders, files in os.walk(folder / name, followlinks=True):
            folders.sort()
            paths += [os.path.join(place, file) for file in sorted(files) if not file.startswith(".")]
        found[name] = [path for path in paths if path.lower().endswith(ENDINGS)]
        others += [path for path in paths if not path.lower().endswith(ENDINGS)]
    if others:
        log.warning("left out, as their endings are no image's (%d): %s", len(others), ", ".join(others[:20]))
    empty = [name for name, paths in found.items() if not paths]
    if empty:
        raise ValueError(f"{len(empty)} of {len(found)} classes in {folder} have no images: {', '.join(empty[:5])}")
    return found


def readable(names: list[str]) -> tuple[str, ...]:
    """English names, where the folders are ImageNet's thousand; else the names of the folders."""
    is_imagenet = len(names) == 1000 and all(len(n) == 9 and n[0] == "n" and n[1:].isdigit() for n in names)
    return imagenet_class_names() if is_imagenet else tuple(names)


# ---- the hub


def open_hub(recipe: Recipe, name: str, training: bool, stream: bool) -> Data:
    """An image classification set of the Hugging Face hub, or a folder with a copy of one.

    Units:   with ``stream`` images are fetched while training, else all of them first
    Raises:  ConnectionError, with the remedy, if the hub cannot be reached; ValueError for a set without a test split,
             an image column or a label column
    """

    import datasets

    options = dict(recipe.data_options)
    stream = options.pop("streaming", stream)
    try:
        splits = datasets.load_dataset(name, streaming=stream, **options)
    except ConnectionError as error:
        raise ConnectionError(
            f"cannot reach {name} on the Hugging Face hub, and its cache holds no copy ({error}). Without a network: "
            f"fetch the files of huggingface.co/datasets/{name} elsewhere, put them into a folder, and name it: "
            f"--data {recipe.data.partition(':')[0]}:FOLDER"
        ) from error
    test = next((split for split in ("validation", "val", "test") if split in splits), None)
    if "train" not in splits or test is None:
        raise ValueError(f"{name} has the splits {', '.join(splits)}; expected train, and validation or test")
    columns = splits[test].features or {}
    image = next((key for key, kind in columns.items() if isinstance(kind, datasets.Image)), None)
    label = next((key for key, kind in columns.items() if isinstance(kind, datasets.ClassLabel)), None)
    if image is None or label is None:
        raise ValueError(f"{name} has the columns {columns}; expected an Image and a ClassLabel")

    def wrap(split: str, training: bool) -> Dataset:
        rows = splits[split].cast_column(image, datasets.Image(decode=False))  # a damaged image shall not stop us
        rows = rows.select_columns([image, label])
        for ours, theirs in (("image", image), ("label", label)):
            rows = rows if theirs == ours else rows.rename_column(theirs, ours)
        if not stream:
            return Images(rows, recipe, training)
        said = (rows.info.splits or {}).get(split)
        return Stream(rows, recipe, training, recipe.epoch_samples or (said.num_examples if said else None))

    names = columns[label].names
    return Data(wrap("train", True) if training else None, wrap(test, False), len(names), tuple(names))


# ---- reading


class Images(Dataset):
    """Images of a table with a label and either a path or the bytes of a file; any mode, any size.

    In training, a file that cannot be read is replaced by the next that can, so that lengths and order are the same in
    every process. In a test its label is -1. Random crops come from Python's generator, which sampling.py seeds.

    Shapes:  item  (c h w, int)   c = 3, h = w = img_size where the source's images differ in size
    Raises:  RuntimeError if a hundred files in a row cannot be read
    """

    def __init__(self, rows, recipe: Recipe, training: bool):
        self.rows, self.recipe, self.training = rows, recipe, training
        self.bad = torch.zeros(len(rows), dtype=torch.bool).share_memory_()  # the DataLoader's processes share it

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "c h w"], int]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")  # also what ends a loop over the images
        seed = random.random()  # once: the crop shall not depend on how many bad files are known already
        for step in range(min(BAD_IN_A_ROW, len(self))):
            place = (index + step) % len(self)
            if self.bad[place]:
                continue
            row = self.rows[place]
            image = read(row, self.recipe, self.training, random.Random(seed), place)
            if image is not None:
                return image, row["label"] if self.training or step == 0 else -1
            self.bad[place] = True
        raise RuntimeError(f"{step + 1} images in a row cannot be read, from {name_of(self.rows[index], index)} on")


class Stream(IterableDataset):
    """Photographs read one after the other, of a data set too large to fetch first.

    In training it goes round without end and is cut to whole batches, so that every process sees as many. Order and
    crops depend on (seed, epoch) and the numbers of processes alone.

    Shapes:  item  (c h w, int)   c = 3, h = w = img_size
    Raises:  ValueError if nobody says how long an epoch is; RuntimeError if a hundred images in a row cannot be read;
             TypeError for the length of a test set
    """

    def __init__(self, rows, recipe: Recipe, training: bool, samples: int | None):
        from datasets.distributed import split_dataset_by_node

        # torchrun and accelerate both say so in the environment
        self.rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.recipe, self.training, self.epoch = recipe, training, 0
        if training:
            if not samples:
                raise ValueError(f"{recipe.data} does not say how many images it has: set epoch_samples")
            self.batches = samples // processes // recipe.batch_size
            rows = rows.shuffle(seed=recipe.seed, buffer_size=SHUFFLE_BUFFER)
        self.rows = split_dataset_by_node(rows, rank=self.rank, world_size=processes)

    def __len__(self) -> int:
        if not self.training:
            raise TypeError("a stream of test images ends when it ends")
        return self.batches * self.recipe.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Draw the order and the crops of another epoch from now on."""
        self.epoch = epoch
        self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[UInt8[Tensor, "c h w"], int]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        share = len(range(number, self.batches, workers)) * self.recipe.batch_size if self.training else None
        return islice(self.images(number), share)

    def images(self, worker: int) -> Iterator[tuple[UInt8[Tensor, "c h w"], int]]:
        """The images of one process that reads, round and round in training.

        Shapes:  return  one (c h w, label) after the other
        """
        seen = bad = 0
        while True:
            before = seen
            for row in self.rows:  # the part of this process: the hub's library sees to it
                rng = random.Random(f"{self.recipe.seed} {self.epoch} {self.rank} {worker} {seen}")
                image = read(row, self.recipe, self.training, rng, seen)
                seen += 1
                bad = 0 if image is not None else bad + 1
                if bad == BAD_IN_A_ROW:
                    raise RuntimeError(f"{bad} images in a row cannot be read, up to {name_of(row, seen)}")
                if image is not None:
                    yield image, row["label"]
            if not self.training or seen == before:  # the end, or nothing for this process
                return


def name_of(row: dict, place: int) -> str:
    """What to call an image in the log."""
    return row.get("path") or (row.get("image") or {}).get("path") or f"image number {place}"


def open_bytes(stored: dict):
    """A file to read from: of bytes, of a path, or of an address of the hub."""
    if stored.get("bytes"):
        return io.BytesIO(stored["bytes"])
    if "://" in stored["path"]:
        from datasets.utils.file_utils import xopen

        return xopen(stored["path"], "rb")
    return open(stored["path"], "rb")


def read(row: dict, recipe: Recipe, training: bool, rng: random.Random, place: int) -> UInt8[Tensor, "c h w"] | None:
    """Image of a row, cropped where its source needs it. None, with a line in the log, if it cannot be read.

    Shapes:  return  c h w    bytes
    """
    from PIL import Image

    stored = row.get("image") or {"path": row.get("path")}
    try:
        with open_bytes(stored) as file, Image.open(file) as image:
            if not crops_at_reading(recipe.data):
                image = to_rgb(image)
            elif training and (recipe.crop_scale, recipe.crop_ratio) != ((1, 1), (1, 1)):
                image = random_crop(image, recipe, rng)
            else:
                image = centre_crop(to_rgb(image), *pair(recipe.img_size), recipe.crop_pct, recipe.interpolation)
            return rearrange(torch.from_numpy(np.array(image)), "h w c -> c h w")
    except Exception as error:  # damaged bytes raise almost anything
        log.warning("%s cannot be read and is left out: %s: %s", name_of(row, place), type(error).__name__, error)
        return None


def random_crop(image, recipe: Recipe, rng: random.Random):
    """A random part of a PIL image that has not been read yet, resized to ``img_size``."""
    from PIL import Image

    rows, columns = pair(recipe.img_size)
    is_turned = image.getexif().get(ORIENTATION, 1) >= 5
    width, height = image.size[::-1] if is_turned else image.size
    left, top, right, bottom = draw_box(width, height, recipe.crop_scale, recipe.crop_ratio, rng)
    share = max(columns / (right - left), rows / (bottom - top))
    if share < 1:  # a JPEG file can be read at a half, a quarter or an eighth of its size: much faster
        image.draft(None, (math.ceil(image.width * share), math.ceil(image.height * share)))
    image = to_rgb(image)
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, min(right * across, image.width), min(bottom * down, image.height))
    kind = rng.choice(("bilinear", "bicubic")) if recipe.train_interpolation == "random" else recipe.train_interpolation
    return image.resize((columns, rows), Image.Resampling[kind.upper()], box=box)


def draw_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], rng: random.Random
) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random part of an image.

    Units:   pixels; scale is the range of its share of the area, ratio that of width / height, drawn evenly in its log
    Source:  the authors' crop, timm 0.3.4's RandomResizedCropAndInterpolation: ten tries, else the middle
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
