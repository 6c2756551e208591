"""What fewer bits cost: the stored numbers are those of the committed weights, and are computed as they say."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import results_tables
from einops import rearrange

from t2t_ref.experiments import MEASUREMENTS, precisions, what_it_sees
from t2t_ref.experiments.__main__ import main

RESULTS = Path(__file__).resolve().parents[2] / "results"


@pytest.fixture
def stored():
    return json.loads((RESULTS / "precisions.json").read_text(encoding="utf-8"))


def test_the_stored_numbers_are_those_of_the_committed_weights(stored):
    weights = RESULTS / "weights" / stored["weights"]["file"]
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert found == stored["weights"]["sha256"], f"other weights: run {stored['command']} again"
    assert stored["command"] == f"python -m t2t_ref.experiments {stored['experiment']}"
    assert stored["experiment"] in MEASUREMENTS and stored["tested"] == what_it_sees.TESTED
    beside = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))
    assert stored["accuracy"] == pytest.approx(beside["accuracy"], abs=0.2)  # another processor, another rounding
    assert [(row["form"], row["precision"]) for row in stored["rows"]] == list(precisions.ASKED)


def test_fewer_bits_are_smaller_files_and_never_much_worse(stored):
    rows = {(row["form"], row["precision"]): row for row in stored["rows"]}
    for (form, precision), row in rows.items():
        whole = rows[form, "float32"]
        assert row["difference"] <= precisions.TOLERANCES[precision]
        # a digit that is named otherwise changes the accuracy by at most one digit
        assert abs(row["accuracy"] - stored["accuracy"]) <= 100 * row["changed"] / stored["tested"] + 0.01
        if precision == "float32":
            assert row["changed"] <= 2
        else:
            assert row["bytes"] < 0.7 * whole["bytes"] and row["difference"] > whole["difference"]


def test_numbers_are_counted_by_digit(tmp_path, monkeypatch):
    """A graph that is the model, and one that takes every digit for the one before it."""
    (tmp_path / "weights").mkdir()
    model = what_it_sees.build("t2t").eval()
    what_it_sees.save(model, tmp_path / "weights" / "t2t.safetensors")

    def export(model, path, form, *, precision):
        path.write_bytes(bytes(len(precision)))

    def runner(path, form):
        return (lambda images: model(images).roll(-1, dims=1)) if "int8" in path.name else model

    monkeypatch.setattr(precisions, "export", export)
    monkeypatch.setattr(precisions, "runner", runner)
    monkeypatch.setitem(sys.modules, "onnxruntime", type("OnnxRuntime", (), {"__version__": "0"}))
    said = []
    asked = (("onnx", "float32"), ("onnx", "int8"))
    result = precisions.measure(tmp_path, 70, said.append, asked)
    assert result == json.loads((tmp_path / "precisions.json").read_text(encoding="utf-8")) and len(said) == 2
    images, labels = what_it_sees.shown_digits(70)
    found = rearrange([model(image[None]).argmax(dim=-1) for image in images], "b 1 -> b")
    same, other = result["rows"]
    assert same["accuracy"] == result["accuracy"] == round(100 * (found == labels).double().mean().item(), 2)
    assert other["accuracy"] == round(100 * ((found - 1) % 10 == labels).double().mean().item(), 2)
    assert (same["changed"], other["changed"]) == (0, 70) and same["difference"] < 1e-5 < other["difference"]
    assert (same["bytes"], other["bytes"]) == (7, 4)
    lines = results_tables.markdown(tmp_path / "precisions.json", [])
    assert any("| onnx | int8 |" in line and "| 70 |" in line for line in lines)


def test_without_weights_the_command_says_what_is_missing(tmp_path, capsys):
    assert main(["precisions", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "t2t.safetensors" in error and error.count("\n") == 1
    assert main([]) == 0
    assert "precisions: trains nothing" in capsys.readouterr().out
