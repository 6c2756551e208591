"""Weights from files and into files (chapter 14).

Three functions are for users: :func:`load_checkpoint` reads the files that people have, :func:`save_checkpoint` and
:func:`load_model` write and read the one format that needs nothing else. None of them ever runs code from a file.
"""

import argparse
import functools
import hashlib
import http.client
import json
import math
import os
import re
import ssl
import urllib.error
import urllib.parse
import uuid
import warnings
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from t2t_ref._version import __version__
from t2t_ref.arguments import pair
from t2t_ref.models import CLASSES, VARIANTS, build
from t2t_ref.models.classifier import TokenClassifier
from t2t_ref.models.position import resize_position_table
from t2t_ref.weights.released import RELEASE

HEAD = ("head.weight", "head.bias")
WEIGHT_ENTRIES = ("state_dict_ema", "state_dict", "net", "model")  # where training scripts put the weights
WRAPPERS = ("module.", "_orig_mod.", "backbone.")  # DataParallel, torch.compile, mmpretrain
MMPRETRAIN = (  # its names, ours
    (r"^head\.layers\.head\.", "head."),
    (r"^encoder\.", "blocks."),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
)
HTML_STARTS = (b"<!doctype", b"<html", b"<head", b"<?xml")
NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ssl.SSLError, ConnectionError, TimeoutError)


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
    model: TokenClassifier,
    source: str | os.PathLike | Mapping,
    *,
    use_ema: bool = True,
    strict: bool = True,
    grid: tuple[int, int] | None = None,
    progress: bool = True,
) -> LoadReport:
    """Load weights into ``model``, and report what was done with each entry.

    Reads the authors' files (``state_dict_ema`` before ``state_dict``) and their CIFAR files (``net``), plain state
    dicts, old and new torch files, safetensors; names with ``module.`` in front, and those of mmpretrain. Two things
    are adapted: if the number of classes differs, the head stays as it is in the model; if the grid of tokens differs,
    the position table is resized. With ``strict`` anything else that does not fit is refused; without it such
    entries are left out, and the report says so. If an error is raised, the model is what it was. Weights take the
    dtype and the device of the model.

    mmpretrain's T2T layers scale the scores by 64 ** -0.5 since March 2023, where the authors and we have
    147 ** -0.5 and 576 ** -0.5. For weights trained there since, set
    ``model.tokens_to_token.attention1.attn.scale`` and ``attention2.attn.scale`` to 64 ** -0.5 after loading.

    Units:   source is a path, a URL (kept in torch.hub's cache) or a mapping; use_ema=False asks for the weights
             without averaging, if the file has both; progress shows a bar while a URL is fetched; grid is (rows,
             columns) of the stored position table. Without it the grid is the one that save_checkpoint wrote down, else
             a square: a table of 197 rows is 14 x 14, also for a model whose own 196 tokens are 7 x 28
    Raises:  ValueError for a file that holds no weights, is damaged or holds anything but data, and for weights that
             do not fit, with lists; FileNotFoundError for a path that is not there; ConnectionError for a URL that
             cannot be reached
    """
    if isinstance(source, Mapping):
        content, recorded, origin = source, {}, "the mapping"
    else:
        content, recorded = open_source(source, progress)
        origin = os.fspath(source)
    weights, entry, recorded = find_weights(content, use_ema, recorded, origin)
    weights, notes = our_names(weights, origin)
    fitted, report, problems = fit(model, weights, grid, recorded)
    if (strict and problems) or not report["loaded"]:
        raise ValueError("\n".join(complaint(origin, weights, problems)))
    for name in fitted:  # random directions beside trained keys and queries would be silently wrong
        directions = name.removesuffix("kqv.weight") + "w"
        if name.endswith("kqv.weight") and directions not in fitted:
            raise ValueError(f"{origin} has {name}, but no {directions} that fits: the two belong together")

    own = model.state_dict()  # the entries share their memory with the model's
    if any(entry.is_meta for entry in own.values()):
        raise ValueError("the model is on the meta device, without memory: model.to_empty(device=...) first")
    with torch.no_grad():
        for name, tensor in fitted.items():
            own[name].copy_(tensor)
    origin = f"{origin}, entry {entry!r}" if entry else origin
    return LoadReport(origin, report["loaded"], report["adapted"], report["skipped"], notes + report["notes"])


def open_source(source: str | os.PathLike, progress: bool = True) -> tuple[object, dict]:
    """Content of a path or a URL, and the arguments that save_checkpoint wrote down, if it did.

    Raises:  ConnectionError, with the remedy, for a URL that cannot be reached; as :func:`read_file`
    """
    text = os.fspath(source)
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        return read_file(Path(text), text)

    name = Path(urllib.parse.unquote(urllib.parse.urlsplit(text).path)).name or "weights"
    if not text.startswith(RELEASE):  # elsewhere many files are called model.safetensors
        name = f"{hashlib.sha256(text.encode()).hexdigest()[:8]}-{name}"
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    cached = folder / name
    if cached.exists():
        return read_file(cached, f"{cached} (in torch.hub's cache: delete it to download it again)")
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / f"{name}.{uuid.uuid4().hex}.partial"
    try:
        torch.hub.download_url_to_file(text, str(fresh), progress=progress)
        content = read_file(fresh, text)  # a connection that breaks off leaves half a file, which is refused here
        os.replace(fresh, cached)
    except NETWORK_ERRORS as error:
        raise ConnectionError(
            f"cannot download {text}: {getattr(error, 'reason', None) or error}. Fetch it where there is a network, "
            f"then put it at {cached}, or give its path to load_checkpoint(model, path)"
        ) from error
    finally:
        fresh.unlink(missing_ok=True)
    return content


def read_file(path: Path, shown: str) -> tuple[object, dict]:
    """Content of a file of weights, and the arguments that save_checkpoint wrote down, if it did.

    Raises:  FileNotFoundError; ValueError for anything that is not a whole file of weights and nothing but weights
    """
    if not path.exists():
        raise FileNotFoundError(f"no file of weights at {shown} (looked from {Path.cwd()})")
    if not path.is_file():
        raise ValueError(f"{shown} is not a file; expected a file of weights")
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise ValueError(f"{shown} is empty; expected a file of weights")
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(HTML_STARTS):
        raise ValueError(f"{shown} is a web page, not weights: fetch the file itself, not the page about it")
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return read_safetensors(path, shown)
    try:
        # the authors' files hold the arguments of their training script in one: names and plain values
        with warnings.catch_warnings(action="ignore"), allowed_by_name(argparse.Namespace):
            return torch.load(path, map_location="cpu", weights_only=True), {}
    except Exception as error:  # damaged bytes raise almost anything
        reason = str(error).partition("WeightsUnpickler error: ")[2] or f"{type(error).__name__}: {error}"
    # outside of the except clause, and in our words: torch's advise to switch the protection off
    foreign = re.search(r"GLOBAL ([\w.]+)", reason)
    if foreign:
        raise ValueError(
            f"{shown} asks for {foreign[1]}, which is code or an object; expected tensors, numbers and text. "
            "Nothing of it was run. If you made the file yourself, write its state_dict alone"
        )
    reason = re.split(r"[\n(]|\. ", reason.strip())[0].strip()
    raise ValueError(f"{shown} is no file of weights, or not whole ({reason}); fetch it anew")


@contextmanager
def allowed_by_name(*classes: type):
    """Let torch.load read these classes, with weights_only. torch has a context for it since 2.5, a list in 2.4."""
    if hasattr(torch.serialization, "safe_globals"):
        with torch.serialization.safe_globals(classes):
            yield
    else:
        before = list(torch.serialization.get_safe_globals())  # a copy: it hands out its own list
        torch.serialization.add_safe_globals(classes)
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(before)


def read_safetensors(path: Path, shown: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors of a safetensors file, and the class and arguments that save_checkpoint wrote down, if it did.

    Raises:  ImportError without the package safetensors; ValueError for a file that is none, or not whole
    """
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(f"{shown} is a safetensors file: pip install safetensors") from error
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # copies: a tensor that maps the file would change, or crash, when the file is written over
            content = {name: file.get_tensor(name).clone() for name in file.keys()}
        recorded = json.loads(metadata["arguments"]) | {"class": metadata["class"]} if "t2t_ref" in metadata else {}
        recorded = {key: tuple(value) if isinstance(value, list) else value for key, value in recorded.items()}
    except Exception as error:  # SafetensorError, and whatever a damaged header leads to
        raise ValueError(f"{shown} is no safetensors file, or not whole ({error}); fetch it anew") from error
    return content, recorded


def find_weights(content: object, use_ema: bool, recorded: dict, origin: str) -> tuple[Mapping, str, dict]:
    """The entries of the state dict in ``content``, the key under which it lay, and what is known of the model.

    Raises:  ValueError for content without weights
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{origin} holds a {type(content).__name__}; expected a dict of weights")
    found = [key for key in WEIGHT_ENTRIES if isinstance(content.get(key), Mapping)]
    if not use_ema and "state_dict_ema" in found:
        found.remove("state_dict_ema")
        if not found:
            raise ValueError(f"{origin} holds averaged weights only (state_dict_ema), but use_ema is False")
    weights = content[found[0]] if found else content
    if not any(isinstance(value, Tensor) for value in weights.values()):
        inside = ", ".join(f"{key} ({type(value).__name__})" for key, value in list(content.items())[:8])
        raise ValueError(f"{origin} holds no weights: found {inside or 'an empty dict'}")
    variant = VARIANTS.get(str(content.get("arch")).lower()) if found else None
    if variant is not None:  # the authors' script writes the name of the variant beside the weights
        recorded = {"num_heads": variant.num_heads} | recorded
    return weights, found[0] if found else "", recorded


def our_names(weights: Mapping, origin: str) -> tuple[dict, list[str]]:
    """Names without the wrappers in front, mmpretrain's turned into the authors'. The latter are noted.

    Raises:  ValueError if two entries come to have one name
    """
    renamed: dict = {}
    from_mmpretrain = False
    for name, value in weights.items():
        new = str(name)
        while new.startswith(WRAPPERS):
            new = new.partition(".")[2]
        for pattern, replacement in MMPRETRAIN:
            new, times = re.subn(pattern, replacement, new)
            from_mmpretrain |= times > 0
        if new in renamed:
            raise ValueError(f"{origin} holds two entries for {new!r}; expected one")
        renamed[new] = value
    scale = "mmpretrain's names. Weights trained there since March 2023 want another scale in the T2T layers"
    return renamed, [f"{scale}: see load_checkpoint"] if from_mmpretrain else []


def fit(model: TokenClassifier, weights: dict, grid: tuple[int, int] | None, recorded: dict):
    """Sort the entries: what to copy, the report's lists, and the problems. Nothing is copied yet."""
    own = {name: tuple(entry.shape) for name, entry in model.state_dict().items()}
    stored = {name: tuple(value.shape) if isinstance(value, Tensor) else () for name, value in weights.items()}
    weights, fitted = dict(weights), {}
    report = {"loaded": [], "adapted": [], "skipped": [], "notes": []}
    kinds = ("missing from the file", "not in the model", "of another shape", "of another kind")
    problems: dict[str, list[Entry]] = {kind: [] for kind in kinds}

    fresh_head = other_number_of_classes(stored, own)
    for name in HEAD if fresh_head else ():
        if name in stored or name in own:
            weights.pop(name, None)
            report["skipped"].append(Entry(name, stored.get(name), own.pop(name, None), fresh_head))

    if is_table(weights.get("pos_embed")) and stored["pos_embed"][2] == own["pos_embed"][2]:
        old_grid = stored_grid(model, weights["pos_embed"], grid, recorded)
        if old_grid != model.grid:
            fitted["pos_embed"] = resize_position_table(weights.pop("pos_embed"), old_grid, model.grid)
            note = "grid {}x{} resized to {}x{}".format(*old_grid, *model.grid)
            report["adapted"].append(Entry("pos_embed", stored["pos_embed"], own.pop("pos_embed"), note))

    for name, shape in own.items():
        if name not in weights:
            problems["missing from the file"].append(Entry(name, None, shape))
        elif not is_plain(weights[name]):
            kind = getattr(weights[name], "dtype", type(weights[name]).__name__)
            problems["of another kind"].append(Entry(name, stored[name], shape, f"{kind}, expected plain floats"))
        elif stored[name] != shape:
            problems["of another shape"].append(Entry(name, stored[name], shape))
        else:
            fitted[name] = weights[name]
            report["loaded"].append(Entry(name, shape, shape))
    for name in weights:
        if name not in own:
            problems["not in the model"].append(Entry(name, stored[name], None))
    theirs, ours = head_settings(recorded), head_settings(getattr(model, "arguments", {}))
    for name in theirs.keys() & ours.keys():
        if theirs[name] != ours[name]:
            note = f"the file was made with {name}={theirs[name]}, the model has {name}={ours[name]}"
            problems.setdefault("of another model with the same shapes", []).append(Entry("", None, None, note))
            report["notes"].append(note)
    problems = {kind: entries for kind, entries in problems.items() if entries}
    for kind, entries in problems.items():
        report["skipped"] += [replace(entry, note=entry.note or kind) for entry in entries if entry.name]
    return fitted, report, problems


def head_settings(arguments: dict) -> dict[str, int | float]:
    """Number of heads and scale of the scores, where known: with others, the same weights are another function."""
    known = {key: arguments.get(key) for key in ("num_heads", "qk_scale", "embed_dim")}
    known = {key: value for key, value in known.items() if isinstance(value, (int, float)) and value}
    dim, heads = known.pop("embed_dim", 0), known.get("num_heads", 0)
    if dim >= heads > 0:
        known.setdefault("qk_scale", (dim // heads) ** -0.5)
    return known


def other_number_of_classes(stored: dict[str, tuple], own: dict[str, tuple]) -> str:
    """Why the head is to stay as it is, or "" if it is to be loaded. No head at all counts as no classes."""
    shapes = [tuple(state.get(name) for name in HEAD) for state in (stored, own)]
    whole = all(
        (weight is None and bias is None) or (weight and bias and len(weight) == 2 and bias == weight[:1])
        for weight, bias in shapes
    )
    (theirs, _), (ours, _) = shapes
    if not whole or theirs == ours or (theirs and ours and theirs[1] != ours[1]):
        return ""
    return "another number of classes: " + ("its head stays fresh" if ours else "no head here")


def is_plain(value: object) -> bool:
    """Whether a value can be copied into a parameter."""
    return (
        isinstance(value, Tensor) and value.is_floating_point() and value.layout == torch.strided and not value.is_meta
    )


def is_table(value: object) -> bool:
    """Whether a value can be a position table: a class row, and at least one more."""
    return is_plain(value) and value.ndim == 3 and value.shape[0] == 1 and value.shape[1] >= 2


def stored_grid(
    model: TokenClassifier, table: Float[Tensor, "1 n d"], grid: tuple[int, int] | None, recorded: dict
) -> tuple[int, int]:
    """(rows, columns) of the tokens that a stored position table belongs to.

    Raises:  ValueError if ``grid`` does not fit the table, or if nothing says what the grid is and it is no square
    """
    cells = table.shape[1] - 1
    side = math.isqrt(cells)
    if grid is not None:
        if math.prod(grid) != cells:
            raise ValueError(f"grid is {grid[0]}x{grid[1]} = {math.prod(grid)}, the stored table has {cells} positions")
        return tuple(grid)
    with suppress(KeyError, TypeError, ValueError):  # not written down, or nonsense
        written = model.grid_of(pair(recorded["img_size"]))
        if math.prod(written) == cells:
            return written
    if side * side == cells:
        return side, side
    rows, columns = model.grid
    raise ValueError(
        f"the stored position table has {cells} positions, which is no square: pass grid=(rows, columns); "
        f"the model's own are {rows}x{columns} = {rows * columns}"
    )


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


def looks_like(weights: dict) -> list[str]:
    """Names of the variants whose blocks have these weights' names and sizes, behind a front of the same kind."""

    def body(entries: Mapping) -> dict[str, tuple[int, ...]]:
        shapes = {name: tuple(value.shape) for name, value in entries.items() if isinstance(value, Tensor)}
        return {name: shape for name, shape in shapes.items() if name.startswith(("blocks.", "norm."))}

    kinds = {
        "patch_embed.proj": "vit",
        "tokens_to_token.attention1.kqv": "performer",
        "tokens_to_token.attention1.attn.qkv": "transformer",
    }
    kind = next((kinds[k] for k in kinds if f"{k}.weight" in weights), "convolution")
    names = []
    for name, variant in VARIANTS.items():
        if kind == getattr(variant, "tokens_type", "vit"):
            with torch.device("meta"):
                model = build(name, num_classes=0)
            if body(model.state_dict()) == body(weights):
                names.append(name)
    return names


# ---- saving, and building again


def arguments_of(model: TokenClassifier) -> dict:
    """The arguments that build this model again, as it is now: those of its making, with the head of today."""
    return model.arguments | {"num_classes": model.num_classes, "dynamic_img_size": model.dynamic_img_size}


def save_checkpoint(model: TokenClassifier, path: str | os.PathLike) -> None:
    """Write the weights as safetensors, with the model's class and arguments beside them, for :func:`load_model`.

    The file appears whole or not at all; one that is there is replaced at the last moment.

    Raises:  ValueError for a model that its arguments do not rebuild, because it was changed by hand;
             FileNotFoundError if the folder is not there; ImportError without the package safetensors
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError("save_checkpoint writes safetensors: pip install safetensors") from error
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} into")
    if type(model) not in CLASSES.values():
        raise ValueError(f"cannot write down how to build a {type(model).__name__}; expected {' or '.join(CLASSES)}")
    arguments = arguments_of(model)
    with torch.device("meta"):
        changes = differences(model, type(model)(**arguments))
    if changes:
        raise ValueError(
            f"this model was changed after it was built, and its arguments would not rebuild it: {'; '.join(changes)}. "
            "torch.save(model.state_dict(), path) keeps the weights alone"
        )
    metadata = {
        "format": "pt",  # what other readers of safetensors look for
        "t2t_ref": __version__,
        "class": type(model).__name__,
        "arguments": json.dumps(arguments, default=float),
    }
    weights = {name: entry.detach().cpu().contiguous() for name, entry in model.state_dict().items()}
    fresh = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        save_file(weights, fresh, metadata)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def differences(model: nn.Module, twin: nn.Module) -> list[str]:
    """Where two models differ, values of weights and the mode aside: layers, their settings, shapes."""
    found = []
    ours, theirs = dict(model.named_modules()), dict(twin.named_modules())
    for name in sorted(ours.keys() | theirs.keys()):
        here, there = (f"{type(modules.get(name)).__name__}" for modules in (ours, theirs))
        if here != there:
            found.append(f"{name} is {here}, not {there}")
            continue
        for key, value in vars(theirs[name]).items():
            if isinstance(value, (int, float, str, tuple)) and key != "training" and not key.startswith("_"):
                here = getattr(ours[name], key, None)
                if here != value:
                    found.append(f"{name}.{key} is {here}, not {value}".lstrip("."))
    shapes = [{name: tuple(entry.shape) for name, entry in m.state_dict().items()} for m in (model, twin)]
    return found + [f"shape of {name}" for name in dict(shapes[0].items() ^ shapes[1].items())]


def load_model(path: str | os.PathLike, **overrides) -> TokenClassifier:
    """Build the model that :func:`save_checkpoint` wrote, from its file alone: class, arguments, weights, dtype.

    It comes on the CPU and in training mode, as :func:`create_model` gives it.

    Units:   path may be a URL; ``overrides`` are arguments of the model that shall differ, such as num_classes or
             img_size: the weights are then adapted as :func:`load_checkpoint` does
    Raises:  ValueError for a file that save_checkpoint did not write or that is damaged, and for overrides that the
             weights do not fit; FileNotFoundError, ConnectionError as load_checkpoint
    """
    content, recorded = open_source(path)
    if recorded.get("class") not in CLASSES:
        raise ValueError(
            f"{os.fspath(path)} does not say which model it holds, as files of save_checkpoint do; "
            "build the model with create_model, then load_checkpoint(model, path)"
        )
    arguments = {name: value for name, value in recorded.items() if name != "class"}
    build = CLASSES[recorded["class"]]
    if overrides:
        model = build(**(arguments | overrides))
        load_checkpoint(model, path)
        return model
    try:
        with torch.device("meta"):  # no memory, no random numbers: every entry comes from the file
            model = build(**arguments)
        model.load_state_dict(content, assign=True)
    except Exception as error:
        raise ValueError(f"{os.fspath(path)} is damaged: its arguments and its weights disagree ({error})") from error
    return model


# ---- the Hugging Face hub


@functools.cache
def hub_form() -> type:
    """A model in the form of huggingface_hub's mixin: a folder or repository with model.safetensors and config.json.

    The mixin is a class of its own around a model, so that the models are the same with and without huggingface_hub.

    Raises:  ImportError, with the remedy, if that is not installed
    """
    try:
        from huggingface_hub import ModelHubMixin, hf_hub_download
    except ImportError as error:
        raise ImportError("this needs the Hugging Face hub's client: pip install huggingface_hub") from error

    class HubForm(ModelHubMixin, library_name="t2t_ref", tags=["image-classification"]):
        FILE = "model.safetensors"

        def __init__(self, model: TokenClassifier):
            self.model = model

        def _save_pretrained(self, save_directory: Path) -> None:
            save_checkpoint(self.model, Path(save_directory) / self.FILE)

        @classmethod
        def _from_pretrained(
            cls, *, model_id, revision, cache_dir, force_download, local_files_only, token, **overrides
        ) -> TokenClassifier:
            if os.path.isdir(model_id):
                return load_model(Path(model_id) / cls.FILE, **overrides)
            where = dict(revision=revision, cache_dir=cache_dir, force_download=force_download)
            path = hf_hub_download(model_id, cls.FILE, local_files_only=local_files_only, token=token, **where)
            return load_model(path, **overrides)

    return HubForm
