"""What Colab needs of a notebook, as far as its text shows it. tools/colab_like.sh runs them all."""

import ast
import re
import sys
import tomllib
from functools import cache
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MODULES = {"scikit-learn": "sklearn", "pillow": "PIL"}  # where it is not the name of the distribution
BROUGHT = {"matplotlib": {"numpy", "PIL"}}  # what a distribution needs itself


def distributions(needs: list[str]) -> set[str]:
    names = {re.match(r"[\w-]+", need)[0] for need in needs}
    return {MODULES.get(name, name) for name in names} | {x for name in names for x in BROUGHT.get(name, ())}


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PLAIN = distributions(PROJECT["dependencies"]) | {"t2t_ref"}
EXTRAS = {name: distributions(needs) for name, needs in PROJECT["optional-dependencies"].items()}
WITHOUT_A_BOX = set()
TRAIN_ALONE = EXTRAS["train"] - EXTRAS["book"]


@cache
def notebook_at(path: Path):
    return nbformat.read(path, as_version=4)


def python_of(source: str) -> str:
    """A cell without the lines that are IPython's."""
    return re.sub(r"(?m)^( *)[%!].*$", r"\1pass", source)


def code_cells(path: Path) -> list[ast.Module]:
    return [ast.parse(python_of(cell.source)) for cell in notebook_at(path).cells if cell.cell_type == "code"]


def imported_by(tree: ast.AST) -> set[str]:
    """The modules that a piece of code imports, in functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@cache
def imported_by_file(file: Path) -> frozenset[str]:
    return frozenset(imported_by(ast.parse(file.read_text(encoding="utf-8")))) if file.exists() else frozenset()


def with_the_package(modules: set[str]) -> set[str]:
    """The first names of these modules, and of all that the modules of the package among them may import in turn."""
    seen, waiting = set(), set(modules)
    while waiting:
        seen.add(module := waiting.pop())
        if module.startswith("t2t_ref."):
            place = ROOT.joinpath(*module.split("."))
            waiting |= (imported_by_file(place.with_suffix(".py")) | imported_by_file(place / "__init__.py")) - seen
    return {module.split(".")[0] for module in seen}


def moves_to_a_device(tree: ast.AST, trains: bool) -> list[str]:
    """Code that asks for another device than the CPU or meta, which knows shapes alone.

    With ``trains``, ``fit`` is that of t2t_ref.train, which takes a GPU where there is one.
    """
    found = []
    handed_on = {
        f"{argument.arg}" for node in ast.walk(tree) if isinstance(node, ast.arguments) for argument in node.args
    }
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, ast.Call | ast.Attribute) else ""
        if isinstance(node, ast.Attribute) and node.attr in ("cuda", "mps", "xpu", "set_default_device"):
            found.append(text)
        if isinstance(node, ast.Call):
            devices = [keyword.value for keyword in node.keywords if keyword.arg == "device"]
            if ast.unparse(node.func) == "torch.device":
                devices += node.args[:1]
            theirs = r"'cpu'|'meta'|.*\.device"  # or the device of another tensor
            asked = [ast.unparse(device) for device in devices]
            found += [text for device in asked if device not in handed_on and not re.fullmatch(theirs, device)]
            on_the_cpu = any(k.arg == "cpu" and ast.unparse(k.value) == "True" for k in node.keywords)
            if trains and ast.unparse(node.func) == "fit" and not on_the_cpu:
                found.append(text)
    return found


def runs_unasked(tree: ast.Module) -> ast.Module:
    """The cell without what stands behind a switch that is off: the reader who turns it on asks for the device."""
    kept = [
        statement
        for statement in tree.body
        if not (isinstance(statement, ast.If) and re.fullmatch(r"(RUN|USE)_[A-Z0-9_]+", ast.unparse(statement.test)))
    ]
    return ast.Module(kept, [])


def test_the_set_up_cell_names_the_branch_that_is_published():
    configuration = (ROOT / "_config.yml").read_text(encoding="utf-8")
    assert "\n  branch: main\n" in configuration and '\n  path_to_book: ""\n' in configuration
    assert "colab_url: https://colab.research.google.com\n" in configuration
    chapters = (ROOT / "book").glob("[0-9][0-9]-*.md")
    assert [path.stem for path in NOTEBOOKS] == sorted(path.stem for path in chapters)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_asks_for_a_gpu(self, path):
        metadata = notebook_at(path).metadata
        assert metadata.accelerator == "GPU" and metadata.colab.gpuType == "T4"

    def test_the_first_cell_installs_what_the_chapter_imports(self, path):
        set_up = notebook_at(path).cells[0]
        assert set(set_up.metadata.tags) == {"remove-cell", "nbval-ignore-output"}
        (extras,) = re.findall(r'%pip install -q "t2t-ref\[([\w,]+)\] @ git\+\{REPOSITORY\}@main"', set_up.source)
        extras = extras.split(",")

        own = set.union(*map(imported_by, code_cells(path)))
        first_names = {module.split(".")[0] for module in own} - set(sys.stdlib_module_names)
        assert first_names <= PLAIN.union(*(EXTRAS[extra] for extra in extras))
        assert ("train" in extras) == bool(
            with_the_package(own) & TRAIN_ALONE
        )  # or the set-up takes longer than it must

    @pytest.mark.parametrize("address, installs", [("YOUR_NAME_HERE/t2t-ref", False), ("some-owner/a_name", True)])
    def test_the_first_cell_refuses_the_placeholder_on_colab_alone(self, path, address, installs, monkeypatch):
        source = re.sub(r"%pip install.*", "installed = True", notebook_at(path).cells[0].source)
        source = re.sub(r"https://github.com/[^\"]+", f"https://github.com/{address}", source)
        elsewhere, on_colab = {}, {}
        exec(source, elsewhere)
        assert "installed" not in elsewhere
        monkeypatch.setitem(sys.modules, "google.colab", object())
        if installs:
            exec(source, on_colab)
            assert on_colab["installed"]
        else:
            with pytest.raises(RuntimeError, match="make address REPO=owner/name"):
                exec(source, on_colab)

    def test_stays_on_one_device_whether_or_not_there_is_a_gpu(self, path):
        cells = code_cells(path)
        trains = "t2t_ref.train.fit" in set.union(*map(imported_by, cells))
        assert [found for cell in cells for found in moves_to_a_device(runs_unasked(cell), trains)] == []

    def test_has_something_to_change(self, path):
        texts = [cell.source for cell in notebook_at(path).cells if cell.cell_type == "markdown"]
        boxes = [text for text in texts if "> **Change this and see.** " in text]
        if path.stem in WITHOUT_A_BOX:
            assert boxes == []
            return
        assert len(boxes) == 1
        before, _, after = "\n".join(texts).partition(boxes[0])
        assert "\n## Exercises\n" in before and "\n## Recap\n" in boxes[0] + after


@pytest.mark.parametrize(
    "code, moves",
    [
        ("model.cuda()", True),
        ("torch.cuda.is_available()", True),
        ("torch.ones(2, device='cuda:0')", True),
        ("with torch.device(name): pass", True),
        ("fit(recipe, data=data)", True),
        ("fit(recipe, data=data, cpu=True)", False),
        ("with torch.device('meta'): pass", False),
        ("def f(device=None): return torch.ones(2, device=device)", False),  # the caller's
        ("device = 'cuda'; torch.ones(2, device=device)", True),
        ("torch.ones(2, device=weight.device)", False),
        ("RUN_LONG = False\nif RUN_LONG:\n    fit(recipe)", False),
        ("if ready:\n    fit(recipe)", True),
    ],
)
def test_a_second_device_is_found(code, moves):
    assert bool(moves_to_a_device(runs_unasked(ast.parse(code)), trains=True)) == moves


def test_needs_are_found_through_the_package():
    for module, needed in (("t2t_ref.experiments", True), ("t2t_ref.bench", False), ("t2t_ref.train.fit", True)):
        modules = {module, "t2t_ref.train"} if ".train." in module else {module}
        assert bool(with_the_package(modules) & TRAIN_ALONE) == needed
