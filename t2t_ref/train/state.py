"""The state of a run on disk: one file, written whole or not at all (chapters 11 and 17). The one before it is kept.

Why torch.save of one dictionary, and not accelerate's ``save_state``: that writes a folder of files, among them
pickled generators, and a folder cannot be put in the place of another in one step. One file can, by ``os.replace``;
it is read back with ``weights_only=True``; and since our draws are functions of the position (see sampling.py), there
is no generator to save.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

KEPT = 2  # the last good state, and the one before it in case the last cannot be read
CHUNK = 16 * 2**20  # bytes


class CannotStart(ValueError):
    """The run cannot begin as asked; the message says what to do."""


def states_of(folder: Path) -> list[Path]:
    """The state files in a run's folder, the newest first."""
    return sorted((folder / "state").glob("*.pt"), reverse=True)


def fsync_folder(folder: Path) -> None:
    """Make a rename in this folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_state(folder: Path, state: dict) -> Path:
    """Write the state as state/UPDATE.pt, then drop all but the last two.

    Raises:  OSError if it cannot be written; the states that are there stay
    """
    path = folder / "state" / f"{state['position']['update']:09d}.pt"
    partial = path.with_suffix(".partial")  # not *.pt: no half-written file is ever taken for a state
    path.parent.mkdir(exist_ok=True)
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)
    for old in states_of(folder)[KEPT:]:
        old.unlink()
    return path


def load_state(folder: Path, say: Callable[[str], object]) -> tuple[Path, dict] | None:
    """The newest state that can be read, on the CPU, or None without any. Half-written ones are named and ignored.

    Raises:  CannotStart if there are states and none can be read
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


def check_room(folder: Path, size: int) -> None:
    """Make the folder, and try what saving will do: write ``size`` bytes, with room for all states that are kept.

    Raises:  CannotStart, with the size that is needed
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
