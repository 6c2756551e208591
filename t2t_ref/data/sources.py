"""Where the images come from: digits, CIFAR, folders of photographs, the Hugging Face hub (chapters 11 and 17).

``recipe.data`` says which:

    digits, scattered-digits    t2t_ref.data.digits, without files
    cifar10, cifar100           by name from the hub, or cifar10:FOLDER for a copy of that repository
    imagefolder:PATH            ImageNet's layout: PATH/train/CLASS/*.JPEG and PATH/val/CLASS/*.JPEG
    hub:NAME                    any image classification set of the hub, read while training; NAME may be a folder

Files are read and cropped in the processes of the DataLoader (reading.py), the rest happens on the device
(train/augment.py). A ``recipe`` is any record with the fields named here: that of ``t2t_ref.train``, or less.
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch.utils.data import Dataset

from t2t_ref.arguments import check_known, pair
from t2t_ref.data.digits import Digits, ScatteredDigits
from t2t_ref.data.images import imagenet_class_names
from t2t_ref.data.reading import Images, Prepare, Stream, middle, printable, random_crop, whole

KINDS = ("digits", "scattered-digits", "cifar10", "cifar100", "imagefolder", "hub")
ENDINGS = (".jpeg", ".jpg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".avif", ".tif", ".tiff", ".ppm", ".pgm")
NOT_OURS = {  # what systems leave in folders, thumbnails among it; as everything whose name starts with a dot
    *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
    *("@eadir", "#recycle", "lost+found"),
}
TEST_SPLITS = ("val", "validation", "valid", "test")  # the first that is there
TEST_SAMPLES = 2000  # of the scattered digits, the same ones for every seed

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


def open_data(recipe, training: bool = True) -> Data:
    """The data of a recipe. What is missing is found here, not at step 40,000.

    Args:
        recipe: has ``data``, ``data_options``, ``test_split`` and ``img_size``; for files, what :func:`cropping` needs;
            for what is drawn or read without end ``epoch_samples``, ``batch_size`` and ``seed``
        training: False opens the test set alone

    Raises:
        ValueError: for an unknown source and for folders that do not agree
        FileNotFoundError
        ConnectionError
        ImportError: without the packages of ``t2t-ref[train]``
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


def cropping(recipe, training: bool) -> Prepare:
    """What becomes of an image where it is read: ``prepare(image, rng)`` takes a PIL image and a random.Random.

    Args:
        recipe: has ``data`` and ``img_size``, ``crop_pct`` and ``interpolation`` for the test, ``crop_scale``,
            ``crop_ratio`` and ``train_interpolation`` for training
    """
    if not crops_at_reading(recipe.data):
        return whole
    size = pair(recipe.img_size)
    if training and (recipe.crop_scale, recipe.crop_ratio) != ((1, 1), (1, 1)):
        how = dict(scale=recipe.crop_scale, ratio=recipe.crop_ratio, interpolation=recipe.train_interpolation)
        return partial(random_crop, size=size, **how)
    return partial(middle, size=size, fraction=recipe.crop_pct, interpolation=recipe.interpolation)


def open_digits(recipe, kind: str, training: bool) -> Data:
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


def open_folder(recipe, root: Path, training: bool) -> Data:
    """Photographs in folders, one folder for each class.

    Raises:
        FileNotFoundError: without the folders train and val
        ValueError: if their classes differ, or one is empty
    """

    # datasets' own builder of image folders leaves out linked class folders without a word, stops at a stray zip file
    # and numbers the classes of what it found; so the files are listed here, and its table keeps them
    from datasets import ClassLabel, Features, Value
    from datasets import Dataset as Table

    test = next((root / name for name in TEST_SPLITS if (root / name).is_dir()), root / "val")
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
    # paths as bytes, since not all are UTF-8
    features = Features({"path": Value("binary"), "label": ClassLabel(names=names)})
    tables = []
    for found in files:
        paths = [os.fsencode(path) for paths in found.values() for path in paths]
        labels = [label for label, paths in enumerate(found.values()) for _ in paths]
        tables.append(Table.from_dict({"path": paths, "label": labels}, features))
    train = Images(tables[0], cropping(recipe, True), training=True) if training else None
    return Data(train, Images(tables[-1], cropping(recipe, False), training=False), len(names), readable(names))


def list_images(folder: Path) -> dict[str, list[str]]:
    """The image files below each class folder, both in the order of their names. Other files are named in the log.

    What is hidden, or left by a system, is none of the data. A copy beside its original counts as an image more.

    Raises:
        ValueError: for a folder without class folders, and for a class without images
    """
    found, others = {}, []
    entries = in_sight(folder)
    classes = [entry for entry in entries if entry.is_dir()]
    if not classes:
        raise ValueError(f"{folder} has no folders: expected one for each class, with images inside")
    others += [entry.path for entry in entries if not entry.is_dir()]
    for entry in classes:
        paths = list(files_below(entry.path, above=(os.path.realpath(folder),)))
        found[printable(entry.name)] = [path for path in paths if path.lower().endswith(ENDINGS)]
        others += [path for path in paths if not path.lower().endswith(ENDINGS)]
    if others:
        shown = ", ".join(map(printable, others[:20]))
        log.warning("left out, as their endings are no image's (%d): %s", len(others), shown)
    empty = [name for name, paths in found.items() if not paths]
    if empty:
        raise ValueError(f"{len(empty)} of {len(found)} classes in {folder} have no images: {', '.join(empty[:5])}")
    return found


def in_sight(folder: str | Path) -> list[os.PathLike]:
    """What is in a folder and not hidden, in the order of the names."""
    with os.scandir(folder) as entries:
        shown = [e for e in entries if not e.name.startswith(".") and e.name.lower() not in NOT_OURS]
    return sorted(shown, key=lambda entry: entry.name)


def files_below(folder: str, above: tuple[str, ...]) -> Iterator[str]:
    """The files in a folder and in those below, linked ones too, but not where a link leads back up."""
    here = os.path.realpath(folder)
    if any(Path(folder).is_relative_to(here) for folder in above):
        return
    entries = in_sight(folder)
    yield from (entry.path for entry in entries if not entry.is_dir())
    for entry in entries:
        if entry.is_dir():
            yield from files_below(entry.path, (*above, here))


def readable(names: list[str]) -> tuple[str, ...]:
    """English names, where the folders are ImageNet's thousand; else the names of the folders."""
    is_imagenet = len(names) == 1000 and all(len(n) == 9 and n[0] == "n" and n[1:].isdigit() for n in names)
    return imagenet_class_names() if is_imagenet else tuple(names)


# ---- the hub


def open_hub(recipe, name: str, training: bool, stream: bool) -> Data:
    """An image classification set of the Hugging Face hub, or a folder with a copy of one.

    Args:
        stream: fetch images while training, else all of them first

    Raises:
        ConnectionError: with the remedy, if the hub cannot be reached
        ValueError: for a set without a test split, an image column or a label column
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
    test = next((split for split in TEST_SPLITS if split in splits), None)
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
        prepare = cropping(recipe, training)
        if not stream:
            return Images(rows, prepare, training)
        said = (rows.info.splits or {}).get(split)
        samples = recipe.epoch_samples or (said.num_examples if said else None)
        how = dict(size=pair(recipe.img_size), batch_size=recipe.batch_size, samples=samples, seed=recipe.seed)
        return Stream(rows, prepare, training, **how)

    names = columns[label].names
    return Data(wrap("train", True) if training else None, wrap(test, False), len(names), tuple(names))
