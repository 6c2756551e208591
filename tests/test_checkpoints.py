"""Weights from files: what is read, what is adapted, what is refused; and files of our own."""

import argparse
import builtins
import collections
import http.server
import inspect
import json
import os
import pathlib
import pickle
import re
import struct
import sys
import tarfile
import threading
import urllib.error
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import t2t_ref
from t2t_ref import (
    T2TViT,
    ViT,
    create_model,
    list_models,
    load_checkpoint,
    load_model,
    released_weights,
    resize_position_table,
    save_checkpoint,
)
from t2t_ref.checkpoints import arguments_of

TINY = dict(img_size=64, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2.0, num_classes=5, token_dim=8)


def tiny(seed=0, **arguments):
    torch.manual_seed(seed)
    return T2TViT(**(TINY | arguments)).eval()


@pytest.fixture
def trained():
    """Stands for a trained model: every entry differs from those of a fresh one, the random features too."""
    return tiny(seed=1)


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


# what is read


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_the_authors_file_gives_its_averaged_weights(trained, tmp_path, legacy):
    path = authors_file(state(trained), tmp_path / "model_best.pth.tar", legacy)
    model = tiny()
    report = load_checkpoint(model, path)
    assert same(state(model), state(trained))
    assert str(report).splitlines()[0] == f"{path}, entry 'state_dict_ema'"
    assert len(report.loaded) == len(state(model)) and not report.adapted and not report.skipped
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(image), trained(image))

    load_checkpoint(model, str(path), use_ema=False)
    torch.testing.assert_close(model.head.bias, trained.head.bias + 1)


def test_the_random_features_come_from_the_file(trained):
    """The frozen w belongs to the keys and queries that were trained with it."""
    model, weights = tiny(), state(trained)
    assert not torch.equal(model.tokens_to_token.attention1.w, trained.tokens_to_token.attention1.w)
    load_checkpoint(model, weights)
    for layer in ("attention1", "attention2"):
        assert torch.equal(getattr(model.tokens_to_token, layer).w, getattr(trained.tokens_to_token, layer).w)
        assert not getattr(model.tokens_to_token, layer).w.requires_grad
    del weights["tokens_to_token.attention2.w"]
    refuses(tiny(), weights, ValueError, "missing from the file: 1 entries\n  tokens_to_token.attention2.w: 4 x 8")
    refuses(tiny(), weights, ValueError, "no tokens_to_token.attention2.w that fits", strict=False)


def test_only_averaged_weights(trained, tmp_path):
    torch.save({"state_dict_ema": state(trained)}, tmp_path / "81.5.pth.tar")  # as the released files are
    refuses(tiny(), tmp_path / "81.5.pth.tar", ValueError, "averaged weights only.*use_ema is False", use_ema=False)
    load_checkpoint(tiny(), tmp_path / "81.5.pth.tar")


@pytest.mark.parametrize("prefix", ["module.", "module._orig_mod.", "_orig_mod."])
def test_names_that_wrappers_leave(trained, prefix):
    model = tiny()
    load_checkpoint(model, {prefix + name: entry for name, entry in state(trained).items()})
    assert same(state(model), state(trained))
    both = state(trained) | {"module.norm.bias": trained.norm.bias}
    refuses(model, both, ValueError, "two entries for 'norm.bias'")


def test_a_cifar_file(trained, tmp_path):
    """transfer_learning.py writes net, acc and epoch; the authors' own loader cannot read it."""
    net = {f"module.{name}": entry for name, entry in state(trained).items()}
    torch.save({"net": net, "acc": 98.3, "epoch": 59}, tmp_path / "cifar10.pth")
    model = tiny()
    assert "entry 'net'" in str(load_checkpoint(model, tmp_path / "cifar10.pth"))
    assert same(state(model), state(trained))


MMPRETRAIN = {  # ours, theirs
    "tokens_to_token.attention1.norm1.weight": "backbone.tokens_to_token.attention1.ln1.weight",
    "tokens_to_token.attention2.norm2.bias": "backbone.tokens_to_token.attention2.ln2.bias",
    "tokens_to_token.attention1.attn.qkv.weight": "backbone.tokens_to_token.attention1.attn.qkv.weight",
    "tokens_to_token.attention1.mlp.fc1.bias": "backbone.tokens_to_token.attention1.ffn.layers.0.0.bias",
    "tokens_to_token.attention2.mlp.fc2.weight": "backbone.tokens_to_token.attention2.ffn.layers.1.weight",
    "tokens_to_token.project.weight": "backbone.tokens_to_token.project.weight",
    "blocks.0.norm1.weight": "backbone.encoder.0.ln1.weight",
    "blocks.1.attn.proj.bias": "backbone.encoder.1.attn.proj.bias",
    "blocks.1.norm2.bias": "backbone.encoder.1.ln2.bias",
    "blocks.1.mlp.fc1.weight": "backbone.encoder.1.ffn.layers.0.0.weight",
    "blocks.0.mlp.fc2.bias": "backbone.encoder.0.ffn.layers.1.bias",
    "norm.weight": "backbone.norm.weight",
    "cls_token": "backbone.cls_token",
    "pos_embed": "backbone.pos_embed",
    "head.weight": "head.layers.head.weight",
    "head.bias": "head.layers.head.bias",
}


def mmpretrain_name(name):
    if name.startswith("head."):
        return f"head.layers.{name}"
    for ours, theirs in (
        ("mlp.fc1", "ffn.layers.0.0"),
        ("mlp.fc2", "ffn.layers.1"),
        (".norm1", ".ln1"),
        (".norm2", ".ln2"),
    ):
        name = name.replace(ours, theirs)
    return "backbone." + re.sub("^blocks", "encoder", name)


def test_mmpretrains_names(tmp_path):
    trained, model = tiny(seed=1, tokens_type="transformer"), tiny(tokens_type="transformer")
    weights = {mmpretrain_name(name): entry for name, entry in state(trained).items()}
    assert set(MMPRETRAIN.values()) <= set(weights)
    assert all(mmpretrain_name(ours) == theirs for ours, theirs in MMPRETRAIN.items())
    torch.save({"meta": {"epoch": 310}, "state_dict": weights}, tmp_path / "mm.pth")
    report = load_checkpoint(model, tmp_path / "mm.pth")
    assert same(state(model), state(trained))
    assert "note: mmpretrain's names." in str(report)
    assert "note" not in str(load_checkpoint(model, state(trained)))


def test_safetensors_of_anybody(trained, tmp_path):
    from safetensors.torch import save_file

    model = tiny()
    save_file(state(trained), tmp_path / "model.safetensors", {"format": "pt", "arguments": "none of ours"})
    load_checkpoint(model, tmp_path / "model.safetensors")
    assert same(state(model), state(trained))
    os.rename(tmp_path / "model.safetensors", tmp_path / "weights.bin")  # known by its bytes, not by its name
    load_checkpoint(tiny(), tmp_path / "weights.bin")


def test_precision_is_that_of_the_model(trained):
    model = tiny().double()
    load_checkpoint(model, {name: entry.half() for name, entry in state(trained).items()})
    assert {entry.dtype for entry in state(model).values()} == {torch.float64}
    torch.testing.assert_close(model.norm.weight, trained.norm.weight.half().double())


# what is adapted


@pytest.mark.parametrize("classes", [7, 0])
def test_another_number_of_classes_leaves_the_head_fresh(trained, classes):
    model = tiny(num_classes=classes)
    before = state(model)
    report = load_checkpoint(model, state(trained))
    after = state(model)
    for name in after:
        assert torch.equal(after[name], before[name] if name.startswith("head.") else state(trained)[name])
    assert [(entry.name, entry.stored) for entry in report.skipped] == [("head.weight", (5, 24)), ("head.bias", (5,))]
    in_the_model = "7 x 24 in the model; another number of classes: its head stays fresh"
    nowhere = "head.weight: 5 x 24 in the file; another number of classes: no head here"
    assert (in_the_model if classes else nowhere) in str(report)


def test_weights_without_a_head(trained):
    headless = {name: entry for name, entry in state(trained).items() if not name.startswith("head.")}
    model = tiny()
    before = model.head.weight.clone()
    report = load_checkpoint(model, headless)
    assert torch.equal(model.head.weight, before) and torch.equal(model.cls_token, trained.cls_token)
    assert "head.bias: 5 in the model; another number of classes" in str(report)
    del headless["norm.bias"]  # half a head, or anything else, is no number of classes
    refuses(model, headless, ValueError, "norm.bias")
    refuses(
        model, headless | {"norm.bias": trained.norm.bias, "head.bias": trained.head.bias}, ValueError, "head.weight"
    )


def test_another_image_size_resizes_the_table(trained):
    model = tiny(img_size=(96, 160))
    report = load_checkpoint(model, state(trained))
    expected = resize_position_table(trained.pos_embed, (4, 4), (6, 10))
    torch.testing.assert_close(model.pos_embed, expected)
    assert not model.pos_embed.requires_grad
    assert (
        "adapted: 1\n  pos_embed: 1 x 17 x 24 in the file, 1 x 61 x 24 in the model; grid 4x4 resized to 6x10"
        in str(report)
    )
    assert model(torch.randn(1, 3, 96, 160)).shape == (1, 5)


def test_as_many_tokens_in_another_grid(trained):
    """112 x 448 pixels leave 7 x 28 tokens, as many as 14 x 14: the table must be resized all the same."""
    square, wide = tiny(seed=1, img_size=224), tiny(img_size=(112, 448))
    assert square.pos_embed.shape == wide.pos_embed.shape
    report = load_checkpoint(wide, state(square))
    torch.testing.assert_close(wide.pos_embed, resize_position_table(square.pos_embed, (14, 14), (7, 28)))
    assert "grid 14x14 resized to 7x28" in str(report)

    again = tiny(img_size=(112, 448))
    load_checkpoint(again, state(wide), grid=(7, 28))
    assert same(state(again), state(wide))
    load_checkpoint(square, state(wide), grid=(7, 28))
    torch.testing.assert_close(square.pos_embed, resize_position_table(wide.pos_embed, (7, 28), (14, 14)))


def test_a_grid_that_nothing_tells_is_refused(tmp_path):
    trained, model = tiny(seed=1, img_size=(48, 80)), tiny(img_size=(80, 48))
    refuses(model, state(trained), ValueError, r"15 positions, which is no square: pass grid=.*own are 5x3 = 15")
    refuses(model, state(trained), ValueError, "grid is 3x4 = 12, the stored table has 15 positions", grid=(3, 4))
    load_checkpoint(model, state(trained), grid=(3, 5))
    expected = resize_position_table(trained.pos_embed, (3, 5), (5, 3))
    torch.testing.assert_close(model.pos_embed, expected)
    save_checkpoint(trained, tmp_path / "m.safetensors")  # writes the size down
    other = tiny(img_size=(80, 48))
    load_checkpoint(other, tmp_path / "m.safetensors")
    torch.testing.assert_close(other.pos_embed, expected)


def test_a_vit_is_adapted_too():
    arguments = dict(embed_dim=24, depth=2, num_heads=3)
    trained, model = ViT(img_size=64, num_classes=5, **arguments), ViT(img_size=(32, 96), num_classes=2, **arguments)
    load_checkpoint(model, state(trained))
    torch.testing.assert_close(model.pos_embed, resize_position_table(trained.pos_embed, (4, 4), (2, 6)))
    assert model.pos_embed.requires_grad


# what is refused


def test_another_variant_is_refused_by_name():
    source = state(create_model("t2t_vit_7", num_classes=10))
    message = refuses(
        create_model("t2t_vit_14"), source, ValueError, "does not fit this model, which was left as it was"
    )
    assert "its shapes are those of t2t_vit_7: create_model('t2t_vit_7')" in message
    assert "missing from the file: 77 entries\n  blocks.{7,8,9,10,11,12,13}.norm1.weight: 384 in the model" in message
    assert "cls_token: 1 x 1 x 256 in the file, 1 x 1 x 384 in the model" in message
    assert "head.weight: 10 x 256 in the file, 1000 x 384 in the model\n" in message
    source = state(create_model("t2t_vit_t_14", depth=2))
    refuses(
        create_model("t2t_vit_14", depth=2), source, ValueError, "not in the model: .*\n.*attn.qkv.weight: 192 x 147"
    )
    refuses(tiny(in_chans=1), state(tiny()), ValueError, "attention1.kqv.weight: 24 x 147 in the file, 24 x 49 in the")


def test_heads_that_shapes_do_not_show(tmp_path):
    """T2T-ViT-14 with 32 heads has the very shapes of T2T-ViT-14 with 6."""
    resnext, model = create_model("t2t_vit_14_resnext", depth=1), create_model("t2t_vit_14", depth=1)
    note = "num_heads=32, the model has num_heads=6"
    torch.save({"arch": "t2t_vit_14_resnext", "state_dict": state(resnext)}, tmp_path / "a.pth.tar")
    refuses(model, tmp_path / "a.pth.tar", ValueError, note)
    save_checkpoint(resnext, tmp_path / "a.safetensors")
    refuses(model, tmp_path / "a.safetensors", ValueError, note)
    assert note in str(load_checkpoint(model, tmp_path / "a.safetensors", strict=False))
    load_checkpoint(create_model("t2t_vit_14_resnext", depth=1), tmp_path / "a.pth.tar")
    save_checkpoint(tiny(qk_scale=8**-0.5), tmp_path / "b.safetensors")  # the default, spelled out
    load_checkpoint(tiny(), tmp_path / "b.safetensors")
    save_checkpoint(tiny(qk_scale=24**-0.5), tmp_path / "b.safetensors")
    refuses(tiny(), tmp_path / "b.safetensors", ValueError, "qk_scale=0.204")


def test_strict_lists_every_entry_and_lenient_reports_them(trained):
    weights = state(trained)
    del weights["norm.bias"]
    weights["mask_token"] = torch.zeros(1, 1, 24)
    weights["epoch"] = 3
    weights["blocks.0.norm1.weight"] = torch.zeros(25)
    weights["blocks.1.norm1.bias"] = torch.zeros(24, dtype=torch.int64)
    model = tiny()
    message = refuses(model, weights, ValueError, "does not fit")
    for line in (
        "missing from the file: 1 entries\n  norm.bias: 24 in the model",
        "not in the model: 2 entries\n  mask_token: 1 x 1 x 24 in the file\n  epoch: one number in the file",
        "of another shape: 1 entries\n  blocks.0.norm1.weight: 25 in the file, 24 in the model",
        "of another kind: 1 entries\n  blocks.1.norm1.bias: 24 in the file, 24 in the model; torch.int64",
    ):
        assert line in message
    before = state(model)
    report = load_checkpoint(model, weights, strict=False)
    assert [entry.name for entry in report.skipped] == [
        *("norm.bias", "mask_token", "epoch", "blocks.0.norm1.weight", "blocks.1.norm1.bias")
    ]
    assert "skipped: 5\n  norm.bias: 24 in the model; missing from the file\n" in str(report)
    for name, entry in state(model).items():
        assert torch.equal(entry, (before if name in {e.name for e in report.skipped} else weights)[name])
    refuses(model, {"a": torch.zeros(1)}, ValueError, "does not fit", strict=False)  # nothing at all to load


@pytest.mark.parametrize(
    "spoiled",
    [
        lambda entry: entry.to(torch.complex64),
        lambda entry: entry.to_sparse(),
        lambda entry: entry.to("meta"),
        lambda entry: entry.tolist(),
    ],
)
def test_entries_that_cannot_be_copied_leave_the_model_alone(trained, spoiled):
    weights = state(trained)
    weights["norm.weight"] = spoiled(weights["norm.weight"])
    refuses(tiny(), weights, ValueError, "of another kind: 1 entries\n  norm.weight")


@pytest.mark.parametrize("content", [{}, {"epoch": 3, "acc": 98.3}, {"state_dict": {}, "epoch": 3}, {"net": {"a": 1}}])
def test_a_dict_without_weights_is_refused(content, tmp_path):
    refuses(tiny(), content, ValueError, "the mapping holds no weights: found")
    torch.save(content, tmp_path / "a.pth")
    refuses(tiny(), tmp_path / "a.pth", ValueError, "a.pth holds no weights: found")


def test_a_model_without_memory_is_refused(trained):
    with torch.device("meta"):
        model = tiny()
    with pytest.raises(ValueError, match="the model is on the meta device"):
        load_checkpoint(model, state(trained))


def test_content_that_is_no_dict_is_refused(trained, tmp_path):
    for content, kind in ((list(state(trained).values()), "list"), (trained.cls_token.detach(), "Tensor"), (3, "int")):
        torch.save(content, tmp_path / "a.pth")
        refuses(tiny(), tmp_path / "a.pth", ValueError, f"holds a {kind}; expected a dict of weights")


class Hostile:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["beside", "in the arguments", "as the weights"])
def test_nothing_in_a_file_is_run(trained, tmp_path, legacy, place):
    trace = tmp_path / "was-run"
    hostile = Hostile(os.mkdir, str(trace))
    content = {
        "beside": {"state_dict": state(trained), "extra": hostile},
        "in the arguments": {"state_dict": state(trained), "args": argparse.Namespace(lr=hostile)},
        "as the weights": hostile,
    }[place]
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    refuses(tiny(), tmp_path / "a.pth", ValueError, "asks for (posix|nt).mkdir, which is code.*Nothing of it was run")
    assert not trace.exists()
    torch.load(tmp_path / "a.pth", weights_only=False)  # the trap is a real one
    assert trace.exists()


@pytest.mark.parametrize(
    "thing, name",
    [
        (pathlib.PurePosixPath("/"), r"pathlib(\._local)?\.PurePosixPath"),  # Python 3.13 has it in a module of its own
        (np.float64(81.5), "numpy.*scalar"),
        (Hostile(builtins.eval, "1 + 1"), r"(builtins\.)?eval"),
    ],
)
def test_a_namespace_is_the_only_object_allowed(trained, tmp_path, thing, name):
    torch.save({"state_dict": state(trained), "thing": thing}, tmp_path / "a.pth")
    message = refuses(tiny(), tmp_path / "a.pth", ValueError, f"asks for {name}, which is code or an object")
    assert "weights_only" not in message
    with pytest.raises(pickle.UnpicklingError):  # allowed inside load_checkpoint alone
        torch.save({"args": argparse.Namespace()}, tmp_path / "b.pth")
        torch.load(tmp_path / "b.pth", weights_only=True)


def test_without_torchs_context_the_list_of_allowed_classes_comes_back(trained, tmp_path, monkeypatch):
    """torch 2.4 has a list in the place of safe_globals."""
    monkeypatch.delattr(torch.serialization, "safe_globals", raising=False)
    path = authors_file(state(trained), tmp_path / "a.pth.tar")
    whole = list(torch.serialization.get_safe_globals())
    torch.serialization.add_safe_globals([collections.Counter])  # somebody else's
    try:
        before = set(torch.serialization.get_safe_globals())
        load_checkpoint(tiny(), path)
        assert set(torch.serialization.get_safe_globals()) == before
        torch.save({"thing": Hostile(os.mkdir, str(tmp_path / "was-run"))}, tmp_path / "b.pth")
        refuses(tiny(), tmp_path / "b.pth", ValueError, "which is code")
        assert set(torch.serialization.get_safe_globals()) == before and not (tmp_path / "was-run").exists()
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(whole)


def test_a_whole_pickled_model_is_refused(trained, tmp_path):
    torch.save(trained, tmp_path / "a.pth")
    refuses(tiny(), tmp_path / "a.pth", ValueError, "asks for t2t_ref.t2t_vit.T2TViT")


@pytest.mark.filterwarnings("error")
def test_files_of_another_kind_are_refused(tmp_path):
    path = tmp_path / "81.5_T2T_ViT_14.pth.tar"
    refuses(tiny(), path, FileNotFoundError, f"no file of weights at {path}")
    refuses(tiny(), str(tmp_path), ValueError, "is not a file")
    for content, match in (
        (b"", "is empty"),
        (b"\n\n<!DOCTYPE html>\n<html lang=en><title>GitHub</title></html>", "is a web page, not weights"),
        (b"\xef\xbb\xbf<HTML><body>429</body></HTML>", "is a web page, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "is no file of weights, or not whole"),
        (b"hello", "is no file of weights, or not whole"),
        (pickle.dumps({"a": 1}, protocol=4), r"is no file of weights, or not whole \(Unsupported operand 149\)"),
        (pickle.dumps(Hostile(os.mkdir, str(tmp_path / "was-run"))), "is no file of weights, or not whole"),
    ):
        path.write_bytes(content)
        message = refuses(tiny(), path, ValueError, match)
        assert "weights_only" not in message  # torch's own message tells people to switch the protection off
    with tarfile.open(path, "w") as file:  # the name notwithstanding, the authors' files are no tar archives
        file.add(__file__, "a.py")
    refuses(tiny(), path, ValueError, "is no file of weights")
    with zipfile.ZipFile(path, "w") as file:
        file.write(__file__, "a.py")
    refuses(tiny(), path, ValueError, "is no file of weights")
    assert not (tmp_path / "was-run").exists()


FORMATS = {
    "zip": lambda model, path: torch.save({"state_dict_ema": state(model)}, path),
    "legacy": lambda model, path: authors_file(state(model), path, legacy=True),
    "safetensors": lambda model, path: save_checkpoint(model, path),
}


@pytest.fixture(params=FORMATS)
def whole_file(request, tmp_path, trained):
    FORMATS[request.param](trained, tmp_path / "whole")
    return tmp_path / "whole"


@pytest.mark.parametrize("share", [0.001, 0.01, 0.3, 0.9, 0.999])
def test_truncated_files_are_refused(whole_file, share):
    content = whole_file.read_bytes()
    load_checkpoint(tiny(), whole_file)
    whole_file.write_bytes(content[: int(len(content) * share)])
    refuses(tiny(), whole_file, ValueError, "not whole|is empty")


def only_documented_errors(path, target, before):
    """Whatever the bytes: loaded, or one of the errors that the docstring names and the model as it was."""
    for read in (lambda: load_checkpoint(target, path), lambda: load_model(path)):
        try:
            read()
        except (ValueError, FileNotFoundError):
            assert same(state(target), before)
        target.load_state_dict(before)


fuzzed = settings(  # the same examples in every run; what a test writes may stay from one example to the next
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@fuzzed
@given(
    content=st.binary(max_size=300),
    start=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x10" + 7 * b"\0" + b"{"]),
)
def test_random_bytes_give_the_documented_errors(tmp_path, content, start):
    target = tiny()
    (tmp_path / "a").write_bytes(start + content)
    before = state(target)
    with pytest.raises(ValueError):
        load_checkpoint(target, tmp_path / "a")
    with pytest.raises(ValueError):
        load_model(tmp_path / "a")
    assert same(state(target), before)


@fuzzed
@given(data=st.data())
def test_damaged_bytes_give_the_documented_errors(whole_file, data):
    """Bytes changed at random, most of them where the structure is: at the start and at the end."""
    content = bytearray(whole_file.read_bytes())
    last = len(content) - 1
    near_an_end = st.integers(0, min(2500, last)) | st.integers(max(0, last - 2500), last)
    for place in data.draw(st.lists(near_an_end | st.integers(0, last), min_size=1, max_size=5)):
        content[place] = data.draw(st.integers(0, 255))
    damaged = whole_file.with_name("damaged")
    damaged.write_bytes(bytes(content[: data.draw(st.just(last + 1) | st.integers(0, last))]))
    target = tiny()
    only_documented_errors(damaged, target, state(target))


# released files


def test_the_table_of_released_files():
    table = released_weights()
    text, page = str(table), table._repr_html_()
    assert repr(table) == text and len(table) == 15 and len(text.splitlines()) == 17
    for row in table:
        assert row.url == f"https://github.com/yitu-opensource/T2T-ViT/releases/download/main/{row.file}"
        assert row.file in text and f'<a href="{row.url}">{row.file}</a>' in page
        assert row.model in list_models() and str(row.top1) in row.file
        assert row.measured is None or abs(row.measured[0] - row.top1) < 0.06 < row.measured[1] - row.measured[0]
    assert "t2t_vit_14    ImageNet   224     81.5_T2T_ViT_14.pth.tar        81.5   81.50 / 95.67   86,212,823" in text
    assert sum(row.in_create_model for row in table) == 10
    fourteen = next(row for row in table if row.size)
    with torch.device("meta"):
        tensors = sum(4 * entry.numel() for entry in create_model(fourteen.model).state_dict().values())
    assert 0 < fourteen.size - tensors < 50_000  # one copy in float32, and little else


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of torch.hub's, and no network: torch.hub's urlopen serves what ``pages`` holds."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "urlopen", lambda request: (_ for _ in ()).throw(urllib.error.URLError("no route")))
    return tmp_path / "hub" / "checkpoints"


def test_pretrained_takes_the_released_file_from_the_cache(hub):
    trained = create_model("t2t_vit_7")
    hub.mkdir(parents=True)
    torch.save({"state_dict_ema": trained.state_dict()}, hub / "71.7_T2T_ViT_7.pth.tar")
    assert same(state(create_model("t2t_vit_7", pretrained=True)), state(trained))
    model = create_model("t2t_vit_7", pretrained=True, num_classes=10, img_size=(64, 96), drop_path_rate=0.1)
    assert torch.equal(model.blocks[3].attn.qkv.weight, trained.blocks[3].attn.qkv.weight)
    torch.testing.assert_close(model.pos_embed, resize_position_table(trained.pos_embed, (14, 14), (4, 6)))
    assert {block.attn.scale for block in model.blocks} == {64**-0.5}
    for wrong, match in (
        (dict(qk_scale=256**-0.5), "need qk_scale=None.*num_heads=4; found qk_scale=0.0625"),
        (dict(num_heads=8), "found qk_scale=None, num_heads=8"),
        (dict(in_chans=1), "24 x 147|192 x 147 in the file"),
        (dict(depth=3), r"not in the model: 44 entries\n  blocks.\{3,4,5,6\}"),
    ):
        with pytest.raises(ValueError, match=match):
            create_model("t2t_vit_7", pretrained=True, **wrong)
    (hub / "71.7_T2T_ViT_7.pth.tar").write_bytes(b"half")
    with pytest.raises(ValueError, match="in torch.hub's cache: delete it to download it again"):
        create_model("t2t_vit_7", pretrained=True)


def test_pretrained_at_384_pixels_has_a_file_of_its_own(hub):
    for img_size, file in (
        (384, "83.3_"),
        ((384, 384), "83.3_"),
        (224, "81.5_"),
        (448, "81.5_"),
        ((384, 224), "81.5_"),
    ):
        with pytest.raises(ConnectionError, match=f"{file}T2T_ViT_14.pth.tar"):
            create_model("t2t_vit_14", pretrained=True, img_size=img_size, depth=1)


@pytest.mark.parametrize("name", ["t2t_vit_c_14", "t2t_vit_14_wide", "vit_base_patch16"])
def test_pretrained_without_released_weights(name):
    with pytest.raises(ValueError, match=f"no weights for '{name}'; there are some for t2t_vit_7, .*, t2t_vit_t_24$"):
        create_model(name, pretrained=True)


@pytest.fixture
def server(whole_file):
    """A server on this machine: /whole is right, /half breaks off in the middle, /page is a web page."""
    content = whole_file.read_bytes()
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            name = self.path.partition("?")[0].rpartition("/")[2]
            body = {"whole": content, "half": content[: len(content) // 2], "page": b"<html>log in</html>"}.get(name)
            self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(content if name == "half" else body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


def test_downloads_are_whole_or_not_there(server, trained, tmp_path, monkeypatch, capsys):
    address, asked = server
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    cache = tmp_path / "hub" / "checkpoints"
    model = tiny()
    refuses(model, f"{address}/half", ValueError, "/half is no (safetensors file|file of weights), or not whole")
    refuses(model, f"{address}/page", ValueError, "/page is a web page, not weights")
    refuses(model, f"{address}/absent", ConnectionError, "cannot download .*/absent: Not Found. Fetch it where there")
    assert list(cache.iterdir()) == []

    capsys.readouterr()
    load_checkpoint(model, f"{address}/whole?raw=1")
    assert "100%" in capsys.readouterr().err  # a progress bar
    assert same(state(model), state(trained))
    (stored,) = cache.iterdir()
    assert re.fullmatch(r"[0-9a-f]{8}-whole", stored.name)
    load_checkpoint(tiny(), f"{address}/whole?raw=1", progress=False)
    assert asked.count("/whole?raw=1") == 1  # the second time from the cache
    load_checkpoint(tiny(), f"{address}/other/whole", progress=False)  # of the same name, from elsewhere
    assert len(list(cache.iterdir())) == 2
    refuses(tiny(), "no-such-scheme://a/b", ConnectionError, "cannot download no-such-scheme://a/b: unknown url type")


# files of our own

OVERRIDES = [
    dict(),
    dict(num_classes=0),
    dict(img_size=(48, 80), in_chans=1, num_classes=3),
    dict(qkv_bias=True, qk_scale=0.3, mlp_ratio=3.3),
    dict(drop_rate=0.1, attn_drop_rate=0.2, drop_path_rate=0.3, performer_drop_rate=0.0, performer_epsilon=1e-4),
    dict(dynamic_img_size=True, depth=1, drop_path_rate=0.1),
    dict(tokens_type="transformer"),
    dict(tokens_type="convolution", token_dim=12),
]


@pytest.mark.parametrize("overrides", OVERRIDES, ids=lambda overrides: "-".join(overrides) or "none")
def test_saved_models_come_back(tmp_path, overrides):
    model = tiny(**overrides)
    save_checkpoint(model, tmp_path / "m.safetensors")
    torch.manual_seed(9)
    random_state = torch.get_rng_state()
    again = load_model(tmp_path / "m.safetensors")
    assert torch.equal(torch.get_rng_state(), random_state)  # building it drew no random numbers
    assert type(again) is T2TViT and arguments_of(again) == arguments_of(model) and again.training
    assert repr(again) == repr(model) and same(state(again), state(model))
    assert {n: p.requires_grad for n, p in again.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    image = torch.randn(2, overrides.get("in_chans", 3), *model.img_size)
    assert torch.equal(again.eval()(image), model(image))
    torch.manual_seed(0)
    expected = model.train()(image)
    torch.manual_seed(0)
    assert torch.equal(again.train()(image), expected)  # the same rates of dropout


@pytest.mark.parametrize("name", list_models())
def test_every_variant_is_rebuilt_by_its_arguments(name):
    with torch.device("meta"):
        model = create_model(name, img_size=(64, 96), num_classes=7, drop_path_rate=0.1)
        written = json.loads(json.dumps(arguments_of(model)))
        again = type(model)(**{key: tuple(v) if isinstance(v, list) else v for key, v in written.items()})
    assert arguments_of(again) == arguments_of(model)
    assert repr(again) == repr(model)
    assert [(n, p.shape) for n, p in again.named_parameters()] == [(n, p.shape) for n, p in model.named_parameters()]


def test_saving_knows_the_head_of_today_and_the_precision(tmp_path):
    model = ViT(img_size=32, embed_dim=24, depth=2, num_heads=3, num_classes=5)
    model.reset_classifier(7)
    model.dynamic_img_size = True
    save_checkpoint(model.bfloat16(), tmp_path / "m.safetensors")
    again = load_model(tmp_path / "m.safetensors")
    assert type(again) is ViT and again.num_classes == 7 and again.dynamic_img_size
    assert {entry.dtype for entry in again.state_dict().values()} == {torch.bfloat16}
    assert same(state(again), state(model))


def test_a_loaded_model_does_not_hang_on_its_file(trained, tmp_path):
    """Tensors that map the file would change with it, or end the process."""
    save_checkpoint(trained, tmp_path / "m.safetensors")
    model = load_model(tmp_path / "m.safetensors")
    with (tmp_path / "m.safetensors").open("r+b") as file:
        file.write(bytes(5000))
        file.truncate(5000)
    assert same(state(model), state(trained))


def test_load_model_with_other_arguments(trained, tmp_path):
    save_checkpoint(trained, tmp_path / "m.safetensors")
    model = load_model(tmp_path / "m.safetensors", num_classes=7, img_size=(32, 48), drop_path_rate=0.1)
    assert model(torch.randn(2, 3, 32, 48)).shape == (2, 7)
    assert torch.equal(model.cls_token, trained.cls_token)
    with pytest.raises(ValueError, match="does not fit"):
        load_model(tmp_path / "m.safetensors", depth=3)


def test_a_model_changed_by_hand_is_not_saved(trained, tmp_path):
    trained.blocks[1].attn.scale = 0.5
    trained.head = torch.nn.Linear(24, 9)
    trained.blocks[0].mlp.act = torch.nn.ReLU()
    with pytest.raises(ValueError, match="changed after it was built.*is ReLU, not GELU") as caught:
        save_checkpoint(trained, tmp_path / "m.safetensors")
    for change in ("blocks.1.attn.scale is 0.5, not 0.35", "head.out_features is 9, not 5", "shape of head.weight"):
        assert change in str(caught.value)
    with pytest.raises(ValueError, match="how to build a Linear; expected T2TViT or ViT"):  # without the run's checks
        inspect.unwrap(save_checkpoint)(torch.nn.Linear(2, 2), tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_saving_is_whole_or_not_at_all(trained, tmp_path, monkeypatch):
    import safetensors.torch

    path = tmp_path / "m.safetensors"
    save_checkpoint(trained, path)
    before = path.read_bytes()
    assert list(tmp_path.iterdir()) == [path]

    def half(tensors, filename, metadata):
        pathlib.Path(filename).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(tiny(), path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before
    with pytest.raises(FileNotFoundError, match="no folder .*absent to write m.safetensors into"):
        save_checkpoint(trained, tmp_path / "absent" / "m.safetensors")


def rewritten(path, **changes):
    """The file with other metadata."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] |= changes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def test_load_model_refuses_what_it_cannot_rebuild(trained, tmp_path):
    path = tmp_path / "m.safetensors"
    torch.save(state(trained), path.with_suffix(".pth"))
    with pytest.raises(ValueError, match="does not say which model it holds.*load_checkpoint"):
        load_model(path.with_suffix(".pth"))
    with pytest.raises(FileNotFoundError, match="no file of weights"):
        load_model(path)
    for changes, match in (
        ({"class": "os.system"}, "does not say which model"),
        ({"arguments": '{"depth": 3}'}, "its arguments and its weights disagree"),
        ({"arguments": '{"depth": "three"}'}, "its arguments and its weights disagree"),
        ({"arguments": '{"breadth": 3}'}, "its arguments and its weights disagree"),
        ({"arguments": "[1, 2]"}, "is no safetensors file, or not whole"),
        ({"arguments": "not json"}, "is no safetensors file, or not whole"),
    ):
        save_checkpoint(trained, path)
        rewritten(path, **changes)
        with pytest.raises(ValueError, match=match):
            load_model(path)
    save_checkpoint(trained, path)
    rewritten(path, arguments='{"img_size": "huge", "num_heads": [], "qk_scale": {}}')
    load_checkpoint(tiny(), path)  # the weights are whole; what is written beside them is nonsense


# the Hugging Face hub


def test_hub_folders(trained, tmp_path):
    pytest.importorskip("huggingface_hub")
    wide = tiny(seed=1, img_size=(48, 80))
    wide.save_pretrained(tmp_path / "wide")
    assert {path.name for path in (tmp_path / "wide").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["img_size"] == [48, 80]
    again = T2TViT.from_pretrained(tmp_path / "wide")
    assert type(again) is T2TViT and arguments_of(again) == arguments_of(wide) and same(state(again), state(wide))
    assert T2TViT.from_pretrained(str(tmp_path / "wide"), num_classes=3).head.weight.shape == (3, 24)
    with pytest.raises(ValueError, match="holds a T2TViT, expected a ViT"):
        ViT.from_pretrained(tmp_path / "wide")


def test_push_to_hub_uploads_that_folder(trained, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    uploaded = {}

    def upload_folder(self, *, repo_id, folder_path, **options):
        uploaded.update({path.name: path.read_bytes() for path in pathlib.Path(folder_path).iterdir()})
        return f"https://huggingface.co/{repo_id}/commit/0"

    class Repo:
        repo_id = "somebody/tiny"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, *a, **k: Repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    assert "somebody/tiny" in trained.push_to_hub("somebody/tiny")
    assert {"config.json", "model.safetensors"} <= set(uploaded)


def test_optional_packages_are_named(trained, tmp_path, monkeypatch):
    t2t_ref.checkpoints.hub_form.cache_clear()
    save_checkpoint(trained, tmp_path / "m.safetensors")
    for name in ("huggingface_hub", "safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    for call, package in (
        (lambda: T2TViT.from_pretrained("somebody/tiny"), "huggingface_hub"),
        (lambda: trained.push_to_hub("somebody/tiny"), "huggingface_hub"),
        (lambda: save_checkpoint(trained, tmp_path / "n.safetensors"), "safetensors"),
        (lambda: load_checkpoint(trained, tmp_path / "m.safetensors"), "safetensors"),
    ):
        with pytest.raises(ImportError, match=f"pip install {package}"):
            call()


def test_arguments_survive_copies(trained):
    import copy

    for again in (copy.deepcopy(trained), pickle.loads(pickle.dumps(trained)), copy.copy(trained)):
        assert arguments_of(again) == arguments_of(trained) == TINY | arguments_of(trained)
    assert set(arguments_of(trained)) == set(inspect.signature(T2TViT).parameters)  # defaults too
    with pytest.raises(TypeError, match="unexpected keyword argument 'breadth'"):
        tiny(breadth=3)
