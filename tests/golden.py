"""The authors' numbers, and the rule that fills a model with the weights they were recorded with.

The files in tests/goldens/ hold numbers only. They were recorded from the authors' public code
(yitu-opensource/T2T-ViT at commit 0f63dc9) with torch 2.13.0 on a CPU: weights by rule A below, inputs by numpy's
RandomState(0). Under rule B (files *.kqv025.json) the performers' kqv layers are scaled by 0.25, which brings the
denominator far above its epsilon.
"""

import json
import math
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent / "goldens"
TINY = dict(img_size=64, embed_dim=96, depth=2, num_heads=3, mlp_ratio=2.0, num_classes=10, token_dim=32)
TINY_MODELS = {  # arguments of T2TViT; the other files carry the name of a variant
    "tiny_performer": TINY,
    "tiny_performer_1ch": TINY | dict(img_size=32, in_chans=1, embed_dim=48, token_dim=16),
    "tiny_transformer": TINY | dict(tokens_type="transformer"),
    "tiny_transformer_qkvbias_qkscale": TINY | dict(tokens_type="transformer", qkv_bias=True, qk_scale=96**-0.5),
}


def read(name):
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def value(name, shape):
    """The entry ``name`` of a state dict, by rule A, in float64."""
    z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    if name.rpartition(".")[2] == "w":
        z = 0.7 * z
    elif name == "cls_token":
        z = 0.02 * z
    elif len(shape) == 1:
        z = 1 + 0.1 * z if "norm" in name and name.endswith(".weight") else 0.02 * z
    else:
        z = z / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(z)


def fill(model, dtype, kqv_scale=1.0):
    """Give ``model`` the weights of the rule. Its position table stays, rounded to float32 as it is."""
    model.to(dtype)
    with torch.no_grad():
        for name, entry in model.state_dict().items():
            if name != "pos_embed":
                scale = kqv_scale if name.rpartition(".")[0].endswith("kqv") else 1.0
                entry.copy_(scale * value(name, entry.shape))
    return model.eval()


@contextmanager
def in_float64():
    """As a decorator: what the test builds and draws has float64, so that "the same function" is nearly exact."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def noise(*shape, seed=0):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))
