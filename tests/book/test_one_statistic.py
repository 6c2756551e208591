"""Chapter 16 and the page of results give the same number for the same comparison, by the same statistic."""

import json
import re
from pathlib import Path

import pytest
import results_tables

ROOT = Path(__file__).resolve().parents[2]
LINE = re.compile(r"fused against readable: (\d\.\d\d), middle halves (apart|overlap)")


def printed(file: str) -> list[tuple[str, str]]:
    """What the cell that shows a file of results printed, from the stored outputs of the chapter."""
    notebook = json.loads((ROOT / "notebooks" / "16-fast-and-small.ipynb").read_text(encoding="utf-8"))
    (cell,) = (cell for cell in notebook["cells"] if f'\nmodels("{file}.json")' in "\n" + "".join(cell["source"]))
    return LINE.findall("".join("".join(out.get("text", "")) for out in cell["outputs"]))


@pytest.mark.parametrize("file", ["bench_models", "bench_384", "bench_bfloat16", "bench_compile", "bench_peer"])
def test_fused_against_readable_is_one_number(file):
    found = json.loads((ROOT / "results" / f"{file}.json").read_text(encoding="utf-8"))["found"]
    rows = [results_tables.medians(entry, "fused against readable") for entry in found]
    words = {"faster": "apart", "slower": "apart", "middle halves overlap": "overlap"}
    assert printed(file) == [(ratio, words[word]) for _, word, ratio in rows] != []
