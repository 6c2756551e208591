"""The whole model on one page computes the authors' numbers, loads their files, and needs torch and einops alone."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import golden
import pytest
import rules
import torch
from small import authors_file

import t2t_ref

ROOT = Path(__file__).resolve().parents[2]
SOURCE = (ROOT / "book" / "one_page.py").read_text(encoding="utf-8")
PAGE = (ROOT / "book" / "one-page.md").read_text(encoding="utf-8")
SPEC = importlib.util.spec_from_file_location("one_page", ROOT / "book" / "one_page.py")
one_page = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(one_page)

TINY = dict(size=(96, 2, 3, 2), side=64, classes=10, token_dim=32)
BUILD = {
    "tiny_performer": lambda: one_page.T2TViT(layer=one_page.TokenPerformer, **TINY),
    "tiny_transformer": lambda: one_page.T2TViT(layer=one_page.TokenTransformer, **TINY),
    "t2t_vit_7": lambda: one_page.t2t_vit("t2t_vit_7"),
    "t2t_vit_14_nc10": lambda: one_page.t2t_vit(classes=10),
    "t2t_vit_t_14": lambda: one_page.t2t_vit("t2t_vit_t_14"),
}


@pytest.mark.parametrize(
    "name", ["tiny_performer", "tiny_performer.kqv025", "t2t_vit_7", "t2t_vit_7.kqv025", "t2t_vit_14_nc10"]
    + ["tiny_transformer", "t2t_vit_t_14"]
)  # fmt: skip
def test_it_computes_the_authors_numbers(name):
    record, (stem, _, rule) = golden.read(name), name.partition(".")
    model = BUILD[stem]()
    assert [[key, list(entry.shape)] for key, entry in model.state_dict().items()] == record["state_dict"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == record["params_trainable"]
    golden.fill(model, torch.float64, 0.25 if rule else 1.0)
    image = golden.noise(2, 3, *2 * [record["img_size"]])
    tokens, logits = model.tokens_to_token(image), model(image)
    for found, key in ((tokens, "tokens"), (logits, "logits")):
        for norm, expected in (("abs_sum", found.abs().sum()), ("l2", found.norm())):
            torch.testing.assert_close(expected.item(), record[key][norm], atol=1e-9 * found.numel() ** 0.5, rtol=1e-10)
    first = torch.tensor(record["logits"]["first16"], dtype=torch.float64)
    torch.testing.assert_close(logits[:, :16], first, atol=1e-9, rtol=0)

    logits.square().mean().backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    for key, expected in record["grads"].items():
        torch.testing.assert_close(gradients[key].norm().item(), expected["l2"], atol=1e-9, rtol=0)


@pytest.fixture
def torchs_list():
    """The page lets torch read argparse.Namespace from then on. Here that ends with the test."""
    before = torch.serialization.get_safe_globals()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


@pytest.mark.usefixtures("torchs_list")
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_it_loads_a_file_in_the_released_form(tmp_path, legacy):
    trained = golden.fill(t2t_ref.create_model("t2t_vit_7"), torch.float32)
    file = authors_file(trained.state_dict(), tmp_path / "71.7_T2T_ViT_7.pth.tar", legacy)
    model = one_page.load(one_page.t2t_vit("t2t_vit_7"), file)
    image = golden.noise(1, 3, 224, 224).float()
    with torch.no_grad():
        torch.testing.assert_close(model(image), trained(image), atol=2e-5, rtol=0)
    torch.save(trained.state_dict(), tmp_path / "bare.pth")
    assert torch.equal(one_page.load(model, tmp_path / "bare.pth").head.weight, trained.head.weight)


@pytest.mark.parametrize("name", [f"t2t_vit_{t}{n}" for n in one_page.SIZES for t in ("", "t_")])
def test_its_sizes_are_those_of_the_package(name):
    with torch.device("meta"):
        model = one_page.t2t_vit(name)
        named = name if name in t2t_ref.list_models() else name.replace("_t_", "_")
        tokens_type = "transformer" if "_t_" in name else "performer"
        package = t2t_ref.create_model(named, tokens_type=tokens_type)
    shapes = [[(key, entry.shape) for key, entry in one.state_dict().items()] for one in (model, package)]
    assert shapes[0] == shapes[1]


def test_an_image_need_not_be_square_before_the_positions():
    layer = golden.fill(one_page.TokensToToken(one_page.TokenPerformer, 64, 32), torch.float64)
    package = golden.fill(t2t_ref.TokensToToken((64, 97), embed_dim=32), torch.float64)
    image = golden.noise(1, 3, 64, 97)
    torch.testing.assert_close(layer(image), package(image), atol=1e-12, rtol=1e-9)


def test_it_needs_torch_and_einops_alone_and_changes_layouts_by_einops_alone():
    names = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) == {"torch", "einops"}
    assert rules.layout_changes(SOURCE) == []
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'book')!r}); import one_page\n"
         "assert not {'t2t_ref', 'jaxtyping'} & set(sys.modules)"]
    )  # fmt: skip
    assert done.returncode == 0
    assert max(map(len, SOURCE.splitlines())) <= 84


def test_the_page_shows_every_line_once_and_in_order():
    lines, shown = SOURCE.splitlines(), []
    for options in re.findall(r"```\{literalinclude\} one_page\.py\n(.*?)```", PAGE, re.S):
        options = dict(re.findall(r'^:([\w-]+): "?([^"\n]+)"?$', options, re.M))
        if "lines" in options:
            first, last = map(int, options["lines"].split("-"))
            start, end = first - 1, last
        else:
            start = lines.index(options["start-after"]) + 1
            end = lines.index(options["end-before"]) if "end-before" in options else len(lines)
        shown += range(start, end)
    end_of_docstring = SOURCE[: SOURCE.index('"""', 3)].count("\n") + 1
    hidden = [i for i in range(end_of_docstring, len(lines)) if lines[i].strip() and not lines[i].startswith("# ----")]
    assert [i for i in shown if lines[i].strip()] == hidden
    for name in set(re.findall(r"\.\./(notebooks/[\w-]+\.ipynb)", PAGE)):
        assert (ROOT / name).exists()
