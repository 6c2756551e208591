"""Collect the boxes of the chapters on one page, in the order of the chapters.

    ```{boxes} Paper
    :without: 01-the-whole-model#what-this-book-answers
    ```

shows every ``> **Paper.** ...`` of book/NN-*.md under the name of its section, with a link back; with ``:list:`` the
links alone. A section named in ``without`` is left out. What stands in the chapters is read at each build, so nothing
is typed twice. A box that cannot be placed is an error, and so a failed build.
"""

import posixpath
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.front_matter import front_matter_plugin
from myst_parser.mdit_to_docutils.base import compute_unique_slug
from quote_admonitions import KINDS
from sphinx.util.docutils import SphinxDirective

ANCHORS = 3  # headings down to this level have anchors: myst_heading_anchors in _config.yml
SUFFIX = ".ipynb"  # of the pages that show the chapters
TITLE = re.compile(r"\*\*([^*]+)\*\*\s*")


class Box(NamedTuple):
    chapter: str  # the name of the file, without .md
    chapter_title: str
    section: str  # its heading, in Markdown
    slug: str  # its anchor
    title: str  # of the box itself, if it has one: "Paper: the scale." has "the scale"
    text: str  # Markdown, links as they stand in the chapter


@cache
def parse(text: str) -> list[SyntaxTreeNode]:
    """The top-level blocks of a chapter. Its code is fenced, so no comment is taken for a heading."""
    parser = MarkdownIt("commonmark").enable("table").use(front_matter_plugin).use(dollarmath_plugin)
    return SyntaxTreeNode(parser.parse(text)).children


def boxes_of(source: Path, kind: str) -> list[Box]:
    """The boxes of one kind in one chapter, in their order."""
    text = source.read_text(encoding="utf-8")
    lines, found, slugs = text.splitlines(), [], []
    chapter_title = section = None
    for block in parse(text):
        if block.type == "heading" and int(block.tag[1]) <= ANCHORS:
            slugs.append(compute_unique_slug(block, slugs))
            section = block.children[0].content
            chapter_title = chapter_title or section
        elif block.type == "blockquote":
            quote = "\n".join(re.sub(r"^\s{0,3}> ?", "", line) for line in lines[slice(*block.map)])
            opening = TITLE.match(quote)
            if not opening or opening[1].split()[0].rstrip(".:") != kind:
                continue
            where = f"{source.name}, line {block.map[0] + 1}"
            if section is None:
                raise ValueError(f"{where}: a box before the first heading")
            if opening[1][-1] not in ".:":
                raise ValueError(f"{where}: the bold words end neither in a full stop nor in a colon")
            body = quote[opening.end() :].strip()
            if not body:
                raise ValueError(f"{where}: a box without a text")
            title = opening[1].rstrip(".:").removeprefix(kind).lstrip(".:, ")
            found.append(Box(source.stem, chapter_title, section, slugs[-1], title, body))
    # one in a list, one that is not quoted, two in one quotation: nothing of the kind may slip through
    written = re.findall(rf"^[\s>*+\d.)-]*\*\*{kind}\b", text, re.M)
    if len(written) != len(found):
        raise ValueError(
            f"{source.name}: {len(written)} lines open a box '{kind}', but {len(found)} boxes can be placed; "
            "a box is a quotation of its own, outside of lists"
        )
    return found


def sources(root: Path) -> list[Path]:
    return sorted((root / "book").glob("[0-9][0-9]-*.md"))


def boxes(root: Path, kind: str, without: tuple[str, ...] = ()) -> list[Box]:
    """The boxes of one kind in all chapters, but for those in the sections ``without`` ("chapter#anchor")."""
    if kind not in KINDS:
        raise ValueError(f"no box is called {kind!r}; there are {', '.join(KINDS)}")
    found = [box for source in sources(root) for box in boxes_of(source, kind)]
    if missing := set(without) - {f"{box.chapter}#{box.slug}" for box in found}:
        raise ValueError(f"no box '{kind}' to leave out in {', '.join(sorted(missing))}")
    found = [box for box in found if f"{box.chapter}#{box.slug}" not in without]
    if not found:
        raise ValueError(f"no box '{kind}' in any chapter")
    return found


def links(text: str) -> Iterator[str]:
    tree = SyntaxTreeNode(MarkdownIt("commonmark").use(dollarmath_plugin).parse(text))
    yield from {str(link.attrs["href"]) for link in tree.walk() if link.type == "link"}


def moved(box: Box, page: str) -> str:
    """The text of a box with its links as they must be on another page, such as "book/paper-and-code"."""
    text = box.text
    for target in links(text):
        if re.match(r"[a-z]+:", target) or target.startswith("#fig-"):  # these hold everywhere
            continue
        if f"]({target})" not in text:
            raise ValueError(f"{box.chapter}, {box.section}: the link to {target} is not written as [text](target)")
        path, _, anchor = target.partition("#")
        path = posixpath.join("notebooks", path or f"{box.chapter}{SUFFIX}")
        path = posixpath.relpath(path, posixpath.dirname(page)) + (f"#{anchor}" if anchor else "")
        text = text.replace(f"]({target})", f"]({path})")
    return text


class Boxes(SphinxDirective):
    required_arguments = 1
    option_spec = {"without": directives.unchanged_required, "list": directives.flag}

    def run(self):
        root, kind, page = Path(self.env.srcdir), self.arguments[0], self.env.docname
        for source in sources(root):
            self.env.note_dependency(str(source))
        try:
            found = boxes(root, kind, tuple(self.options.get("without", "").split()))
            texts = [moved(box, page) for box in found]
        except ValueError as error:
            raise self.error(f"boxes {kind}: {error}") from error
        if "list" in self.options:
            return self.markdown("\n".join(self.linked(found)))
        sections = {}
        for box, text in zip(found, texts, strict=True):
            if box.chapter not in sections:
                number, chapter = int(box.chapter[:2]), box.chapter_title
                section = nodes.section("", ids=[f"chapter-{number}"], names=[f"chapter-{number}"])
                section += nodes.title("", f"Chapter {number}: {chapter}")
                self.state.document.note_explicit_target(section)
                sections[box.chapter] = section
            sections[box.chapter] += self.admonition(box, text, KINDS[kind])
        return list(sections.values())

    def title(self, box: Box) -> str:
        """The section of a box as a link to it, behind the box's own title if it has one."""
        folder = posixpath.relpath("notebooks", posixpath.dirname(self.env.docname))
        title = f"[{box.section}]({folder}/{box.chapter}{SUFFIX}#{box.slug})"
        return f"{box.title} ({title})" if box.title else title

    def linked(self, found: list[Box]) -> Iterator[str]:
        """One item a chapter, in Markdown. A section with two boxes is named once."""
        chapters = dict.fromkeys((box.chapter, box.chapter_title) for box in found)
        for chapter, name in chapters:
            titles = dict.fromkeys(self.title(box) for box in found if box.chapter == chapter)
            yield f"- Chapter {int(chapter[:2])}, {name}: {'; '.join(titles)}"

    def admonition(self, box: Box, text: str, style: str) -> nodes.admonition:
        title = self.title(box)
        result = nodes.admonition("", nodes.title("", "", *self.markdown(title)[0].children), classes=[style])
        result += self.markdown(text)
        return result

    def markdown(self, text: str) -> list[nodes.Node]:
        container = nodes.container()
        self.state.nested_parse(StringList(text.splitlines(), source=""), self.content_offset, container)
        return container.children


def setup(app):
    app.add_css_file("boxes.css")
    app.add_directive("boxes", Boxes)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
