"""The book's colours, its plot style and the map of the model (chapter 1). Needs matplotlib.

What imports it does so inside a function, so that the package can be used without matplotlib.
"""

import html
from functools import cache

import matplotlib.pyplot as plt
import torch

from t2t_ref.create import create_model
from t2t_ref.inspection import shape_table

# Okabe and Ito's palette: one meaning, one colour, in the whole book
QUERY, KEY, VALUE, TOKEN, OTHER = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#767676"

STYLE = {
    "figure.figsize": (6.4, 3.2),
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "image.cmap": "cividis",
    "image.interpolation": "nearest",
}


def use_style() -> None:
    """The style of every plot in the book: 6.4 inches wide, 10 pt, sharp on high-resolution screens."""
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    set_matplotlib_formats("retina")
    plt.rcParams.update(STYLE)


class Svg(str):
    """SVG text that a notebook shows as a picture."""

    def _repr_svg_(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return f"<SVG, {len(self)} characters>"


# every box: the lines of its title, and the stage of the shape table whose shape stands below it
BOXES = [
    (("photograph",), "(input)"),
    (("soft split",), "tokens_to_token.soft_split0"),
    (("T2T layer",), "tokens_to_token.attention1"),
    (("re-structure",), "into tokens_to_token.soft_split1"),
    (("soft split",), "tokens_to_token.soft_split1"),
    (("T2T layer",), "tokens_to_token.attention2"),
    (("re-structure",), "into tokens_to_token.soft_split2"),
    (("soft split",), "tokens_to_token.soft_split2"),
    (("linear layer",), "tokens_to_token.project"),
    (("+ class token", "+ positions"), "into pos_drop"),
    (("14 transformer", "blocks"), "blocks.0-13"),
    (("norm, head",), "head"),
]
STAGES = {  # what can be lit, and the boxes it lights
    "image": (0,),
    "soft split": (1, 4, 7),
    "T2T layer": (2, 5),
    "re-structure": (3, 6),
    "tokens-to-token": (3, 6),  # and the panel around them
    "class token and positions": (9,),
    "blocks": (10,),
    "head": (11,),
    "model": (),
}
WIDTH, BOX_WIDTH, BOX_HEIGHT, GAP_X, LEFT = 640, 180, 92, 26, 24


@cache
def full_size_shapes() -> dict[str, tuple[int, ...]]:
    """The shape of every stage of T2T-ViT-14 at 224 x 224, from a run without data (torch's meta device)."""
    with torch.device("meta"):
        table = shape_table(create_model("t2t_vit_14"), torch.empty(1, 3, 224, 224))
    return {row.name: row.shape for row in table}


def model_map(lit: str = "model") -> Svg:
    """The map of T2T-ViT-14 that opens every chapter, with one kind of box lit.

    Raises:
        ValueError: for a stage that is not in ``STAGES``

    Source:
        paper, Fig. 4; the shapes are read off a run of the model
    """
    if lit not in STAGES:
        raise ValueError(f"unknown stage {lit!r}: known are {', '.join(STAGES)}")
    tops = [56, 182, 308, 492]  # of the four rows of boxes
    parts = [
        panel(14, 408, LEFT, "tokens-to-token module", "chapters 3 to 6", lit == "tokens-to-token"),
        panel(450, 146, LEFT + BOX_WIDTH + GAP_X, "backbone", "chapters 7 to 9", False),
    ]
    for index, box in enumerate(BOXES):
        row, column = divmod(index, 3)
        left, top = LEFT + column * (BOX_WIDTH + GAP_X), tops[row]
        parts.append(draw_box(left, top, box, index in STAGES[lit]))
        if column < 2:
            y = top + BOX_HEIGHT / 2
            parts.append(arrow(f"M {left + BOX_WIDTH + 3} {y} h {GAP_X - 8}"))
        elif row < 3:  # from the end of a row back to the start of the next
            x, y = left + BOX_WIDTH / 2, top + BOX_HEIGHT + 3
            turn = (tops[row + 1] - y) / 2 - (12 if row == 2 else 0)
            end = tops[row + 1] - y - turn - 5
            parts.append(arrow(f"M {x} {y} v {turn} H {LEFT + BOX_WIDTH / 2} v {end}"))
    return Svg(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 606" width="{WIDTH}" role="img" '
        f'font-family="Helvetica, Arial, sans-serif">\n<title>{html.escape(describe(lit))}</title>\n'
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="7" refY="5" markerWidth="6" markerHeight="6" '
        'orient="auto"><path d="M 0 0 L 10 5 L 0 10 z" fill="#333"/></marker></defs>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def describe(lit: str) -> str:
    """The map in one sentence, for those who do not see it."""
    shapes = full_size_shapes()
    steps = [f"{' '.join(title)} ({label(shapes[stage])})" for title, stage in BOXES]
    here = "" if lit == "model" else f" Lit: {lit}."
    return f"Map of T2T-ViT-14: {', then '.join(steps)}.{here}"


def label(shape: tuple[int, ...]) -> str:
    """A shape without its batch axis: 3136 x 147."""
    return " × ".join(map(str, shape[1:]))


def panel(top: int, height: int, name_x: int, name: str, chapters: str, is_lit: bool) -> str:
    """A frame around several boxes, with its name and its chapters."""
    stroke, width, fill = (TOKEN, 4, "#FFF6F0") if is_lit else ("#999", 1.5, "#FFF")
    return (
        f'<rect x="8" y="{top}" width="{WIDTH - 16}" height="{height}" rx="12" fill="{fill}" '
        f'stroke="{stroke}" stroke-width="{width}"/>'
        f'<text x="{name_x}" y="{top + 29}" font-size="21" font-weight="bold" fill="#222">{name}</text>'
        f'<text x="{WIDTH - LEFT}" y="{top + 29}" font-size="18" fill="#444" text-anchor="end">{chapters}</text>'
    )


def draw_box(left: int, top: int, box: tuple, is_lit: bool) -> str:
    """One box: its title, and the shape of what leaves it."""
    lines, stage = box
    stroke, width, fill = (TOKEN, 5, "#FBD9C6") if is_lit else ("#444", 1.5, "#F1F3F5")
    centre = left + BOX_WIDTH / 2
    first = top + (34 if len(lines) == 1 else 27)
    texts = [
        f'<text x="{centre}" y="{first + 23 * number}" font-size="22" font-weight="bold" fill="#111" '
        f'text-anchor="middle">{line}</text>'
        for number, line in enumerate(lines)
    ]
    return (
        f'<rect x="{left}" y="{top}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="8" fill="{fill}" '
        f'stroke="{stroke}" stroke-width="{width}"/>'
        + "".join(texts)
        + f'<text x="{centre}" y="{top + 76}" font-size="21" fill="#111" text-anchor="middle">'
        f"{label(full_size_shapes()[stage])}</text>"
    )


def arrow(path: str) -> str:
    """An arrow along a path of SVG."""
    return f'<path d="{path}" fill="none" stroke="#333" stroke-width="2.5" marker-end="url(#tip)"/>'
