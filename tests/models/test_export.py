"""Out of Python: torch.export and ONNX give the same logits. (torch.compile is in test_model.py.)

Each export runs in a process of its own: without the checks of the test run, which are no part of a graph.
"""

import importlib.util
import subprocess
import sys

import pytest
import torch

MODEL = """
import torch, t2t_ref
torch.manual_seed(0)
model = t2t_ref.create_model({name!r}, img_size={img_size}, num_classes=10, depth=2).eval()
image = torch.randn(2, 3, *model.img_size)
with torch.no_grad():
    expected = model(image)
"""
EXPORT = """
program = torch.export.export(model, (image,))
torch.testing.assert_close(program.module()(image), expected)
torch.export.save(program, {path!r})
again = torch.export.load({path!r}).module()
torch.testing.assert_close(again(image), expected)
other = torch.randn_like(image)  # a graph, not a recorded answer
torch.testing.assert_close(again(other), model(other))
batches = torch.export.export(model, (image,), dynamic_shapes=({{0: torch.export.Dim("b")}},)).module()
for b in (1, 5):  # any number of images
    torch.testing.assert_close(batches(other[:1].repeat(b, 1, 1, 1)), model(other[:1].repeat(b, 1, 1, 1)))
"""
ONNX = """
import onnxruntime
torch.onnx.export(model, (image,), {path!r}, dynamo=True, verbose=False)
session = onnxruntime.InferenceSession({path!r}, providers=["CPUExecutionProvider"])
(entry,) = session.get_inputs()
for picture in (image, torch.randn_like(image)):
    (logits,) = session.run(None, {{entry.name: picture.numpy()}})
    torch.testing.assert_close(torch.from_numpy(logits), model(picture), atol=2e-5, rtol=1e-4)
"""
MODELS = {"t2t_vit_7": 64, "t2t_vit_t_14": (64, 96), "t2t_vit_c_14": 64, "deit_small_patch16": 64}
absent = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]


def run(code, name, path):
    code = (MODEL + code).format(name=name, img_size=MODELS[name], path=str(path))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", MODELS)
def test_torch_export(name, tmp_path):
    if name == "t2t_vit_7" and torch.__version__.startswith("2.4."):
        pytest.skip("torch 2.4 cannot export the performer, which switches autocast off")
    run(EXPORT, name, tmp_path / "model.pt2")


@pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}")
@pytest.mark.parametrize("name", list(MODELS)[:2])
def test_onnx(name, tmp_path):
    run(ONNX, name, tmp_path / "model.onnx")
