"""Do the chapters notice a mistake? Each of tools/planted.yml is put into a copy of the package and of the chapter's
own definition, then the chapter's cells are run, up to the first that fails. What no cell notices is missed.

    python tools/planted.py                       all of them; exit 1 if less than 95 % are caught
    python tools/planted.py --chapters 4 8        those of these chapters
    python tools/planted.py --fresh               forget what was found before

The tree is never edited: everything happens in a copy. What was found is kept in _build/planted.jsonl, and asked for
again only if the chapter, the package or the mistake has changed. Without a mistake the chapter has to run, or nothing
is learned from its failing.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jupytext
import yaml

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path("tools") / "planted.yml"
ENOUGH = 0.95
TIMEOUT = 900  # seconds, for one chapter
COPIED = ("t2t_ref", "book", "results", "tests/goldens")
LEFT = shutil.ignore_patterns("__pycache__", "*.ipynb", "*.pyc")


class Mistake(NamedTuple):
    chapter: int
    what: str
    file: str
    old: str
    new: str


def mistakes(root: Path) -> list[Mistake]:
    """The table, in the order of the chapters. An entry that lacks something is an error."""
    table = yaml.safe_load((root / TABLE).read_text(encoding="utf-8"))
    return [Mistake(chapter, **entry) for chapter, entries in sorted(table.items()) for entry in entries or []]


# ---- putting a mistake in


def pattern(code: str) -> re.Pattern:
    """Code as a pattern that cares neither for where lines break nor for the comma that a break brings along."""
    words = re.findall(r"\w+|[^\w\s]", code)
    return re.compile(r"(?:,?\s*(?=[)\]])|\s*)".join(map(re.escape, words)))


def enclosing(source: str, old: str) -> list[str]:
    """The definitions that a piece of code stands in, from the outermost on: class and method, or function."""
    found = list(pattern(old).finditer(source))
    if len(found) != 1:
        raise ValueError(f"{old!r} is there {len(found)} times, expected once")
    line = source[: found[0].start()].count("\n") + 1
    kinds = (ast.FunctionDef, ast.ClassDef)
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
    return [node.name for node in nodes if node.lineno <= line <= node.end_lineno]


def spoil(code: str, mistake: Mistake) -> str:
    """Code with the mistake in it. What was on several lines may end up on one."""
    return pattern(mistake.old).sub(lambda _: mistake.new, code)


def spoil_chapter(text: str, mistake: Mistake, names: list[str]) -> tuple[str, int]:
    """The chapter with the mistake in its own definitions, and in how many cells it is.

    A cell defines the class or function, or one of its methods by itself: a class may be shown in pieces.
    """
    if not names:  # a line of a table, or the like
        return text, 0
    notebook = jupytext.reads(text, fmt="md:myst")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    spoiled = spoil_cells([cell.source for cell in code], mistake, names)
    changed = sum(cell.source != source for cell, source in zip(code, spoiled, strict=True))
    for cell, source in zip(code, spoiled, strict=True):
        cell.source = source
    return jupytext.writes(notebook, fmt="md:myst"), changed


def spoil_cells(sources: list[str], mistake: Mistake, names: list[str]) -> list[str]:
    """Cells of code, with the mistake in those that define what is named."""
    methods = "|".join(map(re.escape, names[1:]))
    definition = rf"^(?:class|def) {re.escape(names[0])}\b" + (rf"|^def (?:{methods})\(self\b" if methods else "")
    return [spoil(source, mistake) if re.search(definition, source, re.M) else source for source in sources]


def chapter_of(root: Path, number: int) -> Path | None:
    return next(iter(sorted((root / "book").glob(f"{number:02}-*.md"))), None)


def plant(root: Path, copy: Path, mistake: Mistake | None, chapter: Path) -> int:
    """Make ``copy`` what the tree is, with the mistake; say in how many cells of the chapter it is, too."""
    text, changed = chapter.read_text(encoding="utf-8"), 0
    for name in COPIED:
        shutil.rmtree(copy / name, ignore_errors=True)
        if (root / name).exists():
            shutil.copytree(root / name, copy / name, ignore=LEFT)
    (copy / "notebooks").mkdir(exist_ok=True)
    if mistake:
        source = (root / mistake.file).read_text(encoding="utf-8")
        text, changed = spoil_chapter(text, mistake, enclosing(source, mistake.old))
        (copy / mistake.file).write_text(spoil(source, mistake), encoding="utf-8")
    (copy / "book" / chapter.name).write_text(text, encoding="utf-8")
    return changed


# ---- running a chapter


def run_cells(source: Path) -> int:
    """The number of the first code cell that fails, counted from 1, or 0. For a process of its own."""
    import matplotlib
    from IPython.core.interactiveshell import InteractiveShell

    matplotlib.use("Agg")
    shell = InteractiveShell.instance()
    cells = [cell for cell in jupytext.read(source, fmt="md:myst").cells if cell.cell_type == "code"]
    for number, cell in enumerate(cells, 1):
        result = shell.run_cell(cell.source, store_history=False)
        if not result.success:
            error = result.error_before_exec or result.error_in_exec
            first = (str(error).strip().splitlines() or [""])[0]
            print(f"\nPLANTED {json.dumps([number, f'{type(error).__name__}: {first}'[:120]])}", flush=True)
            return number
    print(f"\nPLANTED {json.dumps([0, ''])}", flush=True)
    return 0


def first_failure(copy: Path, chapter: Path) -> tuple[int, str]:
    """The first cell of a chapter that fails in the copy, 0 if none does, and its error."""
    command = [sys.executable, str(Path(__file__).resolve()), "--run", str(copy / "book" / chapter.name)]
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "IPYTHONDIR": str(copy / "ipython")}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "NO_COLOR": "1"}
    try:
        done = subprocess.run(
            command, cwd=copy / "notebooks", env=environment, capture_output=True, text=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return -1, f"not done after {TIMEOUT} seconds"
    said = re.findall(r"^PLANTED (.*)$", done.stdout, re.M)
    return tuple(json.loads(said[-1])) if said else (-1, f"ended by itself: {done.stderr.strip()[-80:]}")


# ---- what is known already


def fingerprint(root: Path, chapter: Path, mistake: Mistake | None) -> str:
    """Changes with the chapter, with the package and with the mistake."""
    digest = hashlib.sha256(repr(mistake).encode())
    for path in [chapter, *sorted((root / "t2t_ref").rglob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def known(state: Path) -> dict[str, list]:
    lines = state.read_text(encoding="utf-8").splitlines() if state.exists() else []
    return dict(json.loads(line) for line in lines)


def examine(root: Path, chosen: list[Mistake], state: Path) -> Iterator[tuple[Mistake | None, Path, int, str, int]]:
    """(mistake, chapter, first failing cell, its error, cells that were changed); no mistake stands for a clean run."""
    found = known(state)
    state.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for number in dict.fromkeys(mistake.chapter for mistake in chosen):
            chapter = chapter_of(root, number)
            for mistake in [None, *(mistake for mistake in chosen if mistake.chapter == number)]:
                key = fingerprint(root, chapter, mistake)
                if key not in found:
                    changed = plant(root, Path(folder), mistake, chapter)
                    found[key] = [*first_failure(Path(folder), chapter), changed]
                    with state.open("a", encoding="utf-8") as lines:
                        lines.write(json.dumps([key, found[key]]) + "\n")
                yield mistake, chapter, *found[key]
                if mistake is None and found[key][0] != 0:
                    break  # a chapter that does not run by itself would catch everything


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chapters", type=int, nargs="*", help="their numbers; all if not given")
    parser.add_argument("--fresh", action="store_true", help="forget what was found before")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.run:
        return 1 if run_cells(options.run) else 0
    state = root / "_build" / "planted.jsonl"
    if options.fresh:
        state.unlink(missing_ok=True)
    chosen = [m for m in mistakes(root) if not options.chapters or m.chapter in options.chapters]
    for number in options.chapters or []:
        if not any(mistake.chapter == number for mistake in chosen):
            print(f"chapter {number}: no mistake is planted")
    chosen = [mistake for mistake in chosen if chapter_of(root, mistake.chapter)]
    caught = broken = 0
    for mistake, chapter, cell, error, changed in examine(root, chosen, state):
        if mistake is None:
            if cell:
                broken += 1
                print(f"BROKEN  {chapter.stem}: fails without a mistake, cell {cell}: {error}", flush=True)
            continue
        caught += cell != 0
        both = "" if changed else " (in the package alone)"
        outcome = f"caught by cell {cell}: {error}" if cell else "no cell fails"
        print(f"{'caught' if cell else 'MISSED':8}{chapter.stem}: {mistake.what}{both}: {outcome}", flush=True)
    share = caught / len(chosen) if chosen else 1
    print(f"{caught} of {len(chosen)} planted mistakes caught: {share:.0%}, at least {ENOUGH:.0%} are asked for")
    return 1 if broken or share < ENOUGH else 0


if __name__ == "__main__":
    sys.exit(main())
