"""Batches that other processes read, and what those processes have to say (chapter 17).

A process that was forked has the loggers of its parent, one that was spawned has none (macOS, Windows, and Linux from
Python 3.14 on). So no process that reads writes a log: its warnings travel with the next batch, and are logged here.
"""

import logging
import signal
from collections.abc import Iterator

from torch import Tensor
from torch.utils.data import DataLoader, default_collate

LOGGER = logging.getLogger("t2t_ref")


class Kept(logging.Handler):
    """Keeps warnings until they are taken along."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Called by Python's logging for each warning."""
        record.msg, record.args, record.exc_info = record.getMessage(), None, None  # plain values, to be pickled
        self.records.append(record)

    def taken(self) -> list[logging.LogRecord]:
        """The warnings since the last time."""
        records, self.records = self.records, []
        return records


KEPT = Kept()


def keep_warnings(worker: int) -> None:
    """What a process that reads does first: its warnings go nowhere but into ``KEPT``.

    Ctrl-C, which it gets too, is for the process that trains: that may want one more batch, to end in order.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    LOGGER.handlers, LOGGER.propagate = [KEPT], False


def collate(items: list) -> tuple[list[Tensor], list[logging.LogRecord]]:
    """A batch, and the warnings that came up while it was read."""
    return default_collate(items), KEPT.taken()


def read_batches(data, workers: int = 0, **options) -> Iterator[list[Tensor]]:
    """What a DataLoader of ``data`` yields. Warnings of the processes that read are logged here, each once.

    Note:
        what ``data`` raises is raised here, too

    Raises:
        OSError: of another process in one line, as in this one, without its traceback
    """
    start = keep_warnings if workers else None
    said = set()  # two processes may find the same file at the same time
    batches = DataLoader(data, num_workers=workers, collate_fn=collate, worker_init_fn=start, **options)
    try:
        for batch, records in batches:
            for record in records:
                if record.getMessage() not in said:
                    said.add(record.getMessage())
                    logging.getLogger(record.name).handle(record)
            yield batch
    except OSError as error:
        kind, _, text = str(error).strip().splitlines()[-1].partition(": ")
        if "DataLoader worker" not in str(error) or kind != type(error).__name__:
            raise
        raise OSError(text) from error
