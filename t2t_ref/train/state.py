"""The state of a run on disk: one file, written whole or not at all (chapters 11 and 17). The one before it is kept.

Why torch.save of one dictionary, and not accelerate's ``save_state``: that writes a folder of files, among them
pickled generators, and a folder cannot be put in the place of another in one step. One file can, by ``os.replace``;
it is read back with ``weights_only=True``; and since our draws are functions of the position (see sampling.py), there
is no generator to save.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError

from t2t_ref.train.stopping import CannotStart
from t2t_ref.weights.writing import write_whole

KEPT = 2  # the last good state, and the one before it in case the last cannot be read
CHUNK = 16 * 2**20  # bytes


@contextmanager
def disk_errors(what: str, folder: Path, way_on: str):
    """A context in which a disk that refuses or fills up is an OSError that says how to go on.

    safetensors has an error of its own for it, and torch's writer hides it behind a RuntimeError.

    Raises:
        OSError
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        number = getattr(cause, "errno", None) or (errno.ENOSPC if "No space left" in str(error) else errno.EIO)
        reason = getattr(cause, "strerror", None) or str(error).splitlines()[0]
        raise OSError(number, f"{what} failed ({reason}); {way_on}", str(folder)) from error


def states_of(folder: Path) -> list[Path]:
    """The state files in a run's folder, the newest first."""
    return sorted((folder / "state").glob("*.pt"), reverse=True)


def fsync_folder(folder: Path) -> None:
    """Make a rename in this folder survive a power cut, where the system knows how: Windows opens no folder."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save_state(folder: Path, state: dict) -> Path:
    """Write the state as state/UPDATE.pt, then drop all but the last two.

    Raises:
        OSError: if it cannot be written; the states that are there stay
    """
    path = folder / "state" / f"{state['position']['update']:09d}.pt"
    path.parent.mkdir(exist_ok=True)

    def write(draft: Path) -> None:
        with draft.open("wb") as file:  # torch hides what is wrong with the disk, a file of Python's does not
            torch.save(state, file)

    write_whole(path, write)  # the draft is no *.pt: no half-written file is ever taken for a state
    fsync_folder(path.parent)
    for old in [*states_of(folder)[KEPT:], *path.parent.glob("*.partial")]:
        old.unlink(missing_ok=True)
    return path


def load_state(folder: Path, say: Callable[[str], object]) -> tuple[Path, dict] | None:
    """The newest state that can be read, on the CPU, or None without any. Half-written ones are named and ignored.

    Raises:
        CannotStart: if there are states and none can be read
    """
    unreadable = list((folder / "state").glob("*.partial"))
    found = states_of(folder)
    for path in found:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if {"position", "recipe", "state_dict"} <= set(state):
                for partial in unreadable:
                    say(f"ignoring {partial}: writing it was cut off")
                return path, state
            raise ValueError("it is not a state of this program")
        except Exception as error:  # whatever a damaged file makes torch.load raise
            say(f"ignoring {path}: {(str(error) or type(error).__name__).splitlines()[0]}")
    if found:
        raise CannotStart(f"no state in {folder / 'state'} can be read: move {folder} away, or choose another --output")
    for partial in unreadable:
        say(f"ignoring {partial}: writing it was cut off")
    return None


def inventory(data, spec: str) -> dict:
    """What is kept of the training images, to know them again where they have moved to.

    Args:
        spec: the recipe's ``data``, which says below which folder the names of files are compared
    """
    rows, (kind, _, place) = getattr(data.train, "rows", None), spec.partition(":")
    found = {"kind": kind.replace("_", "-"), "classes": list(getattr(data, "class_names", range(data.num_classes)))}
    if hasattr(data.train, "__len__"):
        found["images"] = len(data.train)
    if "path" in (getattr(rows, "column_names", None) or ()):
        root = os.path.join(Path(place).expanduser(), "")
        names = [os.fsdecode(path).removeprefix(root).replace(os.sep, "/") for path in rows["path"]]
        counts = torch.bincount(torch.tensor(list(rows["label"])), minlength=len(data.class_names))
        digest = hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()
        found |= {"counts": counts.tolist(), "names": digest}
    return found


def difference(before: dict, now: dict) -> str:
    """In what two inventories differ, in words; empty if in nothing."""
    if before["kind"] != now["kind"]:
        return f"the kind was {before['kind']}, is {now['kind']}"
    if before["classes"] != now["classes"]:
        lost, new = set(before["classes"]) - set(now["classes"]), set(now["classes"]) - set(before["classes"])
        return f"classes that are gone: {', '.join(sorted(lost)[:5])}; that are new: {', '.join(sorted(new)[:5])}"
    for name, a, b in zip(now["classes"], before.get("counts", ()), now.get("counts", ()), strict=False):
        if a != b:
            return f"class {name} had {a} images, has {b}"
    if before.get("images") != now.get("images"):
        return f"there were {before.get('images')} images, there are {now.get('images')}"
    return "" if before.get("names") == now.get("names") else "the names of the files differ"


def check_room(folder: Path, size: int) -> None:
    """Make the folder, and try what saving will do: write ``size`` bytes, with room for all states that are kept.

    Raises:
        CannotStart: with the size that is needed
    """
    needed = (KEPT + 1) * size  # those that are kept, and the one being written
    trial = folder / "state" / "trial.partial"
    try:
        trial.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free + sum(path.stat().st_size for path in states_of(folder))
        if free < needed:
            raise CannotStart(
                f"{folder} needs {in_mib(needed)} for the states of this run, and has {in_mib(free)} free"
            )
        with open(trial, "wb") as file:
            for start in range(0, size, CHUNK):
                file.write(bytes(min(CHUNK, size - start)))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CannotStart(
            f"cannot write a state of {in_mib(size)} into {folder}: {error.strerror or error}. "
            "Choose a folder with --output that can be written and has room"
        ) from error
    finally:
        try:
            trial.unlink(missing_ok=True)
        except OSError:  # its folder is no folder: said above
            pass


def in_mib(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 2**20:,.1f} MiB"
