"""A small model for the tests of weights, and what they ask of it."""

import argparse
import collections

import pytest
import torch

from t2t_ref import T2TViT, load_checkpoint

TINY = dict(img_size=64, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2.0, num_classes=5, token_dim=8)


def tiny(seed=0, **arguments):
    torch.manual_seed(seed)
    return T2TViT(**(TINY | arguments)).eval()


def state(model):
    return {name: entry.clone() for name, entry in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def refuses(model, source, error, match, **options):
    """``source`` is refused, and ``model`` is what it was."""
    before = state(model)
    with pytest.raises(error, match=match) as caught:
        load_checkpoint(model, source, **options)
    assert same(state(model), before)
    return str(caught.value)


def authors_file(weights, path, legacy=False):
    """As timm 0.3.4's saver writes it for the authors' training script; the released files hold the last entry only."""
    content = {
        "epoch": 309,
        "arch": "t2t_vit_14",
        "state_dict": {name: entry + 1 for name, entry in weights.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-5}]},
        "version": 2,
        "args": argparse.Namespace(model="t2t_vit_14", lr=5e-4, mean=None, cooldown_epochs=10),
        "amp_scaler": {"scale": 65536.0},
        "metric": 81.5,
        "state_dict_ema": collections.OrderedDict(weights),
    }
    del content["arch"]  # the tiny model is none of the variants; see test_heads_that_shapes_do_not_show
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path
