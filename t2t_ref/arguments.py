"""Arguments as people write them: one number for two, names that are nearly right, the words of a command line."""

import argparse
import difflib
from collections.abc import Iterable


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """An image size as (height, width); an int means a square.

    Raises:
        ValueError: unless both are at least 1
    """
    h, w = (size, size) if isinstance(size, int) else size
    if min(h, w) < 1:
        raise ValueError(f"an image size of {h}x{w} pixels is empty")
    return h, w


def check_known(kind: str, name: str, known: Iterable[str], error: type[Exception] = ValueError) -> None:
    """Refuse a name that is not known.

    Raises:
        ValueError: with the nearest known names; another error if ``error`` says so
    """
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(str(name).lower(), known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise error(f"unknown {kind} {name!r}: {hint}known are {', '.join(known)}")


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are raised, so that a command can print them in one line as it does all others."""

    def error(self, message: str):
        """Called by argparse for what it cannot parse.

        Raises:
            ValueError
        """
        raise ValueError(message)
