"""What a run writes down as it goes: lines of JSON, and a picture of the curve (chapter 11)."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

NAME = "log.jsonl"
LOGGER = logging.getLogger("t2t_ref")  # what the package has to say, such as images that cannot be read


class Log:
    """Lines of JSON, in memory and, with a folder, in log.jsonl.

    Each line has a ``kind``: "run" and "resume" say what is run on what; "step" is the mean since the step before;
    "epoch" has the numbers of the test set; "warning" repeats one; "end" closes a run, or says why it stopped.

    Units:   ``size`` bytes of an earlier run's log stay, those that its saved state has seen: what came later will
             come again
    """

    def __init__(self, folder: Path | None = None, size: int = 0):
        self.lines: list[dict] = []
        self.file = None
        if folder is None:
            return
        path = folder / NAME
        if path.exists():
            os.truncate(path, min(size, path.stat().st_size))
            self.lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        self.file = open(path, "a", encoding="utf-8")

    def write(self, kind: str, **values) -> None:
        """Add a line."""
        line = {"kind": kind} | values
        self.lines.append(line)
        if self.file:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()  # one write to a file open for appending: processes that read images may add lines too

    def sync(self) -> int:
        """See that the lines are on the disk, before a state is saved that counts on them. Returns their bytes."""
        os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size

    def close(self) -> None:
        """Close the file. The lines stay in memory."""
        if self.file:
            self.file.close()
            self.file = None


class WarningsToLog(logging.Handler):
    """Writes the package's warnings into the log, and shows them."""

    def __init__(self, log: Log, say: Callable[[str], object]):
        super().__init__(logging.WARNING)
        self.log, self.say = log, say

    def emit(self, record: logging.LogRecord) -> None:
        """Called by Python's logging for each warning."""
        self.log.write("warning", message=record.getMessage())
        self.say(record.getMessage())


def draw_curve(lines: list[dict], path: str | os.PathLike | None = None):
    """Loss and accuracy against epochs, as a figure in the style of the book, and as a file if there is a path."""
    import matplotlib
    from matplotlib.figure import Figure

    from t2t_ref.book import figures

    steps = [line for line in lines if line["kind"] == "step"]
    epochs = [line for line in lines if line["kind"] == "epoch" and "test_loss" in line]
    with matplotlib.rc_context(figures.STYLE):  # not pyplot: a run leaves no open figure behind
        figure = Figure()
        left, right = figure.subplots(1, 2)
        left.plot([s["epoch"] for s in steps], [s["loss"] for s in steps], color=figures.OTHER, label="training")
        left.plot(
            [e["epoch"] for e in epochs],
            [e["test_loss"] for e in epochs],
            color=figures.TOKEN,
            marker=".",
            label="test",
        )
        left.set(xlabel="epochs", ylabel="loss (nats)")
        left.legend(frameon=False)
        right.plot(
            [e["epoch"] for e in epochs], [100 * e["test_accuracy"] for e in epochs], color=figures.TOKEN, marker="."
        )
        right.set(xlabel="epochs", ylabel="test accuracy (%)")
        if path is not None:
            figure.savefig(path, dpi=200, format="png")
    return figure
