"""How to cite: ``{bibtex-of-the-book}`` prints CITATION.cff as BibTeX, so that there is one source of it.

Besides, the items of a bibliography get the role of list items. Sphinx gives them one that a list may not hold, which
screen readers stumble over.
"""

from pathlib import Path

import yaml
from docutils import nodes
from sphinx.util.docutils import SphinxDirective


def bibtex(cff: dict, year: str) -> str:
    """A record of CITATION.cff as a BibTeX entry."""
    names = " and ".join(
        f"{{{who['name']}}}" if "name" in who else f"{who['family-names']}, {who['given-names']}"
        for who in cff["authors"]
    )
    fields = {
        "title": f"{{{cff['title']}}}",
        "author": names,
        "year": year,
        "version": cff["version"],
        "url": cff["repository-code"],
    }
    key = cff["repository-code"].rpartition("/")[2]
    lines = [f"  {name:7} = {{{value}}}," for name, value in fields.items()]
    return "\n".join([f"@misc{{{key},", *lines, "}"])


class BibtexOfTheBook(SphinxDirective):
    def run(self):
        path = Path(self.env.srcdir) / "CITATION.cff"
        self.env.note_dependency(str(path))
        text = bibtex(yaml.safe_load(path.read_text(encoding="utf-8")), str(self.config.copyright))
        return [nodes.literal_block(text, text, language="bibtex")]


def name_list_items(app, pagename, templatename, context, doctree):
    context["body"] = context.get("body", "").replace('role="doc-biblioentry"', 'role="listitem"')


def setup(app):
    app.add_directive("bibtex-of-the-book", BibtexOfTheBook)
    app.connect("html-page-context", name_list_items)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
