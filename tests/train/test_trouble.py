"""What other machines and other people's disks do to a run, and what people type."""

import errno
import importlib.metadata
import io
import json
import math
import multiprocessing
import os
import signal
import stat
import sys
import time
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors import SafetensorError
from torch.utils._python_dispatch import TorchDispatchMode

from t2t_ref.train import CannotStart, Interrupted, Recipe, fit, loop, sampling, state
from t2t_ref.train import run as run_module
from t2t_ref.train.__main__ import main
from t2t_ref.train.evaluate import main as evaluate
from t2t_ref.train.log import Log, printable

SHORT = replace(tiny.RECIPE, epochs=2, warmup_epochs=0, cooldown_epochs=0)


def trained(recipe=SHORT, output=None, data=tiny.DATA, **options):
    return fit(recipe, output, data=data, cpu=True, **options)


def never(model, update):
    raise AssertionError("it trained")


def lines_of(folder, kind):
    lines = map(json.loads, (folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["kind"] == kind]


# ---- platforms


def test_a_system_that_opens_no_folder(tmp_path, monkeypatch):
    """Windows."""
    real = os.open

    def refusing(path, *rest, **more):
        if not isinstance(path, int) and os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return real(path, *rest, **more)

    monkeypatch.setattr(state.os, "open", refusing)
    trained(output=tmp_path)
    assert len(state.states_of(tmp_path)) == state.KEPT


def test_a_file_system_that_syncs_no_folder(tmp_path, monkeypatch):
    """Some that are mounted over a network."""
    real = os.fsync

    def refusing(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(handle)

    monkeypatch.setattr(state.os, "fsync", refusing)
    trained(output=tmp_path)
    assert len(state.states_of(tmp_path)) == state.KEPT


class NoFloat64(TorchDispatchMode):
    """A device that does not have it, such as Apple's: the CPU itself, but for what it refuses."""

    def __torch_dispatch__(self, operation, types, arguments=(), more=None):
        result = operation(*arguments, **(more or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
                raise TypeError(f"{operation} makes float64")
        return result


@pytest.mark.skipif(
    tuple(map(int, importlib.metadata.version("kornia").split(".")[:2])) < (0, 9),
    reason="kornia before 0.9 solves in float64 wherever the device has it",
)
def test_no_step_of_an_update_needs_float64():
    recipe = replace(
        SHORT, epochs=1, mixup=0.8, cutmix=1.0, flip=0.5, pad_crop=2, erasing=0.5, rand_augment=9.0, smoothing=0.1,
        clip_grad=1.0, ema_warmup=True, img_size=32,
    )  # fmt: skip
    mode = NoFloat64()

    def begin(model, update):  # the model itself is built on the CPU, whatever the device
        if update == 1:
            mode.__enter__()

    try:
        trained(recipe, after_update=begin)
    finally:
        mode.__exit__(None, None, None)


class Slow(torch.utils.data.Dataset):
    """Images that take their time, one of which is worth a warning."""

    def __len__(self):
        return 48

    def __getitem__(self, index):
        time.sleep(0.02)
        if index == 7:
            run_module.LOGGER.getChild("data").warning("image 7 is broken")
        return torch.full((3, 32, 32), 0.5), index % 4


@pytest.fixture
def started_by(request):
    """How processes are started, for one test."""
    if sys.platform != "linux":
        pytest.skip("Windows has neither way, and a fork of a process that has computed is unsafe on macOS")
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.parametrize(
    "started_by, number",
    [("fork", signal.SIGINT), ("fork", signal.SIGTERM), ("forkserver", signal.SIGINT)],
    indirect=["started_by"],
)
def test_a_signal_to_all_processes_saves_while_images_are_awaited(tmp_path, started_by, number):
    """A terminal sends Ctrl-C to the processes that read images too, a batch system its SIGTERM."""
    recipe = replace(SHORT, epochs=3, workers=1, save_every_updates=0, evaluate_every=0, ema_decay=0.0)

    def to_all(model, update):
        if update == 3:
            for process in [*multiprocessing.active_children(), SimpleNamespace(pid=os.getpid())]:
                os.kill(process.pid, number)

    data = SimpleNamespace(train=Slow(), test=tiny.DATA.test, num_classes=4, class_names=tuple("abcd"))
    with pytest.raises(Interrupted, match="after update [34]: the last good state is .*--resume goes on from it"):
        trained(recipe, tmp_path, data, after_update=to_all)
    assert [path.name for path in state.states_of(tmp_path)][-1] in ("000000003.pt", "000000004.pt")
    assert (tmp_path / "weights.safetensors").exists()


@pytest.mark.parametrize("started_by", ["fork", "forkserver"], indirect=True)
def test_what_a_process_that_reads_has_to_say_is_in_the_log(tmp_path, started_by):
    data = SimpleNamespace(train=Slow(), test=tiny.DATA.test, num_classes=4, class_names=tuple("abcd"))
    trained(replace(SHORT, epochs=1, workers=1, evaluate_every=0), tmp_path, data)
    assert [line["message"] for line in lines_of(tmp_path, "warning")] == ["image 7 is broken"]


def test_an_error_that_is_no_signal_stays_what_it_is(tmp_path):
    class Broken(Slow):
        def __getitem__(self, index):
            raise RuntimeError("a bug")

    data = SimpleNamespace(train=Broken(), test=tiny.DATA.test, num_classes=4, class_names=tuple("abcd"))
    with pytest.raises(RuntimeError, match="a bug"):
        trained(output=tmp_path, data=data)


def test_letters_that_the_terminal_does_not_know(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert printable("caf\xe9 \udcff.png") == "caf\\xe9 \\udcff.png"
    trained(replace(SHORT, epochs=1, data="caf\xe9 \udcff"), tmp_path / "r\xfcn", quiet=False)
    sys.stdout.flush()
    assert b"caf\\xe9 \\udcff" in sys.stdout.buffer.getvalue()


# ---- full disks


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_for_the_state(monkeypatch):
    """torch's writer answers a file that takes no more with a RuntimeError of its own."""
    real, count = torch.save, [0]

    def save(content, file):
        count[0] += 1
        real(content, SimpleNamespace(write=full_disk, flush=file.flush) if count[0] == 3 else file)

    monkeypatch.setattr(state.torch, "save", save)


def full_for_the_weights(monkeypatch):
    """safetensors has an error of its own for it."""
    real, count = run_module.save_checkpoint, [0]

    def save(model, path):
        count[0] += 1
        if count[0] == 2:  # after the trial
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        real(model, path)

    monkeypatch.setattr(run_module, "save_checkpoint", save)


def full_for_the_log(monkeypatch):
    real, count = Log.write, [0]

    def write(self, kind, **values):
        count[0] += 1
        if count[0] == 8:
            self.file.write('{"kind": "st')
            full_disk()
        real(self, kind, **values)

    monkeypatch.setattr(Log, "write", write)


@pytest.mark.parametrize("fill", [full_for_the_state, full_for_the_weights, full_for_the_log])
def test_a_disk_that_fills_up_is_said_in_one_line_and_the_run_resumes(tmp_path, monkeypatch, fill):
    whole = trained()
    with monkeypatch.context() as patched:
        fill(patched)
        with pytest.raises(
            OSError, match=r"No space left on device.*last good state is .*\.pt, and --resume"
        ) as caught:
            trained(output=tmp_path)
    assert caught.value.errno == errno.ENOSPC and "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.partial"))
    rest = trained(output=tmp_path, resume=True)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, rest.model.state_dict()[name]), name
    assert [line["update"] for line in lines_of(tmp_path, "step")] == list(range(1, 13))


# ---- data that moved


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    from PIL import Image

    root = tmp_path_factory.mktemp("photos") / "here"
    for split, count in (("train", 8), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (40, 40), (100 * label, 10 * number, 0)).save(folder / f"{number}.png")
    return root


def moved(recipe, place, output):
    return fit(replace(recipe, data=f"imagefolder:{place}"), output, cpu=True, resume=True)


def test_images_that_have_moved_are_known_again(photos, tmp_path):
    recipe = replace(SHORT, batch_size=4, data=f"imagefolder:{photos}")
    whole = fit(recipe, tmp_path / "whole", cpu=True)

    def cut(model, update):
        if update == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(recipe, tmp_path / "run", cpu=True, after_update=cut)
    there = photos.rename(photos.with_name("there"))
    try:  # others are not taken for them
        (there / "train/dog/3.png").rename(there / "train/dog/9.png")
        with pytest.raises(CannotStart, match="does not hold the images of .*: the names of the files differ"):
            moved(recipe, there, tmp_path / "run")
        (there / "train/dog/9.png").rename(there / "9.png")
        with pytest.raises(CannotStart, match="class dog had 8 images, has 7"):
            moved(recipe, there, tmp_path / "run")
        (there / "9.png").rename(there / "train/dog/3.png")
        for split in ("train", "val"):
            (there / split / "dog").rename(there / split / "wolf")
        with pytest.raises(CannotStart, match="classes that are gone: dog; that are new: wolf"):
            moved(recipe, there, tmp_path / "run")
        for split in ("train", "val"):
            (there / split / "wolf").rename(there / split / "dog")
        rest = moved(recipe, there, tmp_path / "run")
    finally:
        there.rename(photos)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, rest.model.state_dict()[name]), name


def test_a_move_that_cannot_be_checked_is_refused(photos, tmp_path):
    recipe = replace(SHORT, batch_size=4, data=f"imagefolder:{photos}")
    fit(recipe, tmp_path, cpu=True)
    with pytest.raises(CannotStart, match="another recipe: data was 'imagefolder:.*', is 'digits'"):
        fit(replace(recipe, data="digits"), tmp_path, cpu=True, resume=True)
    for path in state.states_of(tmp_path):  # as an earlier version wrote it
        content = torch.load(path, weights_only=True)
        del content["data"]
        torch.save(content, path)
    moved(recipe, photos, tmp_path)
    link = tmp_path / "link"
    try:
        link.symlink_to(photos)
    except OSError as error:
        pytest.skip(f"no links here: {error}")
    with pytest.raises(CannotStart, match="another recipe: data was"):
        moved(recipe, link, tmp_path)


def test_images_that_have_changed_in_their_place_are_mentioned(tmp_path):
    recipe = replace(SHORT, updates_per_epoch=2)
    trained(replace(recipe, save_every_updates=0, evaluate_every=0), tmp_path)
    state.states_of(tmp_path)[0].unlink()  # the one that says it is finished
    more = SimpleNamespace(**vars(tiny.DATA) | {"train": tiny.Images(0, 56)})
    fit(replace(recipe, save_every_updates=0, evaluate_every=0), tmp_path, data=more, cpu=True, resume=True)
    (line,) = lines_of(tmp_path, "warning")
    assert "not those that the run began with: there were 48 images, there are 56" in line["message"]


def test_the_weights_it_started_from_are_not_needed_to_go_on(tmp_path):
    first = trained(replace(SHORT, epochs=1), tmp_path / "first")
    recipe = replace(SHORT, model_weights=str(tmp_path / "first" / "weights.safetensors"))
    trained(recipe, tmp_path / "second")
    (tmp_path / "first" / "weights.safetensors").unlink()
    again = trained(recipe, tmp_path / "second", resume=True)
    assert not torch.equal(again.model.head.weight, first.model.head.weight)
    with pytest.raises(CannotStart, match="weights.safetensors"):
        trained(recipe, tmp_path / "third", after_update=never)


# ---- refusals


def test_every_number_of_a_recipe_has_its_range():
    for field in fields(Recipe):
        takes_numbers = "float" in str(field.type) or field.type is int
        assert bool(field.metadata["within"]) == takes_numbers, field.name
        if takes_numbers:
            wrong = -1 if field.type is int else math.nan
            value = (wrong,) * len(field.default) if isinstance(field.default, tuple) else wrong
            with pytest.raises(ValueError, match=rf"{field.name} is .*(nan|-1).*, expected a (whole )?number in "):
                replace(Recipe(), **{field.name: value})


@pytest.mark.parametrize(
    "words, message",
    [
        ("--workers -1", "workers is -1, expected a whole number in [0, inf)"),
        ("--crop-pct 90", "crop_pct is 90.0, expected a number in (0, 1]"),
        ("--lr nan", "lr is nan, expected a number in (0, inf)"),
        ("--lr inf", "lr is inf"),
        ("--lr 0", "lr is 0.0, expected a number in (0, inf)"),
        ("--img-size 0", "img_size is 0, expected a whole number in [1, inf)"),
        ("--batch-size 2.5", "--batch-size: invalid literal"),
        ("--batch-size 0", "batch_size is 0"),
        ("--flip 1.5", "flip is 1.5, expected a number in [0, 1]"),
        ("--drop-path 1", "drop_path is 1.0, expected a number in [0, 1)"),
        ("--ema-decay 1", "ema_decay is 1.0, expected a number in [0, 1)"),
        ("--weight-decay -0.1", "weight_decay is -0.1"),
        ("--seed -1", "seed is -1"),
        ("--std 0 1 1", "std is (0.0, 1.0, 1.0), expected a number in (0, inf)"),
        ("--std 1 1", "mean has 3 channels and std 2, expected as many"),
        ("--crop-scale 1 0.5", "crop_scale is (1.0, 0.5), expected the smaller number first"),
        ("--interpolation cubic", "unknown interpolation 'cubic': did you mean 'bicubic'?"),
        ("--epochs", "argument --epochs: expected one argument"),
        ("--model-options colour=red", "model_options: "),
        ("--model-options embed_dim=-1", "model_options: "),
        ("--data-options colour=red", "data_options: "),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(words, message, tmp_path, capsys):
    assert main([*words.split(), "--cpu", "--output", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("t2t_ref.train: ") and message in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        ("--workers -1", "workers is -1"),
        ("--crop-pct 90", "crop_pct is 90.0, expected a number in (0, 1]"),
        ("--batch-size 0", "batch_size is 0"),
        ("--img-size 0", "img_size is 0"),
        ("--img-size many", "argument --img-size: invalid int value: 'many'"),
        ("--images x", "unrecognized arguments: --images x"),
    ],
)
def test_the_evaluation_refuses_likewise(words, message, tmp_path, capsys):
    assert evaluate([str(tmp_path / "w.safetensors"), "--data", "digits", "--cpu", *words.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("t2t_ref.evaluate: ") and message in line


def test_a_compiler_that_is_missing_is_found_before_anything_starts(tmp_path, monkeypatch):
    def compile(function):
        def run(*arguments):
            try:
                raise FileNotFoundError("no C++ compiler")
            except FileNotFoundError as error:
                raise RuntimeError("backend='inductor' raised:\n\nmuch more") from error

        return run

    monkeypatch.setattr(loop.torch, "compile", compile)
    with pytest.raises(CannotStart, match=r"torch.compile does not work here \(FileNotFoundError: no C\+\+ compiler\)"):
        trained(replace(SHORT, compile=True), tmp_path / "run", after_update=never)
    assert not (tmp_path / "run").exists()


# ---- what the log says, and what is drawn


def test_mixed_images_have_no_training_accuracy():
    for changes, expected in (({}, True), ({"mixup": 0.8}, False), ({"cutmix": 1.0}, False)):
        lines = trained(replace(SHORT, epochs=1, evaluate_every=0, **changes)).steps
        assert len(lines) == 6 and all(("accuracy" in line) == expected for line in lines)


def test_data_that_draw_nothing_are_read_without_a_seed(monkeypatch):
    data, seeds = tiny.Images(0), []
    monkeypatch.setattr(sampling, "seed_all", lambda *numbers, devices: seeds.append(numbers))
    batches = []
    for draws, expected in ((True, 48), (False, 0)):
        data.draws = draws
        seeds.clear()
        batches.append([labels for _, labels in sampling.training_batches(data, 0, 0, 8, 0, 1)])
        assert len(seeds) == expected
    assert torch.equal(*map(torch.cat, batches))
