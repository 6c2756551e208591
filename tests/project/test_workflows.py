"""The workflows, as far as they can be checked without running them: what they call is there, and versions agree."""

import re
import tomllib
from pathlib import Path

import address
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
each = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def jobs(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]


def steps(path: Path) -> list[dict]:
    return [step for job in jobs(path).values() for step in job["steps"]]


def missing(command: str, makefile: str, root: Path) -> list[str]:
    """The make targets and the files of this repository that a command calls and that are not there."""
    targets = set(re.findall(r"(?m)^([\w-]+):", makefile))
    wrong = [f"make {name}" for name in re.findall(r"\bmake ([\w-]+)", command) if name not in targets]
    files = re.findall(r"(?<![\w./$-])((?:tools|tests|\.ci)(?:/[\w.-]+)?|[\w-]+\.txt)(?![\w./])", command)
    return wrong + [name for name in files if not (root / name).exists()]


@each
def test_what_it_calls_is_there(path):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for step in steps(path):
        assert missing(step.get("run", ""), makefile, ROOT) == []


def test_what_is_not_there_is_found(tmp_path):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "here.sh").touch()
    command = "make book gone\nbash tools/here.sh\nmake paper\nbash tools/gone.sh\npip install -r gone.txt"
    assert missing(command, "book: x\n\techo\n", tmp_path) == ["make paper", "tools/gone.sh", "gone.txt"]


@each
def test_permissions_are_few_and_time_is_short(path):
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["permissions"] in ({}, {"contents": "read"})
    assert "concurrency" in yaml.safe_load(path.read_text(encoding="utf-8"))
    for name, job in jobs(path).items():
        assert job["timeout-minutes"] <= 60, name
        assert "contents" not in job.get("permissions", {}) or path.stem == "release", name
    assert "secrets." not in path.read_text(encoding="utf-8")


@each
def test_actions_are_used_by_their_major_version(path):
    for step in steps(path):
        assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step.get("uses", "a/b@v1"))


def test_versions_are_the_bounds_of_the_package():
    ci = jobs(ROOT / ".github" / "workflows" / "ci.yml")
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert ci["book"]["strategy"]["matrix"]["python"][0] == oldest
    assert {"3.11", "3.12", "3.13"} <= set(ci["book"]["strategy"]["matrix"]["python"])
    (torch,) = (need for need in PROJECT["dependencies"] if need.startswith("torch"))
    rows = ci["torch"]["strategy"]["matrix"]["include"]
    assert [row["torch"] for row in rows] == [torch.replace(">=", "==") + ".*", "torch"]


def test_colab_has_one_version():
    found = {
        (job["steps"][1]["with"]["python-version"], job["steps"][-1]["env"]["TORCH"])
        for name in ("ci", "weekly")
        for job in [jobs(ROOT / ".github" / "workflows" / f"{name}.yml")["colab"]]
    }
    assert len(found) == 1
    ((python, torch),) = found
    assert f"PYTHON=python{python} " in (ROOT / "tools" / "colab_like.sh").read_text(encoding="utf-8")
    assert f"TORCH={torch} " in (ROOT / "tools" / "colab_like.sh").read_text(encoding="utf-8")


def test_the_tools_of_the_torch_job_are_in_the_requirements():
    (command,) = (step["run"] for step in steps(ROOT / ".github" / "workflows" / "ci.yml") if "tools=" in str(step))
    names = re.search(r"tools='([^'$]+)", command)[1].split("|")
    rows = jobs(ROOT / ".github" / "workflows" / "ci.yml")["torch"]["strategy"]["matrix"]["include"]
    names += [name for row in rows for name in row["onnx"].split("|") if name]
    pins = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert [name for name in names if not re.search(rf"(?m)^{re.escape(name)}==", pins)] == []


@each
def test_no_address_is_typed(path):
    assert address.current(ROOT).split("/")[0] not in path.read_text(encoding="utf-8")
    assert not re.search(r"github\.(com|io)/", path.read_text(encoding="utf-8"))


def test_only_what_was_tested_is_published():
    path = ROOT / ".github" / "workflows" / "publish.yml"
    publish = yaml.safe_load(path.read_text(encoding="utf-8"))
    (name,) = publish[True]["workflow_run"]["workflows"]  # YAML reads "on" as true
    ci = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert name == ci["name"] and publish[True]["workflow_run"]["branches"] == ["main"]
    taken = next(
        step["with"]["name"]
        for step in steps(ROOT / ".github" / "workflows" / "publish.yml")
        if "download" in step.get("uses", "")
    )
    made = [step["with"]["name"] for step in ci["jobs"]["pages"]["steps"] if "upload" in step.get("uses", "")]
    assert taken in made and "conclusion == 'success'" in publish["jobs"]["publish"]["if"]
