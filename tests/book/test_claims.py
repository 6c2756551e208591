"""The page of claims is complete, its verdicts have something behind them, and each of these checks can fail."""

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

import claims
import pytest
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace

ROOT = Path(__file__).resolve().parents[2]

PAGE = (ROOT / "book" / "claims.md").read_text(encoding="utf-8")
ENTRY = re.compile(r"^:::\{claim\} (\S+) ([^\n]+)\n:name: (\S+)\n(?::by: (\S+)\n)?\n(.*?)\n:::$", re.M | re.S)
LINK = re.compile(r"\]\(\.\./notebooks/([\w-]+)\.ipynb#([^)]+)\)")
COUNTED = re.compile(r"\]\(printed-numbers\.md#([^)]+)\)")
GAP = re.compile(r"\{gap\}`([^`]+)`")
WANTED = [
    *(f"claim-eq-{n}" for n in range(1, 6)),
    *(f"claim-table-{n}" for n in range(1, 8)),
    *(f"claim-figure-{n}" for n in (1, 2, 3, 4, "appendix")),
    *(f"claim-text-{n}" for n in range(1, 10)),
    "claim-slip-786 claim-slip-depth-7 claim-slip-515 claim-slip-gain claim-slip-t19 claim-slip-cifar claim-slip-wide",
    "claim-slip-differences claim-slip-ghost claim-slip-without-t2t claim-table-2-macs-384 claim-slip-macs",
    "claim-slip-positions",
]
AGREES = {"small": "ahead", "contradicted": "behind", "unresolved": "not resolved"}


@cache
def sections(notebook: str) -> dict[str, bool]:
    """The sections of a chapter by their anchors, and whether a cell in them asserts something or draws a figure."""
    from myst_parser.mdit_to_docutils.base import default_slugify

    found, path = {}, []
    for cell in json.loads((ROOT / "notebooks" / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]:
        source, metadata = "".join(cell["source"]), cell["metadata"]
        if cell["cell_type"] == "markdown":
            for marks, title in re.findall(
                r"^(#{1,3}) (.+)$", re.sub(r"^```.*?^```", "", source, flags=re.M | re.S), re.M
            ):
                path = [*(p for p in path if p[0] < len(marks)), (len(marks), default_slugify(title))]
                found[path[-1][1]] = False
        elif not {"remove-cell", "hide-cell"} & set(metadata.get("tags", [])):
            if re.search(r"^\s*(assert |torch\.testing\.assert_)", source, re.M) or "figure" in metadata.get(
                "mystnb", {}
            ):
                found |= {slug: True for level, slug in path if level > 1}
    return found


@cache
def counted() -> dict[str, bool]:
    """The sections of the page of printed numbers by their anchors, and whether something is counted in them."""
    from myst_parser.mdit_to_docutils.base import default_slugify

    page = (ROOT / "book" / "printed-numbers.md").read_text(encoding="utf-8")
    parts = (part.split("\n", 1) for part in re.split(r"(?m)^## ", page)[1:])
    return {default_slugify(title): bool(re.search(r"\{(printed|counted|works)\}", text)) for title, text in parts}


def problems(page: str) -> list[str]:
    """What the page lacks, or says without showing it."""
    entries = ENTRY.findall(page)
    names = [name for _, _, name, _, _ in entries]
    found = [f"{name}: twice" for name, count in Counter(names).items() if count > 1]
    if len(entries) != page.count(":::{claim}"):
        found.append("an entry that cannot be read")
    for wanted in " ".join(WANTED).split():
        if not any(name == wanted or name.startswith(f"{wanted}-") for name in names):
            found.append(f"{wanted}: missing")
    for verdict, _, name, by, text in entries:
        if verdict not in claims.VERDICTS or (verdict == "contradicted") != (by in claims.BY):
            found.append(f"{name}: verdict")
        links, counts = LINK.findall(text), COUNTED.findall(text)
        found += [f"{name}: no section {slug}" for notebook, slug in links if slug not in sections(notebook)]
        found += [f"{name}: no section {slug}" for slug in counts if slug not in counted()]
        if verdict == "imagenet":
            if not links and "](#" not in text:
                found.append(f"{name}: no link")
        elif not any([sections(notebook).get(slug) for notebook, slug in links] + [counted().get(s) for s in counts]):
            found.append(f"{name}: nothing shown")
        gaps = [claims.gap(gap)[0] for gap in GAP.findall(text)]
        if gaps and gaps[0] != AGREES.get(verdict):  # the first is the paper's claim, leader first
            found.append(f"{name}: {verdict}, but {gaps[0]}")
    return found


def test_every_claim_has_an_entry_and_every_entry_shows_something():
    assert problems(PAGE) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (":name: claim-eq-3", ":name: claim-eq-2", "claim-eq-3: missing"),
        (":name: claim-eq-3", ":name: claim-eq-2", "claim-eq-2: twice"),
        (":name: claim-eq-3\n", "", "an entry that cannot be read"),
        ("printed-numbers.md#table-3", "printed-numbers.md#table-5", "claim-table-3-macs: no section table-5"),
        ("{claim} exact Re-structure", "{claim} true Re-structure", "claim-eq-2: verdict"),
        ("{claim} exact Re-structure", "{claim} contradicted Re-structure", "claim-eq-2: verdict"),
        ("#re-structure-by-hand", "#re-structure", "claim-eq-2: no section re-structure"),
        ("#re-structure-by-hand", "#four-equations", "claim-eq-2: nothing shown"),
        ("the recipe itself](../notebooks/11-training.ipynb#", "the recipe itself](11#", "claim-text-7-cnns: no link"),
        ("{claim} small T2T with its", "{claim} unresolved T2T with its", "claim-table-7-t2t: unresolved, but ahead"),
    ],
)
def test_each_check_can_fail(old, new, problem):
    assert old in PAGE
    assert problem in problems(PAGE.replace(old, new))


def test_a_difference_is_that_of_the_stored_runs():
    arms = json.loads((ROOT / "results" / "tokenisers.json").read_text(encoding="utf-8"))["arms"]
    scores = [
        {run["seed"]: run["accuracy"] for run in arms[label]["runs"]} for label in ("T2T, performer", "hard split")
    ]
    mean = sum(scores[0].values()) / 5 - sum(scores[1].values()) / 5
    words, found, half = claims.gap("tokenisers | T2T, performer | hard split")
    assert found == pytest.approx(mean) and words == "ahead" and 0 < half < found
    words, back, _ = claims.gap("tokenisers | hard split | T2T, performer")
    assert back == pytest.approx(-mean) and words == "behind"
    assert claims.gap("tokenisers | T2T, transformer | T2T, performer")[0] == "not resolved"


def test_the_small_resnet_ends_above_t2t():  # claim-table-3-order says so, in words
    models = json.loads((ROOT / "results" / "what_it_sees.json").read_text(encoding="utf-8"))["arms"]
    scores = {kind: [run["accuracy"] for run in models[kind]["runs"]] for kind in ("t2t", "resnet")}
    assert min(scores["resnet"]) > max(scores["t2t"])
    assert "samples" not in models["resnet"]["values"] | models["t2t"]["values"]  # the same images
    assert models["resnet"]["parameters"] == pytest.approx(models["t2t"]["parameters"], rel=0.06)


def build(folder: Path, page: str) -> str:
    """The page as HTML, built by itself: links to chapters lead nowhere here."""
    source = folder / "source"
    source.mkdir(exist_ok=True)
    (source / "index.md").write_text(page, encoding="utf-8")
    settings = {
        "extensions": ["myst_parser", "claims"],
        "myst_enable_extensions": ["colon_fence", "deflist", "dollarmath"],
        "suppress_warnings": ["myst.xref_missing", "myst.role_unknown"],
        "html_theme": "basic",
    }
    with docutils_namespace():  # what this build registers does not outlive it
        Sphinx(source, None, folder / "html", folder / "trees", "html", settings, status=None, warning=None).build()
    return (folder / "html" / "index.html").read_text(encoding="utf-8")


def test_the_tally_is_that_of_the_entries(tmp_path):
    html = build(tmp_path, PAGE)
    entries = ENTRY.findall(PAGE)
    counts = Counter(verdict for verdict, *_ in entries)
    shown = re.findall(r'<span class="verdict verdict-(\w+)">[^<]*</span> <span class="tally">(\d+)</span>', html)
    assert {verdict: int(count) for verdict, count in shown} == counts
    assert counts.keys() == claims.VERDICTS.keys()
    by = Counter(by for _, _, _, by, _ in entries if by)
    asked = re.findall(r"\{tally\}`contradicted (\w+)`", PAGE)
    inside = re.search(r"Something says otherwise.*?</p>", html, re.S)[0]
    assert dict(zip(asked, map(int, re.findall(r'"tally">(\d+)<', inside)), strict=True)) == by
    for _, _, name, _, _ in entries:
        assert html.count(f'id="{name}"') == 1 and f'<li><p><a class="reference internal" href="#{name}">' in html


def test_another_page_can_link_to_an_entry(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "other.md").write_text("# Other\n\n[](index.md#claim-eq-3)\n", encoding="utf-8")
    build(tmp_path, PAGE)
    title = re.search(r"^:::\{claim\} exact (.+)\n:name: claim-eq-3$", PAGE, re.M)[1]
    link = rf'href="index.html#claim-eq-3"><span[^>]*>{title}</span>'  # without the entry the words would be missing
    assert re.search(link, (tmp_path / "html" / "other.html").read_text(encoding="utf-8"))


def test_a_claim_without_a_known_verdict_is_refused(tmp_path):
    page = "# Page\n\n" + "".join(f":::{{claim}} {v} A title\n:name: {v}\n\nText.\n:::\n\n" for v in ("maybe", "exact"))
    html = build(tmp_path, page)
    assert 'id="exact"' in html and 'id="maybe"' not in html
