"""The commands that put a model to use: classify and export. The graphs themselves are in test_export.py."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from small import tiny

from t2t_ref import ViT, create_model, preprocess, save_checkpoint
from t2t_ref.inspection import attention_maps
from t2t_ref.models.relatives.pvt_v2 import PVTv2
from t2t_ref.train import classify, export


@pytest.fixture
def photograph(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photograph.png")
    return tmp_path / "photograph.png"


@pytest.fixture
def weights(tmp_path):
    save_checkpoint(tiny(), tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def said(main, capsys, *words):
    status = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, out, err


def refused(main, capsys, *words):
    """One line on stderr, status 2, nothing on stdout."""
    status, out, err = said(main, capsys, *words)
    assert status == 2 and not out and err.count("\n") == 1 and err.endswith("\n"), (status, out, err)
    return err


# classify


def test_the_likeliest_classes_come_first(photograph, weights, capsys):
    model = tiny()
    (logits,) = model(preprocess(photograph, 64))
    best = logits.softmax(dim=-1).sort(descending=True)
    found = classify.classify(model, photograph, top=3)
    assert [name for name, _ in found] == [f"class {number}" for number in best.indices[:3].tolist()]
    assert [share for _, share in found] == pytest.approx(best.values[:3].tolist())
    status, out, _ = said(classify.main, capsys, photograph, "--weights", weights, "--top", 2)
    assert status == 0 and len(out.splitlines()) == 2
    assert out.splitlines()[0] == f"{100 * found[0][1]:5.1f} %  {found[0][0]}"
    names = photograph.with_name("names.txt")
    names.write_text("ant\nbee\ncat\ndog\neel\n", encoding="utf-8")
    _, out, _ = said(classify.main, capsys, photograph, "--weights", weights, "--class-names", names)
    assert sorted(line.split()[-1] for line in out.splitlines()) == ["ant", "bee", "cat", "dog", "eel"]
    assert classify.classify(create_model("t2t_vit_7", img_size=32, depth=1), photograph)[0][0][:5] != "class"


def test_the_map_is_what_the_class_token_took(photograph, weights, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    model = tiny()
    seen = classify.where_it_looked(model, photograph)
    (heads,) = attention_maps(model, preprocess(photograph, 64))[-1]
    torch.testing.assert_close(seen[1, 2], heads[:, 0, 1 + 1 * 4 + 2].mean())
    rolled = classify.where_it_looked(model, photograph, rollout=True)
    assert rolled.shape == (4, 4) and not torch.allclose(rolled, seen)
    for name in ("map.png", "map.svg"):
        status, _, _ = said(classify.main, capsys, photograph, "--weights", weights, "--map", tmp_path / name)
        assert status == 0 and (tmp_path / name).stat().st_size > 1000
    with Image.open(tmp_path / "map.png") as drawn:
        assert drawn.width == 1280 and drawn.height == 640


def test_mistakes_of_classify(photograph, weights, tmp_path, capsys, monkeypatch):
    (tmp_path / "text.jpg").write_text("no image", encoding="utf-8")
    (tmp_path / "few.txt").write_text("ant\n", encoding="utf-8")
    w = ("--weights", weights)
    for words, match in (
        ((), "the following arguments are required: FILE"),
        ((photograph,), "a fresh model knows no classes: say --weights FILE"),
        ((photograph, "--model", "t2t_vit_7"), "a fresh model knows no classes"),
        ((tmp_path / "none.jpg", *w), "no file "),
        ((tmp_path / "text.jpg", *w), "cannot be read as an image"),
        ((photograph, "--weights", tmp_path / "none.pth"), "none.pth"),
        ((photograph, *w, "--top", 0), "--top is 0, expected 1 or more"),
        ((photograph, *w, "--class-names", tmp_path / "few.txt"), "there are 1 names for 5 classes"),
        ((photograph, photograph, *w, "--map", "a.png"), "--map draws one photograph, found 2"),
    ):
        assert match in refused(classify.main, capsys, *words)
    for words, match in (
        ((photograph, *w, "--map", tmp_path / "a.xyz"), "xyz"),
        ((photograph, *w, "--map", tmp_path / "nowhere" / "a.png"), "no folder"),
    ):
        status, _, err = said(classify.main, capsys, *words)
        assert status == 2 and match in err and err.count("\n") == 1
    sizes = dict(embed_dims=(8, 8, 8, 8), num_heads=(1, 1, 1, 1), depths=(1, 1, 1, 1), img_size=64)
    with pytest.raises(ValueError, match="a PVTv2 has no class token that looks at all patches"):
        classify.where_it_looked(PVTv2(**sizes), photograph)
    with pytest.raises(ValueError, match="the model has no head"):
        classify.classify(tiny(num_classes=0), photograph)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        classify.draw_map(tiny(), photograph, tmp_path / "b.png")


# export


def test_mistakes_of_export(weights, tmp_path, capsys, monkeypatch):
    for words, match in (
        ((), "the following arguments are required: PATH"),
        ((tmp_path / "m.onnx",), "say which model: --model NAME, --weights FILE or both"),
        ((tmp_path / "m.foo", "--weights", weights), "does not end in .onnx or .pt2: say onnx or torch-export"),
        ((tmp_path / "m.pt2", "--model", "t2t_vit_77"), "unknown model 't2t_vit_77': did you mean"),
        ((tmp_path / "m.pt2", "--weights", tmp_path / "none.pth"), "none.pth"),
        ((tmp_path / "nowhere" / "m.pt2", "--weights", weights), "no folder"),
        ((tmp_path / "m.pt2", "--weights", weights, "--dynamic-size"), "can be left free in ONNX"),
        ((tmp_path / "m", "--weights", weights, "--to", "tflite"), "invalid choice: 'tflite'"),
        ((tmp_path / "m.onnx", "--weights", weights, "--precision", "int4"), "invalid choice: 'int4'"),
        (
            (tmp_path / "m.pt2", "--weights", weights, "--precision", "int8"),
            "int8 is for ONNX alone: a program of torch.export takes float32 or bfloat16",
        ),
    ):
        assert match in refused(export.main, capsys, *words)
    with pytest.raises(ValueError, match="unknown precision 'bf16': did you mean 'bfloat16'"):
        export.export(tiny(), tmp_path / "m.onnx", precision="bf16")
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    for more in ((), ("--precision", "int8")):
        words = (tmp_path / "m.onnx", "--weights", weights, *more)
        assert "pip install onnx onnxscript onnxruntime" in refused(export.main, capsys, *words)
    assert not list(tmp_path.glob("*.pt2")) and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("precision, factor", [("float32", 1.001), ("bfloat16", 1.2)])
def test_a_graph_that_computes_something_else_is_not_written(precision, factor, tmp_path, monkeypatch):
    class Wrong:
        @staticmethod
        def save(program, file):
            file.write(b"graph")

        @staticmethod
        def load(file):
            return Wrong

        @staticmethod
        def module():
            return lambda images: factor * model(images)

    model = ViT(img_size=32, embed_dim=24, depth=1, num_heads=3, num_classes=5)
    monkeypatch.setattr(export, "trace", lambda model, free, traced: (free, None))
    monkeypatch.setattr(torch.export, "save", Wrong.save)
    monkeypatch.setattr(torch.export, "load", Wrong.load)
    with pytest.raises(ValueError, match="of its largest logit off the model: nothing written"):
        export.export(model, tmp_path / "m.pt2", precision=precision)
    assert not list(tmp_path.iterdir())
