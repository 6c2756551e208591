"""Files of weights read safely: what is in them is never run (chapter 14).

A file is read once, into :class:`Stored`, which says what it knows of its model.
"""

import hashlib
import http.client
import json
import os
import re
import ssl
import tarfile
import urllib.error
import urllib.parse
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from t2t_ref.models import VARIANTS
from t2t_ref.weights.released import RELEASE
from t2t_ref.weights.writing import path_of, shown, write_whole

ENTRIES = ("state_dict", "net", "model", "model_state_dict", "module", "weights", "params")  # the first there is taken
AVERAGED = re.compile(r"(?<![a-z])(ema|ewma|swa|avg|averaged?|polyak|shadow)(?![a-z])", re.IGNORECASE)
NO_WEIGHTS = re.compile(r"optimizer|^opt(im)?$|sched|scaler|callback|^loops?$|rng|random_state", re.IGNORECASE)
NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ssl.SSLError, ConnectionError, TimeoutError)


@dataclass(frozen=True)
class Stored:
    """Weights as they lie in a file, and what the file says about their model.

    ``weights`` are the entries by their names; ``origin`` is the place, for messages. ``class_name`` and ``arguments``
    are what save_checkpoint wrote down, ``variant`` is the name that the authors' training script writes; each is
    empty where the file does not say. ``notes`` are lines for the report.
    """

    weights: Mapping
    origin: str
    class_name: str = ""
    arguments: dict = field(default_factory=dict)
    variant: str = ""
    notes: tuple[str, ...] = ()


def read_weights(
    source: "str | bytes | os.PathLike | Mapping | Stored", use_ema: bool = True, progress: bool = True
) -> Stored:
    """Read a path, a URL or a mapping once. What is read already is given back as it is.

    Raises:
        ValueError: as :func:`~t2t_ref.weights.loading.load_checkpoint`
        FileNotFoundError: for a path that is not there
        ConnectionError: for a URL that cannot be reached
    """
    if isinstance(source, Stored):
        return source
    content, recorded, origin = source, {}, "the mapping"
    if not isinstance(source, Mapping):
        content, recorded = open_source(source, progress)
        origin = shown(source)
    weights, entry, notes = find_weights(content, use_ema, origin)
    class_name, arguments = recorded.get("class", ""), recorded.get("arguments", {})
    variant = str(content.get("arch")).lower() if entry else ""
    variant = variant if variant in VARIANTS else ""
    if entry:
        origin = f"{origin}, entry {entry!r}"
    return Stored(weights, origin, class_name, arguments, variant, notes)


# ---- the weights among everything that training scripts write


def tensors_in(content: object, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Mapping | list]]:
    """Every dict and list in ``content`` whose values are mostly tensors, with the keys that lead to it."""
    values = list(content.values()) if isinstance(content, Mapping) else content
    if not isinstance(values, (list, tuple)) or len(keys) > 4:
        return
    if 2 * sum(isinstance(value, Tensor) and value.ndim > 0 for value in values) > len(values):
        yield keys, content
    names = content.keys() if isinstance(content, Mapping) else range(len(values))
    for name, value in zip(names, values, strict=True):
        if not NO_WEIGHTS.search(str(name)):
            yield from tensors_in(value, (*keys, str(name)))


def find_weights(content: object, use_ema: bool, origin: str) -> tuple[Mapping, str, tuple[str, ...]]:
    """The state dict in ``content``, the key under which it lies, and notes on the sets that were not taken.

    Raises:
        ValueError: for content without weights, and where several sets have an equal claim
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{origin} holds a {type(content).__name__}; expected a dict of weights")
    found = {".".join(keys): value for keys, value in tensors_in(content)}
    sets = {key: value for key, value in found.items() if isinstance(value, Mapping)}
    nameless = [key for key, value in found.items() if key not in sets and AVERAGED.search(key)]
    if use_ema and nameless and not any(map(AVERAGED.search, sets)):
        raise ValueError(
            f"{origin} holds its averaged weights ({nameless[0]}) as a list without names, which nothing can assign: "
            "use_ema=False asks for the others"
        )
    if not sets:
        kinds = {key: f"{type(value).__module__}.{type(value).__name__}" for key, value in list(content.items())[:8]}
        inside = ", ".join(f"{key} ({kind.removeprefix('builtins.')})" for key, kind in kinds.items())
        raise ValueError(f"{origin} holds no weights: found {inside or 'an empty dict'}")

    def claim(key: str) -> tuple[int, int]:
        return min((ENTRIES.index(k) for k in key.split(".") if k in ENTRIES), default=len(ENTRIES)), -len(sets[key])

    large = [key for key in sets if 2 * len(sets[key]) > max(map(len, sets.values()))]  # a small one is of another use
    taken = choose(sorted(large, key=claim), use_ema, origin, lambda first, second: claim(first) < claim(second))
    left = ", ".join(key for key in sets if key != taken and key)
    which = "the averaged weights were taken; " if AVERAGED.search(taken) else ""
    return sets[taken], taken, (f"{which}also in the file: {left}",) if left else ()


def choose(names: list[str], use_ema: bool, origin: str, better=lambda first, second: not first) -> str:
    """The first of several sets of weights: of those with averaged weights if there are any and ``use_ema`` says so.

    Raises:
        ValueError: if there are averaged ones only and they are not wanted, or if the first is not ``better``
    """
    averaged = [name for name in names if AVERAGED.search(name)]
    wanted = averaged if averaged and use_ema else [name for name in names if name not in averaged]
    if not wanted:
        raise ValueError(f"{origin} holds averaged weights only ({', '.join(averaged)}), but use_ema is False")
    if len(wanted) > 1 and not better(*wanted[:2]):
        raise ValueError(
            f"{origin} holds several sets of weights, {' and '.join(map(repr, wanted))}: read the file with "
            "torch.load(path, weights_only=True), and give load_checkpoint one of them"
        )
    return wanted[0]


# ---- paths and URLs


def check_source(source: object) -> None:
    """Refuse what is neither a path nor a URL.

    Raises:
        TypeError: that names its type, and for a model what to give
    """
    if not isinstance(source, str | bytes | os.PathLike):
        kind = type(source).__name__
        hint = ": give state_dict()" if hasattr(source, "state_dict") else ""
        raise TypeError(f"source is of type {kind}, expected a path, a URL or a mapping of names{hint}")


def open_source(source: str | bytes | os.PathLike, progress: bool = True) -> tuple[object, dict]:
    """Content of a path or a URL, and the class and arguments that save_checkpoint wrote down, if it did.

    Raises:
        ConnectionError: with the remedy, for a URL that cannot be reached
        FileNotFoundError: as :func:`read_file`
        TypeError: for what is neither
        ValueError: as :func:`read_file`
    """
    if not isinstance(source, str | bytes | os.PathLike):
        hint = ": give its state_dict()" if hasattr(source, "state_dict") else ""
        raise TypeError(
            f"source is of type {type(source).__name__}, expected a path, a URL or a mapping of names{hint}"
        )
    text = os.fsdecode(source)
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        return read_file(path_of(text), shown(text))

    name = Path(urllib.parse.unquote(urllib.parse.urlsplit(text).path)).name or "weights"
    if not text.startswith(RELEASE):  # elsewhere many files are called model.safetensors
        name = f"{hashlib.sha256(text.encode()).hexdigest()[:8]}-{name}"
    cached = Path(torch.hub.get_dir()) / "checkpoints" / name
    if cached.exists():
        return read_file(cached, f"{cached} (in torch.hub's cache: delete it to download it again)")
    content = None

    def download(draft: Path) -> None:
        nonlocal content
        torch.hub.download_url_to_file(text, str(draft), progress=progress)
        content = read_file(draft, text)  # a connection that breaks off leaves half a file, which is refused here

    cached.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_whole(cached, download)
    except NETWORK_ERRORS as error:
        raise ConnectionError(
            f"cannot download {text}: {getattr(error, 'reason', None) or error}. Fetch it where there is a network, "
            f"then put it at {cached}, or give its path to load_checkpoint(model, path)"
        ) from error
    return content


def read_file(path: Path, name: str) -> tuple[object, dict]:
    """Content of a file of weights, and the class and arguments that save_checkpoint wrote down, if it did.

    Raises:
        FileNotFoundError
        ValueError: for anything that is not a whole file of weights and nothing but weights
    """
    if not path.exists():
        raise FileNotFoundError(f"no file of weights at {name} (looked from {Path.cwd()})")
    if path.is_dir():
        raise ValueError(f"{name} is not a file; {in_folder(path)}")
    if not path.is_file():
        raise ValueError(f"{name} is not a file; expected a file of weights")
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise ValueError(f"{name} is empty; expected a file of weights")
    safe = path.suffix == ".safetensors" or start[8:9] == b"{"
    try:
        return read_safetensors(path, name) if safe else (read_torch(path, name), {})
    except ValueError as error:
        if kind := what_it_is(path, start):
            raise ValueError(f"{name} is {kind}") from error
        raise


# ---- torch's files and safetensors


def stand_in(name: str) -> type:
    """A class that torch.load puts in the place of ``name``: it takes anything, keeps nothing and does nothing."""
    module, _, own = name.rpartition(".")
    nothing = {"__init__": lambda self, *args: None, "__setstate__": lambda self, state: None}
    return type(own, (), nothing | {"__module__": module, "__qualname__": own})


# what training scripts leave beside the weights: their settings, and numpy's numbers and arrays, old names and new.
# Their bytes come through encode, which torch knows itself since 2.5
HARMLESS = [stand_in(name) for name in ("argparse.Namespace", "numpy.dtype", "numpy.ndarray", "_codecs.encode")] + [
    stand_in(f"numpy.{core}.multiarray.{name}") for core in ("core", "_core") for name in ("scalar", "_reconstruct")
]


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


def is_program(path: Path) -> bool:
    """Whether a file is a TorchScript archive. torch 2.4 would load one in spite of weights_only."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torch(path: Path, name: str) -> object:
    """Content of a file that torch.save wrote. No class but those of torch's list and stand-ins is ever made.

    Raises:
        ValueError: for a file that is none, is not whole, or asks for anything else
    """
    try:
        if is_program(path):
            raise ValueError("a program")
        with path.open("rb") as file, warnings.catch_warnings(action="ignore"), allowed_by_name(*HARMLESS):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise almost anything
        reason = str(error).partition("WeightsUnpickler error: ")[2] or f"{type(error).__name__}: {error}"
    # outside of the except clause, and in our words: torch's advise to switch the protection off
    foreign = re.search(r"GLOBAL ([\w.]+)", reason)
    if foreign:
        raise ValueError(
            f"{name} asks for {foreign[1]}, which is code or an object; expected tensors, numbers and text. "
            "Nothing of it was run. If you made the file yourself, write its state_dict alone"
        )
    reason = re.split(r"[\n(]|\. ", reason.strip())[0].strip()
    raise ValueError(f"{name} is no file of weights, or not whole ({reason}); fetch it anew")


def read_safetensors(path: Path, name: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors of a safetensors file, and the class and arguments that save_checkpoint wrote down, if it did.

    Raises:
        ImportError: without the package safetensors
        ValueError: for a file that is none, or not whole
    """
    try:
        from safetensors.torch import load
    except ImportError as error:
        raise ImportError(f"{name} is a safetensors file: pip install safetensors") from error
    data = path.read_bytes()  # a tensor that maps the file would change, or crash, when the file is written over
    try:
        content = load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
        if "t2t_ref" not in metadata:
            return content, {}
        arguments = json.loads(metadata["arguments"]).items()
    except Exception as error:  # SafetensorError, and whatever a damaged header leads to
        raise ValueError(f"{name} is no safetensors file, or not whole ({error}); fetch it anew") from error
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments}
    return content, {"class": str(metadata.get("class")), "arguments": arguments}


# ---- what else people take for a file of weights

STARTS = (  # the first bytes, and what they say
    (rb"version https://git-lfs", "a Git LFS pointer, not the file that it stands for: fetch that with 'git lfs pull'"),
    (
        rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml)",
        "a web page, not weights: fetch the file itself, not the page about it",
    ),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf\x27\x1c|Rar!", "a compressed archive: unpack it first"),
    (rb"\x93NUMPY", "an array of numpy's, without the names that weights need"),
    (rb"\x89HDF", "an HDF5 file, such as Keras writes: convert it to a PyTorch state dict"),
    (rb"GGUF", "a GGUF file, for another program: look for the PyTorch or safetensors file"),
    (rb"\x08[\x00-\x20]\x12.(pytorch|tf2onnx|onnx)", "an ONNX model: look for the PyTorch file it was made from"),
    (rb"....TFL3", "a TensorFlow Lite model: look for the PyTorch file"),
    (rb"\x80[\x02-\x05](?!\x8a\nl\xfc\x9c)", "a plain pickle that torch.save did not write, and was not opened"),
)
ENDINGS = {
    ".pdparams": "a Paddle file: convert it to PyTorch (name by name, linear layers transposed) and torch.save that",
    ".onnx": "an ONNX model: look for the PyTorch file it was made from",
    ".pb": "a TensorFlow graph: convert it to a PyTorch state dict",
    ".msgpack": "a Flax file: convert it to a PyTorch state dict",
}
TELLTALE = (  # names in an archive or a folder
    (r"(^|/)constants\.pkl$", "a TorchScript program, which is code: save the state_dict of the model that it was"),
    (r"\.npy$", "an archive of numpy arrays (.npz): convert it to a PyTorch state dict"),
    (
        r"(^|/)(saved_model\.pb|checkpoint)$|\.ckpt\.index$|_CHECKPOINT_METADATA$",
        "a TensorFlow or JAX checkpoint: convert it first",
    ),
    (r"(^|/)model\.weights\.h5$", "a Keras model: convert it to a PyTorch state dict"),
    (r"\.distcp$", "a distributed checkpoint: join it with python -m torch.distributed.checkpoint.format_utils"),
    (r"(^|/)zero_to_fp32\.py$", "a DeepSpeed checkpoint: join it with the zero_to_fp32.py in it"),
    (r"\.index\.json$", "a checkpoint in several files: read each, join their dicts, and give the result"),
)
WEIGHT_FILE = re.compile(r"\.(safetensors|pth|pt|bin|ckpt|tar)$")


def what_it_is(path: Path, start: bytes) -> str:
    """What a file that could not be read is, and what would be right; "" where nobody can say."""
    if path.suffix in ENDINGS:
        return ENDINGS[path.suffix]
    for pattern, kind in STARTS:
        if re.match(pattern, start, re.IGNORECASE | re.DOTALL):
            return kind
    if start.lstrip()[:1] == b"{":  # text
        if b'"weight_map"' in path.read_bytes():
            return "the index of a checkpoint in several files: read each, join their dicts, and give the result"
        return "a JSON text, such as a configuration: expected the file of weights beside it"
    try:
        if tarfile.is_tarfile(path):  # first: a zip at the end of a tar makes that a zip as well
            with tarfile.open(path) as file:
                names = file.getnames()
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                names = file.namelist()
        else:
            return ""
    except (OSError, tarfile.TarError, zipfile.BadZipFile, EOFError, ValueError):
        return ""
    if any(name.endswith("/data.pkl") for name in names) and not any(name.endswith("constants.pkl") for name in names):
        return ""  # torch's own, so that what could not be read in it is the matter
    return telltale(names, "an archive: unpack it first")


def in_folder(folder: Path) -> str:
    """What a folder that was given in place of a file is, and what would be right."""
    names = sorted(shown(path.name) for path in folder.iterdir())
    if "data.pkl" in names:
        return "it is a torch file that something has unpacked: fetch it anew, and keep the browser from opening it"
    return "it is " + telltale(names, "a folder: expected a file of weights")


def telltale(names: list[str], otherwise: str) -> str:
    """What names in an archive or a folder say, and which of them look like files of weights."""
    kind = next((kind for pattern, kind in TELLTALE if any(re.search(pattern, name) for name in names)), otherwise)
    files = [shown(name) for name in names if WEIGHT_FILE.search(name)]
    return f"{kind}; in it: {', '.join(files[:4])}" if files else kind
