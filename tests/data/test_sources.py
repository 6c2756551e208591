"""Where images come from: bad files, odd ones, folders that do not agree, sets of the hub from a local copy."""

import io
import logging
import multiprocessing
import os
import pickle
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import t2t_ref
from t2t_ref.data.reading import Stream, draw_box
from t2t_ref.data.sources import cropping, open_data
from t2t_ref.train.recipes import Recipe
from t2t_ref.train.sampling import evaluation_batches, training_batches

SIZE = 32


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.05)  # five seconds after each epoch
    datasets.disable_progress_bars()


def recipe_for(data, **changes):
    return Recipe(data=str(data), img_size=SIZE, crop_pct=0.9, **changes)


def random_image(height=40, width=60, seed=0, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height)).convert(mode)


def write_folder(root, per_class=4):
    """ImageNet's layout, and what goes wrong in it: one truncated, one empty, one text file, one of another ending."""
    for split in ("train", "val"):
        for number, name in enumerate(("n02", "n01")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for image in range(per_class):
                random_image(seed=10 * number + image).save(folder / f"good_{image}.JPEG")
    train = root / "train" / "n01"
    random_image(200, 200).save(train / "cut_off.jpg")
    whole = (train / "cut_off.jpg").read_bytes()
    (train / "cut_off.jpg").write_bytes(whole[: len(whole) // 2])
    (train / "empty.jpg").touch()
    (train / "text.jpg").write_text("<html>404</html>", encoding="utf-8")
    (train / "notes.txt").write_text("no image", encoding="utf-8")
    random_image(mode="L").save(train / "grey.jpg")
    random_image(mode="CMYK").save(train / "cmyk.jpg")
    random_image(1, 1).save(train / "tiny.png")
    random_image(1, 3000).save(train / "strip.png")
    random_image(mode="P").save(train / "palette.gif")
    random_image(mode="RGBA").save(train / "alpha.png")
    random_image().save(train / "in_truth_a_png.jpg", format="PNG")
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(train / "sixteen_bits.png")
    return root


def labels_of(data):
    return [label for _, label in data]


# folders


@pytest.mark.parametrize(
    "crop", [{}, {"crop_scale": (0.08, 1.0), "crop_ratio": (3 / 4, 4 / 3)}], ids=["centre", "random"]
)
def test_bad_images_are_named_and_replaced_odd_ones_converted(tmp_path, caplog, crop):
    write_folder(tmp_path)
    data = open_data(recipe_for(f"imagefolder:{tmp_path}", **crop))
    assert data.class_names == ("n01", "n02") and data.num_classes == 2
    assert "notes.txt" in caplog.text
    caplog.clear()
    assert len(data.train) == 11 + 4 + 4 and len(data.test) == 8
    images, labels = zip(*(data.train[i] for i in range(len(data.train))), strict=True)
    assert {image.shape for image in images} == {(3, SIZE, SIZE)} and {image.dtype for image in images} == {torch.uint8}
    assert sorted(labels) == [0] * 15 + [1] * 4
    bad = ("cut_off.jpg", "empty.jpg", "text.jpg")
    messages = [record.getMessage() for record in caplog.records]
    assert sorted(m.split(" cannot be read")[0].rpartition("/")[2] for m in messages) == sorted(bad)
    for index in range(len(data.train)):  # another epoch: they are known, and not named again
        data.train[index]
    assert len(caplog.records) == len(bad)
    # cut_off comes after cmyk, before empty: both are replaced by the next one that is good
    names = sorted(path.name for path in (tmp_path / "train" / "n01").iterdir() if path.suffix != ".txt")
    if not crop:
        assert torch.equal(images[names.index("cut_off.jpg")], images[names.index("good_0.JPEG")])
        assert torch.equal(images[names.index("empty.jpg")], images[names.index("good_0.JPEG")])
        grey = images[names.index("sixteen_bits.png")].float()
        assert (grey - 40_000 / 257).abs().max() < 1
        assert (images[names.index("grey.jpg")].float().std(dim=0) < 1).all()


def test_a_bad_image_of_the_test_set_is_not_counted(tmp_path, caplog):
    write_folder(tmp_path)
    (tmp_path / "val" / "n01" / "a_bad_one.JPEG").write_bytes(b"\xff\xd8 and no more")
    test = open_data(recipe_for(f"imagefolder:{tmp_path}"), training=False).test
    assert labels_of(test) == [-1, 0, 0, 0, 0, 1, 1, 1, 1]
    assert labels_of(test) == [-1, 0, 0, 0, 0, 1, 1, 1, 1]  # also when it is known
    assert [record.getMessage().count("a_bad_one.JPEG cannot be read") for record in caplog.records] == [1]


def test_the_test_images_are_prepared_as_the_authors_do(tmp_path):
    from t2t_ref import preprocess
    from t2t_ref.data.images import IMAGENET_MEAN, IMAGENET_STD
    from t2t_ref.train.augment import Augment

    write_folder(tmp_path)
    recipe = recipe_for(f"imagefolder:{tmp_path}", mean=IMAGENET_MEAN, std=IMAGENET_STD)
    image, _ = open_data(recipe).test[2]
    expected = preprocess(tmp_path / "val" / "n01" / "good_2.JPEG", SIZE)
    torch.testing.assert_close(Augment(recipe, 2).normalise(image[None]), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_all_images_bad_is_an_error_of_one_line(tmp_path, workers):
    write_folder(tmp_path)
    for path in (tmp_path / "train").rglob("*.*"):
        path.write_bytes(b"gone")
    data = open_data(recipe_for(f"imagefolder:{tmp_path}"))
    with pytest.raises(OSError, match=r"^none of the 19 images can be read, such as \S*\.\S*$"):
        list(training_batches(data.train, 0, 0, 4, 0, 1, workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_however_many_bad_files_in_a_row_the_others_are_read(tmp_path, caplog, workers):
    """A copy that broke off: 250 empty files in one class, more than twice what is taken for a lost disk."""
    write_folder(tmp_path)
    for number in range(250):
        for split in ("train", "val"):
            (tmp_path / split / "n02" / f"z{number:03d}.png").touch()
    data = open_data(recipe_for(f"imagefolder:{tmp_path}"))
    labels = torch.cat([labels for _, labels in evaluation_batches(data.test, 16, 0, 1, workers)])
    assert labels.tolist() == [0] * 4 + [1] * 4 + [-1] * 250
    caplog.clear()
    count = sum(len(labels) for _, labels in training_batches(data.train, 0, 0, 10, 0, 1, workers=workers))
    assert count == 260 and data.train.bad.sum() == 253  # two more are damaged, and one is a text
    named = [record.getMessage().split(" cannot be read")[0] for record in caplog.records]
    assert len(named) == len(set(named)) == 253


def test_a_lost_disk_is_told_from_bad_files(tmp_path):
    """Once a hundred in a row cannot be read, one that could is read again."""
    write_folder(tmp_path)
    for number in range(120):
        random_image(8, 8).save(tmp_path / "train" / "n02" / f"z{number:03d}.png")
    train = open_data(recipe_for(f"imagefolder:{tmp_path}")).train
    train[0]
    (tmp_path / "train").rename(tmp_path / "away")
    with pytest.raises(OSError, match="100 images in a row cannot be read, nor .*alpha.png, which could before"):
        train[20]


# what is no part of the data


@pytest.mark.parametrize("level", ["split", "class", "below"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_what_is_hidden_is_left_out_everywhere(tmp_path, caplog, split, level):
    """Copies by Jupyter, thumbnails of file managers and servers, what a Mac adds to a zip, and links into them."""
    for each in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / each / name / "below").mkdir(parents=True)
            random_image().save(tmp_path / each / name / "a.png")
            random_image().save(tmp_path / each / name / "below" / "B.PNG")
    where = tmp_path / split / {"split": ".", "class": "cat", "below": "cat/below"}[level]
    for folder in (".ipynb_checkpoints", ".thumbnails", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found"):
        (where / folder / "deeper").mkdir(parents=True)
        random_image().save(where / folder / "a-checkpoint.png")
        random_image().save(where / folder / "deeper" / "a.png")
    for file in ("._a.png", ".a.png"):
        random_image().save(where / file)
    for file in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (where / file).write_bytes(b"not ours")
    for training in (True, False):
        data = open_data(recipe_for(f"imagefolder:{tmp_path}"), training=training)
        assert labels_of(data.test) == [0, 0, 1, 1] and data.class_names == ("cat", "dog")
        assert not training or labels_of(data.train) == [0, 0, 1, 1]
    assert not caplog.records  # nothing to tell


def test_copies_count_and_other_files_are_named(tmp_path, caplog):
    write_folder(tmp_path)
    random_image().save(tmp_path / "val" / "n01" / "good_0-Copy1.JPEG")
    random_image().save(tmp_path / "val" / "nowhere.png")  # beside the classes: whose would it be?
    (tmp_path / "val" / "n02" / "drawing.svg").write_text("<svg/>", encoding="utf-8")
    assert labels_of(open_data(recipe_for(f"imagefolder:{tmp_path}"), training=False).test) == [0] * 5 + [1] * 4
    (message,) = [record.getMessage() for record in caplog.records]
    assert "(2): " in message and "nowhere.png" in message and "drawing.svg" in message


@pytest.mark.parametrize("target", [".", "..", "../..", "../../.."], ids=["itself", "class", "split", "root"])
def test_a_link_that_leads_back_up_is_not_followed(tmp_path, target):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name / "below").mkdir(parents=True)
            random_image().save(tmp_path / split / name / "below" / "a.png")
    (tmp_path / "train" / "cat" / "below" / "round").symlink_to(target, target_is_directory=True)
    (tmp_path / "train" / "dog" / "a.png").symlink_to("nothing")  # a link that leads nowhere is a file to be named
    data = open_data(recipe_for(f"imagefolder:{tmp_path}"))
    assert len(data.train) == 3 and [data.train[i][1] for i in range(3)] == [0, 1, 1] and data.train.bad.sum() == 1


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take names in UTF-8 alone")
def test_names_that_are_no_utf8(tmp_path, caplog):
    """An old archive: the class is named in Latin 1. Its images are read, and what is printed can be written."""
    for split in ("train", "val"):
        for name in (b"caf\xe9", "thé".encode()):
            folder = os.fsencode(tmp_path / split) + b"/" + name
            os.makedirs(folder)
            for file in (b"na\xefve.png", b"good.png"):
                with open(folder + b"/" + file, "wb") as stream:
                    random_image().save(stream, format="PNG")
            with open(folder + b"/b\xe4d.png", "wb"):
                pass
    data = open_data(recipe_for(f"imagefolder:{tmp_path}"))
    assert data.class_names == (r"caf\xe9", "thé")
    assert labels_of(data.test) == [-1, 0, 0, -1, 1, 1]
    assert len(caplog.records) == 2 and all(r"b\xe4d.png cannot be read" in r.getMessage() for r in caplog.records)
    for text in (*data.class_names, *(record.getMessage() for record in caplog.records)):
        text.encode("utf-8")


# other processes


# a process from a fork server inherits as little as one that is spawned
METHODS = [method for method in ("fork", "forkserver") if method in multiprocessing.get_all_start_methods()]


@pytest.mark.parametrize("method", METHODS or ["spawn"])
def test_a_bad_file_is_named_once_however_the_processes_started(tmp_path, caplog, method):
    """Images and streams, training and test: what is said in a process that reads is logged in this one."""
    write_folder(tmp_path)
    (tmp_path / "val" / "n01" / "a_bad_one.JPEG").touch()
    data = open_data(recipe_for(f"imagefolder:{tmp_path}", crop_scale=(0.5, 1.0)))
    caplog.clear()
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(method, force=True)
    try:
        for epoch in range(2):
            batches = list(training_batches(data.train, 0, epoch, 2, 0, 1, workers=2))
            assert [len(labels) for _, labels in batches] == [2] * 9
        labels = torch.cat([labels for _, labels in evaluation_batches(data.test, 4, 0, 1, workers=1)])
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert labels.tolist() == [-1] + [0] * 4 + [1] * 4
    named = sorted(re.split(r"[\\/]", r.getMessage().split(" cannot be read")[0])[-1] for r in caplog.records)
    assert named == ["a_bad_one.JPEG", "cut_off.jpg", "empty.jpg", "text.jpg"]
    assert {record.name for record in caplog.records} == {"t2t_ref.data.reading"}


def test_data_sets_can_be_pickled(tmp_path):
    write_folder(tmp_path / "folder")
    write_hub(tmp_path / "hub", "image")
    options = dict(epoch_samples=8, batch_size=4, crop_scale=(0.5, 1.0))
    for source in (f"imagefolder:{tmp_path / 'folder'}", f"hub:{tmp_path / 'hub'}", f"cifar10:{tmp_path / 'hub'}"):
        data = open_data(recipe_for(source, **options))
        for one in (data.train, data.test):
            again = pickle.loads(pickle.dumps(one))
            random.seed(0)
            first = next(iter(one))[0]
            random.seed(0)
            assert torch.equal(first, next(iter(again))[0])


def test_a_recipe_is_any_record_with_the_fields(tmp_path):
    """data/ does not know t2t_ref.train; the old address leads here."""
    from t2t_ref.train.sources import open_data as at_the_old_address

    assert at_the_old_address is open_data
    write_folder(tmp_path)
    fields = dict(data=f"imagefolder:{tmp_path}", img_size=(24, 40), crop_pct=0.9, interpolation="bilinear")
    data = open_data(SimpleNamespace(**fields), training=False)
    assert data.test[0][0].shape == (3, 24, 40)
    root = Path(t2t_ref.__file__).parent / "data"
    assert not [
        path.name
        for path in root.glob("*.py")
        if "t2t_ref.train" in re.sub(r"``.*?``", "", path.read_text(encoding="utf-8"))
    ]


@pytest.mark.skipif(os.name == "nt", reason="Windows asks for a privilege to make links")
def test_linked_and_nested_folders_count(tmp_path):
    write_folder(tmp_path / "real")
    (tmp_path / "data [1]").mkdir()
    for split in ("train", "val"):
        (tmp_path / "data [1]" / split).mkdir()
        (tmp_path / "data [1]" / split / "linked").symlink_to(tmp_path / "real" / "val" / "n01")
        (tmp_path / "data [1]" / split / "nested" / "deep").mkdir(parents=True)
        random_image().save(tmp_path / "data [1]" / split / "nested" / "deep" / "a.JPEG")
        (tmp_path / "data [1]" / split / "nested" / "far").symlink_to(tmp_path / "real" / "val" / "n02")
    data = open_data(recipe_for(f"imagefolder:{tmp_path / 'data [1]'}"))
    assert labels_of(data.test) == [0] * 4 + [1] * 5


def test_folders_that_cannot_be_trained_on_are_refused_at_the_start(tmp_path):
    write_folder(tmp_path)
    recipe = recipe_for(f"imagefolder:{tmp_path}")
    (tmp_path / "val" / "n03").mkdir()
    with pytest.raises(ValueError, match="1 of 3 classes in .*val have no images: n03"):
        open_data(recipe)
    random_image().save(tmp_path / "val" / "n03" / "a.png")
    with pytest.raises(ValueError, match="classes of .*train and .*val differ: 1 are in .*val only: n03$"):
        open_data(recipe)
    assert open_data(recipe, training=False).class_names == ("n01", "n02", "n03")  # enough for an evaluation
    (tmp_path / "val").rename(tmp_path / "validation")
    assert len(open_data(recipe, training=False).test) == 9
    (tmp_path / "validation").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"no folder .*val: expected .*train/CLASS/\*.JPEG and .*val/CLASS"):
        open_data(recipe)
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere.train"):
        open_data(recipe_for(f"imagefolder:{tmp_path / 'nowhere'}"))
    (tmp_path / "flat" / "train").mkdir(parents=True)
    (tmp_path / "flat" / "val").mkdir()
    with pytest.raises(ValueError, match="flat.train has no folders: expected one for each class"):
        open_data(recipe_for(f"imagefolder:{tmp_path / 'flat'}"))


def test_the_thousand_of_imagenet_get_english_names(tmp_path):
    from t2t_ref.data.sources import readable

    names = [f"n{number:08d}" for number in range(1000)]
    assert readable(names)[207] == "golden retriever"
    assert readable(names[:999]) == tuple(names[:999])


def test_unknown_sources_suggest_the_nearest():
    with pytest.raises(ValueError, match="unknown data source 'cifar11': did you mean 'cifar1"):
        open_data(recipe_for("cifar11"))
    with pytest.raises(ValueError, match="imagefolder needs a place: imagefolder:PATH"):
        open_data(recipe_for("imagefolder"))


def test_a_missing_package_comes_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'need the package datasets: pip install "t2t-ref\[train\]"'):
        open_data(recipe_for("cifar10"))
    assert len(open_data(recipe_for("digits")).test) == 400  # the digits do without
    monkeypatch.delitem(sys.modules, "t2t_ref.train.augment", raising=False)
    monkeypatch.setitem(sys.modules, "kornia.augmentation", None)
    with pytest.raises(ImportError, match=r'augmentation needs the package kornia.*"t2t-ref\[train\]"'):
        import t2t_ref.train.augment  # noqa: F401


# crops


def test_crops_depend_on_seed_epoch_and_index_alone(tmp_path, caplog):
    """So a resumed run, or one with other processes that read, sees the same images, bad files or not."""
    write_folder(tmp_path, per_class=6)
    recipe = recipe_for(f"imagefolder:{tmp_path}", crop_scale=(0.1, 1.0), crop_ratio=(0.75, 1.3))

    def images(seed=0, epoch=0, workers=0, train=None):
        train = train or open_data(recipe).train
        return [batch[0] for batch, _ in training_batches(train, seed, epoch, 1, 0, 1, workers=workers)]

    def same(first, second):
        return sum(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    train = open_data(recipe).train
    first = images(train=train)
    assert same(first, images(workers=2)) == same(first, images(train=train)) == len(first) == 23
    assert same(first, images(epoch=1)) < 3 and same(first, images(seed=1)) < 3
    assert train.bad.sum() == 3
    caplog.clear()
    images(workers=2, train=train)
    assert not caplog.records
    fresh = open_data(recipe).train
    images(workers=1, train=fresh)
    assert fresh.bad.sum() == 3  # the processes that read have told this one


def test_boxes_cover_the_shares_and_shapes_asked_for():
    rng = random.Random(0)
    boxes = np.array([draw_box(500, 300, (0.08, 1.0), (3 / 4, 4 / 3), rng) for _ in range(3000)])
    left, top, right, bottom = boxes.T
    assert (left >= 0).all() and (top >= 0).all() and right.max() <= 500 and bottom.max() <= 300
    share, shape = (right - left) * (bottom - top) / 150_000, (right - left) / (bottom - top)
    assert 0.079 < share.min() < 0.1 and 0.7 < share.max() and 0.74 < shape.min() < 0.77 and 1.3 < shape.max() < 1.35
    assert 0.4 < np.mean(shape > 1) < 0.65 and len(np.unique(left)) > 200 and len(np.unique(top)) > 150
    # nothing of this shape fits: the middle, of the nearest shape
    assert draw_box(1000, 10, (0.5, 1.0), (0.75, 1.5), rng) == (492, 0, 507, 10)
    assert draw_box(10, 1000, (0.5, 1.0), (0.5, 1.5), rng) == (0, 490, 10, 510)
    assert draw_box(1, 1, (0.08, 1.0), (0.75, 1.3), rng) == (0, 0, 1, 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("turn", [None, 6])
def test_a_random_crop_is_the_box_of_the_whole_image(turn, kind):
    """Also where the file is read at a fraction of its size, and where its tag says that it is turned."""
    image, file = random_image(600, 900), io.BytesIO()
    exif = image.getexif()
    if turn:
        exif[0x0112] = turn
    image.save(file, format=kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    recipe = recipe_for("imagefolder:x", crop_scale=(0.3, 1.0), crop_ratio=(0.75, 1.3), train_interpolation="bicubic")
    sizes = []
    with pytest.MonkeyPatch.context() as patch:
        before = Image.Image.resize
        patch.setattr(Image.Image, "resize", lambda self, *a, **k: sizes.append(self.size) or before(self, *a, **k))
        for seed in range(10):
            got = cropping(recipe, training=True)(Image.open(file), random.Random(seed))
            upright = image.transpose(Image.Transpose.ROTATE_270) if turn else image
            box = draw_box(*upright.size, recipe.crop_scale, recipe.crop_ratio, random.Random(seed))
            expected = before(upright, (SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
            difference = np.abs(np.asarray(got, float) - np.asarray(expected, float))
            assert got.size == (SIZE, SIZE) and difference.mean() < 2 and difference.max() < 25
    assert kind != "JPEG" or max(max(size) for size in sizes) < 900  # read small


# digits


def test_digits_and_scattered_digits():
    data = open_data(recipe_for("digits", test_split="val"))
    assert data.train[0][0].shape == (3, SIZE, SIZE) and len(data.test) == 200 and data.num_classes == 10
    recipe = Recipe(data="scattered_digits", img_size=64, seed=3, epoch_samples=7, data_options=(("clutter", 1),))
    data = open_data(recipe)
    assert len(data.train) == 7 and data.train.clutter == 1 and data.class_names[3] == "3"
    other = open_data(Recipe(data="scattered-digits", img_size=64, seed=4, data_options=(("clutter", 1),)))
    assert torch.equal(data.test[5][0], other.test[5][0])  # one test set for all seeds
    assert not torch.equal(data.train[5][0], other.train[5][0])
    assert open_data(recipe, training=False).train is None


# the hub, from a local copy


def write_hub(root, image="img", label="label", splits=("train", "test"), count=12, files=2):
    """Parquet files named as on the hub, with images as bytes of PNG files."""
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=["cat", "dog", "owl"])})
    (root / "plain_text").mkdir(parents=True)
    for split in splits:
        rows = {
            image: [random_image(20, 20, seed) for seed in range(count)],
            label: [seed % 3 for seed in range(count)],
        }
        table = datasets.Dataset.from_dict(rows, features)
        for number in range(files):
            part = table.shard(files, number, contiguous=True)
            part.to_parquet(root / "plain_text" / f"{split}-{number:05d}-of-{files:05d}.parquet")
    return root


def test_cifar_from_a_folder(tmp_path):
    write_hub(tmp_path / "c10")
    data = open_data(recipe_for(f"cifar10:{tmp_path / 'c10'}"))
    assert data.class_names == ("cat", "dog", "owl") and len(data.train) == len(data.test) == 12
    image, label = data.test[4]
    assert label == 1 and image.shape == (3, 20, 20)  # as it is: the device enlarges it
    assert torch.equal(image, torch.from_numpy(np.array(random_image(20, 20, 4))).permute(2, 0, 1))
    assert labels_of(data.train) == [0, 1, 2] * 4


def test_without_a_network_the_error_says_where_to_put_files():
    with pytest.raises(
        ConnectionError, match=r"cannot reach uoft-cs/cifar100 .*fetch the files of .*--data cifar100:FOLDER"
    ):
        open_data(recipe_for("cifar100"))


def test_sets_of_the_hub_that_are_not_for_this(tmp_path):
    write_hub(tmp_path / "a", splits=("train",))
    with pytest.raises(ValueError, match="has the splits train; expected train, and validation or test"):
        open_data(recipe_for(f"hub:{tmp_path / 'a'}"))
    (tmp_path / "b").mkdir()
    for split in ("train", "test"):
        datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "b" / f"{split}.parquet")
    with pytest.raises(ValueError, match="expected an Image and a ClassLabel"):
        open_data(recipe_for(f"hub:{tmp_path / 'b'}"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_ends_after_whole_batches_the_same_in_every_process(tmp_path, monkeypatch, workers):
    """Three processes of 24 images: two batches of 4 each, although the files give some more and some less."""
    write_hub(tmp_path / "hub", "image", splits=("train", "validation"), count=24, files=4)
    seen = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        options = dict(epoch_samples=24, batch_size=4, crop_scale=(0.5, 1.0), crop_ratio=(1.0, 1.0))
        data = open_data(recipe_for(f"hub:{tmp_path / 'hub'}", **options))
        assert isinstance(data.train, Stream) and len(data.train) == 8
        loader = DataLoader(data.train, 4, num_workers=workers, drop_last=True)
        epochs = []
        for epoch in (0, 1, 0):
            data.train.set_epoch(epoch)
            batches = list(loader)
            assert len(batches) == 2 and all(images.shape == (4, 3, SIZE, SIZE) for images, _ in batches)
            epochs.append(torch.cat([images for images, _ in batches]))
        assert torch.equal(epochs[0], epochs[2])
        first, second = ({image.numpy().tobytes() for image in epoch} for epoch in epochs[:2])
        assert len(first) == 8 and not first & second  # each time another crop
        seen += [image.numpy().tobytes() for image, _ in data.test]
    whole = open_data(recipe_for(f"hub:{tmp_path / 'hub'}", epoch_samples=24, batch_size=4)).train
    orders = []
    for epoch in range(3):
        whole.set_epoch(epoch)
        orders.append(tuple(image.numpy().tobytes() for image, _ in whole))
    assert len(set(orders)) == 3  # without crops only the order changes
    assert len(seen) == 24 == len(set(seen))  # the test images once, over all processes


def test_bad_images_in_a_stream(tmp_path, caplog):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    good = io.BytesIO()
    random_image().save(good, format="PNG")
    rows = [{"bytes": data, "path": f"{n}.png"} for n, data in enumerate([b"no image", good.getvalue()] * 3)]
    table = datasets.Dataset.from_dict({"image": rows, "label": [0, 1] * 3}, features)
    (tmp_path / "hub").mkdir()
    for split in ("train", "test"):
        table.to_parquet(tmp_path / "hub" / f"{split}.parquet")
    data = open_data(recipe_for(f"hub:{tmp_path / 'hub'}", epoch_samples=8, batch_size=4))
    assert labels_of(data.train) == [1] * 8  # round and round
    assert labels_of(data.test) == [-1, 1] * 3  # named, and not counted
    assert [image.any() for image, _ in data.test] == [False, True] * 3
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 6 and sum("0.png cannot be read" in message for message in messages) == 2  # once for each
    data.train.set_epoch(1)
    assert labels_of(data.train) == [1] * 8 and len(caplog.records) == 6
    with pytest.raises(ValueError, match="does not say how many images it has: set epoch_samples"):
        open_data(recipe_for(f"hub:{tmp_path / 'hub'}"))
    caplog.set_level(logging.CRITICAL)
    bad = datasets.Dataset.from_dict({"image": [rows[0]] * 150, "label": [0] * 150}, features)
    for split in ("train", "test"):
        bad.to_parquet(tmp_path / "hub" / f"{split}.parquet")
    data = open_data(recipe_for(f"hub:{tmp_path / 'hub'}", epoch_samples=8, batch_size=4))
    with pytest.raises(OSError, match="none of the 150 images can be read, such as 0.png"):
        list(data.train)
    with pytest.raises(OSError, match="none of the 150 images can be read, such as 0.png"):
        list(data.test)
    mostly = datasets.Dataset.from_dict({"image": [rows[0]] * 150 + [rows[1]], "label": [0] * 150 + [1]}, features)
    for split in ("train", "test"):
        mostly.to_parquet(tmp_path / "hub" / f"{split}.parquet")
    data = open_data(recipe_for(f"hub:{tmp_path / 'hub'}", epoch_samples=8, batch_size=4))
    assert labels_of(data.train) == [1] * 8 and labels_of(data.test) == [-1] * 150 + [1]
