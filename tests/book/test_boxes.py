"""Boxes of the chapters are collected whole, and the corrections to the source article each have a cell behind them."""

import re
from functools import cache
from pathlib import Path

import collect
import pytest
import torch
from myst_parser.mdit_to_docutils.base import default_slugify
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace

import t2t_ref

ROOT = Path(__file__).resolve().parents[2]

PAPER = (ROOT / "book" / "paper-and-code.md").read_text(encoding="utf-8")
CORRECTIONS = (ROOT / "book" / "corrections.md").read_text(encoding="utf-8")
LEFT_OUT = "01-the-whole-model#what-this-book-answers"  # there a box says what boxes are
LINK = re.compile(r"\]\(\.\./notebooks/([\w-]+)\.ipynb#([^)]+)\)")
PRINTED = re.compile(r"\]\(printed-numbers\.md#table-\d\)")  # there a table is counted: test_printed.py
ENTRY = re.compile(r"^\((article-[\w-]+)\)=\n### [^\n]+\n(.*?)(?=^\(article-|^## |\Z)", re.M | re.S)
POINTS = "motivation pictures two-changes windows shortcut single-attn deep-narrow series"
WRONG = "unfold rounding padding fixed-tokens drop-path single-head"
OPEN = "order estimate directions epsilon temperature repeat aspect layout"
WANTED = [f"article-{name}" for name in f"{POINTS} {WRONG} {OPEN}".split()]


@cache
def sections(chapter: str) -> dict[str, bool]:
    """The sections of a chapter by their anchors, and whether readers see a code cell in them."""
    found, path = {}, []
    for block in collect.parse((ROOT / "book" / f"{chapter}.md").read_text(encoding="utf-8")):
        if block.type == "heading":
            level, text = int(block.tag[1]), block.children[0].content
            path = [*(p for p in path if p[0] < level), (level, default_slugify(text))]
            found[path[-1][1]] = False
        elif block.type == "fence" and block.info.startswith("{code-cell}"):
            if not re.match(r":tags: .*(remove-cell|hide-cell)", block.content):
                found |= {slug: True for level, slug in path if level > 1}
    return found


@cache
def boxes_of_the_book(kind: str, *without: str) -> list[collect.Box]:
    return collect.boxes(ROOT, kind, without)


def squeezed(text: str) -> str:
    return " ".join(text.split())


# ---- paper and code


def written(kind: str) -> list[tuple[str, str]]:
    """(chapter, text) of all boxes of one kind, found line by line and not as the collector finds them."""
    found, inside = [], False
    for source in sorted((ROOT / "book").glob("[0-9][0-9]-*.md")):
        for line in source.read_text(encoding="utf-8").splitlines():
            if line.startswith(f"> **{kind}"):
                found.append((source.stem, ""))
                inside = True
                line = "> " + line.partition(".** ")[2]
            inside = inside and line.startswith(">")
            if inside:
                found[-1] = (source.stem, f"{found[-1][1]} {line[1:]}")
    return [(chapter, squeezed(text)) for chapter, text in found]


@pytest.mark.parametrize("kind", ["Paper", "Article", "Pitfall"])
def test_every_box_is_collected_in_the_order_of_the_chapters(kind):
    boxes = boxes_of_the_book(kind)
    assert [(box.chapter, squeezed(box.text)) for box in boxes] == written(kind)
    assert len(boxes) > 3


def test_every_box_stands_under_a_section_of_its_chapter():
    for box in boxes_of_the_book("Paper"):
        assert box.slug in sections(box.chapter), box
        assert f"# {box.section}\n" in (ROOT / "book" / f"{box.chapter}.md").read_text(encoding="utf-8")


def test_the_page_collects_all_boxes_but_the_one_that_explains_boxes():
    (options,) = re.findall(r"```\{boxes\} Paper\n(.*?)\n```", PAPER, re.S)
    assert options == f":list:\n:without: {LEFT_OUT}"
    everything, shown = boxes_of_the_book("Paper"), boxes_of_the_book("Paper", LEFT_OUT)
    assert [box for box in everything if box not in shown] == [everything[1]]
    assert everything[1].text.startswith("A box like this one")
    assert "**Paper.**" not in PAPER  # nothing is typed twice
    for box in shown:
        assert squeezed(box.text) not in squeezed(PAPER)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("> **Paper.** Text.\n\n# Title\n", "before the first heading"),
        ("# Title\n\n> **Paper** Text.\n", "neither in a full stop"),
        ("# Title\n\n> **Paper.**\n", "without a text"),
        ("# Title\n\n- > **Paper.** In a list.\n", "0 boxes can be placed"),
        ("# Title\n\n1. > **Paper.** In a list.\n", "0 boxes can be placed"),
        ("# Title\n\n**Paper.** Not quoted.\n", "0 boxes can be placed"),
        ("# Title\n\n> **Paper.** One.\n>\n> **Paper.** Two.\n", "2 lines open a box 'Paper', but 1"),
        ("# Title\n\n> **Paper: *so*.** Text.\n", "0 boxes can be placed"),
        ("# Title\n\nNo box.\n", "no box 'Paper' in any chapter"),
    ],
)
def test_a_box_that_cannot_be_placed_is_an_error(tmp_path, source, message):
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "01-one.md").write_text(source, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        collect.boxes(tmp_path, "Paper")


def test_wrong_requests_are_errors():
    with pytest.raises(ValueError, match="no box is called 'Papers'"):
        collect.boxes(ROOT, "Papers")
    with pytest.raises(ValueError, match="no box 'Paper' to leave out in 01-the-whole-model#nowhere"):
        collect.boxes(ROOT, "Paper", ("01-the-whole-model#nowhere",))
    box = collect.Box("01-one", "One", "One", "one", "", "See [Chapter 2][two].\n\n[two]: 02-two.ipynb")
    with pytest.raises(ValueError, match="not written as"):
        collect.moved(box, "book/page")


CHAPTER = r"""---
title: front matter is no heading
---
# A chapter

```python
# a comment is no heading
```

## Odd: `code`, *stressed*

> **Paper.** First, with $a_1$ and `x > 0`. See [Chapter 2](02-two.md#there), [notes](../book/notes.md),
> [here](#odd-code-stressed) and [the web](https://example.org).
>
> Second paragraph.

> **Paper: the scale.** It has a title.
"""


def build(folder: Path) -> str:
    """The page book/page of a small book, built with two processes and only as far as it has changed."""
    settings = {
        "extensions": ["myst_parser", "sphinx.ext.mathjax", "quote_admonitions", "collect"],
        "myst_enable_extensions": ["dollarmath"],
        "myst_heading_anchors": 3,
        "exclude_patterns": ["book/0*"],
        "html_theme": "basic",
    }
    warnings = folder / "warnings"
    with warnings.open("w") as stream, docutils_namespace():
        Sphinx(
            folder / "source", None, folder / "html", folder / "trees", "html", settings,
            status=None, warning=stream, parallel=2,
        ).build()  # fmt: skip
    assert warnings.read_text(encoding="utf-8") == ""
    return (folder / "html" / "book" / "page.html").read_text(encoding="utf-8")


def test_the_page_shows_boxes_with_links_that_lead_back(tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "SUFFIX", ".md")  # this small book has no notebooks
    book, chapters = tmp_path / "source" / "book", tmp_path / "source" / "notebooks"
    book.mkdir(parents=True)
    chapters.mkdir()
    for name, text in (("01-one", CHAPTER), ("02-two", "# Two\n\n## There\n\n> **Paper.** Of two.\n")):
        (book / f"{name}.md").write_text(text, encoding="utf-8")
        (chapters / f"{name}.md").write_text(text, encoding="utf-8")
    pages = [f"notebooks/0{name}" for name in ("1-one", "2-two")] + ["book/page", "book/notes", *"abcd"]
    (tmp_path / "source" / "index.md").write_text(
        "# Book\n\n```{toctree}\n" + "\n".join(pages) + "\n```\n", encoding="utf-8"
    )
    for name in ("book/notes", *"abcd"):  # more pages than one process reads
        (tmp_path / "source" / f"{name}.md").write_text("# Notes\n", encoding="utf-8")
    (book / "page.md").write_text("# Page\n\n## All\n\n```{boxes} Paper\n```\n", encoding="utf-8")
    html = build(tmp_path)
    assert re.findall(r"<h3>(Chapter [^<]+)<", html) == ["Chapter 1: A chapter", "Chapter 2: Two"]
    assert html.count('<div class="seealso admonition">') == html.count("admonition-title") == 3
    titles = re.findall(r'<p class="admonition-title">(.*?)</p>\n', html)
    assert all('href="../notebooks/01-one.html#odd-code-stressed"' in title for title in titles[:2])
    assert '<span class="pre">code</span>' in titles[0] and "the scale (" in titles[1]
    assert 'href="../notebooks/02-two.html#there"' in html and 'href="notes.html"' in html
    assert html.count('href="../notebooks/01-one.html#odd-code-stressed"') == 3
    assert 'href="https://example.org"' in html and "<p>Second paragraph.</p>" in html
    assert r"\(a_1\)" in html and "mathjax" in html  # the page itself holds no other maths
    assert "**" not in html

    (book / "page.md").write_text("# Page\n\n## All\n\n```{boxes} Paper\n:list:\n```\n", encoding="utf-8")
    html = build(tmp_path)
    assert "seealso" not in html and "Second paragraph" not in html and "<li><p>Chapter 2, Two: " in html
    assert html.count('href="../notebooks/01-one.html#odd-code-stressed"') == 2 and "the scale (" in html
    (book / "page.md").write_text("# Page\n\n## All\n\n```{boxes} Paper\n```\n", encoding="utf-8")
    build(tmp_path)

    changed = (book / "02-two.md").read_text(encoding="utf-8").replace("Of two", "Of two, again")
    (book / "02-two.md").write_text(changed, encoding="utf-8")
    assert "Of two, again" in build(tmp_path)  # nothing else has changed


# ---- corrections


@cache
def shapes() -> list[tuple[int, ...]]:
    """What leaves each step of the walk, from a run of the model."""
    model = t2t_ref.create_model("t2t_vit_14").eval()
    with torch.no_grad():
        table = t2t_ref.shape_table(model, torch.zeros(1, 3, 224, 224))
    t2t = "tokens_to_token"
    rows = [f"{t2t}.soft_split0", f"{t2t}.attention1", f"into {t2t}.soft_split1", f"{t2t}.soft_split1"]
    rows += [f"{t2t}.attention2", f"into {t2t}.soft_split2", f"{t2t}.soft_split2", f"{t2t}.project"]
    # class token, positions and dropout keep one shape
    rows += ["into pos_drop", "into pos_drop", "into pos_drop", "blocks.0-13", "into head"]
    return [table.shape(row) for row in rows]


def problems(page: str) -> list[str]:
    """What the page of corrections lacks, or says without showing it."""
    found = []
    entries = ENTRY.findall(page)
    names = [name for name, _ in entries]
    if names != WANTED:
        found.append(f"entries: {sorted(set(names) ^ set(WANTED)) or 'order'}")
    for name, text in entries:
        if not re.fullmatch(r"\n\*\*The article:\*\* .+?\n\n\*\*Here:\*\* .+\n*", text, re.S):
            found.append(f"{name}: form")
        if not any(sections(chapter).get(slug) for chapter, slug in LINK.findall(text)):
            found.append(f"{name}: no cell")
    rows = re.findall(r"^\| [^|]+ \| (1(?:, \d+)+) \| ([^|]+) \| ([^|]+) \|$", page, re.M)
    walk = [tuple(map(int, shape.split(", "))) for shape, *_ in rows]
    if walk != shapes():
        found.append("walk: shapes")
    for number, (_, asserted, explained) in enumerate(rows, 1):
        for cell in (asserted, explained):
            if not any(sections(chapter).get(slug) for chapter, slug in LINK.findall(cell)):
                found.append(f"walk, row {number}: no cell")
    links = set(LINK.findall(page))
    found += [f"no section {slug}" for chapter, slug in sorted(links) if slug not in sections(chapter)]
    boxes = boxes_of_the_book("Article", LEFT_OUT)
    found += [f"no word of the box in {b.chapter}, {b.slug}" for b in boxes if (b.chapter, b.slug) not in links]
    return found


def test_every_point_of_the_article_has_an_entry_and_a_cell():
    assert problems(CORRECTIONS) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("(article-padding)=\n", "", "entries: ['article-padding']"),
        ("(article-padding)=", "(article-stride)=", "entries: ['article-padding', 'article-stride']"),
        ("**The article:** Padding 3", "Padding 3", "article-padding: form"),
        ("06-tokens-to-token.ipynb#what-is-fixed-about-the-final-tokens", "x", "article-fixed-tokens: no cell"),
        ("#three-things-called-unfold", "#recap", "article-unfold: no cell"),
        ("#three-things-called-unfold", "#nowhere", "no section nowhere"),
        ("#what-follows-dropout) |", "#recap) |", "walk, row 11: no cell"),
        ("1, 784, 64 |", "1, 784, 576 |", "walk: shapes"),
        (
            "#would-another-padding-do",
            "#how-many-windows",
            "no word of the box in 03-soft-split, would-another-padding-do",
        ),
    ],
)
def test_each_check_can_fail(old, new, problem):
    assert old in CORRECTIONS
    assert problem in problems(CORRECTIONS.replace(old, new))


@pytest.mark.parametrize("page", [PAPER, CORRECTIONS], ids=["paper and code", "corrections"])
def test_each_link_of_a_table_leads_to_a_cell(page):
    rows = re.findall(r"^\| .*\]\(.*$", page, re.M)
    assert len(rows) > 10
    for row in rows:
        links = LINK.findall(row)
        assert links or PRINTED.search(row), row
        assert all(sections(chapter).get(slug) for chapter, slug in links), row
