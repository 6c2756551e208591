"""Looking inside a model: shapes, parameters, multiply-accumulates, attention maps."""

import html
import typing
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from t2t_ref.backbone import Attention, DropPath

DEFAULT_AXES = {1: "d", 2: "b d", 3: "b n d", 4: "b c h w"}  # for modules without annotations, by number of axes
QUIET = (nn.Identity, nn.Dropout, DropPath)  # change no shape: only what reaches them is of interest
DOOR_NOTES = {  # what has happened to a tensor on its way into these modules of T2TViT
    "soft_split1": "re-structured",
    "soft_split2": "re-structured",
    "pos_drop": "class token, positions",
    "head": "class token alone",
}
PRODUCTS_OF_ACTIVATIONS = ("bmm", "baddbmm")  # a linear layer runs as mm or addmm, a convolution as itself


@contextmanager
def eval_without_gradients(model: nn.Module):
    """Run in eval mode without gradients, and leave every module's mode as it was."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in was_training:
            module.training = True


@dataclass(frozen=True)
class ShapeRow:
    """One stage of a run: where, what, the names of its axes, their lengths, the parameters it holds."""

    name: str
    kind: str
    axes: str
    shape: tuple[int, ...]
    parameters: int


class ShapeTable(list):
    """The rows of :func:`shape_table`. Prints as text; shows as an HTML table in a notebook."""

    HEADINGS = ("stage", "what", "axes", "shape", "parameters")

    def cells(self) -> list[tuple[str, ...]]:
        """Heading and rows as strings."""
        return [self.HEADINGS] + [
            (r.name, r.kind, r.axes, " x ".join(map(str, r.shape)), f"{r.parameters:,}" if r.parameters else "")
            for r in self
        ]

    def __str__(self) -> str:
        cells = self.cells()
        widths = [max(len(row[column]) for row in cells) for column in range(len(self.HEADINGS))]
        lines = []
        for row in cells:
            texts = [text.ljust(width) for text, width in zip(row, widths, strict=True)]
            texts[-1] = row[-1].rjust(widths[-1])
            lines.append("  ".join(texts).rstrip())
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head, *body = [[html.escape(text) for text in row] for row in self.cells()]
        right = ' style="text-align: right"'
        lines = ["<table>", "<thead><tr>" + "".join(f"<th>{text}</th>" for text in head) + "</tr></thead>", "<tbody>"]
        for name, kind, axes, shape, parameters in body:
            lines.append(
                f"<tr><td><code>{name}</code></td><td>{kind}</td><td><code>{axes}</code></td>"
                f"<td{right}>{shape}</td><td{right}>{parameters}</td></tr>"
            )
        return "\n".join([*lines, "</tbody>", "</table>"])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the stage called ``name``. KeyError, with the names there are, if there is none."""
        for row in self:
            if row.name == name:
                return row.shape
        raise KeyError(f"no stage {name!r}; there are {', '.join(row.name for row in self)}")


def axes_of(module: nn.Module, tensor: Tensor) -> str:
    """The axis letters of a module's output, from the annotation of its forward; else by the number of axes."""
    annotated = typing.get_type_hints(type(module).forward).get("return")
    letters = getattr(annotated, "dim_str", "")
    return letters if len(letters.split()) == tensor.ndim else DEFAULT_AXES.get(tensor.ndim, "...")


def shape_table(model: nn.Module, image: Tensor, *, depth: int = 2) -> ShapeTable:
    """Run ``model`` on ``image`` once and list the shape at every stage.

    A stage is a module at most ``depth`` names deep, such as ``tokens_to_token.attention1``. What happens between
    two modules is seen at the door of the next: if its input has another shape than the output before it, it gets a
    row of its own, ``into NAME``. Equal neighbours in a list are folded: ``blocks.0-13``.

    Shapes:  image   whatever ``model`` takes; images b c h w, tokens b n d
             return  a list of :class:`ShapeRow` that prints as a table
    Units:   parameters counts the numbers a stage owns, frozen ones included; what a model holds outside its stages
             (class token, position table) stands in the last row
    """
    rows = [ShapeRow("(input)", "", DEFAULT_AXES.get(image.ndim, "..."), tuple(image.shape), 0)]
    stages = {
        name: module
        for name, module in model.named_modules()
        if name and not isinstance(module, nn.ModuleList) and is_stage(name, module, depth)
    }

    def watch_input(name: str) -> Callable:
        def hook(module, inputs):
            (tensor,) = inputs
            if tuple(tensor.shape) != rows[-1].shape:
                note = DOOR_NOTES.get(name.rpartition(".")[2], "")
                axes = DEFAULT_AXES.get(tensor.ndim, "...")
                rows.append(ShapeRow(f"into {name}", note, axes, tuple(tensor.shape), 0))

        return hook

    def watch_output(name: str) -> Callable:
        def hook(module, inputs, output):
            if not isinstance(module, QUIET):
                kind, held = type(module).__name__, count_parameters(module)
                rows.append(ShapeRow(name, kind, axes_of(module, output), tuple(output.shape), held))

        return hook

    hooks = []
    try:
        for name, module in stages.items():
            hooks += [module.register_forward_pre_hook(watch_input(name))]
            hooks += [module.register_forward_hook(watch_output(name))]
        with eval_without_gradients(model):
            output = model(image)
    finally:
        for hook in hooks:
            hook.remove()

    axes, shape = axes_of(model, output), tuple(output.shape)
    if shape == rows[-1].shape and stages:
        rows[-1] = replace(rows[-1], axes=axes)  # the model's own annotation knows better than the last layer's
    else:
        rows.append(ShapeRow("(output)", type(model).__name__, axes, shape, 0))
    in_stages = {id(parameter) for module in stages.values() for parameter in module.parameters()}
    rest = {name: p for name, p in model.named_parameters() if id(p) not in in_stages}
    if rest:
        held = sum(parameter.numel() for parameter in rest.values())
        rows.append(ShapeRow(", ".join(rest), "held outside the stages", "", (), held))
    return ShapeTable(fold_equal_neighbours(rows))


def is_stage(name: str, module: nn.Module, depth: int) -> bool:
    """Whether a module gets a row: as deep as asked, or shallower and without children."""
    deep = name.count(".") + 1
    return deep == depth or (deep < depth and not list(module.children()))


def fold_equal_neighbours(rows: list[ShapeRow]) -> list[ShapeRow]:
    """blocks.0, blocks.1, ... of one shape become one row, blocks.0-13, with the sum of their parameters."""
    folded: list[ShapeRow] = []
    first = 0
    for row in rows:
        stem, _, number = row.name.rpartition(".")
        before = folded[-1] if folded else None
        if before and number.isdecimal() and before.name.rpartition(".")[0] == stem:
            if (before.kind, before.axes, before.shape) == (row.kind, row.axes, row.shape):
                held = before.parameters + row.parameters
                folded[-1] = replace(before, name=f"{stem}.{first}-{number}", parameters=held)
                continue
        first = number
        folded.append(row)
    return folded


def count_parameters(model: nn.Module, *, trainable_only: bool = False) -> int:
    """How many numbers the parameters hold. Frozen ones (position table, random features) count unless told not to."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


def count_macs(model: nn.Module, image: Tensor, *, products_of_activations: bool = True) -> int:
    """Multiply-accumulates of one forward pass, for one image of the batch, by torch's own FLOP counter.

    Some tools count linear layers and convolutions only. ``products_of_activations=False`` gives their number: it
    leaves out queries x keys and weights x values of attention, and the feature products of the performer.

    Shapes:  image   b c h w
    Units:   multiply-accumulates, half the FLOPs of matrix products; element-wise work is not counted
    """
    counter = FlopCounterMode(display=False)
    # the plain backend writes attention as two matrix products, which every version of torch counts
    with eval_without_gradients(model), sdpa_kernel(SDPBackend.MATH), counter:
        model(image)
    flops = counter.get_flop_counts()["Global"]
    counted = sum(
        count
        for operation, count in flops.items()
        if products_of_activations or operation.__name__ not in PRODUCTS_OF_ACTIVATIONS
    )
    return counted // 2 // len(image)


def attention_maps(model: nn.Module, image: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b g q k"]]:
    """The attention weights of every backbone block, exactly, although the model itself never holds them.

    Shapes:  image   b c h w
             return  one b g q k for each block: head g, weight of key k for query q; rows sum to 1. Token 0 is the
                     class token.
    """
    maps = []

    def hook(attention, inputs):
        (tokens,) = inputs
        queries, keys, _ = attention.split_heads(tokens)
        scores = einsum(queries, keys, "b g q e, b g k e -> b g q k") * attention.scale
        maps.append(scores.softmax(dim=-1))

    hooks = [m.register_forward_pre_hook(hook) for m in model.modules() if isinstance(m, Attention)]
    try:
        with eval_without_gradients(model):
            model(image)
    finally:
        for handle in hooks:
            handle.remove()
    return maps
