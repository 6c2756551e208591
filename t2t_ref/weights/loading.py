"""Weights into a model: names, heads, position tables, shapes, and a report of it all (chapter 14)."""

import functools
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from t2t_ref.arguments import pair
from t2t_ref.models import VARIANTS, build
from t2t_ref.models.classifier import Classifier
from t2t_ref.weights.files import Stored, choose, read_weights

# what PyTorch's wrappers put into names: data parallel and averaged, compiled, sharded, recomputed
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
COUNTERS = ("n_averaged", "num_updates", "decay", "initted", "step")  # which averaging keeps beside the weights
MMPRETRAIN = (  # its names, ours
    (r"\bhead\.layers\.head\.", "head."),
    (r"\bencoder\.(\d+)\.", r"blocks.\1."),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
)
TIMM = ((r"\bhead\.fc\.", "head."),)  # the names of its pooling heads


# ---- the report


@dataclass(frozen=True)
class Entry:
    """One entry of a state dict: its shape in the file and in the model (None where it is not), and what was done."""

    name: str
    stored: tuple[int, ...] | None
    own: tuple[int, ...] | None
    note: str = ""


def sizes(shape: tuple[int, ...]) -> str:
    """A shape for people: 384 x 576."""
    return " x ".join(map(str, shape)) or "one number"


def folded(entries: list[Entry]) -> list[str]:
    """A line for each entry; entries that differ in the number of their block alone share one."""
    lines: dict[tuple, list[str]] = {}
    for entry in entries:
        before, number, after = re.fullmatch(r"(blocks\.)(\d+)(\..*)|.*", entry.name).groups()
        pattern = f"{before}*{after}" if number else entry.name
        lines.setdefault((pattern, entry.stored, entry.own, entry.note), []).append(number or "")
    texts = []
    for (pattern, stored, own, note), numbers in lines.items():
        name = pattern.replace("*", numbers[0] if len(numbers) == 1 else "{" + ",".join(numbers) + "}")
        where = [f"{sizes(stored)} in the file"] if stored is not None else []
        where += [f"{sizes(own)} in the model"] if own is not None else []
        texts.append(f"  {name}: {', '.join(where)}" + (f"; {note}" if note else ""))
    return texts


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_checkpoint` did with every entry, of the file and of the model. Prints as text."""

    origin: str
    loaded: list[Entry] = field(default_factory=list)  # taken as they are
    adapted: list[Entry] = field(default_factory=list)  # made to fit
    skipped: list[Entry] = field(default_factory=list)  # not taken: the model's own stay, if it has them
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        numbers = sum(math.prod(entry.own) for entry in self.loaded)
        lines = [self.origin, f"loaded: {len(self.loaded)} entries as they are, {numbers:,} numbers"]
        lines += [f"adapted: {len(self.adapted) or 'none'}", *folded(self.adapted)]
        lines += [f"skipped: {len(self.skipped) or 'none'}", *folded(self.skipped)]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])

    __repr__ = __str__


# ---- loading


def load_checkpoint(
    model: nn.Module,
    source: str | bytes | os.PathLike | Mapping | Stored,
    *,
    use_ema: bool = True,
    strict: bool = True,
    grid: tuple[int, int] | None = None,
    progress: bool = True,
) -> LoadReport:
    """Load weights into ``model``, and report what was done with each entry.

    Reads the authors' files (``state_dict_ema`` before ``state_dict``) and their CIFAR files (``net``), those of DeiT
    (``model_ema``, ``model``), of Lightning and most other scripts, plain state dicts, old and new torch files,
    safetensors. Averaged weights are taken where there are some. What all names have in front is left out, whatever it
    is (``module.``, ``model.``, ``encoder.``), and so is what PyTorch's wrappers put between; mmpretrain's names are
    turned into the authors'. ``model`` may be wrapped too: compiled, parallel, or part of a larger module.

    Two things are adapted: if the number of classes differs, the head stays as it is in the model; if the grid of
    tokens differs, the position table is resized. With ``strict`` anything else that does not fit is refused; without
    it such entries are left out, and the report says so. If an error is raised, the model is what it was. Weights take
    the dtype and the device of the model.

    mmpretrain's T2T layers scale the scores by 64 ** -0.5 since March 2023, where the authors and we have
    147 ** -0.5 and 576 ** -0.5. For weights trained there since, set
    ``model.tokens_to_token.attention1.attn.scale`` and ``attention2.attn.scale`` to 64 ** -0.5 after loading.

    Args:
        source: a path, a URL (kept in torch.hub's cache), a mapping or what read_weights gave
        use_ema: False asks for the weights without averaging, if the file has both
        grid: (rows, columns) of the stored position table. Without it the grid is the one that save_checkpoint wrote
            down, else a square: a table of 197 rows is 14 x 14, also for a model whose own 196 tokens are 7 x 28
        progress: show a bar while a URL is fetched

    Raises:
        ValueError: for a file that holds no weights, is damaged or holds anything but data, and for weights that do not
            fit, with lists
        TypeError: for a model that is none of this package's
        FileNotFoundError: for a path that is not there
        ConnectionError: for a URL that cannot be reached
    """
    model = unwrap(model)
    own = {plain_name(name): entry for name, entry in model.state_dict().items()}  # shares its memory with the model
    if any(entry.is_meta for entry in own.values()):
        raise ValueError("the model is on the meta device, without memory: model.to_empty(device=...) first")
    stored = read_weights(source, use_ema, progress)
    shapes = {name: tuple(entry.shape) for name, entry in own.items()}

    weights, notes = rename(stored.weights, shapes, use_ema, stored.origin)
    computed = {name for name in weights if name.rpartition(".")[2] in model.computed}
    if computed:
        weights = {name: value for name, value in weights.items() if name not in computed}
        notes.append(f"not taken, since the model computes it: {', '.join(model.computed)} ({len(computed)} entries)")
    weights, shapes, skipped = drop_heads(weights, shapes, model.head_names)
    resized, adapted = resize_tables(weights, shapes, model, grid, stored.arguments)
    fitting, problems = check_shapes(weights | resized, shapes)
    problems |= check_heads(stored, model)

    if (strict and problems) or not fitting.keys() - resized.keys():
        raise ValueError("\n".join(complaint(stored.origin, weights, problems)))
    for name in fitting:  # random directions beside trained keys and queries would be silently wrong
        directions = name.removesuffix("kqv.weight") + "w"
        if name.endswith("kqv.weight") and directions not in fitting:
            raise ValueError(f"{stored.origin} has {name}, but no {directions} that fits: the two belong together")
    with torch.no_grad():
        for name, tensor in fitting.items():
            own[name].copy_(tensor)

    for kind, entries in problems.items():
        skipped += [replace(entry, note=entry.note or kind) for entry in entries if entry.name]
        notes += [entry.note for entry in entries if not entry.name]
    loaded = [Entry(name, shapes[name], shapes[name]) for name in fitting if name not in resized]
    return LoadReport(stored.origin, loaded, adapted, skipped, [*stored.notes, *notes])


def unwrap(model: nn.Module) -> Classifier:
    """The model of this package in a module: itself, or the only one in whatever it is wrapped in.

    Raises:
        TypeError: if there is none, or more than one
    """
    if isinstance(model, Classifier):
        return model
    found = {name: part for name, part in model.named_modules() if isinstance(part, Classifier)}
    if len(found) != 1:
        inside = f"one with {len(found)} of them ({', '.join(found)})" if found else "one without any"
        raise TypeError(f"expected a model of t2t_ref or a module around one, found a {type(model).__name__}, {inside}")
    return next(iter(found.values()))


def plain_name(name: str) -> str:
    """The name of an entry without what PyTorch's wrappers put into it."""
    return WRAPPERS.sub("", name)


# ---- the four passes: from names and tensors to names and tensors, and lines for the report


def rename(weights: Mapping, own: Mapping, use_ema: bool, origin: str) -> tuple[dict, list[str]]:
    """Give the entries the names that the model has: without wrappers, without what stands in front of all of them.

    Raises:
        ValueError: if two entries come to have one name, or two sets of entries fit
    """

    def fits(names: list[str]) -> Counter:
        """For each prefix, of how many names it makes the model's."""
        ends = ((name, dot.end()) for name in names for dot in re.finditer(r"^|\.", name))
        return Counter(name[:end] for name, end in ends if name[end:] in own)

    before = [str(name) for name in weights]
    names, notes = [plain_name(name) for name in before], []
    for known, table in (("", TIMM), (MMPRETRAIN_NOTE, MMPRETRAIN)):
        turned = names
        for pattern, ours in table:
            turned = [re.sub(pattern, ours, name) for name in turned]
        if max(fits(turned).values(), default=0) > max(fits(names).values(), default=0):
            names, notes = turned, notes + [known] * bool(known)

    counted = fits(names)
    many = [prefix for prefix, count in counted.most_common() if 2 * count > max(counted.values())]
    prefix = "" if "" in many or not many else choose(many, use_ema, origin)
    others = tuple(other for other in many if other not in (prefix, ""))
    wrappers = {part for name in before for part in WRAPPERS.findall(name)}
    gone = sorted(wrappers) + [prefix] * bool(prefix)
    if gone:
        notes.insert(0, f"left out of the names: {', '.join(map(repr, gone))}")

    renamed, counts = {}, Counter()
    for name, value in zip(names, weights.values(), strict=True):
        other = next((other for other in others if name.startswith(other)), None)
        name = name.removeprefix(prefix)
        if other is not None or (name.rpartition(".")[2] in COUNTERS and name not in own):
            counts[other or name] += 1
        elif name in renamed:
            raise ValueError(f"{origin} holds two entries for {name!r}; expected one")
        else:
            renamed[name] = value
    if counts:
        notes.insert(0, "not taken: " + ", ".join(f"{name} ({count} entries)" for name, count in counts.items()))
    return renamed, notes


MMPRETRAIN_NOTE = (
    "mmpretrain's names. Weights trained there since March 2023 want another scale in the T2T layers: "
    "see load_checkpoint"
)


def drop_heads(weights: dict, own: dict, heads: tuple[str, ...]) -> tuple[dict, dict, list[Entry]]:
    """Leave out the heads for another number of classes, of the file and of the model. No head counts as no classes."""
    weights, own, skipped = dict(weights), dict(own), []
    for head in heads:
        names = [f"{head}.weight", f"{head}.bias"]
        theirs, ours = ([state.get(name) for name in names] for state in (shapes_of(weights), own))
        whole = all(
            (weight is None and bias is None) or (weight and bias and len(weight) == 2 and bias == weight[:1])
            for weight, bias in (theirs, ours)
        )
        same_width = not (theirs[0] and ours[0]) or theirs[0][1:] == ours[0][1:]
        if whole and same_width and theirs != ours:
            why = "another number of classes: " + ("its head stays fresh" if ours[0] else "no head here")
            skipped += [Entry(name, *shapes, why) for name, *shapes in zip(names, theirs, ours, strict=True)]
            for name in names:
                weights.pop(name, None), own.pop(name, None)
    return weights, own, skipped


def resize_tables(
    weights: dict, own: dict, model: Classifier, grid: tuple[int, int] | None, arguments: dict
) -> tuple[dict, list[Entry]]:
    """The position tables that lie on another grid than the model's, resized to it.

    Raises:
        ValueError: if ``grid`` does not fit a table, or if nothing says what its grid is and it is no square
    """
    tables, adapted, written = {}, [], {}
    with suppress(KeyError, TypeError, ValueError):  # not written down, or nonsense
        written = model.position_tables(pair(arguments["img_size"]))
    for name, own_grid in model.position_tables().items():
        table = weights.get(name)
        if not is_plain(table) or table.ndim != len(own[name]):
            continue
        stored = tuple(table.shape)
        cells = stored[-2] - (own[name][-2] - math.prod(own_grid))  # rows for class tokens are as many as in the model
        if cells < 1 or stored[:-2] + stored[-1:] != own[name][:-2] + own[name][-1:]:
            continue
        old_grid = stored_grid(cells, own_grid, grid, written.get(name, (0, 0)))
        if old_grid != tuple(own_grid):
            tables[name] = model.resize_table(name, table, old_grid, own_grid)
            note = "grid {}x{} resized to {}x{}".format(*old_grid, *own_grid)
            adapted.append(Entry(name, stored, own[name], note))
    return tables, adapted


def stored_grid(
    cells: int, own: tuple[int, int], given: tuple[int, int] | None, written: tuple[int, int]
) -> tuple[int, int]:
    """(rows, columns) of a stored table: as given, as written down, else a square.

    Raises:
        ValueError: as :func:`resize_tables`
    """
    if given is not None:
        if math.prod(given) != cells:
            rows, columns = given
            raise ValueError(f"grid is {rows}x{columns} = {rows * columns}, the stored table has {cells} positions")
        return tuple(given)
    if math.prod(written) == cells:
        return tuple(written)
    side = math.isqrt(cells)
    if side * side == cells:
        return side, side
    rows, columns = own
    raise ValueError(
        f"the stored position table has {cells} positions, which is no square: pass grid=(rows, columns); "
        f"the model's own are {rows}x{columns} = {rows * columns}"
    )


def check_shapes(weights: dict, own: dict) -> tuple[dict, dict[str, list[Entry]]]:
    """The entries that can be copied into the model as they are, and by kind of problem those that cannot."""
    stored, fitting = shapes_of(weights), {}
    kinds = ("missing from the file", "not in the model", "of another shape", "of another kind")
    missing, left, shape, kind = problems = [[], [], [], []]
    for name, expected in own.items():
        if name not in weights:
            missing.append(Entry(name, None, expected))
        elif not is_plain(weights[name]):
            found = getattr(weights[name], "dtype", type(weights[name]).__name__)
            kind.append(Entry(name, stored[name], expected, f"{found}, expected plain floats"))
        elif stored[name] != expected:
            shape.append(Entry(name, stored[name], expected))
        else:
            fitting[name] = weights[name]
    left += [Entry(name, stored[name], None) for name in weights if name not in own]
    return fitting, {kind: entries for kind, entries in zip(kinds, problems, strict=True) if entries}


def shapes_of(weights: Mapping) -> dict[str, tuple[int, ...]]:
    """The shapes of the entries; anything that is no tensor has none."""
    return {name: tuple(value.shape) if isinstance(value, Tensor) else () for name, value in weights.items()}


def is_plain(value: object) -> bool:
    """Whether a value can be copied into a parameter."""
    return (
        isinstance(value, Tensor) and value.is_floating_point() and value.layout == torch.strided and not value.is_meta
    )


# ---- what no shape tells, and what an error says


def check_heads(stored: Stored, model: Classifier) -> dict[str, list[Entry]]:
    """Refuse another number of heads and another scale of the scores, where the file says them: no shape does."""
    known = {"num_heads": VARIANTS[stored.variant].num_heads} if stored.variant else {}
    theirs, ours = head_settings(known | stored.arguments), head_settings(model.arguments)
    notes = [
        f"the file was made with {name}={theirs[name]}, the model has {name}={ours[name]}"
        for name in theirs
        if name in ours and theirs[name] != ours[name]
    ]
    return {"of another model with the same shapes": [Entry("", None, None, note) for note in notes]} if notes else {}


def head_settings(arguments: dict) -> dict[str, int | float]:
    """Number of heads and scale of the scores, where known: with others, the same weights are another function."""
    known = {key: arguments.get(key) for key in ("num_heads", "qk_scale", "embed_dim")}
    known = {key: value for key, value in known.items() if isinstance(value, (int, float)) and value}
    dim, heads = known.pop("embed_dim", 0), known.get("num_heads", 0)
    if dim >= heads > 0:
        known.setdefault("qk_scale", (dim // heads) ** -0.5)
    return known


def complaint(origin: str, weights: dict, problems: dict[str, list[Entry]]) -> list[str]:
    """The lines of the error for weights that do not fit."""
    lines = [f"{origin} does not fit this model, which was left as it was"]
    alike = looks_like(weights)
    if alike:
        lines.append(f"its shapes are those of {' or '.join(alike)}: create_model({alike[0]!r})")
    for kind, entries in problems.items():
        named = [entry for entry in entries if entry.name]
        lines.append(f"{kind}: {len(named)} entries" if named else f"{kind}: {'; '.join(e.note for e in entries)}")
        lines += folded(named)
    return lines


@functools.cache
def variant_shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of every variant without its head, by the variant's name."""
    with torch.device("meta"):
        return {name: shapes_of(build(name, num_classes=0).state_dict()) for name in VARIANTS}


def looks_like(weights: dict) -> list[str]:
    """Names of the variants that have these weights' names, heads aside, and nearly all of their shapes."""
    found = shapes_of(weights)
    names = []
    for name, own in variant_shapes().items():
        heads = VARIANTS[name].model.head_names
        body = {entry: shape for entry, shape in found.items() if entry.rpartition(".")[0] not in heads}
        if body.keys() == own.keys() and sum(body[entry] == own[entry] for entry in own) > 0.9 * len(own):
            names.append(name)
    return names
