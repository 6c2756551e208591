"""What a run writes down as it goes: lines of JSON, and a picture of the curve."""

import json
import os
from pathlib import Path

NAME = "log.jsonl"


class Log:
    """Lines of JSON, kept in memory and, with a folder, in log.jsonl.

    Each line has a ``kind``: "run" and "resume" say what is run on what; "step" is the mean since the line before;
    "epoch" has the numbers of the test set; "end" closes a run, or says why it stopped.
    """

    def __init__(self, folder: Path | None = None, keep: int = 0):
        """``keep`` lines of an earlier run stay: those that its saved state has seen. Later ones will come again."""
        self.lines: list[dict] = []
        self.file = None
        if folder is None:
            return
        path = folder / NAME
        kept = path.read_bytes().splitlines(keepends=True)[:keep] if keep and path.exists() else []
        self.lines = [json.loads(line) for line in kept]
        partial = path.with_suffix(".partial")
        partial.write_bytes(b"".join(kept))
        os.replace(partial, path)
        self.file = open(path, "a", encoding="utf-8")

    def write(self, kind: str, **values) -> dict:
        """Add a line, and return it."""
        line = {"kind": kind} | values
        self.lines.append(line)
        if self.file:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        return line

    def sync(self) -> None:
        """See that the lines are on the disk, before a state is saved that counts on them."""
        if self.file:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        if self.file:
            self.file.close()
            self.file = None

    def of_kind(self, kind: str) -> list[dict]:
        return [line for line in self.lines if line["kind"] == kind]


def draw_curve(lines: list[dict], path: str | os.PathLike | None = None):
    """Loss and accuracy against epochs, as a figure in the style of the book, and as a file if there is a path."""
    import matplotlib
    from matplotlib.figure import Figure

    from t2t_ref import figures

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
