"""Evaluation: counts against a loop by hand, files of both kinds, several processes, what goes wrong."""

import collections
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from t2t_ref import T2TViT, create_model, preprocess, save_checkpoint
from t2t_ref.train.evaluate import Evaluation, draw_confusion, evaluate, find_model, main, wilson

TINY = dict(img_size=32, embed_dim=24, depth=1, num_heads=3, mlp_ratio=2.0, token_dim=8)


class Table(nn.Module):
    """A model whose answer for an image is written in its first pixels."""

    def __init__(self, classes):
        super().__init__()
        self.classes, self.weight = classes, nn.Parameter(torch.zeros(1))

    def forward(self, images):
        assert not self.training and not torch.is_grad_enabled()
        return images[:, 0, 0, : self.classes]


def answers(count, classes, seed=0):
    """Images that hold random answers, and labels; some images are not to be counted."""
    torch.manual_seed(seed)
    images = torch.randn(count, 1, 2, max(classes, 4))
    labels = torch.randint(classes, (count,))
    labels[::7] = -1
    return list(zip(images, labels.tolist(), strict=True))


def by_hand(data, classes):
    confusion, top5, losses = np.zeros((classes, classes), int), 0, []
    for image, label in data:
        if label >= 0:
            order = sorted(range(classes), key=lambda k: -image[0, 0, k].item())
            confusion[label, order[0]] += 1
            top5 += label in order[:5]
            losses.append(-image[0, 0, :classes].log_softmax(0)[label].item())
    return confusion, top5, np.mean(losses)


@pytest.mark.parametrize("classes", [2, 3, 5, 6, 30])
def test_counts_are_those_of_a_loop_by_hand(classes):
    data, model = answers(101, classes), Table(classes).train()
    result = evaluate(model, data, lambda x: x, classes, batch_size=8)
    confusion, top5, loss = by_hand(data, classes)
    assert result.confusion.tolist() == confusion.tolist()
    assert result.top1_hits == confusion.trace() and result.count == confusion.sum() and result.unread == 15
    assert result.top1 == confusion.trace() / confusion.sum()
    assert result.top5_hits == top5 and (classes > 5 or result.top5 == 1.0)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert ("top-5" in str(result)) == (classes > 5)
    assert model.training  # it is given back as it came


def test_the_interval_is_wilsons():
    for hits, total in ((0, 10), (7, 10), (10, 10), (40720, 50000), (1, 3)):
        for bound in wilson(hits, total):  # where the share seen is 1.96 standard errors from the share supposed
            error = math.sqrt(bound * (1 - bound) / total)
            assert abs(hits / total - bound) == pytest.approx(1.959964 * error, rel=1e-5, abs=1e-12)
    assert wilson(0, 0) == (0, 1)


def test_the_text_and_the_pairs_confused_most():
    confusion = torch.tensor([[8, 2, 0], [0, 4, 6], [1, 0, 9]])
    result = Evaluation(confusion, 30, 0.5, 1, ("cat", "dog", "owl"))
    assert result.confused() == [("dog", "owl", 6, 0.6), ("cat", "dog", 2, 0.2), ("owl", "cat", 1, 0.1)]
    assert result.confused(1) == [("dog", "owl", 6, 0.6)]
    lines = str(result).splitlines()
    assert lines[0] == "30 images of 3 classes; 1 more could not be read"
    assert lines[1] == "top-1   70.00 %   21 right, 95 % interval 52.12 to 83.34 %"
    assert "  dog for owl: 6, 60.0 %" in lines
    assert json.loads(json.dumps(result.summary()))["confusion"] == confusion.tolist()
    assert "confusion" not in Evaluation(torch.eye(41, dtype=torch.int64), 41, 0.0).summary()


def test_the_picture_shows_what_is_wrong_in_shares_of_each_class(tmp_path):
    confusion = torch.tensor([[8, 2, 0], [0, 5, 0], [1, 2, 1]])
    figure = draw_confusion(Evaluation(confusion, 15, 0.1, 0, ("cat", "dog", "owl")), tmp_path / "confusion.png")
    axes = figure.axes[0]
    shown = axes.images[0].get_array()
    assert shown.filled(-1).tolist() == [[-1, 20, 0], [0, -1, 0], [25, 50, -1]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat  (80 %)", "dog  (100 %)", "owl  (25 %)"]
    assert axes.get_xlabel() == "wrongly taken for" and axes.images[0].get_clim() == (0, 50)
    assert Image.open(tmp_path / "confusion.png").size[0] > 800
    with pytest.raises(ValueError, match="41 classes are too many for a picture, expected at most 40"):
        draw_confusion(Evaluation(torch.eye(41, dtype=torch.int64), 41, 0.0))


def test_classes_that_do_not_agree_and_answers_that_are_none():
    with pytest.raises(ValueError, match="the model tells 5 classes apart, the data has 3"):
        evaluate(Table(5), answers(10, 3), lambda x: x[..., [0, 1, 2, 3, 3]], 3)
    with pytest.raises(ValueError, match="the data has 3, and the largest label is 4"):
        evaluate(Table(3), [(torch.zeros(1, 1, 4), 4)], lambda x: x, 3)
    model = Table(3).train()
    with pytest.raises(ValueError, match="answers are not finite"):
        evaluate(model, answers(10, 3), lambda x: x / 0, 3)
    assert model.training


def test_nothing_to_count():
    result = evaluate(Table(3), [(torch.zeros(1, 1, 4), -1)], lambda x: x, 3)
    assert result.count == 0 and result.top1 == 0 and "0 images" in str(result)


class FakeProcess:
    """One of several processes, all of whose sums are known: what accelerate does, one process after the other."""

    device = torch.device("cpu")

    def __init__(self, rank, world, sums):
        self.process_index, self.num_processes, self.sums, self.calls = rank, world, sums, 0

    def unwrap_model(self, model):
        return model

    def reduce(self, tensor, reduction):
        assert reduction == "sum"
        self.sums.setdefault(self.calls, []).append(tensor)
        self.calls += 1
        return sum(self.sums[self.calls - 1])


@pytest.mark.parametrize("count", [100, 101, 3, 2])
def test_processes_share_an_odd_number_of_images(count):
    data, sums = answers(count, 4), {}
    alone = evaluate(Table(4), data, lambda x: x, 4)
    for rank in range(3):  # the last one sees the sums of all
        shared = evaluate(Table(4), data, lambda x: x, 4, batch_size=4, accelerator=FakeProcess(rank, 3, sums))
    assert torch.equal(shared.confusion, alone.confusion) and shared.unread == alone.unread
    assert shared.loss == pytest.approx(alone.loss, rel=1e-5) and shared.top5_hits == alone.top5_hits


# files


def write_folder(root, classes=3, images=5):
    for split in ("train", "val"):
        for number in range(classes):
            folder = root / split / f"class_{number}"
            folder.mkdir(parents=True)
            for image in range(images + number):
                pixels = np.random.default_rng(10 * number + image).integers(0, 100, (30, 40, 3), np.uint8)
                pixels[..., (number + image // 3) % 3] += 150  # two colours in each class
                Image.fromarray(pixels).save(folder / f"{image}.png")
    (root / "val" / "class_0" / "bad.png").write_text("no image", encoding="utf-8")
    return root


def released(model, path):
    """A file such as the authors publish: the averaged weights alone."""
    torch.save({"state_dict_ema": collections.OrderedDict(model.state_dict())}, path)
    return path


def expected_of(model, root, **options):
    """Counts by hand, image after image, prepared by t2t_ref.preprocess."""
    confusion = torch.zeros(3, 3, dtype=torch.int64)
    with torch.no_grad():
        for label in range(3):
            for path in sorted((root / "val" / f"class_{label}").glob("[0-9]*.png")):
                confusion[label, model.eval()(preprocess(path, 32)).argmax()] += 1
    return confusion.tolist()


def test_a_file_of_the_authors(tmp_path, capsys):
    root = write_folder(tmp_path / "photos")
    torch.manual_seed(0)
    model = create_model("t2t_vit_7", num_classes=3, img_size=32)
    with torch.no_grad():  # or every image is of one class
        images = [preprocess(path, 32) for path in sorted((root / "val").rglob("[0-9]*.png"))]
        model.head.bias -= model.eval()(torch.cat(images)).mean(dim=0)
    path = released(model, tmp_path / "71.7_T2T_ViT_7.pth.tar")
    arguments = [str(path), "--data", f"imagefolder:{root}", "--img-size", "32", "--cpu", "--workers", "0"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "32 pixels, crop 0.9" in text and "18 images of 3 classes; 1 more could not be read" in text
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert found["confusion"] == expected_of(model, root)
    assert len({np.argmax(row) for row in found["confusion"]}) > 1
    assert found["top1_hits"] == np.trace(found["confusion"]) and found["interpolation"] == "bicubic"
    assert (tmp_path / "out" / "confusion.png").exists()


def test_a_file_that_does_not_say_what_it_is(tmp_path, capsys):
    torch.manual_seed(0)
    path = released(create_model("t2t_vit_7", num_classes=3, img_size=32), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="does not say which model it holds: --model, one of t2t_vit_7,"):
        find_model(str(path))
    model = find_model(str(path), "t2t_vit_7", 32)
    assert model.num_classes == 3 and model.img_size == (32, 32)
    headless = create_model("t2t_vit_7", num_classes=0, img_size=32)
    with pytest.raises(ValueError, match="have no head"):
        find_model(str(released(headless, path)), "t2t_vit_7", 32)


def test_a_wrong_number_of_classes_is_an_error_of_one_line(tmp_path, capsys):
    root = write_folder(tmp_path / "photos", classes=2)
    path = tmp_path / "weights.safetensors"
    save_checkpoint(T2TViT(**TINY, num_classes=3), path)
    assert main([str(path), "--data", f"imagefolder:{root}", "--cpu", "--workers", "0"]) == 2
    assert "the model tells 3 classes apart, the data has 2" in capsys.readouterr().err
    assert main([str(path), "--cpu"]) == 2
    assert "--data says what to evaluate on" in capsys.readouterr().err
    assert main([str(tmp_path / "none.safetensors"), "--data", "digits"]) == 2
    assert "no file of weights at" in capsys.readouterr().err


def test_ours_with_the_recipe_of_its_run(tmp_path, capsys):
    """The log beside the weights says what they were trained on, and how its images were normalised."""
    from dataclasses import asdict

    from t2t_ref.train.recipes import Recipe

    torch.manual_seed(0)
    save_checkpoint(T2TViT(**TINY, num_classes=10), tmp_path / "weights.safetensors")
    recipe = Recipe(data="digits", test_split="val", mean=(0.1, 0.2, 0.3), model_options=(("depth", 1),), img_size=32)
    (tmp_path / "log.jsonl").write_text(json.dumps({"kind": "run", "recipe": asdict(recipe)}) + "\n", encoding="utf-8")
    assert main([str(tmp_path / "weights.safetensors"), "--cpu", "--output", str(tmp_path)]) == 0
    assert "on digits, 32 pixels" in capsys.readouterr().out
    found = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert found["images"] == 200 and found["mean"] == [0.1, 0.2, 0.3]
    tall = T2TViT(**TINY | {"img_size": (32, 48)}, num_classes=10)
    save_checkpoint(tall, tmp_path / "weights.safetensors")
    assert main([str(tmp_path / "weights.safetensors"), "--cpu"]) == 2
    assert "images of 32x48 pixels; only squares" in capsys.readouterr().err
    assert main([str(tmp_path / "weights.safetensors"), "--cpu", "--img-size", "32"]) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun of torch's wheels for Windows lacks libuv")
def test_two_real_processes_count_every_image_once(tmp_path):
    root = write_folder(tmp_path / "photos", images=4)  # 4 + 5 + 6 images and a bad one: unequal shares
    torch.manual_seed(0)
    weights = tmp_path / "w.safetensors"
    save_checkpoint(T2TViT(**TINY, num_classes=3), weights)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [str(weights), "--data", f"imagefolder:{root}", "--cpu", "--workers", "0"]
    done = subprocess.run(
        [*launch, "-m", "t2t_ref.evaluate", *arguments, "--output", str(tmp_path / "two")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,  # a busy machine
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("top-1") == 1  # one process prints
    assert main([*arguments, "--output", str(tmp_path / "one")]) == 0
    two, one = (
        json.loads((tmp_path / name / "evaluation.json").read_text(encoding="utf-8")) for name in ("two", "one")
    )
    assert two["images"] == 15 and two["unread"] == 1
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert two | {"loss": 0} == one | {"loss": 0}
