"""Write the diagrams of the pages (make figures). Chapters draw their own, in a cell."""

from pathlib import Path

from t2t_ref.book.figures import TOKEN, model_map

HERE = Path(__file__).parent
# the sign of the book: the first two windows of a soft split, and the strip of pixels that both of them hold
SIDE, STEP = 42, 24  # of a window and of the step, in 7 : 4 as in the paper


def sign(ink: str, stroke: int = 5) -> str:
    left, top = 4, 11
    windows = "".join(
        f'<rect x="{left + STEP * number}" y="{top}" width="{SIDE}" height="{SIDE}" rx="3" fill="none" '
        f'stroke="{colour}" stroke-width="{stroke}"/>'
        for number, colour in enumerate((ink, TOKEN))
    )
    shared = (
        f'<rect x="{left + STEP}" y="{top}" width="{SIDE - STEP}" height="{SIDE}" fill="{TOKEN}" fill-opacity="0.45"/>'
    )
    return shared + windows


def logo(ink: str, quiet: str) -> str:
    """The sign and the name of the book, for a page whose text has the colour ``ink``."""
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 250 64" width="250" height="64" role="img" '
        'font-family="Helvetica, Arial, sans-serif">\n<title>T2T-ViT, piece by piece</title>\n'
        f"{sign(ink)}\n"
        f'<text x="84" y="34" font-size="30" font-weight="bold" fill="{ink}">T2T-ViT</text>\n'
        f'<text x="85" y="55" font-size="17" fill="{quiet}">piece by piece</text>\n</svg>\n'
    )


def favicon() -> str:
    """The sign alone, readable on a light and on a dark tab."""
    opened = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 74 64">'
    return f"{opened}\n<title>T2T-ViT</title>\n{sign('#767676', stroke=8)}\n</svg>\n"


PICTURES = {
    "model-map.svg": model_map(),
    "logo-light.svg": logo(ink="#222", quiet="#555"),
    "logo-dark.svg": logo(ink="#eee", quiet="#bbb"),
    "favicon.svg": favicon(),
}

if __name__ == "__main__":
    for name, text in PICTURES.items():
        (HERE / name).write_text(text, encoding="utf-8", newline="\n")
