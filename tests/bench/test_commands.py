"""The command line of the bench: what cannot be measured is found before anything is, and what was measured is kept."""

import json

import pytest

from t2t_ref import bench
from t2t_ref.bench import cases, commands

SMALL = "models --models t2t_vit_7 --img-size 64 --batch 1 --rounds 3 --modes forward --implementations readable"


@pytest.fixture
def nothing_measured(monkeypatch):
    def measure(*arguments, **options):
        raise AssertionError("this was found too late")

    for name in ("interleave", "build", "pieces", "peak_memory"):
        monkeypatch.setattr(commands, name, measure)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("models --models t2t_vit_15", "unknown model 't2t_vit_15': did you mean 't2t_vit_1"),
        ("kinds --models t2t_vit_7 vit", "unknown model 'vit'"),
        ("models --implementations plain quick", "unknown implementation 'quick': known are plain, readable, fused"),
        ("memory --models t2t_vit_7 --img-size 64 2 --batch 1 1", "a 7x7 window does not fit in an image of 2x2"),
        ("models --rounds 2", "rounds is 2, expected at least 3"),
        ("start --rounds 0", "rounds is 0, expected at least 3"),
        ("models --img-size 64 96 --batch 1", "found 1 --batch for 2 --img-size, expected one for each"),
        ("models --img-size 64 2 --batch 1 1", "a 7x7 window does not fit in an image of 2x2"),
        ("models --models t2t_vit_7 vit_base_patch16 --img-size 100", "patches of 16 pixels do not tile"),
        ("models --batch 0", "batch is 0, expected at least 1"),
        ("models --modes forward --implementations recompute recompute+compile", "recompute is for training alone"),
        ("models --device abacus", "device 'abacus' cannot be had"),
        ("tokens --tokens 49 0", "tokens is 0, expected at least 1"),
        ("roof --threads 0", "threads is 0, expected at least 1"),
        ("pieces --json nowhere/found.json", "nowhere/found.json cannot be written: expected a file in a folder"),
        ("models --picture .", ". cannot be written"),
    ],
)
def test_what_cannot_be_measured_is_found_before_anything_is(arguments, said, nothing_measured, capsys):
    assert bench.main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("t2t_ref.bench: ") and said in err and err.count("\n") == 1


@pytest.mark.parametrize("arguments", ["peak", "speed", "models --precision float8"])
def test_what_is_no_command_is_refused_with_the_usage(arguments, nothing_measured, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main(arguments.split())
    assert ended.value.code == 2 and "invalid choice" in capsys.readouterr().err


def test_memory_is_taken_once_and_on_no_clock(nothing_measured, capsys):
    for option in ("--rounds 5", "--clock cpu"):
        with pytest.raises(SystemExit):
            bench.main(f"memory {option}".split())
        assert f"unrecognized arguments: {option}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, said, status",
    [
        (RuntimeError("out of memory\nand more"), "out of memory", 2),
        (MemoryError(), "MemoryError", 2),
        (KeyboardInterrupt(), "interrupted", 130),
    ],
)
def test_what_was_measured_before_a_failure_is_written(error, said, status, tmp_path, monkeypatch, capsys):
    whole = commands.bench_case

    def fail_in_training(case, options):
        if case.mode == "train":
            raise error
        return whole(case, options)

    monkeypatch.setattr(commands, "bench_case", fail_in_training)
    path, picture = tmp_path / "found.json", tmp_path / "found.png"
    arguments = SMALL.replace("forward", "forward train") + " --no-memory"
    assert bench.main([*arguments.split(), "--json", str(path), "--picture", str(picture)]) == status
    content = json.loads(path.read_text(encoding="utf-8"))
    assert [entry["case"]["mode"] for entry in content["found"]] == ["forward"] and content["failed"] == said
    assert capsys.readouterr().err == f"t2t_ref.bench: {said}\n" and picture.exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["found.json", "found.png"]


def test_an_earlier_file_survives_a_command_that_measured_nothing(tmp_path):
    path = tmp_path / "found.json"
    path.write_text("earlier", encoding="utf-8")
    assert bench.main([*"models --models t2t_vit_15 --json".split(), str(path)]) == 2
    assert path.read_text(encoding="utf-8") == "earlier"


def test_times_stand_without_the_memory(monkeypatch, capsys):
    def died(implementation, case):
        raise RuntimeError(f"{implementation}: died")

    monkeypatch.setattr(commands, "peak_memory", died)
    assert bench.main(SMALL.split()) == 0
    assert "peak memory of readable: died" in capsys.readouterr().out


def test_forms_of_a_mode():
    forms = ["plain", "recompute", "recompute+compile"]
    assert cases.forms_of(bench.Case(mode="forward"), forms) == ["plain"]
    assert cases.forms_of(bench.Case(mode="train"), forms) == forms
