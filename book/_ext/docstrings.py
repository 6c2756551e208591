"""The pages of book/api, made from the docstrings of t2t_ref.

A docstring says what a thing does, then, in sections that napoleon draws and editors know, its shapes, units, errors
and source:

    Shapes:
        image: ``b c h w``
        return: ``b n d``, n windows, row by row

    Raises:
        ValueError: if the padded image is smaller than one window

What is here: plain text that is safe in reStructuredText, with links to chapters; signatures and links that read as in
the source; the fields of records with their comments; and three directives for what would go stale if it were typed:
``public-names``, ``modules`` and ``command-line``.
"""

import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import io
import os
import pkgutil
import re
import sys
import textwrap
from functools import cache
from pathlib import Path
from unittest import mock

from docutils import nodes
from docutils.statemachine import StringList
from sphinx import addnodes
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "t2t_ref"
SECTION = re.compile(r"(Shapes|Args|Units|Note|Raises|Source):$")
CHAPTERS = re.compile(r"\b([Cc]hapters? )(\d+(?:(?:, | and | to )\d+)*)")
ROLE_OR_LITERAL = re.compile(r"(``.+?``|:[\w:]+:`[^`]+`)")
SIGNS = re.compile(r"[\\|`]|(?<=\w)_(?!\w)|(?<![\w*])\*(?!\w[^*]*\w\*(?!\w))|\*\*")  # but for the stars of *stress*


# ---- text


@cache
def chapter_pages() -> dict[str, str]:
    """Number of a chapter, as text, to the name of its page."""
    pages = sorted((ROOT / "notebooks").glob("[0-9][0-9]-*.ipynb"))
    return {str(int(page.name[:2])): f"/notebooks/{page.stem}" for page in pages}


def inline(text: str) -> str:
    """A line as reStructuredText: roles, ``literals`` and *stress* stay, other signs mean themselves.

    The numbers of chapters become links.
    """
    pages = chapter_pages()

    def link(found: re.Match) -> str:
        word, numbers = found.groups()
        if numbers.isdecimal() and numbers in pages:
            return f":doc:`{word}{numbers} <{pages[numbers]}>`"
        return word + re.sub(r"\d+", lambda n: f":doc:`{n[0]} <{pages[n[0]]}>`" if n[0] in pages else n[0], numbers)

    parts = ROLE_OR_LITERAL.split(text)
    for place in range(0, len(parts), 2):
        part = SIGNS.sub(lambda sign: "\\" + sign[0], parts[place])
        part = re.sub(r"(?<![\w-])--[a-z][\w-]*", r"``\g<0>``", part)
        parts[place] = CHAPTERS.sub(link, part)
    return "".join(parts)


def language_of(lines: list[str]) -> str:
    """How to colour an example."""
    try:
        ast.parse(textwrap.dedent("\n".join(lines)))
    except SyntaxError:
        return "text"
    return "python"


def markup(lines: list[str]) -> list[str]:
    """A docstring as lines that napoleon reads: sections stay, signs mean themselves, examples are code."""
    result: list[str] = []
    lines, place, section = list(lines), 0, False
    while place < len(lines):
        line = lines[place]
        place += 1
        if SECTION.match(line):
            section = True
            result.append(line)
        elif line.startswith("    ") and not section:  # an example, a formula, a table: as it stands
            body = [line]
            while place < len(lines) and (not lines[place].strip() or lines[place].startswith("    ")):
                body.append(lines[place])
                place += 1
            result += [f".. code-block:: {language_of(body)}", "", *body]
        else:
            section = section and (line.startswith(" ") or not line)
            text = re.sub(r"^( *)(?=[A-Z][.)] )", r"\1\\", inline(line))  # "E. Author" is no item E of a list
            result.append(text.replace("::", ":") if text.endswith("::") else text)
    return result


# ---- assignments with their comments


LONGEST = 72


def comment_behind(node: ast.stmt, lines: list[str]) -> str:
    """The comment at the end of a statement, else the one behind the bracket that opens it."""
    behind = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().partition("#")[2]
    return (behind or lines[node.lineno - 1].partition("  # ")[2]).strip()


def row(name: str, value: str, comment: str) -> str:
    if value.startswith("Keys") and comment:  # a long list comes last
        return f":``{name}``: {inline(comment)}. {value}"
    return f":``{name}``: " + " ".join(filter(None, [value, inline(comment)]))


def fields(record: type) -> list[str]:
    """The annotated names of a class with their types, defaults and comments; comments alone are headings.

    Fields that carry their own help and heading, as those of a recipe do, are shown with these.
    """
    described = dataclasses.fields(record) if dataclasses.is_dataclass(record) else ()
    told = {each.name: each for each in described if "help" in each.metadata}
    source = textwrap.dedent(inspect.getsource(record))
    lines, rows, before = source.splitlines(), [], 0
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            headings = [line.strip("# ") for line in lines[before : node.lineno - 1] if line.lstrip().startswith("#")]
            own = told[node.target.id].metadata if node.target.id in told else {}
            headings += [own["heading"]] if own.get("heading") else []
            rows += [text for heading in headings for text in ("", f"**{inline(heading)}**", "")]
            value = ast.get_source_segment(source, node.value) if node.value else ""
            value = "" if value.startswith("field(") else value
            value = ast.get_source_segment(source, node.value.args[0]) if own else value
            kind = " = ".join(filter(None, [ast.unparse(node.annotation), value]))
            rows.append(row(ast.unparse(node.target), f"``{kind}``", own.get("help") or comment_behind(node, lines)))
        before = node.end_lineno
    return rows


def constants(module: object) -> list[str]:
    """The names in capitals of a module that have a comment or are tables, with their values or keys."""
    source = inspect.getsource(module)
    lines, rows, before = source.splitlines(), [], 0
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            name = ast.unparse(node.target if isinstance(node, ast.AnnAssign) else node.targets[0]).strip("()")
            above = [line.strip("# ") for line in lines[before : node.lineno - 1] if re.match("# (?!--)", line)]
            comment = " ".join(above) or comment_behind(node, lines)
            value = " ".join(ast.get_source_segment(source, node.value).split())
            thing = getattr(module, name, None)
            if len(value) <= LONGEST:
                value = f"``{value}``"
            elif isinstance(thing, dict) and all(isinstance(key, str) for key in thing):
                value = "Keys: " + ", ".join(f"``{key}``" for key in thing)
            else:
                value = ""
            if name.split(",")[0].isupper() and (comment or value.startswith("Keys")):
                rows.append(row(name, value, comment))
        before = node.end_lineno
    return rows


# ---- what autodoc asks


def ours(thing: object) -> bool:
    return (getattr(thing, "__module__", None) or "").partition(".")[0] == PACKAGE


def before_napoleon(app, what, name, thing, options, lines) -> None:
    lines[:] = markup(lines)


def after_napoleon(app, what, name, thing, options, lines) -> None:
    result = list(lines)
    while result and not result[-1]:
        result.pop()
    if what in ("class", "exception"):
        rows = fields(thing)
        bases = [base for base in thing.__bases__ if base is not object]
        if (rows or bases) and result:
            result.append("")
        if rows:
            result.append(f":{'Fields' if dataclasses.is_dataclass(thing) else 'Attributes'}:")
            result += [f"    {line}" if line else "" for line in rows]
        if bases:
            shown = (f":class:`~{b.__module__}.{b.__name__}`" if ours(b) else f"``{b.__name__}``" for b in bases)
            result.append(f":Base: {', '.join(shown)}")
    elif what == "module" and options.get("members") is not None:
        rows = constants(thing)
        if rows:
            result += ["", ".. rubric:: Constants", "", *rows]
    lines[:] = [*result, ""]


def process_signature(app, what, name, thing, options, signature, returned):
    # the fields of a record say the same, with their comments
    if what == "class" and (dataclasses.is_dataclass(thing) or signature.startswith(("(*args", "(iterable"))):
        return "", ""


def skip_member(app, what, name, thing, skip, options):
    if name == "forward" and ours(thing):
        return False  # what it does, the docstring of its class says
    if what == "class" and (isinstance(thing, type) or name == "extra_repr"):
        return True


def quote_as_in_the_source(app, domain, kind, content) -> None:
    """Python shows strings in single quotes; the source has double ones."""
    for node in content.parent.findall(addnodes.desc_signature):
        for text in list(node.findall(nodes.Text)):
            if re.fullmatch(r"'[^'\"]*'", text):
                text.parent.replace(text, nodes.Text(f'"{text[1:-1]}"'))


def parameters_as_lines(app, page, template, context, doctree) -> None:
    """Sphinx sets parameters below each other as a list of definitions without terms, which is no list to a reader."""
    if page.startswith("book/api/") and "body" in context:
        tags = {"<dl>": '<div class="parameters">', "</dl>": "</div>", "<dd>": "<div>", "</dd>": "</div>"}
        mend = lambda line: re.sub("</?d[ld]>", lambda tag: tags[tag[0]], line[0])  # noqa: E731
        context["body"] = re.sub(r'<dt class="sig .*?</dt>', mend, context["body"], flags=re.S)


def resolve(app, env, node, contents):
    """A name as Python would find it in the module that mentions it, else among the public names."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"].removeprefix(f"{PACKAGE}.")
    for place in (node.get("py:module"), PACKAGE):
        thing = sys.modules.get(place or "")
        for part in target.split("."):
            thing = getattr(thing, part, None)
        if ours(thing):
            name = f"{thing.__module__}.{getattr(thing, '__qualname__', part)}"
            domain = env.get_domain("py")
            found = domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], name, node, contents)
            if found is not None:
                return found
    return None


def source_address(domain: str, info: dict) -> str | None:
    """Where the repository shows the source of a name."""
    thing = sys.modules.get(info["module"])
    for part in info["fullname"].split("."):
        thing = getattr(thing, part, None)
    thing = inspect.unwrap(thing.fget if isinstance(thing, property) else thing)
    try:
        lines, first = inspect.getsourcelines(thing)
        file = Path(inspect.getsourcefile(thing)).resolve().relative_to(ROOT)
    except (TypeError, OSError, ValueError):
        return None
    return f"{source_address.repository}/{file.as_posix()}#L{first}-L{first + len(lines) - 1}"


def read_address(app, config) -> None:
    config.napoleon_custom_sections = [("Shapes", "params_style"), "Units", "Source"]
    config.napoleon_numpy_docstring = False
    theme = config.html_theme_options
    source_address.repository = f"{theme['repository_url']}/blob/{theme['repository_branch']}"
    config.linkcode_resolve = source_address


# ---- directives, to be used in eval-rst


def modules() -> list[str]:
    """The modules of the package by their full names, without private ones and the doors of three lines."""
    found = pkgutil.walk_packages(importlib.import_module(PACKAGE).__path__, f"{PACKAGE}.")
    names = [module.name for module in found if not module.name.rpartition(".")[2].startswith("_")]
    doors = ("The door ", "An older door")  # read, not imported: one of them needs timm
    texts = {name: Path(importlib.util.find_spec(name).origin).read_text(encoding="utf-8") for name in names}
    return [name for name in names if not ast.get_docstring(ast.parse(texts[name])).startswith(doors)]


def first_sentence(thing: object) -> str:
    """The first sentence of a docstring, without its full stop."""
    text = " ".join(inspect.getdoc(thing).split("\n\n")[0].split())
    return re.split(r"(?<!Sec)(?<!Eq)(?<!Fig)(?<!al)(?<!\.\.)\.(?: |$)", text)[0].rstrip(":")


class Generated(SphinxDirective):
    """A directive that writes reStructuredText."""

    def run(self) -> list[nodes.Node]:
        container = nodes.container()
        lines = StringList(self.lines(), self.get_source_info()[0])
        self.state.nested_parse(lines, self.content_offset, container)
        return container.children


class PublicNames(Generated):
    """A table of the names that a package exports."""

    required_arguments = 1

    def lines(self) -> list[str]:
        package = importlib.import_module(self.arguments[0])
        rows = [".. list-table::", "   :class: names", "   :widths: 36 64", "   :header-rows: 1", ""]
        rows += ["   * - name", "     - what it is"]
        for name in package.__all__:
            thing = getattr(package, name)
            if ours(thing):
                role = "class" if isinstance(thing, type) else "func"
                rows += [
                    f"   * - :{role}:`{name} <{thing.__module__}.{name}>`",
                    f"     - {inline(first_sentence(thing))}",
                ]
            else:
                shown = ", ".join(thing) if isinstance(thing, dict) else str(thing)
                rows += [f"   * - ``{name}``", f"     - {type(thing).__name__}: ``{shown}``"]
        return rows


class Modules(Generated):
    """A table of the modules, in the order of the pages."""

    has_content = True

    def lines(self) -> list[str]:
        rows = [".. list-table::", "   :class: names", "   :widths: 34 52 14", "   :header-rows: 1", ""]
        rows += ["   * - module", "     - what it holds", "     - chapters"]
        pages = chapter_pages()
        for name in self.content:
            text = first_sentence(importlib.import_module(name))
            numbers = []
            for said in CHAPTERS.finditer(text):
                found = [int(number) for number in re.findall(r"\d+", said[2])]
                numbers += range(found[0], found[-1] + 1) if " to " in said[2] else found
            text = re.sub(r" \(chapters? [^)]*\)", "", text)
            links = ", ".join(f":doc:`{n} <{pages[str(n)]}>`" for n in numbers if str(n) in pages)
            page = name.removeprefix(f"{PACKAGE}.").replace(".", "_")
            text = re.sub(r":(\w+):`(\w+)`", rf":\1:`\2 <{name}.\2>`", text)  # a cell of this table is in no module
            rows += [
                f"   * - :doc:`{name.removeprefix(PACKAGE + '.')} </book/api/{page}>`",
                f"     - {inline(text)}",
                f"     - {links}",
            ]
        return rows


class CommandLine(SphinxDirective):
    """What a command of the package says to --help: the module, then words that pick one of several commands."""

    required_arguments = 1
    optional_arguments = 9

    def run(self) -> list[nodes.Node]:
        module, *words = self.arguments
        main = importlib.import_module(module).main
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            with mock.patch.dict(os.environ, {"COLUMNS": "76"}):
                main([*words, "--help"])
        text = said.getvalue().strip()
        if not text.startswith("usage: "):
            raise self.error(f"{module} has said nothing to --help")
        block = nodes.literal_block(text, text, language="text")
        return [block]


def written_signatures() -> None:
    """Let autodoc see what a class is written with, and not the argument that its decorator adds to all of them.

    It reads the defaults from the source, and would stumble over one that is not there.
    """
    from t2t_ref.models.classifier import Classifier

    classes = [Classifier]
    while classes:
        one = classes.pop()
        classes += one.__subclasses__()
        init = vars(one).get("__init__")
        if hasattr(init, "__signature__"):
            kept = [entry for name, entry in init.__signature__.parameters.items() if name != "global_pool"]
            init.__signature__ = init.__signature__.replace(parameters=kept)


def setup(app):
    for module in pkgutil.walk_packages(importlib.import_module(f"{PACKAGE}.models").__path__, f"{PACKAGE}.models."):
        importlib.import_module(module.name)
    written_signatures()
    app.setup_extension("sphinx.ext.napoleon")
    app.setup_extension("sphinx.ext.linkcode")
    app.connect("config-inited", read_address)
    app.connect("autodoc-process-docstring", before_napoleon, priority=400)  # napoleon's is 500
    app.connect("autodoc-process-docstring", after_napoleon, priority=600)
    app.connect("autodoc-process-signature", process_signature)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("object-description-transform", quote_as_in_the_source)
    app.connect("missing-reference", resolve)
    app.connect("html-page-context", parameters_as_lines)
    app.add_css_file("api.css")
    app.add_directive("public-names", PublicNames)
    app.add_directive("modules", Modules)
    app.add_directive("command-line", CommandLine)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
