"""The form of the chapters: what a reader finds at the same place in each of them."""

import re
from functools import cache
from pathlib import Path

import jupytext
import pytest

CHAPTERS = sorted((Path(__file__).resolve().parents[2] / "book").glob("[0-9][0-9]-*.md"))
EXERCISE = re.compile(r"> \*\*Exercise (\d+)\.(\d) \((predict|change|explain), (easy|medium|hard)\)\.\*\*")
# what gives the answer of an exercise: a hidden cell, or words that fold out
SOLUTION = re.compile(r"# @title (Solution|Answer|A check)|<summary>(Solution|Answer|What you should see)</summary>")


@cache
def texts(source: str) -> list[str]:
    """The Markdown of a chapter, cell by cell."""
    return [cell.source for cell in jupytext.reads(source, fmt="md:myst").cells if cell.cell_type == "markdown"]


def problems(number: int, source: str) -> list[str]:
    """What is missing in a chapter, or out of place."""
    found = []
    text = "\n\n".join(texts(source))
    exercises = EXERCISE.findall(text)
    if [(int(n), int(m), kind) for n, m, kind, _ in exercises] != [
        (number, 1, "predict"),
        (number, 2, "change"),
        (number, 3, "explain"),
    ]:
        found.append(f"expected three graded exercises, predict, change and explain; found {exercises}")
    boxes = re.split(r"(?m)^> \*\*(?=Exercise|Change this and see)", source)[1:]
    if not boxes or not boxes[-1].startswith("Change this and see.**"):
        found.append("no 'Change this and see' behind the exercises")
    for box in boxes:
        if not SOLUTION.search(box.split("\n## ")[0]):
            found.append(f"no answer to {box.split('**')[0]}")
    for heading in ("## What can go wrong", "## What goes wrong"):
        if f"\n{heading}\n" in text:
            break
    else:
        found.append("no section on what can go wrong")
    if not re.search(r"(?m)^## Recap$", text):
        found.append("no recap")
    for link in ("../book/notation.md", "../book/api/"):
        if link not in text.split("## Recap")[-1]:
            found.append(f"the recap does not link to {link}")
    return found


def unlinked(number: int, source: str) -> list[str]:
    """Mentions of a later chapter in a section that has no link to it."""
    found, linked = [], set()
    for text in texts(source):
        for part in re.split(r"(?m)^(?=#+ )", text):
            linked = set() if part.startswith("#") else linked
            linked |= {int(n) for n in re.findall(r"\]\((\d\d)-", part)}
            bare = re.sub(r"\[[^\]]*\]\([^)]*\)", "", part)
            for mention in re.finditer(r"[Cc]hapters?\s+(\d+)(?:(?:,|\s+(?:and|to|or))\s+(\d+))?", bare):
                later = {int(n) for n in mention.groups() if n and int(n) > number} - linked
                found += [f"chapter {n} is named without a link: {mention[0]!r}" for n in later]
    return found


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_has_what_every_chapter_has(path):
    number, source = int(path.stem[:2]), path.read_text(encoding="utf-8")
    assert problems(number, source) == []
    assert unlinked(number, source) == []


def opening(source: str) -> str:
    """The first words of a chapter, behind its title and its question."""
    (first,) = [text for text in texts(source) if text.startswith("# ")]
    return " ".join(first.split("\n\n")[2].split()[:3])


def test_no_chapter_opens_like_another():
    openings = [opening(path.read_text(encoding="utf-8")) for path in CHAPTERS]
    assert len(set(openings)) == len(openings) > 0


def test_the_checks_find_what_is_missing():
    path = next(path for path in CHAPTERS if path.stem.startswith("03"))
    source = path.read_text(encoding="utf-8")
    spoiled = {
        "three graded exercises": source.replace("(predict, medium)", "(predict)"),
        "no answer to Exercise 3.2": source.replace("# @title Solution\nwider", "wider"),
        "no 'Change this and see'": source.replace("**Change this and see.**", "**Tip.**"),
        "what can go wrong": source.replace("## What can go wrong", "## Wrong"),
        "no recap": source.replace("## Recap", "## End"),
        "does not link to ../book/notation.md": source.replace("../book/notation.md", "notation"),
    }
    for complaint, text in spoiled.items():
        assert text != source, complaint
        assert any(complaint in found for found in problems(3, text)), complaint
    assert unlinked(3, source.replace("[Chapter 6](06-tokens-to-token.ipynb)", "Chapter 6")) != []
