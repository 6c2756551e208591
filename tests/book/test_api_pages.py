"""The pages of book/api: every module has one, and its docstrings say what they should."""

import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import docstrings
import pytest
import yaml
from jaxtyping import AbstractArray

import t2t_ref
import t2t_ref.train

ROOT = Path(__file__).resolve().parents[2]

PAGES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "book" / "api").glob("*.md")}
MODULES = docstrings.modules()
SECTIONS = ("Shapes", "Args", "Units", "Note", "Raises", "Source")  # in this order
OTHER_NAMES = {"return", "item"}  # in a Shapes block, beside the arguments


def page_of(module: str) -> str:
    return module.removeprefix("t2t_ref.").replace(".", "_")


def in_the_toc() -> list[str]:
    parts = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))["parts"]
    (index,) = [c for part in parts for c in part["chapters"] if c["file"] == "book/api/index"]
    return [section["file"] for section in index["sections"]]


def public(thing: object) -> list[tuple[str, object, type | None]]:
    """(name, function or class or property, the class it is in) of everything that a module defines in public."""
    found = []
    for name, member in vars(thing).items():
        member = getattr(member, "__func__", member)  # of a classmethod
        member = inspect.unwrap(member.fget if isinstance(member, property) else member)
        module = thing.__module__ if isinstance(thing, type) else thing.__name__
        if name.startswith("_") or getattr(member, "__module__", None) != module:
            continue
        if not (inspect.isfunction(member) or isinstance(member, type)):
            continue
        if isinstance(thing, type) and isinstance(member, type):
            continue
        found.append((name, member, thing if isinstance(thing, type) else None))
        if isinstance(member, type):
            found += public(member)
    return found


ALL = {
    f"{module}.{owner.__name__ + '.' if owner else ''}{name}": (thing, owner)
    for module in [*MODULES, "t2t_ref.train.__main__"]
    for name, thing, owner in public(importlib.import_module(module))
}


def doc(thing: object) -> str:
    return inspect.cleandoc(thing.__doc__ or "")


def shape_rows(text: str) -> dict[str, str | None]:
    """Name to axes, of the rows of a Shapes section; names that share a row are taken apart."""
    section = re.search(r"^Shapes:\n((?: .*\n?)+)", text, re.M)
    found = {}
    for names, axes in re.findall(r"^ {4}(\S.*?): (?:``(.*?)``)?", section[1] if section else "", re.M):
        found |= {name: axes or None for name in names.split(", ")}
    return found


def axes_of(annotation: object) -> str | None:
    """The axes of an annotation by jaxtyping. In a union, or inside a list or tuple, there are others, too."""
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return annotation.dim_str.strip().replace("*lead", "...")
    return None


# the pages


def test_every_module_has_a_page_and_every_page_is_in_the_toc():
    assert sorted(in_the_toc()) == sorted(f"book/api/{page_of(module)}" for module in MODULES)
    assert set(PAGES) == {"index", *map(page_of, MODULES)}
    for module in MODULES:
        text = PAGES[page_of(module)]
        assert text.startswith(f"# {module}\n")
        assert "(../../notebooks/" in text, f"{module}: no link to a chapter"
    listed = re.search(r"\.\. modules::\n\n((?:   .*\n)+)", PAGES["index"])[1].split()
    assert [f"book/api/{page_of(module)}" for module in listed] == in_the_toc()


def test_every_module_is_documented_once():
    shown = re.findall(r"automodule:: (\S+)", "\n".join(PAGES.values()))
    assert sorted(shown) == sorted([*MODULES, "t2t_ref.train.__main__"])


@pytest.mark.parametrize("package", [t2t_ref, t2t_ref.train])
def test_every_public_name_is_defined_in_a_module_with_a_page(package):
    assert f".. public-names:: {package.__name__}\n" in PAGES["index"] + PAGES["train"]
    for name in package.__all__:
        thing = getattr(package, name)
        if name not in ("__version__", "RECIPES"):  # plain values
            assert ALL[f"{thing.__module__}.{name}"][0] is inspect.unwrap(thing)


def test_every_command_line_is_shown():
    doors = [
        path.relative_to(ROOT).with_suffix("").as_posix().removesuffix("/__main__").replace("/", ".")
        for path in (ROOT / "t2t_ref").rglob("*.py")
        if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")
    ]
    assert {"t2t_ref.train", "t2t_ref.evaluate", "t2t_ref.bench", "t2t_ref.experiments"} <= set(doors)
    shown = set(re.findall(r"command-line:: ([\w.]+)", "\n".join(PAGES.values())))
    assert {name.removesuffix(".__main__") for name in shown} == set(doors)


# the docstrings


def test_everything_public_has_a_docstring():
    assert len(ALL) > 300
    missing = [name for name, (thing, _) in ALL.items() if not doc(thing) and not name.endswith(".forward")]
    assert not missing


@pytest.mark.parametrize("name", ALL)
def test_blocks(name):
    """Their names are known, they come in one order, and a Shapes block speaks of arguments that are there."""
    thing, owner = ALL[name]
    text = doc(thing)
    order = re.findall(r"^([A-Z]\w+):$", text, re.M)
    assert order == [section for section in SECTIONS if section in order]
    assert not re.search(r"^(Shapes|Args|Units|Note|Raises|Source):.", text, re.M), (
        "a section begins on a line of its own"
    )
    rows = shape_rows(text)
    function = getattr(thing, "forward", thing.__init__) if isinstance(thing, type) else thing
    fields = set(getattr(thing, "__annotations__", {}))
    assert set(rows) <= set(inspect.signature(function).parameters) | fields | OTHER_NAMES

    # what the block says is what the annotations say, and these are checked while the tests run
    annotated = inspect.get_annotations(function)
    for argument, annotation in annotated.items():
        axes = axes_of(annotation)
        if axes and rows:
            assert argument in rows, f"no row for {argument}"
            assert rows[argument] in (axes, None)


def test_annotated_shapes_are_explained():
    """A forward by its class; what the package exports in a Shapes block; anything else in words at least."""
    exported = {inspect.unwrap(getattr(t2t_ref, name)) for name in t2t_ref.__all__ if name != "__version__"}
    assert any(thing in exported for thing, _ in ALL.values())
    for name, (thing, owner) in ALL.items():
        if inspect.isfunction(thing) and any(map(axes_of, inspect.get_annotations(thing).values())):
            if thing.__name__ == "forward":
                text = "\n".join(doc(base) for base in owner.__mro__[:-1] if base.__module__.startswith("t2t_ref"))
                assert "Shapes:\n" in text, name
            elif thing in exported:
                assert "Shapes:\n" in doc(thing), name


def raised(function: object) -> set[str]:
    """The names of the errors that leave the body of a function that raises them itself."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except OSError:  # a method that a record was given
        return set()

    def names(node: ast.AST) -> set[str]:
        if isinstance(node, ast.Raise):
            called = node.exc.func if isinstance(node.exc, ast.Call) else None
            return {called.id} if isinstance(called, ast.Name) else set()
        if isinstance(node, ast.Try):
            caught = " ".join(ast.unparse(handler.type) for handler in node.handlers if handler.type)
            inner = set().union(*map(names, node.body))
            inner = {name for name in inner if name not in caught and "Exception" not in caught}
            return inner.union(*map(names, [*node.handlers, *node.orelse, *node.finalbody]))
        return set().union(*map(names, ast.iter_child_nodes(node)))

    return names(tree)


def test_errors_are_named():
    """By the function that raises them, or by its class."""
    silent, seen = [], 0
    for name, (thing, owner) in ALL.items():
        doors = ("__init__", "__post_init__", "__len__")
        own = [vars(thing).get(door) for door in doors] if isinstance(thing, type) else [thing]
        text = doc(thing) + (doc(owner) if owner else "")
        for error in set().union(*(raised(function) for function in own if function)):
            seen += 1
            if error not in text:
                silent.append(f"{name}: {error}")
    assert seen > 60
    assert not silent


# the mark-up


def test_markup_of_a_docstring():
    text = """Cut an image (chapters 3 and 6; 2 * |x|, w_i, *all*). See :func:`grid_size`, --help.

    python -m t2t_ref.bench    runs

Shapes:
    image, mask: ``b c h w``
    return: ``b n d``, n windows,
        row by row

Raises:
    ValueError: if ``kernel`` is too large

Source:
    E. Author, 2021"""
    result = docstrings.markup(text.split("\n"))
    assert ":doc:`3 </notebooks/03-soft-split>` and :doc:`6 </notebooks/06-tokens-to-token>`" in result[0]
    assert result[0].endswith("; 2 \\* \\|x\\|, w_i, *all*). See :func:`grid_size`, ``--help``.")
    assert result[2:5] == [".. code-block:: text", "", "    python -m t2t_ref.bench    runs"]
    assert result[6:] == text.replace("    E. Author", "    \\E. Author").split("\n")[4:]


def test_fields_and_constants_have_their_comments():
    rows = docstrings.fields(t2t_ref.train.Recipe)
    assert ":``lr``: ``float = 5e-4`` at the top of its curve" in rows
    assert rows.index("**model**") < rows.index(":``img_size``: ``int = 224`` pixels")
    rows = docstrings.constants(importlib.import_module("t2t_ref.models.tokens_to_token"))
    assert rows[0].startswith(":``SPLITS``: ``((7, 4, 2), (3, 2, 1), (3, 2, 1))`` kernel, stride, padding; ")
