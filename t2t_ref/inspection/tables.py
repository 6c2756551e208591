"""The shape at every stage of a model, written down while it runs (chapter 1)."""

import html
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace

from torch import Tensor, nn

from t2t_ref.inspection.counting import count_parameters, numbers_of
from t2t_ref.inspection.taps import eval_without_gradients
from t2t_ref.models.backbone import DropPath

DEFAULT_AXES = {1: "d", 2: "b d", 3: "b n d", 4: "b c h w"}  # for modules without annotations, by number of axes
LISTS = (nn.ModuleList, nn.ModuleDict)  # never run themselves
QUIET = (nn.Identity, nn.Dropout, DropPath)  # change no shape: only what reaches them is of interest


class Table(list):
    """Rows that print as text and show as an HTML table in a notebook. A subclass says what a row shows: ``texts``."""

    HEADINGS: tuple[str, ...]
    CODE: tuple[str, ...] = ()  # headings of columns in the typeface of code
    NUMBERS: tuple[str, ...] = ()  # and of columns that stand at the right

    def texts(self, row) -> tuple[str, ...]:
        """The texts of a row, one for each heading."""
        raise NotImplementedError

    def html_of(self, row, heading: str, text: str) -> str:
        """What a cell shows in a notebook, where ``text`` is fit for HTML already."""
        return f"<code>{text}</code>" if heading in self.CODE else text

    def __str__(self) -> str:
        cells = [self.HEADINGS, *map(self.texts, self)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = []
        for *texts, last in cells:
            texts = [text.ljust(width) for text, width in zip(texts, widths[:-1], strict=True)]
            lines.append("  ".join([*texts, last.rjust(widths[-1])]).rstrip())
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(heading)}</th>" for heading in self.HEADINGS)
        lines = ["<table>", f"<thead><tr>{head}</tr></thead>", "<tbody>"]
        for row in self:
            line = ""
            for heading, text in zip(self.HEADINGS, self.texts(row), strict=True):
                right = ' style="text-align: right"' if heading in self.NUMBERS else ""
                line += f"<td{right}>{self.html_of(row, heading, html.escape(text))}</td>"
            lines.append(f"<tr>{line}</tr>")
        return "\n".join([*lines, "</tbody>", "</table>"])


@dataclass(frozen=True)
class ShapeRow:
    """One stage of a run: where, what, the names of its axes, their lengths, the parameters it holds."""

    name: str
    kind: str
    axes: str
    shape: tuple[int, ...]
    parameters: int


class ShapeTable(Table):
    """The rows of :func:`shape_table`. Prints as text; shows as an HTML table in a notebook."""

    HEADINGS = ("stage", "what", "axes", "shape", "parameters")
    CODE = ("stage", "axes")
    NUMBERS = ("shape", "parameters")

    def texts(self, row: ShapeRow) -> tuple[str, ...]:
        """The texts of a row, one for each heading."""
        held = f"{row.parameters:,}" if row.parameters else ""
        return row.name, row.kind, row.axes, " x ".join(map(str, row.shape)), held

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the stage called ``name``.

        Raises:
            KeyError: with the names there are, if there is none
        """
        for row in self:
            if row.name == name:
                return row.shape
        raise KeyError(f"no stage {name!r}; there are {', '.join(row.name for row in self)}")


def tensors_of(value: object, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in lists, tuples and dicts, with its place: ``""`` for a tensor alone, ``"[0]"``, ``"[1][x]"``."""
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from tensors_of(part, f"{place}[{key}]")
    elif isinstance(value, (list, tuple)):
        for number, part in enumerate(value):
            yield from tensors_of(part, f"{place}[{number}]")


def alone(tensors: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """The same as a list; where there is but one tensor, its place needs no words."""
    tensors = list(tensors)
    return tensors if len(tensors) > 1 else [("", tensor) for _, tensor in tensors]


def default_axes(tensor: Tensor) -> str:
    """Axis letters by the number of axes."""
    return DEFAULT_AXES.get(tensor.ndim, "...")


def axes_of(module: nn.Module, number: int, tensor: Tensor) -> str:
    """The axis letters of a module's output, from the annotation of its forward; else by the number of axes.

    Args:
        number: which of several outputs it is
    """
    annotated = None
    with suppress(NameError):  # somebody else's module, with names that are there for type checkers alone
        annotated = typing.get_type_hints(type(module).forward).get("return")
    several = typing.get_args(annotated)
    letters = getattr(several[number] if number < len(several) else annotated, "dim_str", "")
    return letters if len(letters.split()) == tensor.ndim else default_axes(tensor)


def shape_table(model: nn.Module, image: Tensor | tuple, *, depth: int = 2) -> ShapeTable:
    """Run ``model`` on ``image`` once and list the shape at every stage.

    A stage is a module at most ``depth`` names deep, such as ``tokens_to_token.attention1``. What happens between
    two modules is seen at the door of the next: if its input has another shape than the output before it, it gets a
    row of its own, ``into NAME``, and a note, if the module around it has one in its ``door_notes``. Equal neighbours
    in a list are folded: ``blocks.0-13``. Of several inputs or outputs each has a row: ``blocks.0[1]``.

    Shapes:
        image: whatever ``model`` takes; images b c h w, tokens b n d; a tuple for more than one input
        return: a list of :class:`ShapeRow` that prints as a table

    Units:
        parameters counts the numbers a stage owns, frozen ones included

    Note:
        what a model holds outside its stages (class token, position table) stands in the last row
    """
    inputs = image if isinstance(image, tuple) else (image,)
    rows: list[ShapeRow] = []
    latest: list[tuple[int, ...]] = []  # the shapes that the stage before has left
    stages = {name: module for name, module in model.named_modules() if name and is_stage(model, name, depth)}

    def write(name: str, kind: str, tensors: list[tuple[str, Tensor]], axes: Callable, parameters: int = 0) -> None:
        latest[:] = [tuple(tensor.shape) for _, tensor in tensors]
        for number, (place, tensor) in enumerate(tensors):
            held = parameters if number == 0 else 0
            rows.append(ShapeRow(name + place, kind, axes(number, tensor), tuple(tensor.shape), held))

    def watch_input(name: str) -> Callable:
        around, _, own = name.rpartition(".")
        note = getattr(model.get_submodule(around), "door_notes", {}).get(own, "")

        def hook(module, arguments, named):
            tensors = alone([*tensors_of(arguments), *tensors_of(named)])
            fresh = [(place, tensor) for place, tensor in tensors if tuple(tensor.shape) not in latest]
            if fresh:
                write(f"into {name}", note, fresh, lambda number, tensor: default_axes(tensor))

        return hook

    def watch_output(name: str) -> Callable:
        def hook(module, inputs, output):
            if not isinstance(module, QUIET):
                axes = lambda number, tensor: axes_of(module, number, tensor)  # noqa: E731
                write(name, type(module).__name__, alone(tensors_of(output)), axes, count_parameters(module))

        return hook

    write("(input)", "", alone(tensors_of(inputs)), lambda number, tensor: default_axes(tensor))
    with ExitStack() as hooks, eval_without_gradients(model):
        for name, module in stages.items():
            hooks.callback(module.register_forward_pre_hook(watch_input(name), with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(watch_output(name)).remove)
        output = model(*inputs)

    tensors = alone(tensors_of(output))
    # the model's own annotation knows better than those of its last layers, and all heads give what the model gives
    if stages and [tuple(tensor.shape) for _, tensor in tensors] == latest:
        for number, (_, tensor) in enumerate(tensors):
            row = number - len(tensors)
            rows[row] = replace(rows[row], axes=axes_of(model, number, tensor))
        heads, last = getattr(model, "head_names", ()), rows[-1]
        rows[:] = [
            replace(row, axes=last.axes) if (row.name in heads and row.shape == last.shape) else row for row in rows
        ]
    else:
        write("(output)", type(model).__name__, tensors, lambda number, tensor: axes_of(model, number, tensor))
    in_stages = {id(entry) for module in stages.values() for entry in numbers_of(module).values()}
    rest = {name: entry for name, entry in numbers_of(model).items() if id(entry) not in in_stages}
    if rest:
        held = sum(entry.numel() for entry in rest.values())
        rows.append(ShapeRow(", ".join(rest), "held outside the stages", "", (), held))
    return ShapeTable(fold_equal_neighbours(rows))


def is_stage(model: nn.Module, name: str, depth: int) -> bool:
    """Whether a module gets a row: as deep as asked, or shallower and without children; of a list, what is in it."""
    module, parts = model.get_submodule(name), name.split(".")
    between = [model.get_submodule(".".join(parts[:number])) for number in range(depth, len(parts))]
    if isinstance(module, LISTS) or not all(isinstance(outer, LISTS) for outer in between):
        return False
    return len(parts) >= depth or not list(module.children())


def fold_equal_neighbours(rows: list[ShapeRow]) -> list[ShapeRow]:
    """blocks.0, blocks.1, ... of one shape become one row, blocks.0-13, with the sum of their parameters."""
    folded: list[ShapeRow] = []
    runs: dict[tuple[str, str], tuple[int, str]] = {}  # ("blocks.", place): index of its row, number of the first block
    for row in rows:
        stem, number, place = re.fullmatch(r"(.*\.|)(\d+)(\[.*|)|.*", row.name, re.DOTALL).groups(default="")
        index, first = runs.get((stem, place), (None, number))
        if index is not None and number:
            before = folded[index]
            if (before.kind, before.axes, before.shape) == (row.kind, row.axes, row.shape):
                held = before.parameters + row.parameters
                folded[index] = replace(before, name=f"{stem}{first}-{number}{place}", parameters=held)
                continue
        if index is not None or stem not in {stem for stem, _ in runs}:
            runs.clear()  # another shape, or another list: what comes now is compared with this row
        if number:
            runs[stem, place] = (len(folded), number)
        folded.append(row)
    return folded
