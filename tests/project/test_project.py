"""The project around the package: address, pairing, rules, figures, and that each of these checks can fail."""

import ast
import base64
import io
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import address
import nb
import nbformat
import pytest
import rules

import t2t_ref

ROOT = Path(__file__).resolve().parents[2]
figures_differ = runpy.run_path(str(ROOT / "conftest.py"))["figures_differ"]  # several files have this name
CHAPTER = """---
kernelspec:
  name: python3
  display_name: Python 3
---

```{code-cell}
:tags: [remove-cell, nbval-ignore-output]

REPOSITORY = "https://github.com/old-owner/old.name"
```

# A chapter

```{code-cell}
print(1 + 1)
```
"""


@pytest.fixture
def project(tmp_path):
    """A small project with one executed chapter."""
    for name in ("book", "notebooks", "t2t_ref"):
        (tmp_path / name).mkdir()
    (tmp_path / "_config.yml").write_text(
        "repository:\n  url: https://github.com/old-owner/old.name\n", encoding="utf-8"
    )
    (tmp_path / "README.md").write_text(
        "https://github.com/old-owner/old.name/actions https://old-owner.github.io/old.name/ "
        "https://colab.research.google.com/github/old-owner/old.name/blob github.com/old-owner/old.name-two",
        encoding="utf-8",
    )
    (tmp_path / "t2t_ref" / "piece.py").write_text(
        'def half(x):\n    """Doc."""\n    return x / 2  # why\n', encoding="utf-8"
    )
    source = tmp_path / "book" / "01-a.md"
    source.write_text(CHAPTER, encoding="utf-8")
    notebook = nb.from_markdown(source)
    for count, cell in enumerate(nb.code_cells(notebook), start=1):
        cell.execution_count = count
    nb.code_cells(notebook)[1].outputs = [nbformat.v4.new_output("stream", name="stdout", text="2\n")]
    (tmp_path / "notebooks" / "01-a.ipynb").write_text(nb.text_of(notebook), encoding="utf-8")
    return tmp_path


# the address


def test_every_place_has_the_address_of_the_configuration():
    repository = address.current(ROOT)
    name = repository.split("/")[1]
    texts = {path.name: path.read_text(encoding="utf-8") for path in address.places(ROOT)}
    texts |= {path.name: path.read_text(encoding="utf-8") for _, path in nb.chapters(ROOT)}
    for needed in ("README.md", "CITATION.cff", "pyproject.toml", *(n for n in texts if re.match(r"\d\d-", n))):
        assert f"github.com/{repository}" in texts[needed], needed
    for where, text in texts.items():
        for found in re.findall(rf"(?:github(?:\.com)?/)([\w.-]+/{re.escape(name)})(?![\w-])", text):
            assert found == repository, where


def test_address_is_rewritten_everywhere_and_outputs_stay(project, monkeypatch, capsys):
    monkeypatch.setattr(nb, "ROOT", project)
    assert address.main(["new-owner/new_name.x"]) == 0
    assert address.current(project) == "new-owner/new_name.x"
    assert (project / "README.md").read_text(encoding="utf-8") == (
        "https://github.com/new-owner/new_name.x/actions https://new-owner.github.io/new_name.x/ "
        "https://colab.research.google.com/github/new-owner/new_name.x/blob github.com/old-owner/old.name-two"
    )
    stored = nbformat.read(project / "notebooks" / "01-a.ipynb", as_version=4)
    set_up, code = nb.code_cells(stored)
    assert "new-owner/new_name.x" in set_up.source
    assert code.outputs[0].text == "2\n"
    assert list(nb.problems(project)) == []


@pytest.mark.parametrize(
    "wrong", [[], [""], ["owner"], ["own er/name"], ["own_er/name"], ["a/b/c"], ["-a/b"], ["a/b", "c"]]
)
def test_a_wrong_address_changes_nothing(project, monkeypatch, capsys, wrong):
    monkeypatch.setattr(nb, "ROOT", project)
    before = (project / "README.md").read_text(encoding="utf-8")
    assert address.main(wrong) == 2
    assert "expected the address as owner/name" in capsys.readouterr().out
    assert (project / "README.md").read_text(encoding="utf-8") == before


def test_the_version_is_the_same_everywhere():
    assert f"version: {t2t_ref.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(
        rf"^## {re.escape(t2t_ref.__version__)}", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M
    )


# text and notebooks


def test_chapters_and_notebooks_agree():
    assert list(nb.problems(ROOT)) == []


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda text: text.replace("A chapter", "A chapter on"), "differs from 01-a.md"),
        (lambda text: text.replace("1 + 1", "1 + 2"), "differs from 01-a.md"),
        (lambda text: text + "\n```{note}\nhello\n```\n", "a ``` directive"),
        (lambda text: text + "\nsee {ref}`there`\n", "a {role}"),
        (lambda text: text + "\n$$a \\\\ b \\tag{1}$$\n", "a numbered equation of several lines"),
    ],
)
def test_drift_is_found(project, change, complaint):
    assert list(nb.problems(project)) == []
    source = project / "book" / "01-a.md"
    source.write_text(change(source.read_text(encoding="utf-8")), encoding="utf-8")
    if "differs" not in complaint:  # bring the notebook into step, so that only the syntax is wrong
        nb.write(nb.merged(source, project / "notebooks" / "01-a.ipynb"), project / "notebooks" / "01-a.ipynb")
    assert complaint in "\n".join(nb.problems(project))


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda cell: cell.update(execution_count=None), "without a stored run"),
        (lambda cell: cell.outputs.append(nbformat.v4.new_output("stream", name="stderr", text="!")), "on stderr"),
        (
            lambda cell: cell.outputs.append(nbformat.v4.new_output("display_data", {"image/png": "AA"})),
            "no alt text",
        ),
        (lambda cell: cell.outputs[0].update(text="x" * nb.MAX_OUTPUT), "characters"),
    ],
)
def test_bad_outputs_are_found(project, spoil, complaint):
    path = project / "notebooks" / "01-a.ipynb"
    stored = nbformat.read(path, as_version=4)
    spoil(nb.code_cells(stored)[1])
    path.write_text(nb.text_of(stored), encoding="utf-8")
    assert complaint in "\n".join(nb.problems(project))


def test_a_notebook_without_text_is_found(project):
    shutil.copy(project / "notebooks" / "01-a.ipynb", project / "notebooks" / "02-b.ipynb")
    assert "02-b.ipynb: no Markdown source" in list(nb.problems(project))


def test_changed_code_drops_the_outputs_and_changed_text_keeps_them(project):
    source, path = project / "book" / "01-a.md", project / "notebooks" / "01-a.ipynb"
    source.write_text(CHAPTER.replace("A chapter", "Another"), encoding="utf-8")
    assert nb.code_cells(nb.merged(source, path))[1].outputs
    source.write_text(CHAPTER.replace("1 + 1", "1 + 2"), encoding="utf-8")
    assert not nb.code_cells(nb.merged(source, path))[1].outputs


# einops only, mirror


def test_the_rules_hold():
    assert list(rules.problems(ROOT)) == []


@pytest.mark.parametrize(
    "source",
    [
        "x.view(2, 3)",
        "x.reshape(-1)",
        "torch.transpose(x, 0, 1)",
        "x.T",
        "x.mT @ y",
        "x[:, None]",
        "x[None]",
        "x[..., np.newaxis]",
        "nn.Flatten()",
        "from torch import squeeze",
        "x.expand(3, -1).repeat(2, 1)",
        "getattr(x, 'permute')(1, 0)",
        "%pip install a\nx.unsqueeze(0)",
        "np.repeat(x, 2)",
    ],
)
def test_layout_changes_are_found(source):
    assert rules.layout_changes(source)


@pytest.mark.parametrize(
    "source",
    [
        "rearrange(x, 'h w -> w h')",
        "repeat(x, 'h -> h w', w=3)",
        "einops.repeat(x, 'h -> h w', w=3)",
        "from einops import repeat",
        "from einops.layers.torch import Rearrange",
        "x[:, 0], x[1:], d['view']",
        "f(None)",
    ],
)
def test_einops_is_welcome(source):
    assert not rules.layout_changes(source)


@pytest.mark.parametrize(
    "body, complaint",
    [
        ('def half(x):\n    """Other words."""\n    return x / 2  # other reason', None),
        ("def half(x):\n    return x / 3", "half, tagged mirror, differs from t2t_ref"),
        ("def third(x):\n    return x / 3", "third, tagged mirror, is not in t2t_ref"),
        ("x = 1", "defines nothing"),
    ],
)
def test_mirror_cells(project, body, complaint):
    source = project / "book" / "01-a.md"
    source.write_text(CHAPTER + f"\n```{{code-cell}}\n:tags: [mirror]\n\n{body}\n```\n", encoding="utf-8")
    found = "\n".join(rules.problems(project))
    assert complaint in found if complaint else not found


@pytest.mark.parametrize(
    "tags, half, complaint",
    [
        ("mirror", 2, "half, tagged mirror, is in models.others and piece: say which one"),
        ("mirror, mirror-piece", 2, None),
        ("mirror, mirror-others", 3, None),
        ("mirror, mirror-models-others", 3, None),
        ("mirror, mirror-others", 2, "half, tagged mirror, differs from t2t_ref.models.others"),
        ("mirror, mirror-elsewhere", 2, "half, tagged mirror-elsewhere, is not in t2t_ref"),
    ],
)
def test_a_name_in_two_modules_is_shown_with_its_module(project, tags, half, complaint):
    (project / "t2t_ref" / "models").mkdir()
    (project / "t2t_ref" / "models" / "others.py").write_text("def half(x):\n    return x / 3\n", encoding="utf-8")
    source = project / "book" / "01-a.md"
    body = f"def half(x):\n    return x / {half}"
    source.write_text(CHAPTER + f"\n```{{code-cell}}\n:tags: [{tags}]\n\n{body}\n```\n", encoding="utf-8")
    found = "\n".join(rules.problems(project))
    assert complaint in found if complaint else not found


# figures


def png(draw):
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (320, 320), "white")
    draw(ImageDraw.Draw(picture))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return [{"data": {"image/png": base64.b64encode(buffer.getvalue()).decode()}}]


def test_another_curve_is_seen_and_a_thinner_line_is_not():
    thick = png(lambda draw: draw.line([(0, 300), (300, 0)], fill="black", width=4))
    thin = png(lambda draw: draw.line([(0, 300), (300, 0)], fill="black", width=3))
    reversed_curve = png(lambda draw: draw.line([(0, 0), (300, 300)], fill="black", width=4))
    assert figures_differ(thick, thin) is None
    assert "differs from the stored one" in figures_differ(thick, reversed_curve)
    assert "differs" in figures_differ(thick, png(lambda draw: None))
    assert figures_differ([], thick) == "0 figures, 1 stored"


def test_the_stored_map_is_the_one_that_is_drawn():
    from t2t_ref.book import figures

    assert (ROOT / "book" / "figures" / "model-map.svg").read_text(encoding="utf-8") == figures.model_map()
    for stage, boxes in figures.STAGES.items():
        assert figures.model_map(stage).count("#FBD9C6") == len(boxes)
    assert "3136 × 147" in figures.model_map() and "Lit: soft split." in figures.model_map("soft split")
    with pytest.raises(ValueError, match="unknown stage 'hard split': known are image, soft split"):
        figures.model_map("hard split")


# the package as it is installed


def test_importing_the_package_is_light():
    """None of what the extras ask for. (A CUDA build of torch may bring more parts of its own, such as triton.)"""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    heavy = {re.match(r"[\w-]+", need)[0] for needs in extras.values() for need in needs} | {"sklearn", "PIL"}
    code = (
        "import sys, torch, einops, jaxtyping; before = set(sys.modules); import t2t_ref; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    new = set(done.stdout.split())
    assert "t2t_ref" in new and {"matplotlib", "PIL", "accelerate"} <= heavy and not new & heavy


DATA = {"digits.py", "reading.py", "sources.py", "workers.py"}  # of which only images.py makes a promised name
EXTRAS = {"train", "experiments", "bench", "book"} | DATA  # whose packages come with an extra
ON_DEMAND = {"huggingface_hub", "timm"}  # asked for by those who use it, with a message that says so


def test_what_the_package_imports_is_what_it_asks_for():
    """`pip install t2t-ref`, and nothing else: imports inside of functions count as well."""
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    names = {need.split(">=")[0] for need in needs}
    asked = {{"pillow": "PIL"}.get(name, name) for name in names} | {"t2t_ref"} | set(sys.stdlib_module_names)
    found = set()
    for path in (ROOT / "t2t_ref").rglob("*.py"):
        if not EXTRAS & set(path.relative_to(ROOT / "t2t_ref").parts):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                found |= {name.partition(".")[0] for name in names}
    assert {"torch", "numpy", "PIL", "safetensors"} <= found
    assert found <= asked | ON_DEMAND


def test_bounds_are_loose_and_pins_are_exact():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert all(">=" in bound and "==" not in bound for bound in project["dependencies"])
    assert {bound.split(">=")[0] for bound in project["dependencies"]} == {
        "torch",
        "einops",
        "jaxtyping",
        "safetensors",
        "numpy",
        "pillow",
    }
    assert {"book", "train"} <= set(project["optional-dependencies"])
    wanted = [
        line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    ]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split())
    for line in wanted:
        if line and not line.startswith("-c"):
            name, version = line.split("==")
            assert name == "torch" or pins[name] == version  # torch has builds of one version, hence no constraint
