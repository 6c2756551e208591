"""Files, whole or not at all, whatever their names."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path


def path_of(path: str | bytes | os.PathLike) -> Path:
    """A path as people write it; a name that is not UTF-8 keeps its bytes."""
    return Path(os.fsdecode(path))


def shown(path: str | bytes | os.PathLike) -> str:
    """A path for messages: what cannot be printed is written as an escape."""
    return os.fsencode(path).decode(errors="backslashreplace")


def write_whole(path: str | bytes | os.PathLike, write: Callable[[Path], object]) -> None:
    """Call ``write`` with the path of a draft beside ``path``, then put the draft in its place in one step.

    Whatever happens, ``path`` is what it was or the whole new file, and no draft stays. The file is on the disk when
    this returns, with the permissions of the one that was there, else with the usual ones; a link stays a link.

    Raises:
        FileNotFoundError: if the folder is not there
        OSError: if the file cannot be written
    """
    path = path_of(os.path.realpath(path))
    draft = path.with_name(f"{uuid.uuid4().hex[:12]}.partial")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {shown(path.parent)} to write {shown(path.name)} into")
    draft.touch()
    try:
        permissions = (path if path.exists() else draft).stat().st_mode
        write(draft)
        draft.chmod(permissions)
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
