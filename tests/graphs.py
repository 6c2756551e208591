"""Out of Python: torch.export, ONNX, and torch.compile without a graph break, each against the model itself.

    python tests/graphs.py FOLDER NAME ...    runs these checks, and prints what went wrong in each as JSON

All checks share one process, since importing the compiler takes longer than most of them, and it is not the process of
the test run, whose checks of every shape are no part of a graph. test_export.py starts it.
"""

import importlib.util
import json
import sys
import traceback
from copy import deepcopy
from functools import cache
from pathlib import Path

import torch

from t2t_ref import T2TViT, create_model
from t2t_ref.models.cnn_designs import GhostViT, SEViT
from t2t_ref.models.dense import DenseViT
from t2t_ref.models.fused import fuse

OLD = torch.__version__.startswith("2.4.")  # it cannot export the performer, nor compile get_parameter
FREE_SIDES = hasattr(torch.export.Dim, "DYNAMIC")  # since torch 2.6: sides that divide as the model needs
ABSENT = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
SIZES = {"t2t_vit_7": 64, "t2t_vit_t_14": (64, 96), "t2t_vit_c_14": 64, "deit_small_patch16": 64}
DESIGNS = {"se": SEViT, "ghost": GhostViT, "dense": DenseViT}  # what is in front of their blocks is among SIZES


def variant(name):
    return create_model(name, img_size=SIZES[name], num_classes=10, depth=1).eval()


def design(name):
    sizes = dict(img_size=32, embed_dim=48, num_heads=4, mlp_ratio=3.0, num_classes=10)
    sizes |= dict(depths=(1, 1), growth_rate=16) if name == "dense" else dict(depth=1)
    return DESIGNS[name](**sizes).eval()


def small(fused):
    model = T2TViT(img_size=32, embed_dim=48, depth=1, num_heads=3, token_dim=16).eval()
    return fuse(deepcopy(model)) if fused else model


def images_for(model, batch=2):
    return torch.randn(batch, 3, *model.img_size)


def exported(model, folder):
    """A graph, not a recorded answer: written, read, and run on other images and on other numbers of them."""
    batches = ({0: torch.export.Dim("b")},)
    program = torch.export.export(model, (images_for(model),), dynamic_shapes=batches)
    torch.export.save(program, folder / "model.pt2")
    again = torch.export.load(folder / "model.pt2").module()
    for b in (2, 1, 5):
        images = images_for(model, b)
        torch.testing.assert_close(again(images), model(images))


def free(name, folder):
    """Height and width left open, beginning from the model's own size, where a table may be taken as it is."""
    model = create_model(name, img_size=32, dynamic_img_size=True, num_classes=3, depth=1).eval()
    sides = ({2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
    graph = torch.export.export(model, (images_for(model),), dynamic_shapes=sides).module()
    for height, width in ((32, 32), (48, 80)):
        images = torch.randn(2, 3, height, width)
        torch.testing.assert_close(graph(images), model(images))
    try:
        torch.export.export(variant(name), (images_for(variant(name)),), dynamic_shapes=sides)
    except ValueError as error:
        assert "build it with dynamic_img_size=True" in str(error)
    else:
        raise AssertionError("a table that cannot follow was exported with free sides")


def onnx(model, folder):
    import onnxruntime

    path = str(folder / "model.onnx")
    torch.onnx.export(model, (images_for(model),), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    for _ in range(2):
        images = images_for(model)
        (logits,) = session.run(None, {entry.name: images.numpy()})
        # two sets of float32 kernels are 5e-7 apart, two images 1e-2
        torch.testing.assert_close(torch.from_numpy(logits), model(images), atol=2e-5, rtol=0)


@cache
def whole(form, folder):
    """A small model in float32: its file, and what was found when it was written."""
    from t2t_ref.train.export import export

    path = folder / f"whole.{form}"
    return path, export(small(fused=False), path)


def written(form, folder):
    """By the command itself: it has compared the graph with the model, at several sizes where they are free."""
    from t2t_ref import save_checkpoint
    from t2t_ref.train.export import main

    save_checkpoint(small(fused=False), folder / "m.safetensors")
    path, free = folder / f"model.{form}", ["--dynamic-size"] * (form == "onnx")
    assert main([str(path), "--weights", str(folder / "m.safetensors"), *free]) == 0
    assert path.stat().st_size > 10_000
    _, found = whole(form, folder)
    assert not found.free_size and 0 <= found.difference < 1e-4


def older(folder):
    """As before torch 2.6, which has named dimensions alone: a free number of images, and sides that stay."""
    from t2t_ref.train.export import trace

    model, dim = small(fused=False), torch.export.Dim
    torch.export.Dim = lambda name: dim(name)
    try:
        free, program = trace(model, free_size=True)
    finally:
        torch.export.Dim = dim
    assert not free
    images = images_for(model, 5)
    torch.testing.assert_close(program.module()(images), model(images))


def smaller(form, precision, folder):
    """In fewer bits: a smaller file, another function, and near the model."""
    from t2t_ref import save_checkpoint
    from t2t_ref.train.export import TOLERANCES, largest_difference, main, runner

    model, path = small(fused=False), folder / f"small-{precision}.{form}"
    save_checkpoint(model, folder / "m.safetensors")
    assert main([str(path), "--weights", str(folder / "m.safetensors"), "--precision", precision]) == 0
    weights = sum(entry.nbytes for entry in model.state_dict().values())
    saved = (whole(form, folder)[0].stat().st_size - path.stat().st_size) / weights
    assert saved > {"bfloat16": 0.4, "int8": 0.6}[precision], saved  # 0.5 and 0.75 without what is kept
    run = runner(path, {"pt2": "torch-export"}.get(form, form))
    assert run(images_for(model)).dtype == torch.float32
    assert TOLERANCES["float32"] < largest_difference(model, run, False) < TOLERANCES[precision] / 2
    if precision == "int8":
        import onnx

        products = [node for node in onnx.load(path).graph.node if node.op_type == "MatMulInteger"]
        assert len(products) == sum(isinstance(layer, torch.nn.Linear) for layer in model.modules())
    elif form == "onnx":  # what was rounded, and how
        for entry in model.state_dict().values():
            if entry.dim() > 1:
                entry.copy_(entry.bfloat16())
        assert largest_difference(model, run, False) < TOLERANCES["float32"]


def traced(model, folder):
    """By timm's tracer, with the leaves that the door tells it."""
    from with_timm import import_timm

    import_timm()
    from timm.models import create_feature_extractor

    import t2t_ref.timm  # noqa: F401

    images = images_for(model)
    last = f"blocks.{len(model.blocks) - 1}"
    found = create_feature_extractor(model, {last: "tokens", "head": "logits"})(images)
    torch.testing.assert_close(found["logits"], model(images))
    torch.testing.assert_close(model.norm(found["tokens"]), model.forward_features(images))


def compiled(model, folder):
    images = images_for(model)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(images), model(images))


CHECKS = {f"export {name}": lambda folder, n=name: exported(variant(n), folder) for name in SIZES}
CHECKS |= {f"export {name}": lambda folder, n=name: exported(design(n), folder) for name in DESIGNS}
FREE = ("t2t_vit_7", "t2t_vit_t_14", "deit_small_patch16")
CHECKS |= {f"export free {name}": lambda folder, n=name: free(n, folder) for name in FREE}
CHECKS |= {f"onnx {name}": lambda folder, n=name: onnx(variant(n), folder) for name in ("t2t_vit_7", "t2t_vit_t_14")}
CHECKS |= {f"compile {name}": lambda folder, n=name: compiled(design(n), folder) for name in DESIGNS}
CHECKS |= {"written older": older}
CHECKS |= {f"written {form}": lambda folder, f=form: written(f, folder) for form in ("onnx", "pt2")}
LOWER = (("onnx", "bfloat16"), ("onnx", "int8"), ("pt2", "bfloat16"))
CHECKS |= {f"written {f} {p}": lambda folder, f=f, p=p: smaller(f, p, folder) for f, p in LOWER}
CHECKS |= {f"trace {name}": lambda folder, n=name: traced(variant(n), folder) for name in SIZES}
CHECKS |= {f"trace {name}": lambda folder, n=name: traced(design(n), folder) for name in DESIGNS}
CHECKS |= {"trace fused": lambda folder: traced(small(fused=True), folder)}
CHECKS |= {"compile readable": lambda folder: compiled(small(fused=False), folder)}
CHECKS |= {"compile fused": lambda folder: compiled(small(fused=True), folder)}
PERFORMERS = ("export t2t_vit_7", "export free t2t_vit_7", "compile fused")


def cannot(name):
    """Why this check cannot run here, or None."""
    if name.startswith("trace") and importlib.util.find_spec("timm") is None:
        return "not installed: timm"
    if not FREE_SIDES and name.startswith("export free"):
        return "torch before 2.6 cannot leave height and width free"
    if OLD and (name in PERFORMERS or name.startswith("written")):
        return "torch 2.4 can neither export nor compile it"
    return f"not installed: {', '.join(ABSENT)}" if "onnx" in name and ABSENT else None


def main(folder, *names):
    found = {}
    for name in names:
        torch.manual_seed(0)
        try:
            with torch.no_grad():
                CHECKS[name](Path(folder))
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
