"""Out of Python: the checks of graphs.py, all of them in one child."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import graphs
import pytest

ROOT = Path(__file__).resolve().parents[2]


@cache
def outcome(folder):
    """What went wrong in each check."""
    names = [name for name in graphs.CHECKS if not graphs.cannot(name)]
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "graphs.py"), str(folder), *names]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", graphs.CHECKS)
def test_the_graph_computes_the_same(name, tmp_path_factory):
    if reason := graphs.cannot(name):
        pytest.skip(reason)
    found = outcome(tmp_path_factory.getbasetemp())[name]
    assert not found, found
