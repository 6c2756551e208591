"""Text is read and written as UTF-8, whatever the locale: on Windows, and on old servers, that is another encoding."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path for part in ("t2t_ref", "tools", "book", "tests") for path in sorted((ROOT / part).rglob("*.py"))]


def without_encoding(text: str) -> list[str]:
    """The calls that read or write text and leave the encoding to the system."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        named = {keyword.arg for keyword in node.keywords}
        mode = [value for value in node.args if isinstance(value, ast.Constant) and isinstance(value.value, str)]
        if name in ("read_text", "write_text"):
            arguments = len(node.args) - (name == "write_text")
            missing = not arguments and "encoding" not in named
        else:  # the built-in one, in a mode for text
            is_binary = any("b" in value.value for value in mode[-1:])
            missing = isinstance(node.func, ast.Name) and name == "open" and not is_binary and "encoding" not in named
        if missing:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", [ROOT / "conftest.py", *SOURCES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_text_file_is_utf8(path):
    assert not without_encoding(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "text, found",
    [
        ("Path('a').read_text()", 1),
        ("Path('a').write_text('b')", 1),
        ("open('a', 'w')", 1),
        ("open('a')", 1),
        ("open('a', 'rb'); Path('a').read_text('utf-8'); Path('a').write_text('b', encoding='utf-8')", 0),
    ],
)
def test_the_check_sees_what_it_should(text, found):
    assert len(without_encoding(text)) == found
