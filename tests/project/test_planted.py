"""The planted mistakes fit the package that they are for, and the tool tells what was noticed from what was not."""

import ast
import json
from functools import cache
from pathlib import Path

import planted
import pytest
import rules

ROOT = Path(__file__).resolve().parents[2]
ALL = planted.mistakes(ROOT)


code_of, definitions = cache(rules.chapter_cells), cache(rules.definitions)


@pytest.mark.parametrize("mistake", ALL, ids=lambda m: f"{m.chapter}: {m.what}")
def test_each_mistake_fits(mistake):
    source = (ROOT / mistake.file).read_text(encoding="utf-8")
    names, spoiled = planted.enclosing(source, mistake.old), planted.spoil(source, mistake)
    ast.parse(spoiled)
    assert rules.definitions(spoiled) != definitions(source) or not names
    chapter = planted.chapter_of(ROOT, mistake.chapter)
    if chapter is None:
        pytest.skip(f"there is no chapter {mistake.chapter} yet")
    shown = [cell for cell in code_of(chapter) if "mirror" in cell.metadata.get("tags", [])]
    if names and any(names[0] in definitions(cell.source) for cell in shown):
        sources = [cell.source for cell in code_of(chapter)]
        there = planted.spoil_cells(sources, mistake, names) != sources
        assert there, "the chapter shows this definition, and the mistake is not in it"


def test_each_mistake_is_there_once():
    keys = [(m.chapter, m.file, m.old, m.new) for m in ALL]
    assert len(set(keys)) == len(keys) > 60
    assert {m.chapter for m in ALL} >= {2, 3, 4, 5, 6, 7, 8, 9, 10, 14}


def test_code_is_found_wherever_its_lines_break():
    found = planted.pattern('f(a, "b c -> c b", d=1)')
    assert found.search('x = f(\n    a,\n    "b c -> c b",\n    d=1,\n)')
    assert not found.search('f(a, "b c -> b c", d=1)')


PACKAGE = "def twice(x):\n    return x + x\n\n\nclass Layer:\n    def forward(self, x):\n        return twice(x) + 1\n"
CHAPTER = """---
kernelspec: {name: python3, display_name: Python 3}
---
# Chapter

```{code-cell}
from t2t_ref import Layer, twice


def forward(self, x):
    return twice(x) + 1


def other(x):
    return x + x
```

```{code-cell}
assert twice(3) == 6
print("fine")
```
"""


@pytest.fixture
def tree(tmp_path):
    for name in ("t2t_ref", "book", "tools"):
        (tmp_path / name).mkdir()
    (tmp_path / "t2t_ref" / "__init__.py").write_text(PACKAGE, encoding="utf-8")
    (tmp_path / "book" / "04-chapter.md").write_text(CHAPTER, encoding="utf-8")

    def entries(*pairs):
        lines = [
            f"  - {{what: {old} to {new}, file: t2t_ref/__init__.py, old: {old}, new: {new}}}" for old, new in pairs
        ]
        (tmp_path / "tools" / "planted.yml").write_text("4:\n" + "\n".join(lines) + "\n18: []\n", encoding="utf-8")
        return tmp_path

    return entries


def test_a_mistake_is_put_into_the_definition_alone(tree):
    root = tree(("twice(x) + 1", "twice(x)"))
    (mistake,) = planted.mistakes(root)
    names = planted.enclosing(PACKAGE, mistake.old)
    assert names == ["Layer", "forward"]
    text, changed = planted.spoil_chapter(CHAPTER, mistake, names)
    assert changed == 1 and "return twice(x)\n" in text and "return x + x" in text
    with pytest.raises(ValueError, match="there 0 times"):
        planted.enclosing(PACKAGE, "x - x")


def test_caught_and_missed_and_kept(tree, capsys):
    root = tree(("x + x", "x + 2"), ("twice(x) + 1", "twice(x) + 2"))
    assert planted.main([], root) == 1
    said = capsys.readouterr().out
    assert "caught  04-chapter: x + x to x + 2 (in the package alone): caught by cell 2: AssertionError" in said
    assert "MISSED  04-chapter: twice(x) + 1 to twice(x) + 2: no cell fails" in said and "1 of 2" in said
    assert (root / "t2t_ref" / "__init__.py").read_text(encoding="utf-8") == PACKAGE
    state = root / "_build" / "planted.jsonl"
    assert len(state.read_text(encoding="utf-8").splitlines()) == 3  # with the run without a mistake

    state.write_text(state.read_text(encoding="utf-8").replace("[2, ", "[7, "), encoding="utf-8")
    assert planted.main(["--chapters", "4", "18"], root) == 1  # nothing is run again
    said = capsys.readouterr().out
    assert "caught by cell 7" in said and "chapter 18: no mistake is planted" in said

    tree(("x + x", "x + 2"))
    assert planted.main(["--fresh"], root) == 0
    assert "1 of 1 planted mistakes caught: 100%" in capsys.readouterr().out


def test_a_chapter_that_fails_by_itself_is_no_proof(tree, capsys):
    root = tree(("x + x", "x + 2"))
    (root / "book" / "04-chapter.md").write_text(CHAPTER.replace("== 6", "== 7"), encoding="utf-8")
    assert planted.main([], root) == 1
    said = capsys.readouterr().out
    assert "BROKEN  04-chapter: fails without a mistake, cell 2" in said and "0 of 1" in said
    lines = (root / "_build" / "planted.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)[1][0] for line in lines] == [2]
