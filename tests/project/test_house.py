"""tools/house.py: each of its rules, broken once in a small house."""

from pathlib import Path

import house
import pytest

ROOT = Path(__file__).resolve().parents[2]
SOUND = {
    "__init__.py": "from t2t_ref.create import make\n",
    "arguments.py": "",
    "models/__init__.py": "",
    "models/block.py": "from t2t_ref.arguments import pair\n",
    "models/whole.py": "from t2t_ref.models.block import Block\n",
    "weights/__init__.py": "from t2t_ref.models import whole\n",
    "create.py": "from t2t_ref.weights import load\n",
    "train/__main__.py": "import t2t_ref\nfrom t2t_ref import create\n",
    "evaluate.py": '"""The door to it."""\nfrom t2t_ref.train import __main__\n',
}


def build(root: Path, files: dict[str, str]) -> list[str]:
    for name, text in files.items():
        path = root / "t2t_ref" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(house.problems(root))


def test_the_house_stands():
    assert list(house.problems(ROOT)) == []


def test_a_sound_house_passes(tmp_path):
    assert build(tmp_path, SOUND) == []


@pytest.mark.parametrize(
    "name, text, complaint",
    [
        ("models/block.py", "def f():\n    from t2t_ref.weights import load\n", "which does not lie below it"),
        ("models/block.py", "import t2t_ref\n", "t2t_ref.models.block imports t2t_ref, which"),
        ("models/block.py", "def f():\n    import t2t_ref.models.whole\n", "in a circle: t2t_ref.models"),
        ("weights/__init__.py", "from t2t_ref import create\n", "t2t_ref.weights imports t2t_ref.create"),
        ("inspection/a.py", "import t2t_ref.data.b\n", "t2t_ref.inspection.a imports t2t_ref.data.b"),
        ("shed/tools.py", "", "shed is on no floor"),
        ("models/block.py", "pass\n" * 451, "models/block.py has 451 lines"),
    ],
)
def test_a_broken_rule_is_named(tmp_path, name, text, complaint):
    (tmp_path / "t2t_ref/data").mkdir(parents=True)
    (tmp_path / "t2t_ref/data/b.py").write_text("", encoding="utf-8")
    assert complaint in "\n".join(build(tmp_path, SOUND | {name: text}))


def test_a_crowd_is_named(tmp_path):
    many = {f"models_{number}.py": "" for number in range(12)}
    assert "has 19 entries" in "\n".join(build(tmp_path, SOUND | many))
