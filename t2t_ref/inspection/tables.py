"""Looking inside a model: shapes, parameters, MACs, inner features, attention maps (chapters 1, 9 and 15)."""

import fnmatch
import html
import math
import typing
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from t2t_ref.arguments import check_known
from t2t_ref.models.backbone import Attention, DropPath
from t2t_ref.models.token_performer import TokenPerformer, log_features, without_autocast
from t2t_ref.models.token_transformer import TokenTransformer
from t2t_ref.models.tokens_to_token import restructure

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
        """The shape of the stage called ``name``.

        Raises:  KeyError, with the names there are, if there is none
        """
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


@contextmanager
def tap(model: nn.Module, names: str | Sequence[str]):
    """Write down inner tensors of any model while it runs: ``with tap(model, "blocks.*") as seen: model(image)``.

    A name is that of a module and means what it returns. ``"into NAME"`` means what it is given, ``"blocks.*"`` every
    module of that pattern (a star stands for one part between dots). :func:`shape_table` shows the names.

    Shapes:  return  a dict from name to a copy of the tensor, in the order of the run; filled by the model's own run.
                     A module that runs more than once leaves its last; what is no tensor is kept as it is.
    Raises:  ValueError for a name that fits no module
    """
    names = [names] if isinstance(names, str) else list(names)
    modules = {name: module for name, module in model.named_modules() if name}
    seen: dict[str, Tensor] = {}

    def keep(name: str, value: object) -> None:
        seen.pop(name, None)  # so that the last run also stands last
        # a copy: layers that work in place, such as ReLU(inplace=True), would change it under our eyes
        seen[name] = value.clone() if isinstance(value, Tensor) else value

    hooks = []
    try:
        for name in names:
            pattern, into = name.removeprefix("into "), name.startswith("into ")
            found = [known for known in modules if same_parts(known, pattern)]
            if not found:
                check_known("module", pattern, list(modules))
            for known in found:
                if into:
                    hook = lambda module, inputs, known=known: keep(f"into {known}", inputs[0])  # noqa: E731
                    hooks.append(modules[known].register_forward_pre_hook(hook))
                else:
                    hook = lambda module, inputs, output, known=known: keep(known, output)  # noqa: E731
                    hooks.append(modules[known].register_forward_hook(hook))
        yield seen
    finally:
        for handle in hooks:
            handle.remove()


def same_parts(name: str, pattern: str) -> bool:
    """Whether a dotted name fits a pattern, part by part."""
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def token_maps(tokens: Float[Tensor, "b n d"], grid: tuple[int, int]) -> Float[Tensor, "b d h w"]:
    """Tokens as maps, one for each channel. A class token in front is left out.

    Shapes:  tokens  b n d     n = h w, or 1 + h w with a class token
             grid    (h, w)    as ``model.token_grid`` gives it
             return  b d h w
    Raises:  ValueError if n is neither
    """
    rows, columns = grid
    return restructure(tokens[:, 1:] if tokens.shape[1] == 1 + rows * columns else tokens, grid)


def class_token_maps(weights: Float[Tensor, "*lead q k"], grid: tuple[int, int]) -> Float[Tensor, "*lead h w"]:
    """How much the class token takes from each patch, as a map. What it takes from itself is left out.

    Shapes:  weights  ... q k    attention of one block, b g q k, or a rollout, b q k; token 0 is the class token
             return   ... h w    rows of the map sum to 1 minus the class token's weight for itself
    Raises:  ValueError if there are not 1 + h w tokens
    """
    rows, columns = grid
    if weights.shape[-1] != 1 + rows * columns:
        raise ValueError(f"{weights.shape[-1]} tokens are not a class token and a grid of {rows}x{columns}")
    return rearrange(weights[..., 0, 1:], "... (h w) -> ... h w", h=rows)


def attention_rollout(maps: Sequence[Float[Tensor, "b g q k"]], shortcut: float = 0.5) -> Float[Tensor, "b q k"]:
    """The attention of all blocks in a row, multiplied up: what would reach token q of the input token k.

    Each block is taken for a mean of its heads, mixed with the identity for its shortcut. Values, MLPs and norms are
    left out, so this is a story about the model and not the model.

    Shapes:  maps    one b g q k for each block, first block first, as :func:`attention_maps` gives them
             return  b q k    rows sum to 1
    Units:   shortcut is the share of the identity, between 0 and 1
    Raises:  ValueError for no maps, or a share out of range
    Source:  Abnar and Zuidema 2020, "Quantifying attention flow in transformers"
    """
    if not maps or not 0 <= shortcut <= 1:
        raise ValueError(f"expected at least one map and a share of 0 to 1, found {len(maps)} maps and {shortcut}")
    rollout = eye = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype, device=maps[0].device)
    for weights in maps:
        block = (1 - shortcut) * reduce(weights, "b g q k -> b q k", "mean") + shortcut * eye
        rollout = block @ rollout
    return rollout


def performer_weights(
    queries: Float[Tensor, "b n e"],
    keys: Float[Tensor, "b n e"],
    directions: Float[Tensor, "m e"],
    epsilon: float = 1e-8,
) -> Float[Tensor, "b n k"]:
    """The n x n weights that :func:`performer_attention` applies and never holds. Quadratic: for small n only.

    Shapes:  queries, keys  b n e
             directions     m e
             return         b n k    k = n; weights @ values is the layer's attention; rows sum to D / (D + epsilon)
    Source:  chapter 5: each query mixes the features, each feature mixes the tokens
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    with without_autocast(queries.device.type):
        directions = directions.to(dtype)
        log_queries = log_features(queries.to(dtype), directions)
        log_keys = log_features(keys.to(dtype), directions)
        log_terms = log_queries + log_keys.logsumexp(dim=1, keepdim=True)
        weights = einsum(log_terms.softmax(dim=-1), log_keys.softmax(dim=1), "b n m, b k m -> b n k")
        if epsilon > 0:
            log_denominators = log_terms.logsumexp(dim=-1, keepdim=True) - math.log(len(directions))
            weights = weights * torch.sigmoid(log_denominators - math.log(epsilon))
    return weights


def token_attention_maps(model: nn.Module, image: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b q k"]]:
    """The attention weights of the T2T layers, exact ones or a performer's implicit ones. For small images.

    Shapes:  image   b c h w
             return  one b q k for each T2T layer; q and k are windows of its soft split, row by row
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, TokenPerformer | TokenTransformer)}
    with eval_without_gradients(model), tap(model, [f"{name}.norm1" for name in layers]) as seen:
        model(image)
        maps = []
        for name, layer in layers.items():
            tokens = seen[f"{name}.norm1"]
            if isinstance(layer, TokenPerformer):
                keys, queries, _ = rearrange(layer.kqv(tokens), "b n (three e) -> three b n e", three=3)
                maps.append(performer_weights(queries, keys, layer.w, layer.epsilon))
            else:
                queries, keys, _ = rearrange(layer.attn.qkv(tokens), "b n (three e) -> three b n e", three=3)
                scores = einsum(queries, keys, "b q e, b k e -> b q k") * layer.attn.scale
                maps.append(scores.softmax(dim=-1))
    return maps
