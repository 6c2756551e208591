"""When a run does not begin, or ends before its end: refusals, NaN, and signals (chapters 11 and 17)."""

import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class CannotStart(ValueError):
    """The run cannot begin as asked; the message says what to do."""


class NotFinite(Exception):
    """The loss or a gradient is infinite or NaN; the message says where it came from."""


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


class Signals:
    """Remembers that SIGINT or SIGTERM came, so that the update at hand can be finished.

    The third one acts at once, not the second: torchrun passes on to its processes what they may have got already.
    """

    number = count = 0

    @contextmanager
    def noted(self):
        """A context in which the first two signals are written down instead of acting."""
        if threading.current_thread() is not threading.main_thread():  # Python refuses handlers elsewhere
            yield
            return

        def note(number: int, frame) -> None:
            self.number, self.count = number, self.count + 1
            if self.count == 2:
                signal.signal(number, before[number])

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def interruptible(batches: Iterable, signals: Signals) -> Iterator:
    """The same batches. If the processes that read them end because of a signal to all, so does the run, in order.

    Raises:
        Interrupted
    """
    try:
        yield from batches
    except Exception as error:
        time.sleep(1)  # the signal may reach this process last
        if not signals.number:
            raise
        raise Interrupted("the processes that read images have ended", signals.number) from error


def largest_outputs(model: nn.Module, forward) -> str:
    """Run ``forward()`` with an eye on every layer, and say in words which outputs are largest, or not finite."""
    largest: dict[str, float] = {}
    broken_outputs: list[str] = []  # in the order of the run; a layer may be used twice

    def watch(name: str, module: nn.Module):
        def note(module, inputs, output):
            if isinstance(output, Tensor):
                size = float(output.detach().abs().max())  # of values with a NaN among them: NaN
                if size < float("inf"):
                    largest[name] = max(largest.get(name, 0.0), size)
                else:
                    broken_outputs.append(name)

        return module.register_forward_hook(note)

    handles = [watch(name, module) for name, module in model.named_modules() if not list(module.children())]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    top = sorted(largest.items(), key=lambda item: -item[1])[:5]
    lines = ["largest outputs: " + (", ".join(f"{name} {size:.3g}" for name, size in top) or "none is finite")]
    if broken_outputs:
        lines.append(f"first output that is not finite: {broken_outputs[0]}")
    broken = [name for name, entry in model.state_dict().items() if not entry.isfinite().all()]
    if broken:
        lines.append(f"weights that are not finite already: {', '.join(broken[:5])}")
    return "\n".join(lines)
