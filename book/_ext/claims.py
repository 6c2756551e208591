"""Entries of the page of claims: a verdict for each, counted while the page is built.

    :::{claim} contradicted Title of the entry
    :name: claim-table-1-macs
    :by: count

    What the paper says, where it is shown, what came out.
    :::

A verdict is a key of VERDICTS; `by` is a key of BY, for a contradiction and only there. {verdict}`small` shows a badge,
{tally}`small` or {tally}`contradicted count` the number of such entries on the page, and
{gap}`FILE | ARM | ARM` the difference of two arms of results/FILE.json with its 95 % interval. The directive
{entries} lists all entries of a verdict as links. The first gap of an entry is what the paper claims, its winner named
first; tests/test_claims.py holds the verdict against it.
"""

import json
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util.docutils import SphinxDirective, SphinxRole

VERDICTS = {
    "exact": ("✓", "shown exactly"),
    "small": ("≈", "shown at small scale"),
    "contradicted": ("≠", "contradicted"),
    "unresolved": ("?", "not resolved"),
    "imagenet": ("…", "needs ImageNet"),
}
BY = {
    "count": "by our count",
    "small": "in small runs only",
    "code": "by the authors' code",
    "itself": "by its own numbers",
}
RESULTS = Path(__file__).resolve().parents[2] / "results"


def badge(verdict, by=None):
    mark, words = VERDICTS[verdict]
    text = f"{mark} {words} {BY[by]}" if by else f"{mark} {words}"
    return nodes.inline(text, text, classes=["verdict", f"verdict-{verdict}"])


def gap(text):
    """(words, difference in points, half of the interval) of "FILE | ARM | ARM", the first arm less the second."""
    from t2t_ref.experiments import paired_interval

    file, *labels = (part.strip() for part in text.split("|"))
    arms = json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))["arms"]
    mean, half = paired_interval(*(arms[label] for label in labels))
    return "ahead" if mean > half else "behind" if mean < -half else "not resolved", mean, half


class Claim(SphinxDirective):
    required_arguments = 2
    final_argument_whitespace = True
    has_content = True
    option_spec = {"name": directives.unchanged_required, "by": directives.unchanged_required}

    def run(self):
        verdict, title = self.arguments
        by = self.options.get("by")
        if verdict not in VERDICTS or (verdict == "contradicted") != (by in BY) or "name" not in self.options:
            raise self.error(f"a claim needs a name, a verdict of {list(VERDICTS)} and, if contradicted, by {list(BY)}")
        box = nodes.container(classes=["claim", f"claim-{verdict}"], verdict=verdict, by=by, title=title)
        self.set_source_info(box)
        self.add_name(box)
        box += nodes.paragraph("", "", badge(verdict, by), nodes.Text(" "), nodes.strong(title, title))
        self.state.nested_parse(self.content, self.content_offset, box)
        return [box]


class Entries(SphinxDirective):
    required_arguments = 1

    def run(self):
        return [nodes.bullet_list(entries=self.arguments[0])]


class Verdict(SphinxRole):
    def run(self):
        return [badge(self.text)], []


class Tally(SphinxRole):
    def run(self):
        verdict, _, by = self.text.partition(" ")
        return [nodes.inline("", "", classes=["tally"], tally=(verdict, by))], []


class Gap(SphinxRole):
    def run(self):
        words, mean, half = gap(self.text)
        self.env.note_dependency(str(RESULTS / f"{self.text.partition('|')[0].strip()}.json"))
        text = f"{words} ({mean:+.1f}\u00a0±\u00a0{half:.1f} points)".replace("-", "−")
        return [nodes.inline(text, text)], []


def finish(app, document):
    """Fill in tallies and lists, and let [text](claims.md#claim-eq-3) find the entries as it finds headings."""
    boxes = [box for box in document.findall(nodes.container) if "verdict" in box]
    for box in boxes:
        box["place"] = box.parent[0].astext().partition(":")[0]  # the heading that it stands under
    for node in document.findall(lambda node: isinstance(node, nodes.inline) and "tally" in node):
        verdict, by = node["tally"]
        count = sum(box["verdict"] == verdict and by in ("", box["by"]) for box in boxes)
        node += nodes.Text(str(count))
    for listing in document.findall(lambda node: isinstance(node, nodes.bullet_list) and "entries" in node):
        for box in (box for box in boxes if box["verdict"] == listing["entries"]):
            link = nodes.reference("", f"{box['place']}: {box['title']}", refid=box["ids"][0], internal=True)
            listing += nodes.list_item("", nodes.paragraph("", "", link))
    slugs = app.env.metadata[app.env.docname].setdefault("myst_slugs", {}) if boxes else {}
    for box in boxes:
        slugs[box["names"][0]] = (box.line, box["ids"][0], box["title"])


def setup(app):
    app.add_directive("claim", Claim)
    app.add_directive("entries", Entries)
    for name, role in {"verdict": Verdict, "tally": Tally, "gap": Gap}.items():
        app.add_role(name, role())
    app.connect("doctree-read", finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
