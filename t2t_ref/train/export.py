"""A model for programs that do not know this package: as ONNX, or as a program of torch.export (chapter 16).

    python -m t2t_ref.export model.onnx --model t2t_vit_14 --weights FILE

The number of images stays free in both. So do height and width in ONNX, with ``--dynamic-size``. ``--precision`` makes
the file smaller. What was written is read back and compared with the model before the command says that it is done.
"""

import argparse
import importlib.util
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from t2t_ref.arguments import Parser, check_known
from t2t_ref.create import create_model
from t2t_ref.inspection import eval_without_gradients
from t2t_ref.models.classifier import Classifier
from t2t_ref.train.evaluate import find_model
from t2t_ref.train.log import escape_unknown_letters
from t2t_ref.weights.writing import path_of, shown, write_whole

FORMS = ("onnx", "torch-export")
ENDINGS = {".onnx": "onnx", ".pt2": "torch-export"}
TOLERANCES = {  # by precision, as shares of the largest logit
    "float32": 1e-4,  # two sets of kernels differ by a hundredth of it
    "bfloat16": 0.1,
    "int8": 0.3,
}


@dataclass(frozen=True)
class Exported:
    """What was written: whether height and width are free, and how far the graph is from the model.

    Note:
        the distance is the largest difference of two logits, as a share of the largest logit
    """

    free_size: bool
    difference: float


def export(
    model: Classifier,
    path: str | os.PathLike,
    form: str | None = None,
    *,
    precision: str = "float32",
    dynamic_size: bool | None = None,
    opset: int = 18,
) -> Exported:
    """Write a model as a graph, read it back, and compare. The file appears whole or not at all.

    The input is called "image", b c h w, and the output "logits". b is free. So are h and w in ONNX, if the model was
    built with dynamic_img_size, and torch can trace it that way. A program of torch.export is for the model's own size.
    Images and logits are float32 in all precisions.

    Args:
        form: "onnx" or "torch-export"; by default what the ending says, .onnx or .pt2
        precision: "float32"; "bfloat16", which ONNX stores the weights in and torch also computes in; "int8" for the
            weights of linear layers in ONNX, whose inputs a runtime rounds as well
        dynamic_size: True insists on free h and w, False on the model's own, None takes what is to be had
        opset: that of ONNX

    Note:
        int8 inputs of a layer share one scale, that of the largest among all images: what an image gives depends on
        the others of its batch, within what this precision costs anyway

    Raises:
        ValueError: for an unknown form or precision, for int8 outside of ONNX, if torch cannot trace the model, and if
            the graph computes something else
        FileNotFoundError: if the folder is not there
        ImportError: with the remedy, without onnx, onnxscript and onnxruntime
    """
    path = path_of(path)
    form = form or ENDINGS.get(path.suffix.lower())
    if form not in FORMS:
        raise ValueError(f"{shown(path)} does not end in {' or '.join(ENDINGS)}: say {' or '.join(FORMS)}")
    check_known("precision", precision, TOLERANCES)
    if precision == "int8" and form != "onnx":
        raise ValueError("int8 is for ONNX alone: a program of torch.export takes float32 or bfloat16")
    absent = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if form == "onnx" and absent:
        raise ImportError(f"exporting as ONNX needs {', '.join(absent)}: pip install {' '.join(absent)}")
    if dynamic_size and (form != "onnx" or not model.dynamic_img_size):
        raise ValueError("height and width can be left free in ONNX, of a model built with dynamic_img_size=True")
    found = []

    def write(draft: Path) -> None:
        with eval_without_gradients(model), quiet():
            traced = InBfloat16(model) if (form, precision) == ("torch-export", "bfloat16") else model
            leave_free = form == "onnx" and model.dynamic_img_size and dynamic_size is not False
            free, program = trace(model, leave_free, traced)
            if dynamic_size and not free:
                raise ValueError(f"torch cannot trace this {type(model).__name__} with free height and width")
            if form == "onnx":
                graph = torch.onnx.export(
                    program,
                    dynamo=True,
                    opset_version=opset,
                    input_names=["image"],
                    output_names=["logits"],
                    verbose=False,
                )
                graph.save(str(draft))
                if precision != "float32":
                    {"bfloat16": store_in_bfloat16, "int8": quantize}[precision](draft)
            else:
                with draft.open("wb") as file:  # by its name torch would not take a draft for a program
                    torch.export.save(program, file)
            found.append(Exported(free, largest_difference(model, runner(draft, form), free)))
        if not found[0].difference <= TOLERANCES[precision]:
            raise ValueError(
                f"the graph is {found[0].difference:.1e} of its largest logit off the model: nothing written"
            )

    write_whole(path, write)
    return found[0]


class InBfloat16(nn.Module):
    """A copy of a model that keeps its weights and computes in bfloat16, with images and logits in float32."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = deepcopy(model).bfloat16()

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image.bfloat16()).float()


def trace(
    model: Classifier, free_size: bool, traced: nn.Module | None = None
) -> tuple[bool, torch.export.ExportedProgram]:
    """The model as a graph of torch.export with a free number of images, and with free sizes if asked and possible.

    Args:
        traced: what is traced in place of the model, on the same images

    Raises:
        ValueError: if torch cannot trace it, in torch's words
    """
    dynamic = getattr(torch.export.Dim, "DYNAMIC", None)  # since torch 2.6; a named one is for the batch alone
    free_size = free_size and dynamic is not None
    # not at its own size, where the table of positions is taken as it is
    images = example(model, 2, larger=int(free_size))
    free = {axis: dynamic or torch.export.Dim("batch") for axis in ((0, 2, 3) if free_size else (0,))}
    try:
        return free_size, torch.export.export(traced or model, (images,), dynamic_shapes=(free,))
    except Exception as error:
        if free_size:
            return trace(model, False, traced)
        raise ValueError(f"torch cannot export this {type(model).__name__}: {str(error)[:300]}") from error


def example(model: Classifier, batch: int, larger: int = 0) -> Tensor:
    """Images of noise, of the model's size or by some multiples of 32 pixels larger; the same at each call."""
    generator, last = torch.Generator().manual_seed(batch + larger), list(model.parameters())[-1]
    h, w = model.img_size
    images = torch.randn(batch, model.in_chans, h + 32 * larger, w + 64 * larger, generator=generator)
    return images.to(last.device, last.dtype)


def largest_difference(model: nn.Module, run: Callable[[Tensor], Tensor], free_size: bool) -> float:
    """How far a graph is from its model, over several numbers of images and, where they are free, sizes.

    Raises:
        ValueError: if it gives another shape
    """
    differences = []
    for batch, larger in [(2, 0), (1, 0), (3, 0)] + [(2, 1), (1, 2)] * free_size:
        images = example(model, batch, larger)
        expected, got = model(images), run(images)
        if got.shape != expected.shape:
            raise ValueError(
                f"of {tuple(images.shape)} the graph makes {tuple(got.shape)}, not {tuple(expected.shape)}"
            )
        differences.append(((got - expected).abs().max() / expected.abs().max()).item())
    return max(differences)


def quantize(path: Path) -> None:
    """Round the weights of an ONNX file's linear layers to int8, and let a runtime do so with what they multiply."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # unsigned and signed: products of these two may overflow on older processors, those of two unsigned do not
    quantize_dynamic(path, path, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QUInt8)


def store_in_bfloat16(path: Path) -> None:
    """Keep the matrices and tables of an ONNX file as bfloat16, each with a cast to float32 behind it.

    Runtimes do the casts once, when they read the file, and compute in float32: few of them multiply bfloat16.
    """
    import onnx
    from onnx.numpy_helper import to_array

    content, casts = onnx.load(path), []
    for weight in content.graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT and len(weight.dims) > 1:
            rounded = torch.from_numpy(to_array(weight).copy()).bfloat16().float().numpy()
            upper = np.frombuffer(rounded.astype("<f4").tobytes(), "<u2")[1::2]  # the lower halves are zeros now
            name, dims = weight.name, list(weight.dims)
            half = onnx.helper.make_tensor(f"{name}.half", onnx.TensorProto.BFLOAT16, dims, upper.tobytes(), raw=True)
            weight.CopyFrom(half)
            casts.append(onnx.helper.make_node("Cast", [half.name], [name], to=onnx.TensorProto.FLOAT))
    for cast in reversed(casts):
        content.graph.node.insert(0, cast)
    onnx.save(content, path)


def runner(path: Path, form: str) -> Callable[[Tensor], Tensor]:
    """A function that runs what was written: ONNX by onnxruntime, a program of torch.export by torch."""
    if form == "torch-export":
        with path.open("rb") as file:
            return torch.export.load(file).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"image": images.numpy()})[0])


@contextmanager
def quiet():
    """Without the exporters' remarks on their own state, which are many and not for the user."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


# ---- the command line


def build(options: argparse.Namespace) -> Classifier:
    """The model of ``--model``, ``--weights`` and the rest, or the one that the file of weights says.

    Raises:
        ValueError: as :func:`~t2t_ref.train.evaluate.find_model` and :func:`~t2t_ref.create.create_model`, and
            without both
        ConnectionError: as they
    """
    if options.weights:
        return find_model(options.weights, options.model, options.img_size)
    if options.model is None:
        raise ValueError("say which model: --model NAME, --weights FILE or both")
    size = {} if options.img_size is None else {"img_size": options.img_size}
    return create_model(options.model, pretrained=options.pretrained, **size)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What every command that takes a model asks for."""
    parser.add_argument("--model", metavar="NAME", help="where the file of weights does not say so")
    parser.add_argument("--weights", metavar="FILE", help="path or URL: yours, the authors', anybody's")
    parser.add_argument("--pretrained", action="store_true", help="the released weights, fetched if need be")
    parser.add_argument("--img-size", type=int, metavar="PIXELS", help="default: what the file says, else 224")


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status."""
    escape_unknown_letters()
    parser = Parser("python -m t2t_ref.export", description="Write a model as a graph for other programs.")
    parser.add_argument("path", metavar="PATH", help="the file to write: .onnx or .pt2")
    add_model_options(parser)
    parser.add_argument("--to", choices=FORMS, help="default: what the ending of PATH says")
    parser.add_argument(
        "--precision", choices=TOLERANCES, default="float32", help="int8: ONNX alone; default: %(default)s"
    )
    parser.add_argument("--dynamic-size", action="store_true", help="leave height and width free as well")
    parser.add_argument("--opset", type=int, default=18, help="of ONNX; default: %(default)s")
    try:
        options = parser.parse_args(argv)
        model = build(options)
        model.dynamic_img_size = model.dynamic_img_size or options.dynamic_size
        dynamic_size = options.dynamic_size or None
        found = export(
            model,
            options.path,
            options.to,
            precision=options.precision,
            dynamic_size=dynamic_size,
            opset=options.opset,
        )
    except KeyboardInterrupt:
        print("t2t_ref.export: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except (ValueError, OSError, ImportError) as error:
        print(f"t2t_ref.export: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    h, w = model.img_size
    size = f"any height and width, made for {h} x {w}" if found.free_size else f"{h} x {w} pixels"
    precision = "" if options.precision == "float32" else f", {options.precision}"
    print(f"{shown(options.path)}: {type(model).__name__}{precision}, any number of images, {size}")
    print(f"read back and compared: at most {found.difference:.0e} of the largest logit apart")
    return 0
