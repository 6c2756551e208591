"""Results, notation, glossary, bibliography and how to cite: complete, in step with their sources, able to fail."""

import ast
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import citing
import pytest
import results_tables
import rules
import torch
import yaml
from pybtex.database import parse_file, parse_string
from torch import nn

import t2t_ref
from t2t_ref import experiments
from t2t_ref.models.token_performer import TokenPerformer

ROOT = Path(__file__).resolve().parents[2]

RESULTS = ROOT / "results"
CHAPTERS = sorted((ROOT / "book").glob("[0-9][0-9]-*.md"))
DIRECTIVE = re.compile(r"^```\{results\} (\S+)\n(.*?)```$", re.M | re.S)


def page(name: str) -> str:
    return (ROOT / "book" / f"{name}.md").read_text(encoding="utf-8")


# results


def shown() -> dict[str, list[str]]:
    """The names on the page, each with the lines of its body."""
    return {name: body.splitlines() for name, body in DIRECTIVE.findall(page("results"))}


def test_every_file_of_results_has_one_section_that_links_to_a_chapter():
    names = [name for name, _ in DIRECTIVE.findall(page("results"))]
    assert sorted(names) == sorted(path.stem for path in RESULTS.iterdir() if path.suffix != ".part")
    for section in re.split(r"(?m)^##+ ", page("results"))[1:]:
        if DIRECTIVE.search(section):
            assert re.search(r"\]\(\.\./notebooks/[12]\d-[\w-]+\.ipynb#", section), section.splitlines()[0]
            assert len(DIRECTIVE.findall(section)) == 1, section.splitlines()[0]


def test_no_measured_number_is_typed():
    prose = re.sub(r"\(\.\./[^)]*\)", "", DIRECTIVE.sub("", page("results")))
    assert not re.findall(r"\d+\.\d+|\d+ ?(?:points|seconds|minutes|ms|MB)", prose)


def test_a_file_without_a_section_is_a_warning(tmp_path):
    (tmp_path / "results").mkdir()
    for name in ("known.json", "forgotten.json", "half.json.part"):
        (tmp_path / "results" / name).touch()
    env = SimpleNamespace(srcdir=tmp_path, results_shown={"known": "book/results"})
    warned = []
    logger = SimpleNamespace(warning=lambda text, name: warned.append(name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results_tables.logging, "getLogger", lambda name: logger)
        results_tables.check(None, env)
        assert warned == ["forgotten"]
        results_tables.forget(None, env, "book/results")
        results_tables.check(None, env)
    assert warned == ["forgotten", "forgotten", "known"]


def rows(lines: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


@pytest.mark.parametrize("name", [name for name in experiments.EXPERIMENTS if name != "what_it_sees"])
def test_the_tables_of_an_experiment(name):
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    lines = results_tables.markdown(RESULTS / f"{name}.json", shown()[name])
    found = {row[0]: row[1:] for row in rows(lines)}
    for label, arm in result["arms"].items():
        scores = [run["accuracy"] for run in arm["runs"]]
        mean, half = experiments.mean_interval(scores)
        assert mean == pytest.approx(sum(scores) / len(scores))
        accuracy, runs, parameters, *_ = found[label]
        assert [accuracy, parameters] == [f"{mean:.1f}\xa0±\xa0{half:.1f}", f"{arm['parameters']:,}"]
        by_seed = sorted(arm["runs"], key=lambda run: run["seed"])
        assert runs.replace("\xa0", " ").split(", ") == [f"{run['accuracy']:.0f}" for run in by_seed]
    for pair in shown()[name]:
        one, base = (result["arms"][label] for label in pair.split(" against "))
        mean, half = experiments.paired_interval(one, base)
        words = "not resolved" if abs(mean) <= half else "ahead" if mean > 0 else "behind"
        assert found[pair] == [words, f"{mean:+.1f}\xa0±\xa0{half:.1f}".replace("-", "\N{MINUS SIGN}")]
    assert any(result["command"] == line for line in lines)


@pytest.mark.parametrize("name", sorted(path.stem for path in RESULTS.glob("bench_*.json")))
def test_the_tables_of_a_bench(name):
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    lines = results_tables.markdown(RESULTS / f"{name}.json", shown()[name])
    text = "\n".join(lines)
    assert result["machine"]["cpu"] in text and f"torch {result['machine']['torch']}" in text
    command = re.search(r"```bash\n(.*?)\n```", text, re.S).group(1)
    assert command.replace(" \\\n", " ") == result["command"] and max(map(len, command.splitlines())) <= 70
    for entry in result["found"]:
        timed = entry["rows"].values() if isinstance(entry.get("rows"), dict) else entry.get("rows", [])
        for row in list(timed)[1:]:
            assert f"| {row['verdict']} | {row['speed']:.2f} |" in text, entry


def test_a_changed_file_changes_the_page(tmp_path):
    path = shutil.copy(RESULTS / "tokenisers.json", tmp_path)
    before = results_tables.markdown(Path(path), shown()["tokenisers"])
    result = json.loads(Path(path).read_text(encoding="utf-8"))
    for run in result["arms"]["hard split"]["runs"]:
        run["accuracy"] = 99.0
    Path(path).write_text(json.dumps(result), encoding="utf-8")
    after = results_tables.markdown(Path(path), shown()["tokenisers"])
    assert "| T2T, performer against hard split | ahead |" in "\n".join(before)
    assert "| T2T, performer against hard split | behind |" in "\n".join(after)


def test_two_forms_of_a_model_are_told_apart_only_if_their_middle_halves_are():
    def entry(low, high):
        speeds = {"a": (1.0, 1.2), "b": (low, high)}
        of = [dict(implementation=k, speed=(x + y) / 2, speed_low=x, speed_high=y) for k, (x, y) in speeds.items()]
        return {"case": {"model": "tiny", "mode": "forward"}, "rows": of}

    for limits, words in (((1.1, 1.3), "middle halves overlap"), ((1.3, 1.4), "faster"), ((0.5, 0.9), "slower")):
        assert results_tables.medians(entry(*limits), "b against a")[1] == words


def test_what_the_page_cannot_compare_is_an_error():
    arms = json.loads((RESULTS / "tokenisers.json").read_text(encoding="utf-8"))["arms"]
    for pair in ("hard split", "hard split against nothing", "nothing against hard split"):
        with pytest.raises(ValueError, match="does not name two arms"):
            results_tables.verdict(arms, pair)


def test_the_small_weights_are_listed_with_their_sizes():
    text = "\n".join(results_tables.weights(RESULTS / "weights"))
    for path in (RESULTS / "weights").glob("*.safetensors"):
        assert f"| `{path.name}` | {path.stat().st_size / 1e6:.1f} |" in text


# notation

WORD = re.compile(r"[A-Za-z_]\w*")


def axes(source: str) -> set[str]:
    """Names of axes in the einops patterns and the annotations of a source."""
    tree = ast.parse(re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", source))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and re.fullmatch(r"[\w() ,.]+ ->[\w() ,.]*", str(node.value)):
            found |= set(WORD.findall(node.value))
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple) and len(node.slice.elts) == 2:
            kind, shape = ast.unparse(node.value), node.slice.elts[1]
            if kind in ("Float", "Int", "Bool", "UInt8") and isinstance(shape, ast.Constant):
                found |= set(WORD.findall(shape.value)) - {"_"}
    return found


def in_table(text: str, heading: str, column: int = 0) -> list[str]:
    """What stands in code marks in one column of the first table below a heading."""
    lines = text.split(heading, 1)[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| "))
    end = next((i for i, line in enumerate(lines[start:], start) if not line.startswith("| ")), len(lines))
    cells = [line.split(" | ")[column] for line in lines[start + 2 : end]]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def used() -> dict[str, set[str]]:
    found = {path.name: axes(path.read_text(encoding="utf-8")) for path in (ROOT / "t2t_ref").rglob("*.py")}
    for path in CHAPTERS:
        found[path.name] = set().union(*(axes(cell.source) for cell in rules.chapter_cells(path)))
    return found


def test_axes_are_found():
    source = 'def f(x: Float[Tensor, "b odd"]):\n    print("to -> my")\n    return rearrange(x, "b (h w) -> b h w")'
    assert axes(source) == {"b", "odd", "h", "w", "to", "my"}


def test_every_axis_has_a_row():
    letters, local = (in_table(page("notation"), f"## {title}") for title in ("The axis letters", "Names for one"))
    assert len(letters) == 14 and not set(letters) & set(local)
    found = used()
    for where, names in found.items():
        assert names <= {*letters, *local}, where
    assert set(local) <= set().union(*found.values()), "a row that nothing uses"
    for name in ("index", "02-images-as-tokens"):  # shorter tables of the same letters
        for cell in re.findall(r"(?m)^\| (`\w+`(?:, `\w+`)*) \|", page(name)):
            assert set(re.findall(r"`(\w+)`", cell)) <= set(letters), name
    assert set(in_table(page("02-images-as-tokens"), "## The letters of this book")) <= set(letters)


def test_every_pattern_of_the_page_is_used():
    code = "\n".join(path.read_text(encoding="utf-8") for path in (*CHAPTERS, *(ROOT / "t2t_ref").rglob("*.py")))
    patterns = in_table(page("notation"), "## Reading a pattern")
    patterns = [pattern for pattern in patterns if "->" in pattern]
    assert len(patterns) > 8
    for pattern in patterns:
        assert f'"{pattern}"' in code, pattern


def test_the_sizes_are_those_of_the_model():
    with torch.device("meta"):
        model = t2t_ref.create_model("t2t_vit_14").eval()
        image = torch.empty(1, 3, 224, 224)
    module, sides = model.tokens_to_token, [224]
    layers = [module.attention1, module.attention2]
    assert all(isinstance(layer, TokenPerformer) for layer in layers)
    splits = t2t_ref.models.tokens_to_token.SPLITS
    for split in splits:
        sides.append(t2t_ref.SoftSplit(*split).grid_size((sides[-1], sides[-1]))[0])
    block = model.blocks[0]
    width = block.mlp.fc1.in_features
    hidden = [next(part for part in layer.mlp if isinstance(part, nn.Linear)).out_features for layer in layers]
    final = module.project.in_features
    sizes = {
        "c": [image.shape[1], layers[0].w.shape[1]],
        "h": sides,
        "kh": [kernel for kernel, _, _ in splits],
        "n": [*(side**2 for side in sides[1:]), model.pos_embed.shape[1]],
        "d": [*(layer.kqv.in_features for layer in layers), final, width],
        "e": [layers[0].w.shape[1]],
        "g": [1, block.attn.num_heads],
        "m": [layers[0].w.shape[0]],
        "f": [hidden[0], block.mlp.fc1.out_features],
    }
    assert layers[0].w.shape[1] == width // block.attn.num_heads == 64 and hidden[0] == hidden[1]
    for letter, expected in sizes.items():
        (line,) = re.findall(rf"(?m)^\| `{letter}`.*$", page("notation").split("## Reading")[0])
        cell = re.sub(r"T2T", "", line.split(" | ")[2])
        assert [int(number) for number in re.findall(r"\d+", cell)] == expected, letter


# glossary


def entries() -> dict[str, str]:
    body = page("glossary").split("```{glossary}\n")[1].split("\n```")[0]
    found = {}
    for entry in re.split(r"\n\n", body):
        terms = [line for line in entry.splitlines() if not line.startswith(" ")]
        found |= {term: " ".join(line.strip() for line in entry.splitlines()[len(terms) :]) for term in terms}
    return found


def test_glossary_is_in_order_and_every_entry_links_to_a_chapter():
    firsts = [entry.splitlines()[0].lower() for entry in page("glossary").split("```{glossary}\n")[1].split("\n\n")]
    assert firsts == sorted(firsts) and len(set(firsts)) == len(firsts)
    for term, text in entries().items():
        assert re.search(r"\. \[Chapter (\d+)\]\(\.\./notebooks/0?\1-[\w-]+\.ipynb#[\w-]+\)$", text), term
        assert 3 < len(text.split()) < 60, term


def test_glossary_has_the_words_of_the_title_terms():
    wanted = (
        "attention; soft split; re-structure; T2T layer; token transformer; token performer; tokens-to-token module; "
        "backbone; block; class token; position table; head (of the model); drop path; random features; MAC; seed; "
        "confidence interval; paired difference; plateau; ghost; checkpoint; recipe; patch; stride; padding; overlap"
    )
    assert set(wanted.split("; ")) <= entries().keys()


# bibliography and how to cite


def test_every_work_that_a_chapter_links_to_is_in_the_bibliography():
    entries_of = parse_file(str(ROOT / "book" / "references.bib")).entries
    known = {entry.fields["url"] for entry in entries_of.values()}
    for path in CHAPTERS:
        for url in re.findall(r"https://arxiv\.org/abs/[\d.]+\d", path.read_text(encoding="utf-8")):
            assert url in known, f"{path.name}: {url}"
    cited = re.findall(r"\{cite:t\}`([\w]+)`", page("bibliography"))
    assert sorted(cited) == sorted(entries_of)
    assert len({entry.fields["url"] for entry in entries_of.values()}) == len(entries_of)
    for key, entry in entries_of.items():
        assert entry.fields["year"] in key and entry.persons["author"][0].last_names[-1].strip("{")[0].lower() in key


def test_the_bibtex_of_the_book_is_its_citation_file():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    ((_, entry),) = parse_string(citing.bibtex(cff, "2026"), "bibtex").entries.items()
    assert entry.fields["version"] == t2t_ref.__version__
    assert entry.fields["title"].strip("{}") == cff["title"]
    assert entry.fields["url"] == cff["repository-code"]
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    assert cff["title"] == config["title"] and cff["authors"] == [{"name": config["author"]}]


def test_the_paper_is_the_same_in_both_files():
    (cited,) = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["references"]
    entry = parse_file(str(ROOT / "book" / "references.bib")).entries["yuan2021t2t"]
    plain = {name: re.sub(r"[{}]", "", value) for name, value in entry.fields.items()}
    assert (plain["title"], plain["booktitle"]) == (cited["title"], cited["collection-title"])
    assert (plain["url"], plain["year"]) == (cited["url"], str(cited["year"]))
    people = [(" ".join(p.last_names), " ".join(p.first_names + p.middle_names)) for p in entry.persons["author"]]
    assert people == [(who["family-names"], who["given-names"]) for who in cited["authors"]]
    text = (ROOT / "book" / "references.bib").read_text(encoding="utf-8")
    assert text.index("yuan2021t2t") < text.index("dosovitskiy2021vit")  # where how-to-cite.md stops to copy
    shown_entry = text[text.rindex("@", 0, text.index("yuan2021t2t")) : text.index("@", text.index("yuan2021t2t"))]
    assert len(parse_string(shown_entry, "bibtex").entries) == 1


def test_items_of_a_list_have_the_role_of_items():
    context = {"body": '<div role="list"><div class="citation" role="doc-biblioentry">'}
    citing.name_list_items(None, "page", "template", context, None)
    assert context["body"] == '<div role="list"><div class="citation" role="listitem">'
