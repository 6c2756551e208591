"""Fixtures of the tests of weights."""

import pytest
import torch
from small import authors_file, state, tiny

from t2t_ref import save_checkpoint


@pytest.fixture
def trained():
    """Stands for a trained model: every entry differs from those of a fresh one, the random features too."""
    return tiny(seed=1)


FORMATS = {
    "zip": lambda model, path: torch.save({"state_dict_ema": state(model)}, path),
    "legacy": lambda model, path: authors_file(state(model), path, legacy=True),
    "safetensors": lambda model, path: save_checkpoint(model, path),
}


@pytest.fixture(params=FORMATS)
def whole_file(request, tmp_path, trained):
    FORMATS[request.param](trained, tmp_path / "whole")
    return tmp_path / "whole"
