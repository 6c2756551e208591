"""Drawing takes half of the time of these small runs: a test that looks at the curve asks for ``drawn``."""

import pytest

from t2t_ref.train import run as run_module


@pytest.fixture
def drawn():
    """The curve is drawn."""


@pytest.fixture(autouse=True)
def no_curve(request, monkeypatch):
    """The curve is not drawn."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(run_module, "draw_curve", lambda lines, path: None)
