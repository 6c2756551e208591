"""What every `pytest --nbval` run needs: one thread per kernel, and a look at the figures.

nbval never compares image/png. Here every figure is cut into 32 x 32 blocks: at most 1 % of them
may differ from the stored figure by more than 10 % grey. A thinner line or a longer title passes;
another curve, an empty plot or a missing figure fails. A figure that draws what was trained a
moment ago says in its cell how much more may differ (mystnb: figure_tolerance: 0.06).
What stands on stderr is not compared: a warning belongs to one version of a package. (None is
stored either: tools/nb.py refuses it.)
"""

import base64
import io
import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # inherited by the kernels: stable sums, and
    os.environ.setdefault(name, "1")  # no fight for cores between two workers
os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # or the kernel warns about frozen modules

# what takes longest begins first, so that no worker is left alone with it at the end
LONGEST = (
    "test_export.py", "17-many-gpus.ipynb", "24-side-by-side.ipynb", "14-released-weights.ipynb", "test_parity.py",
    "test_evaluate.py", "11-training.ipynb", "15-what-it-sees.ipynb", "16-fast-and-small.ipynb", "test_processes.py",
    "test_experiments.py", "test_train.py", "test_trouble.py", "08-transformer-blocks.ipynb",
)  # fmt: skip

BLOCKS_PER_SIDE, BLOCK_DIFFERENCE, SHARE_OF_BLOCKS = 32, 0.1, 0.01


def grey_blocks(outputs):
    """The mean grey of every block, for each PNG among a cell's outputs."""
    from PIL import Image

    for out in outputs:
        png = out.get("data", {}).get("image/png")
        if png:
            picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA")
            sheet = Image.new("RGBA", picture.size, "white")
            sheet.alpha_composite(picture)
            size = (BLOCKS_PER_SIDE, BLOCKS_PER_SIDE)
            yield list(sheet.convert("L").resize(size, Image.Resampling.BOX).tobytes())


def figures_differ(new_outputs, stored_outputs, tolerance=SHARE_OF_BLOCKS):
    """What is wrong with the figures of a cell, or None."""
    new, stored = list(grey_blocks(new_outputs)), list(grey_blocks(stored_outputs))
    if len(new) != len(stored):
        return f"{len(new)} figures, {len(stored)} stored"
    for number, (a, b) in enumerate(zip(new, stored, strict=True)):
        share = sum(abs(x - y) > 255 * BLOCK_DIFFERENCE for x, y in zip(a, b, strict=True)) / len(a)
        if share > tolerance:
            return f"figure {number}: {share:.1%} of it differs from the stored one"
    return None


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_configure(config):
    if not getattr(config.option, "nbval", False):
        return
    from nbval.plugin import IPyNbCell

    compare_text = IPyNbCell.compare_outputs
    if hasattr(compare_text, "with_figures"):
        return

    def compare_outputs(self, test, ref, skip_compare=None):
        test, ref = ([out for out in outs if out.get("name") != "stderr"] for outs in (test, ref))
        if not compare_text(self, test, ref, skip_compare):
            return False
        tolerance = self.cell.metadata.get("mystnb", {}).get("figure_tolerance", SHARE_OF_BLOCKS)
        difference = figures_differ(test, ref, tolerance)
        if difference:
            self.comparison_traceback.append(difference)
        return not difference

    compare_outputs.with_figures = True
    IPyNbCell.compare_outputs = compare_outputs
