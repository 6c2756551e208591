"""What every `pytest --nbval` run needs: one thread per kernel, and a look at the figures.

nbval never compares image/png. Here every figure is cut into 32 x 32 blocks: at most 1 % of them
may differ from the stored figure by more than 10 % grey. A thinner line or a longer title passes;
another curve, an empty plot or a missing figure fails.
"""

import base64
import io
import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # inherited by the kernels: stable sums, and
    os.environ.setdefault(name, "1")  # no fight for cores between two workers
os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")

BLOCK_DIFF, MAX_BLOCKS = 0.1, 0.01


def _thumbnails(outputs):
    from PIL import Image

    for out in outputs:
        png = out.get("data", {}).get("image/png")
        if png:
            im = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA")
            sheet = Image.new("RGBA", im.size, "white")
            sheet.alpha_composite(im)
            yield list(sheet.convert("L").resize((32, 32), Image.Resampling.BOX).tobytes())


def pytest_configure(config):
    if not getattr(config.option, "nbval", False):
        return
    from nbval.plugin import IPyNbCell

    plain = IPyNbCell.compare_outputs
    if hasattr(plain, "with_figures"):
        return

    def compare_outputs(self, test, ref, skip_compare=None):
        if not plain(self, test, ref, skip_compare):
            return False
        new, old = list(_thumbnails(test)), list(_thumbnails(ref))
        if len(new) != len(old):
            self.comparison_traceback.append(f"{len(new)} figures, {len(old)} stored")
            return False
        for i, (a, b) in enumerate(zip(new, old, strict=True)):
            part = sum(abs(x - y) > 255 * BLOCK_DIFF for x, y in zip(a, b, strict=True)) / len(a)
            if part > MAX_BLOCKS:
                self.comparison_traceback.append(f"figure {i}: {part:.1%} of it differs from the stored one")
                return False
        return True

    compare_outputs.with_figures = True
    IPyNbCell.compare_outputs = compare_outputs
