"""Two rules of this project, checked on the syntax tree.

Einops only: in t2t_ref/ and in the chapters every change of layout is an einops pattern. Methods and functions that
change the layout of a tensor by position (reshape, view, transpose, indexing with None, ...) are refused.

Mirror: a definition that a chapter shows whole (cell tag "mirror") is the package's definition, comments and docstrings
aside. If several modules define that name, a second tag says which is meant: "mirror-backbone" for models/backbone.py.

    python tools/rules.py       exit 1 if one is broken, and say where
"""

import ast
import re
import sys
from pathlib import Path

import jupytext

ROOT = Path(__file__).resolve().parents[1]
LAYOUT = frozenset(
    "reshape reshape_as view view_as permute transpose transpose_ t t_ swapaxes swapdims movedim moveaxis rollaxis "
    "flatten unflatten ravel squeeze squeeze_ unsqueeze unsqueeze_ expand expand_as expand_dims broadcast_to repeat "
    "repeat_interleave tile T mT H mH adjoint atleast_1d atleast_2d atleast_3d Flatten Unflatten newaxis".split()
)


def layout_changes(source: str) -> list[tuple[int, str]]:
    """(line, name) of every change of layout that is not an einops pattern."""
    tree = ast.parse(re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", source))  # notebook magics are not Python
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in LAYOUT:
            if not (isinstance(node.value, ast.Name) and node.value.id == "einops"):
                found.append((node.lineno, f".{node.attr}"))
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("einops"):
            found += [(node.lineno, f"import {a.name}") for a in node.names if a.name in LAYOUT]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            names = [a.value for a in node.args if isinstance(a, ast.Constant)]
            found += [(node.lineno, f"getattr {name!r}") for name in names if name in LAYOUT]
        elif isinstance(node, ast.Subscript):
            items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            if any(isinstance(item, ast.Constant) and item.value is None for item in items):
                found.append((node.lineno, "[None]"))
    return found


def definitions(source: str) -> dict[str, str]:
    """Top-level functions and classes by name, as text that leaves out comments and docstrings."""
    found = {}
    for node in ast.parse(source).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            continue
        for inner in ast.walk(node):
            if isinstance(inner, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(inner) is not None:
                inner.body = inner.body[1:] or [ast.Pass()]
        found[node.name] = ast.unparse(node)
    return found


def chapter_cells(source: Path) -> list:
    return [cell for cell in jupytext.read(source, fmt="md:myst").cells if cell.cell_type == "code"]


def mirror_problems(cell, package: dict[str, dict[str, str]]):
    """What is wrong with a cell tagged mirror; package holds module and text of every definition, by name."""
    meant = [tag.removeprefix("mirror") for tag in cell.metadata["tags"] if tag.startswith("mirror-")]
    shown = definitions(cell.source)
    if not shown:
        yield "a cell tagged mirror defines nothing"
    for name, text in shown.items():
        homes = {
            module: there
            for module, there in package.get(name, {}).items()
            if all(f"-{module}".replace(".", "-").endswith(tag) for tag in meant)
        }
        if not homes:
            yield f"{name}, tagged mirror{''.join(meant)}, is not in t2t_ref"
        elif len(homes) > 1:
            yield f"{name}, tagged mirror, is in {' and '.join(homes)}: say which one is meant by a tag mirror-MODULE"
        elif text not in homes.values():
            yield f"{name}, tagged mirror, differs from t2t_ref.{next(iter(homes))}"


def problems(root: Path):
    package: dict[str, dict[str, str]] = {}
    for path in sorted((root / "t2t_ref").rglob("*.py")):
        module = ".".join(path.relative_to(root / "t2t_ref").with_suffix("").parts)
        for name, text in definitions(path.read_text(encoding="utf-8")).items():
            package.setdefault(name, {})[module] = text
        for line, name in layout_changes(path.read_text(encoding="utf-8")):
            yield f"{path.relative_to(root)}:{line}: {name} changes a layout; write an einops pattern"
    for source in sorted((root / "book").glob("[0-9][0-9]-*.md")):
        for cell in chapter_cells(source):
            for line, name in layout_changes(cell.source):
                text = cell.source.splitlines()[line - 1].strip()
                yield f"{source.relative_to(root)}: {name} in {text!r} changes a layout; write an einops pattern"
            if "mirror" in cell.metadata.get("tags", []):
                yield from (f"{source.relative_to(root)}: {what}" for what in mirror_problems(cell, package))


if __name__ == "__main__":
    found = list(problems(ROOT))
    print("\n".join(found) or "einops patterns only; mirrored definitions agree with the package")
    sys.exit(1 if found else 0)
