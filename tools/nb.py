"""Chapters in two forms: book/NN-name.md is written by hand, notebooks/NN-name.ipynb carries the outputs.

    python tools/nb.py sync [NAME ...]  write the notebooks' cells from the Markdown, keep outputs that still hold
    python tools/nb.py run [NAME ...]   sync, then run the notebooks that lack outputs; or just those named; or "all"
    python tools/nb.py check            change nothing; exit 1 if a notebook has drifted or lacks outputs

The direction is always from the Markdown to the notebook. Which file is newer never matters: in a fresh clone all
files are as old as each other.
"""

import hashlib
import os
import re
import sys
import time
from pathlib import Path

import jupytext
import nbformat

ROOT = Path(__file__).resolve().parents[1]
METADATA = ("kernelspec", "accelerator", "colab")
LANGUAGE = {"name": "python", "pygments_lexer": "ipython3"}  # without the lexer, %pip is a warning in the book
MAX_OUTPUT = 400_000  # characters in one stored output
MAX_LINE = 84  # characters that fit the column of code on a page
NOT_PORTABLE = {  # Colab and GitHub show these raw; the last one fails in the book
    r"^:{3,}": "a ::: directive",
    r"^`{3,}\{": "a ``` directive",
    r"^\([\w-]+\)=$": "a (label)=",
    r"\{[\w:]+\}`": "a {role}`...`",
    r"^\$\$ ?\([\w-]+\)$": "an equation label",
    r"\[\^\w+\]": "a footnote",
    r"\$\$[^$]*\\\\[^$]*\\tag": "a numbered equation of several lines",
}


def chapters(root: Path) -> list[tuple[Path, Path]]:
    """(Markdown, notebook) of every chapter."""
    sources = sorted((root / "book").glob("[0-9][0-9]-*.md"))
    return [(source, root / "notebooks" / f"{source.stem}.ipynb") for source in sources]


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def code_that_counts(notebook) -> list[str]:
    """The code on which outputs depend. The set-up cell (its output ignored) does nothing outside Colab."""
    cells = code_cells(notebook)
    return [cell.source for cell in cells if "nbval-ignore-output" not in cell.metadata.get("tags", [])]


def from_markdown(source: Path):
    """The notebook that the Markdown describes: no outputs, cell ids made from the text."""
    notebook = jupytext.read(source, fmt="md:myst")
    kept = {key: notebook.metadata[key] for key in METADATA if key in notebook.metadata}
    notebook.metadata = nbformat.from_dict(kept | {"language_info": LANGUAGE})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        digest = hashlib.sha1(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:8]
        seen[digest] = seen.get(digest, 0) + 1
        cell["id"] = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
    return notebook


def merged(source: Path, path: Path):
    """The notebook of ``source`` with the outputs stored in ``path``, unless any code has changed since."""
    new = from_markdown(source)
    if not path.exists():
        return new
    old = nbformat.read(path, as_version=4)
    # an output depends on every cell above it, so one changed cell makes all outputs doubtful
    if code_that_counts(old) != code_that_counts(new) or len(code_cells(old)) != len(code_cells(new)):
        return new
    for cell, stored in zip(code_cells(new), code_cells(old), strict=True):
        cell.outputs, cell.execution_count = stored.outputs, stored.execution_count
    return new


def execute(notebook, folder: Path, name: str) -> None:
    from nbclient import NotebookClient

    start = time.perf_counter()
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # as in the tests: two that wait for each other crawl
        os.environ.setdefault(variable, "1")
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,  # else a busy machine stores one print as two outputs
        resources=resources,
    )
    client.execute()
    notebook.metadata["language_info"] = LANGUAGE
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    print(f"ran {name} in {time.perf_counter() - start:.1f} s")


def text_of(notebook) -> str:
    return nbformat.writes(notebook, version=4).rstrip("\n") + "\n"


def write_whole(path: Path, text: str) -> None:
    """Write a file beside the old one, then put it in its place: a failure leaves the old one as it was."""
    draft = path.with_name(f"{path.name}.part")
    try:
        draft.write_text(text, encoding="utf-8", newline="\n")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write(notebook, path: Path) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text_of(notebook):
        write_whole(path, text_of(notebook))
        print("wrote", path.name)


def has_run(notebook) -> bool:
    """Every code cell was run, from top to bottom, in one go. nbval does not compare a cell without a count."""
    counts = [cell.execution_count for cell in code_cells(notebook)]
    return counts == list(range(1, len(counts) + 1))


def problems_of_outputs(notebook, name: str):
    for number, cell in enumerate(code_cells(notebook)):
        pictures = [kind for out in cell.outputs for kind in out.get("data", {}) if kind.startswith("image/")]
        hidden = "remove-output" in cell.metadata.get("tags", [])
        if pictures and not hidden and not cell.metadata.get("mystnb", {}).get("image", {}).get("alt"):
            yield f"{name}: the figure of code cell {number} has no alt text (mystnb: image: alt)"
        for out in cell.outputs:
            if out.output_type == "error" or out.get("name") == "stderr":
                yield f"{name}: code cell {number} stores an error or something on stderr"
            if len(str(out)) > MAX_OUTPUT:
                yield f"{name}: code cell {number} stores an output of {len(str(out))} characters"


def problems(root: Path):
    """What ``check`` finds, one line each."""
    for source, path in chapters(root):
        if not path.exists():
            yield f"{source.name}: no notebook; run 'make notebooks'"
            continue
        stored = nbformat.read(path, as_version=4)
        nbformat.validate(stored)
        if text_of(merged(source, path)) != path.read_text(encoding="utf-8"):
            yield f"{path.name}: differs from {source.name}; run 'make notebooks'"
        if not has_run(stored):
            yield f"{path.name}: code cells without a stored run, which nbval would not compare"
        for cell in stored.cells:
            for pattern, what in NOT_PORTABLE.items():
                if cell.cell_type == "markdown" and re.search(pattern, cell.source, re.M):
                    yield f"{source.name}: {what} in {cell.source[:50]!r}, which Colab or the book does not show"
        for cell in code_cells(stored):
            folded = {"remove-cell", "hide-input", "hide-cell"} & set(cell.metadata.get("tags", []))
            for line in [] if folded else cell.source.splitlines():
                if len(line) > MAX_LINE:
                    yield f"{source.name}: more than {MAX_LINE} characters in {line.strip()[:50]!r}"
        yield from problems_of_outputs(stored, path.name)
    known = {path for _, path in chapters(root)}
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        if path not in known:
            yield f"{path.name}: no Markdown source"


def main(arguments: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):  # a chapter's letters may not be among those of the terminal
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    command, names = arguments[0], arguments[1:]
    if command not in ("sync", "run", "check"):
        print(__doc__)
        return 2
    unknown = set(names) - {"all"} - {source.stem for source, _ in chapters(ROOT)}
    if unknown:
        print(f"no chapter called {', '.join(sorted(unknown))} in book/")
        return 2
    if command == "check":
        found = list(problems(ROOT))
        print("\n".join(found) or f"{len(chapters(ROOT))} chapters and their notebooks agree")
        return 1 if found else 0
    for source, path in chapters(ROOT):
        if names and not {source.stem, "all"} & set(names):
            continue
        notebook = merged(source, path)
        if command == "run" and (names or not has_run(notebook)):
            execute(notebook, path.parent, source.stem)
        write(notebook, path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["check"]))
