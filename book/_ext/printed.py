"""The sizes that the paper prints, each counted anew while the page is built.

    ```{printed} 6
    ```

shows all printed sizes of Table 6 beside our counts, and which way of counting gives the printed digit. In the text,

    {counted}`macs vit_large_patch16`            a count: millions of parameters, billions of MACs, two digits
    {counted}`lean t2t_vit_7 depth=8`            with other arguments; the ways are in WAYS
    {works}`4.8 / 10.1 | .1%`                    arithmetic, as a rule with printed numbers
    {tally-printed}`parameters either`           how many of the printed sizes a way of counting gives; see tally()
    {fitting}`parameters neither`                and which ones

What the paper prints is typed once, in PRINTED. Nothing else is: tests/book/test_printed.py holds the page to it.
"""

import ast
import math
import operator
from functools import cache
from typing import NamedTuple

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective, SphinxRole

NARROW = "\N{NO-BREAK SPACE}"


class Printed(NamedTuple):
    """A row of one of the paper's tables, and how the package builds that model."""

    table: str
    model: str
    millions: str  # of parameters, as printed; empty if the table has none
    billions: str  # of MACs
    name: str
    changes: str = ""  # arguments of create_model


NARROW_16 = "depth=16 embed_dim=384 num_heads=6"
PRINTED = [
    Printed("1", "ViT-S/16", "48.6", "10.1", "vit_small_patch16"),
    Printed("1", "ViT-B/16", "86.8", "17.6", "vit_base_patch16"),
    Printed("1", "ViT-L/16", "304.3", "63.6", "vit_large_patch16"),
    Printed("1", "T2T-ViT-14", "21.5", "4.8", "t2t_vit_14"),
    Printed("1", "T2T-ViT-19", "39.2", "8.5", "t2t_vit_19"),
    Printed("1", "T2T-ViT-24", "64.1", "13.8", "t2t_vit_24"),
    Printed("1", "T2T-ViT_t-14", "21.5", "6.1", "t2t_vit_t_14"),
    Printed("1", "T2T-ViT-7", "4.2", "1.1", "t2t_vit_7"),
    Printed("1", "T2T-ViT-12", "6.8", "1.8", "t2t_vit_12"),
    Printed("2", "DeiT-small", "22.1", "4.6", "deit_small_patch16"),
    Printed("2", "ViT-B/16", "86.4", "17.6", "vit_base_patch16"),
    Printed("2", "T2T-ViT-14, 384 pixels", "21.5", "17.1", "t2t_vit_14", "img_size=384"),
    Printed("3", "T2T-ViT_t-19", "", "9.8", "t2t_vit_t_19"),
    Printed("3", "T2T-ViT_t-24", "", "15.0", "t2t_vit_t_24"),
    Printed("4", "T2T-ViT-7", "4.3", "1.1", "t2t_vit_7"),
    Printed("4", "T2T-ViT-12", "6.9", "1.8", "t2t_vit_12"),
    Printed("6", "ViT-S/16", "48.6", "10.1", "vit_small_patch16"),
    Printed("6", "ViT, deep and narrow", "24.5", "5.5", "vit_small_patch16_dn"),
    Printed("6", "ViT, shallow and wide", "47.9", "9.9", "vit_small_patch16_sw"),
    Printed("6", "ViT, dense", "46.7", "9.7", "vit_small_patch16_dense"),
    Printed("6", "ViT, SE", "49.2", "10.2", "vit_small_patch16_se"),
    Printed("6", "ViT, ResNeXt", "48.6", "10.1", "vit_small_patch16_resnext"),
    Printed("6", "ViT, ghost", "32.1", "6.9", "vit_small_patch16_ghost"),
    Printed("6", "T2T-ViT-14", "21.5", "4.8", "t2t_vit_14"),
    Printed("6", "T2T-ViT, wide", "25.1", "5.0", "t2t_vit_14_wide"),
    Printed("6", "T2T-ViT, dense", "23.7", "5.5", "t2t_vit_dense"),
    Printed("6", "T2T-ViT, SE", "21.9", "4.9", "t2t_vit_14_se"),
    Printed("6", "T2T-ViT, ResNeXt", "21.5", "4.8", "t2t_vit_14_resnext"),
    Printed("6", "T2T-ViT, ghost", "16.3", "3.7", "t2t_vit_16_ghost"),
    Printed("7", "T2T-ViT-14 without T2T", "21.1", "4.2", "vit_small_patch16", "depth=14 embed_dim=384 num_heads=6"),
    Printed("7", "T2T-ViT_c-14", "21.3", "4.6", "t2t_vit_c_14"),
    Printed("7", "T2T-ViT-14", "21.5", "4.8", "t2t_vit_14"),
    Printed("7", "T2T-ViT_t-14", "21.5", "6.1", "t2t_vit_t_14"),
    Printed("7", "T2T-ViT-d768-4", "25.0", "5.4", "t2t_vit_14_wide"),
]
# rows that leave open what is built: the choices are the package's
OPEN = {"ViT, deep and narrow", "ViT, shallow and wide", "ViT, dense", "T2T-ViT-14 without T2T"}


class Counts(NamedTuple):
    every: int  # parameters, all of them
    lean: int  # without the position table and the performer's random directions w
    macs: int  # all products
    linear: int  # linear layers and convolutions only: without the products of attention


WAYS = Counts._fields
SCALE = Counts(1e6, 1e6, 1e9, 1e9)


def arguments(changes: str) -> dict:
    """ "depth=8 img_size=384" as arguments."""
    return {key: ast.literal_eval(value) for key, value in (change.split("=") for change in changes.split())}


@cache
def built(name: str, changes: str):
    """A model without numbers."""
    import torch

    import t2t_ref

    with torch.device("meta"):
        return t2t_ref.create_model(name, **arguments(changes))


def parameters(name: str, changes: str = "") -> tuple[int, int]:
    """All of them, and those without position table and random directions."""
    import t2t_ref

    model = built(name, changes)
    aside = sum(p.numel() for key, p in model.state_dict().items() if key == "pos_embed" or key.endswith(".w"))
    every = t2t_ref.count_parameters(model)
    return every, every - aside


@cache
def counts(name: str, changes: str = "") -> Counts:
    import torch

    from t2t_ref.inspection.counting import macs_both_ways

    model = built(name, changes)
    image = torch.empty(1, 3, *model.img_size, device="meta")
    return Counts(*parameters(name, changes), *macs_both_ways(model, image))


def scaled(name: str, changes: str = "") -> Counts:
    """Millions of parameters and billions of MACs."""
    return Counts(*(number / unit for number, unit in zip(counts(name, changes), SCALE, strict=True)))


def rounded(value: float) -> str:
    return f"{value:.1f}"


def cut(value: float) -> str:
    """The digits of a value up to the first decimal: what one gets who cuts and does not round."""
    return f"{math.floor(value * 10) / 10:.1f}"


def size_by(row: Printed) -> str:
    """Which count gives the printed number of parameters."""
    every, lean = (count / 1e6 for count in parameters(row.name, row.changes))
    fits = [rounded(value) == row.millions for value in (every, lean)]
    if any(fits):
        return "both" if all(fits) else "all" if fits[0] else "without"
    cuts = [cut(value) == row.millions for value in (every, lean)]
    return "cut" if any(cuts) else "neither"


def macs_by(row: Printed) -> str:
    """Which count gives the printed number of MACs."""
    *_, macs, linear = scaled(row.name, row.changes)
    return "all" if rounded(macs) == row.billions else "linear" if rounded(linear) == row.billions else "neither"


SIZE_WORDS = {
    "both": "both counts",
    "all": "all counted",
    "without": "without table and w",
    "cut": "neither; cut, not rounded",
    "neither": "neither",
}
MACS_WORDS = {"all": "all products", "linear": "linear layers only", "neither": "neither"}


def chosen(what: str) -> list[Printed]:
    """The rows that "parameters both", "parameters either" or "macs neither" stand for; "rows" are all with a size."""
    kind, _, way = what.partition(" ")
    rows = [row for row in PRINTED if (row.millions if kind == "parameters" else row.billions)]
    by = size_by if kind == "parameters" else macs_by
    wanted = {"rows": None, "either": {"both", "all", "without"}, "off": {"cut", "neither"}}.get(way, {way})
    if kind not in ("parameters", "macs") or not (wanted is None or wanted <= {*SIZE_WORDS, *MACS_WORDS}):
        raise ValueError(f"{what!r} is not 'parameters WAY' or 'macs WAY'")
    return [row for row in rows if wanted is None or by(row) in wanted]


def table(number: str) -> list[str]:
    """The rows of one of the paper's tables, in Markdown."""
    rows = [row for row in PRINTED if row.table == number]
    if not rows:
        raise ValueError(f"no size of a Table {number} is known")
    head = ["model", "M, paper", "all", "without", "fits", "G, paper", "all", "linear", "fits"]
    lines = [head, ["---"] + 3 * ["---:"] + ["---"] + 3 * ["---:"] + ["---"]]
    for row in rows:
        every, lean, macs, linear = (f"{value:.2f}" for value in scaled(row.name, row.changes))
        size = [row.millions, every, lean, SIZE_WORDS[size_by(row)]] if row.millions else ["", every, lean, ""]
        lines.append([row.model, *size, row.billions, macs, linear, MACS_WORDS[macs_by(row)]])
    return ["| " + " | ".join(line) + " |" for line in lines]


OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
}


def worked(text: str) -> str:
    """ "4.8 / 10.1 | .1%" worked out and formatted."""

    def value(node: ast.AST) -> float:
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            return node.value
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp):
            return OPERATORS[type(node.op)](value(node.operand))
        raise ValueError(f"{text!r} is not arithmetic")

    expression, _, form = text.partition("|")
    result = value(ast.parse(expression.strip(), mode="eval").body)
    return format(result, form.strip()).replace("-", "\N{MINUS SIGN}").replace("%", f"{NARROW}%")


def count_of(text: str) -> str:
    """ "macs vit_large_patch16 depth=8" as two digits."""
    way, name, *changes = text.split()
    return f"{getattr(scaled(name, ' '.join(changes)), way):.2f}"


def tally(text: str) -> str:
    return str(len(chosen(text)))


def fitting(text: str) -> str:
    return ", ".join(f"{row.model} (Table{NARROW}{row.table})" for row in chosen(text)) or "none"


class PrintedTable(SphinxDirective):
    required_arguments = 1

    def run(self):
        try:
            lines = table(self.arguments[0])
        except ValueError as error:
            raise self.error(str(error)) from error
        box = nodes.container(classes=["printed"])
        self.state.nested_parse(StringList(lines, source="printed"), self.content_offset, box)
        return [box]


def role(function):
    class Number(SphinxRole):
        def run(self):
            try:
                text = function(self.text)
            except (ValueError, SyntaxError, AttributeError, KeyError, TypeError) as error:
                message = self.inliner.reporter.error(f"{self.name}: {error}", line=self.lineno)
                return [nodes.problematic("", self.rawtext)], [message]
            return [nodes.inline(text, text)], []

    return Number()


ROLES = {"counted": count_of, "works": worked, "tally-printed": tally, "fitting": fitting}


def setup(app):
    app.add_directive("printed", PrintedTable)
    for name, function in ROLES.items():
        app.add_role(name, role(function))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
