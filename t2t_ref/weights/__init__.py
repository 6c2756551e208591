"""Weights from files and into files (chapter 14). Importing it gives the models their methods for the hub."""

from t2t_ref.weights.files import Stored, read_weights
from t2t_ref.weights.hub import from_pretrained, push_to_hub, save_pretrained
from t2t_ref.weights.loading import LoadReport, load_checkpoint
from t2t_ref.weights.released import RELEASED, released_file, released_weights
from t2t_ref.weights.saving import load_model, save_checkpoint

__all__ = [
    "RELEASED",
    "LoadReport",
    "Stored",
    "from_pretrained",
    "load_checkpoint",
    "load_model",
    "push_to_hub",
    "read_weights",
    "released_file",
    "released_weights",
    "save_checkpoint",
    "save_pretrained",
]
