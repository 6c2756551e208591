"""The shape of t2t_ref, checked on its imports, those inside functions included.

Rooms lie above each other in the order of FLOORS. A module imports from its own room or from rooms below, never from
above, and no two modules import each other, by whatever way round. A folder that is opened from anywhere holds at most
MOST_ENTRIES, a file at most MOST_LINES.

    python tools/house.py       exit 1 if one is broken, and say where
"""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# from the ground up; a room is a folder or a file beside the folders
FLOORS = (
    ("arguments",),
    ("models",),
    ("data", "inspection"),
    ("weights",),
    ("create",),
    ("train",),
    ("bench", "experiments"),
    ("book",),
)
MOST_ENTRIES, MOST_LINES = 15, 450


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package by its full name."""
    found = {}
    for path in sorted((root / "t2t_ref").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a file imports, wherever in the file it does so."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{name.name}" for name in node.names}
            found |= inside & set(known) or {node.module}
    return found & set(known)


def room(module: str, path: Path) -> str:
    """The folder or file below t2t_ref that a module lies in. The package itself and its doors lie above all rooms."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    door = text.startswith(("The door ", "An older door"))
    return "above all" if door or module == "t2t_ref" else module.split(".")[1]


def problems(root: Path):
    """What breaks a rule, one line each."""
    known = modules(root)
    arrows = {module: imports(path, known) - {module} for module, path in known.items()}
    height = {name: floor for floor, names in enumerate((*FLOORS, ("above all",))) for name in names}
    rooms = {module: room(module, path) for module, path in known.items()}
    for module, below in arrows.items():
        if rooms[module] not in height:
            yield f"{module}: {rooms[module]} is on no floor; give it one in tools/house.py"
            continue
        for other in sorted(below):
            # the promised names, which `import t2t_ref` gives, are those of create and below
            there = "create" if other == "t2t_ref" else rooms[other]
            if there != rooms[module] and height.get(there, len(FLOORS)) >= height[rooms[module]]:
                yield f"{module} imports {other}, which does not lie below it"
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        yield "imports in a circle: " + " -> ".join(error.args[1])
    entries = {path.relative_to(root / "t2t_ref").parts[0] for path in known.values()} - {"__init__.py"}
    if len(entries) + 1 > MOST_ENTRIES:
        yield f"t2t_ref/ has {len(entries) + 1} entries, at most {MOST_ENTRIES} are allowed"
    for path in known.values():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MOST_LINES:
            yield f"{path.relative_to(root)} has {lines} lines, at most {MOST_LINES} are allowed"


if __name__ == "__main__":
    found = list(problems(ROOT))
    print("\n".join(found) or "every arrow points down, no circle, no crowded room")
    sys.exit(1 if found else 0)
