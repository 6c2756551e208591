"""`> **Note.** text` is a plain quotation on Colab and GitHub; in the book it becomes an admonition.

The bold words that open the quotation, up to their full stop or colon, are the title; KINDS maps
the first of them to a class of the theme.
"""

from docutils import nodes
from sphinx.transforms import SphinxTransform

KINDS = {
    "Note": "note",
    "Tip": "tip",
    "Idea": "tip",
    "Warning": "warning",
    "Pitfall": "caution",
    "Exercise": "exercise",
    "Change": "tip",
    "Article": "note",
    "Check": "important",
    "Paper": "seealso",
}


class QuoteAdmonitions(SphinxTransform):
    default_priority = 200

    def apply(self, **kwargs):
        for quote in list(self.document.findall(nodes.block_quote)):
            if not (quote.children and isinstance(quote[0], nodes.paragraph)):
                continue
            first = quote[0]
            while first.children and isinstance(first[0], nodes.Text) and not first[0].strip():
                first.pop(0)  # markdown-it puts an empty text before the bold
            if not (first.children and isinstance(first[0], nodes.strong)):
                continue
            title = first[0].astext()
            kind = KINDS.get(title.split()[0].rstrip(".:"))
            if kind is None or title[-1] not in ".:":
                continue
            first.pop(0)
            if first.children and isinstance(first[0], nodes.Text):
                first[0] = nodes.Text(first[0].lstrip())
            box = nodes.admonition("", nodes.title("", title.rstrip(".:")), classes=[kind])
            box += [n for n in quote.children if n is not first or first.children]
            quote.replace_self(box)


def setup(app):
    app.add_transform(QuoteAdmonitions)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
