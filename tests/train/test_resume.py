"""A run that is killed goes on as if nothing had been, to the last bit."""

import json
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import replace

import pytest
import safetensors.torch
import tiny
import torch

from t2t_ref.train import CannotStart, fit, state
from t2t_ref.train import run as run_module

RECIPE = replace(tiny.RECIPE, log_every=4, ema_warmup=True)  # every second update a state, so some between two lines


@pytest.fixture(scope="module", autouse=True)
def no_curve():
    """Drawing takes half of the time of these runs, and is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run_module, "draw_curve", lambda lines, path: None)
        yield


def run(folder, **options):
    return fit(RECIPE, folder, data=tiny.DATA, cpu=True, **options)


by_fork = pytest.mark.skipif(
    sys.platform != "linux",  # Windows cannot fork, and a fork of a process that has computed is unsafe on macOS
    reason="kills a fork of this process",
)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(folder, prepare, **options) -> None:
    """Run in a process of its own, which ``prepare`` has made to kill itself somewhere; it may return more options."""

    def work():
        run(folder, **(prepare() or {}), **options)

    process = multiprocessing.get_context("fork").Process(target=work)  # a fork need not import everything again
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


def log_of(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    times = ("seconds", "images_per_second", "command")
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


def assert_same(folder, whole) -> None:
    """Equal weights, bit by bit; equal logs, but for times and for the lines that say where a run went on."""
    ours, expected = tiny.weights(folder), tiny.weights(whole)
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name
    assert [line for line in log_of(folder) if line["kind"] != "resume"] == log_of(whole)


def in_update(number: int):
    """Kill after this update, before anything is written about it."""

    return lambda: {"after_update": lambda model, update: update == number and kill()}


def in_the_middle_of_writing_a_state(number: int):
    def prepare():
        real, count = torch.save, [0]

        def save(content, file):
            count[0] += 1
            if count[0] < number:
                return real(content, file)
            file.write(os.urandom(30_000))
            file.flush()
            kill()

        torch.save = save

    return prepare


def between_renaming_and_clearing_up():
    real, count = os.replace, [0]

    def replace(source, target):
        real(source, target)
        count[0] += str(target).endswith(".pt")
        if count[0] == 3:
            kill()

    os.replace = replace


def after_the_line_of_an_epoch_and_before_its_state():
    real, count = torch.save, [0]

    def save(content, file):
        count[0] += content["position"]["start"] == 0
        if count[0] == 2:
            kill()
        real(content, file)

    torch.save = save


def at_the_end_before_the_weights():
    real, count = safetensors.torch.save_file, [0]

    def save_file(*arguments, **options):
        count[0] += 1
        if count[0] == 2:  # the first is the trial at the start
            kill()
        return real(*arguments, **options)

    safetensors.torch.save_file = save_file


@by_fork
@pytest.mark.parametrize(
    "prepare",
    [
        in_update(1),
        in_update(7),
        in_update(18),
        in_the_middle_of_writing_a_state(1),
        in_the_middle_of_writing_a_state(4),
        between_renaming_and_clearing_up,
        after_the_line_of_an_epoch_and_before_its_state,
        at_the_end_before_the_weights,
    ],
    ids=lambda prepare: prepare.__qualname__.split(".")[0],
)
def test_killed_anywhere_it_resumes_to_the_same_bits(whole, tmp_path, prepare):
    killed(tmp_path, prepare)
    assert not (tmp_path / "weights.safetensors").exists()
    run(tmp_path, resume=True)
    assert_same(tmp_path, whole)


@by_fork
def test_killed_again_and_again_at_any_moment(whole, tmp_path):
    """By the clock: wherever the process happens to be."""
    kills, end = 0, time.monotonic() + 240
    for attempt in range(40):
        process = multiprocessing.get_context("fork").Process(target=lambda: run(tmp_path, resume=True))
        process.start()
        before = len(state.states_of(tmp_path)) and state.states_of(tmp_path)[0].name
        while process.is_alive() and (not state.states_of(tmp_path) or state.states_of(tmp_path)[0].name == before):
            assert time.monotonic() < end, f"no state after {before}"
            time.sleep(0.01)
        time.sleep(0.013 * attempt % 0.05)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:
            break
    assert process.exitcode == 0 and kills >= 1
    assert_same(tmp_path, whole)
    assert len(list((tmp_path / "state").glob("*"))) == state.KEPT


@by_fork
def test_damaged_states_are_named_and_ignored(whole, tmp_path, capsys):
    killed(tmp_path, in_update(11))
    newest, older = state.states_of(tmp_path)
    content = newest.read_bytes()
    newest.write_bytes(content[: len(content) // 2])  # a disk that lied about fsync
    (tmp_path / "state" / "000000099.partial").write_bytes(content[:1000])
    torch.save({"something": 1}, tmp_path / "state" / "000000098.pt")
    run(tmp_path, resume=True, quiet=False)
    shown = capsys.readouterr().out
    assert f"ignoring {newest}" in shown and "000000099.partial: writing it was cut off" in shown
    assert "000000098.pt: it is not a state" in shown and f"going on from {older}" in shown
    assert_same(tmp_path, whole)


@by_fork
def test_without_any_readable_state_it_does_not_start_over(tmp_path):
    killed(tmp_path, in_update(5))
    for path in state.states_of(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(CannotStart, match="no state in .* can be read: move .* away"):
        run(tmp_path, resume=True)


def test_resume_starts_afresh_in_an_empty_folder(whole, tmp_path):
    run(tmp_path / "new", resume=True)
    assert_same(tmp_path / "new", whole)
    assert log_of(tmp_path / "new")[0]["kind"] == "run"


def test_a_finished_run_is_left_alone(whole):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    result = run(whole, resume=True, after_update=lambda model, update: kill())
    assert before == {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert torch.equal(result.model.head.bias, tiny.weights(whole)["head.bias"])
    assert torch.equal(result.average.head.bias, tiny.weights(whole)["ema.head.bias"])
    assert len(result.epochs) == 3


def test_another_recipe_is_refused_by_name(whole):
    for change, message in (
        ({"lr": 0.5}, "lr was 0.01, is 0.5"),
        ({"model_options": (("depth", 2),)}, "model_options was"),
        ({"batch_size": 4}, "batch_size was 8, is 4"),
        ({"epochs": 9, "seed": 3}, "epochs was 3, is 9; seed was 0, is 3"),
    ):
        with pytest.raises(CannotStart, match=f"another recipe: {message}"):
            fit(replace(RECIPE, **change), whole, data=tiny.DATA, cpu=True, resume=True)
    other = replace(RECIPE, workers=1, log_every=7, save_every=0, batch_size=4, accumulate=2)
    fit(other, whole, data=tiny.DATA, cpu=True, resume=True)


def test_a_state_is_read_without_running_what_is_in_it(whole):
    content = torch.load(state.states_of(whole)[0], weights_only=True)
    assert content["position"]["update"] == 18 and content["recipe"]["lr"] == 0.01
