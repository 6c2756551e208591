"""How stored outputs are compared: figures in blocks, numbers to three digits, nothing on stderr."""

import base64
import io
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import jupytext
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
FIGURES = SimpleNamespace(**runpy.run_path(str(ROOT / "conftest.py")))  # several files have this name


def sanitized(text):
    from nbval.plugin import get_sanitize_patterns

    for pattern, replacement in get_sanitize_patterns((ROOT / "nbval_sanitize.cfg").read_text(encoding="utf-8")):
        text = re.sub(pattern, replacement, text)
    return text


@pytest.mark.parametrize(
    "here, there",
    [
        ("loss 2.302585", "loss 2.302571"),
        ("[12.3456789, 100.25012]", "[12.3459, 100.25049]"),
        ("0.00123456 and 0.123456", "0.00123499 and 0.123499"),
        ("1.2345678e-05", "1.23441e-05"),
        ("1,234.5678 MB", "1,234.5671 MB"),
    ],
)
def test_the_fourth_digit_may_differ(here, there):
    assert sanitized(here) == sanitized(there)


@pytest.mark.parametrize(
    "here, there",
    [
        ("loss 2.302", "loss 2.303"),
        ("0.000002", "0.000001"),
        ("0.00123", "0.00124"),
        ("1.2345e-05", "1.2345e-06"),
        ("1,234,567", "1,234,568"),
        ("12345", "12346"),
        ("-0.12345", "0.12345"),
    ],
)
def test_another_number_differs(here, there):
    assert sanitized(here) != sanitized(there)


def live_figures():
    """(chapter, tolerance, stored outputs) of every figure that draws what was trained a moment ago."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            tolerance = cell.metadata.get("mystnb", {}).get("figure_tolerance")
            if tolerance is not None:
                yield path.stem, tolerance, cell.outputs


def changed(outputs, change):
    from PIL import Image

    (stored,) = (out.data["image/png"] for out in outputs if "image/png" in out.get("data", {}))
    buffer = io.BytesIO()
    change(Image.open(io.BytesIO(base64.b64decode(stored)))).save(buffer, format="PNG")
    return [{"data": {"image/png": base64.b64encode(buffer.getvalue()).decode()}}]


def test_a_figure_with_a_tolerance_of_its_own_is_still_compared():
    from PIL import Image, ImageOps

    found = list(live_figures())
    assert {chapter for chapter, *_ in found} == {"11-training"}
    for _, tolerance, outputs in found:
        assert FIGURES.SHARE_OF_BLOCKS < tolerance <= 0.06
        for change, differs in (
            (lambda picture: picture, False),
            (ImageOps.mirror, True),  # a curve that rises where it fell
            (lambda picture: Image.new("RGB", picture.size, "white"), True),
        ):
            message = FIGURES.figures_differ(changed(outputs, change), outputs, tolerance)
            assert bool(message) == differs, message
        assert FIGURES.figures_differ([], outputs, tolerance) == "0 figures, 1 stored"


def test_the_tolerance_of_a_cell_survives_in_the_notebook():
    figures = list(live_figures())
    for source in sorted((ROOT / "book").glob("[0-9][0-9]-*.md")):
        cells = jupytext.read(source, fmt="md:myst").cells
        written = [cell.metadata.get("mystnb", {}).get("figure_tolerance") for cell in cells]
        here = [tolerance for chapter, tolerance, _ in figures if chapter == source.stem]
        assert [tolerance for tolerance in written if tolerance is not None] == here
