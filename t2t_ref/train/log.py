"""What a run writes down as it goes: lines of JSON (chapter 11)."""

import json
import logging
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

NAME = "log.jsonl"
LOGGER = logging.getLogger("t2t_ref")  # what the package has to say, such as images that cannot be read


class Log:
    """Lines of JSON, in memory and, once a folder is opened, in log.jsonl.

    Each line has a ``kind``: "run" and "resume" say what is run on what; "step" is the mean since the step before;
    "epoch" has the numbers of the test set; "warning" repeats one; "end" closes a run, or says why it stopped.
    """

    def __init__(self):
        self.lines: list[dict] = []
        self.file = None

    def open(self, folder: Path, size: int = 0) -> None:
        """Write into a folder from now on, behind what an earlier run has written there.

        Args:
            size: so many bytes of it stay, those that its saved state has seen: what came later will come again
        """
        path = folder / NAME
        if path.exists():
            os.truncate(path, min(size, path.stat().st_size))
            self.lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        self.file = open(path, "a", encoding="utf-8", newline="\n")

    def write(self, kind: str, **values) -> None:
        """Add a line."""
        line = {"kind": kind} | values
        self.lines.append(line)
        if self.file:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def sync(self) -> int:
        """See that the lines are on the disk, before a state is saved that counts on them. Returns their bytes."""
        os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size

    def close(self) -> None:
        """Close the file. The lines stay in memory."""
        file, self.file = self.file, None
        if file:
            try:
                file.close()
            except OSError:  # a full disk, and it has been said
                pass


class WarningsToLog(logging.Handler):
    """Writes the package's warnings into the log, and shows them."""

    def __init__(self, log: Log, say: Callable[[str], object]):
        super().__init__(logging.WARNING)
        self.log, self.say = log, say

    def emit(self, record: logging.LogRecord) -> None:
        """Called by Python's logging for each warning."""
        try:
            self.log.write("warning", message=record.getMessage())
        except OSError:  # the next line of the run itself will say so
            pass
        self.say(record.getMessage())


@contextmanager
def logging_to(log: Log, say: Callable[[str], object]):
    """A context in which the package's warnings go into ``log``. At its end the log is closed."""
    handler = WarningsToLog(log, say)
    LOGGER.addHandler(handler)
    try:
        yield log
    finally:
        LOGGER.removeHandler(handler)
        log.close()


def printable(text: str) -> str:
    """Text with escapes for letters that standard output does not know: names of files may be in any encoding."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def escape_unknown_letters() -> None:
    """The same for all that a command prints."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(errors="backslashreplace")
