"""Write the repository's address wherever it stands: python tools/address.py OWNER/NAME

The address of record is repository.url in _config.yml. Everything else (README, CITATION.cff, pyproject.toml, the
set-up cells of the chapters) repeats it, and this command keeps them in step.
"""

import re
import sys
from pathlib import Path

import nb

FILES = ("_config.yml", "README.md", "CITATION.cff", "CONTRIBUTING.md", "pyproject.toml")
VALID = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,37}[A-Za-z0-9])?/[A-Za-z0-9._-]{1,100}")  # as GitHub allows


def current(root: Path) -> str:
    """owner/name as _config.yml has it."""
    (url,) = re.findall(r"(?m)^  url: https://github\.com/(\S+)$", (root / "_config.yml").read_text(encoding="utf-8"))
    return url


def places(root: Path) -> list[Path]:
    """The files in which the address stands. Notebooks follow from their Markdown."""
    return [path for name in FILES if (path := root / name).exists()] + sorted((root / "book").glob("*.md"))


def rewrite(root: Path, new: str) -> list[Path]:
    """Replace the current address by ``new``; returns the files that changed."""
    owner, name = current(root).split("/")
    new_owner, new_name = new.split("/")
    changed = []
    for path in places(root):
        old_text = path.read_text(encoding="utf-8")
        text = re.sub(rf"(github(?:\.com)?/){re.escape(owner)}/{re.escape(name)}(?![\w-])", rf"\g<1>{new}", old_text)
        site = rf"{re.escape(owner)}\.github\.io/{re.escape(name)}(?![\w-])"
        text = re.sub(site, f"{new_owner}.github.io/{new_name}", text)
        if text != old_text:
            nb.write_whole(path, text)
            changed.append(path)
    return changed


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not VALID.fullmatch(arguments[0]):
        found = " ".join(arguments) or "nothing"
        print(f"expected the address as owner/name, found {found}: make address REPO=owner/name")
        return 2
    for path in rewrite(nb.ROOT, arguments[0]):
        print("wrote", path.relative_to(nb.ROOT))
    return nb.main(["sync"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
