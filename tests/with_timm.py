"""timm, the authors' library, to hold ours against it: ``timm = import_timm()``.

On Linux the torchvision of PyPI is built for CUDA. Beside a torch for the CPU its compiled operations do not load, and
``import torchvision`` stops where it describes the first of them. timm calls none of them, so here they get a name.
"""

import sys
from importlib.util import find_spec

import pytest
import torch

NAMED = []  # a library of operations lives as long as this


def import_timm():
    """timm, or a skipped test file without it."""
    if find_spec("timm") is None:
        pytest.skip("without timm", allow_module_level=True)
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        NAMED.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in ("nms", "qnms"):
            NAMED[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
    import timm

    return timm
