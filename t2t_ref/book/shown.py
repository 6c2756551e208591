"""What a chapter shows as a table: rows of plain values, and two sources side by side (chapter 10)."""

import ast
import difflib
import html
import inspect
import textwrap
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest

from t2t_ref.inspection import Table

STYLE = """
.t2t-diff {container-type: inline-size; background: #fff; color: #1b1f24; color-scheme: light;
  border: 1px solid #767676; border-radius: 6px; overflow: hidden;
  font: 13px/1.5 ui-monospace, Menlo, Consolas, 'Liberation Mono', monospace}
.t2t-diff .rows {display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr)}
.t2t-diff .rows > div {padding: 0 8px 0 calc(8px + var(--hang)); text-indent: calc(0px - var(--hang));
  white-space: pre-wrap; overflow-wrap: anywhere}
.t2t-diff .rows > .right {border-left: 1px solid #767676}
.t2t-diff .rows > .head {font-weight: bold; background: #e9ecef; border-bottom: 1px solid #767676}
.t2t-diff .rows > .only.left {background: #ffe1d6; color: #702000}
.t2t-diff .rows > .only.right {background: #d5efe5; color: #004532}
.t2t-diff .rows > .none {background: #eef0f2}
@container (max-width: 560px) {
  .t2t-diff .rows {grid-template-columns: minmax(0, 1fr)}
  .t2t-diff .rows > div {order: var(--line)}
  .t2t-diff .rows > .right {border-left: 0}
  .t2t-diff .rows > .right.same, .t2t-diff .rows > .none {display: none}
}
"""


class PlainTable(Table):
    """Rows of plain values. Prints as text; shows as an HTML table in a notebook, numbers at the right."""

    def __init__(self, headings: Sequence[str], rows: Iterable[Sequence], digits: int):
        super().__init__(tuple(self.text(value, digits) for value in row) for row in rows)
        columns = [(name, *texts) for name, *texts in zip(headings, *self, strict=True)]
        numbers = [all(map(is_number, texts)) for _, *texts in columns]
        self.widths = [max(map(len, c)) if right else 0 for c, right in zip(columns, numbers, strict=True)]
        self.HEADINGS = self.texts(headings)
        self.NUMBERS = tuple(name for name, right in zip(self.HEADINGS, numbers, strict=True) if right)

    @staticmethod
    def text(value: object, digits: int) -> str:
        """A value for people: whole numbers with commas, floats with so many digits behind the point."""
        if isinstance(value, float):
            return f"{value:,.{digits}f}"
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)

    def texts(self, row: Sequence[str]) -> tuple[str, ...]:
        """The texts of a row, one for each heading; those of numbers as wide as their column."""
        return tuple(text.rjust(width) for text, width in zip(row, self.widths, strict=True))

    def html_of(self, row: tuple[str, ...], heading: str, text: str) -> str:
        """What a cell shows in a notebook: there the column has its own width."""
        return super().html_of(row, heading, text.strip())


def is_number(text: str) -> bool:
    """Whether a text is a number, or nothing at all; per cent and the like count."""
    return not text or text.strip(" +-−%,.").replace(",", "").replace(".", "").isdecimal()


def table(headings: str, rows: Iterable[Sequence], *, digits: int = 2) -> PlainTable:
    """A table of plain values, for the last line of a cell.

    Args:
        headings: the names of the columns, with ``|`` between them
        rows: as many values each
        digits: behind the point, for floats

    Raises:
        ValueError: for a row that is longer or shorter than the headings
    """
    return PlainTable([heading.strip() for heading in headings.split("|")], rows, digits)


# ---- two sources


def source_lines(function: Callable) -> list[str]:
    """The source of a function, without its docstring, moved to the left margin."""
    lines = textwrap.dedent(inspect.getsource(function)).splitlines()
    first = ast.parse("\n".join(lines)).body[0].body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        del lines[first.lineno - 1 : first.end_lineno]
    return [line for line in lines if line.strip()]


class SideBySide:
    """Two lists of lines, with what they share in the same row. Shows as HTML, prints as a diff.

    Note:
        ``removed`` are the lines that only the left one has, ``added`` those of the right one
    """

    def __init__(self, left: list[str], right: list[str], left_name: str, right_name: str):
        self.names = (left_name, right_name)
        matcher = difflib.SequenceMatcher(None, left, right, autojunk=False)
        self.parts = [(what == "equal", left[a:b], right[c:d]) for what, a, b, c, d in matcher.get_opcodes()]
        self.removed = [line for same, old, _ in self.parts for line in old if not same]
        self.added = [line for same, _, new in self.parts for line in new if not same]

    def __repr__(self) -> str:
        lines = [f"- {self.names[0]}", f"+ {self.names[1]}"]
        for same, old, new in self.parts:
            lines += ["  " + line for line in old] if same else ["- " + a for a in old] + ["+ " + b for b in new]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        cells = [self.cell("left head", "-", self.names[0], 0), self.cell("right head", "+", self.names[1], 0)]
        number = 1  # of the line, if there is one column only
        for same, old, new in self.parts:
            for row, (a, b) in enumerate(zip_longest(old, new)):
                kind = ["none" if line is None else "same" if same else "only" for line in (a, b)]
                marks = "  " if same else "-+"
                cells.append(self.cell(f"left {kind[0]}", marks[0], a, number + row))
                cells.append(self.cell(f"right {kind[1]}", marks[1], b, number + row + (0 if same else len(old))))
            number += len(old) + len(new)
        rows = "\n".join(cells)
        return f'<style>{STYLE}</style>\n<div class="t2t-diff"><div class="rows">\n{rows}\n</div></div>'

    @staticmethod
    def cell(kind: str, mark: str, line: str | None, number: int) -> str:
        """One half of a row. A long line wraps, and hangs four characters deeper than it begins."""
        indent = len(line) - len(line.lstrip()) if line else 0
        text = "" if line is None else f"{mark} {html.escape(line)}"
        return f'<div class="{kind}" style="--hang: {indent + 6}ch; --line: {number}">{text}</div>'


def side_by_side(left: Callable, right: Callable) -> SideBySide:
    """The sources of two functions, without their docstrings, as a :class:`SideBySide`."""
    return SideBySide(source_lines(left), source_lines(right), left.__qualname__, right.__qualname__)
