"""A model into one file, and back (chapter 14)."""

import json
import os
from pathlib import Path

import torch
from torch import nn

from t2t_ref.models import CLASSES
from t2t_ref.models.classifier import Classifier
from t2t_ref.weights._version import __version__
from t2t_ref.weights.files import Stored, read_weights
from t2t_ref.weights.loading import load_checkpoint, plain_name, unwrap
from t2t_ref.weights.writing import shown, write_whole


def arguments_of(model: Classifier) -> dict:
    """The arguments that build this model again, as it is now: those of its making, with the head of today."""
    today = {name: getattr(model, name) for name in ("num_classes", "dynamic_img_size") if name in model.arguments}
    if model.global_pool != type(model).global_pool:
        today["global_pool"] = model.global_pool
    return model.arguments | today


def save_checkpoint(model: nn.Module, path: str | bytes | os.PathLike) -> None:
    """Write the weights as safetensors, with the model's class and arguments beside them, for :func:`load_model`.

    Of a model that is wrapped, compiled or parallel say, the model itself is written. The file appears whole or not at
    all; one that is there is replaced at the last moment.

    Raises:
        ValueError: for a model that its arguments do not rebuild, because it was changed by hand
        TypeError: for one that is none of this package's
        FileNotFoundError: if the folder is not there
        OSError: if the file cannot be written
        ImportError: without the package safetensors
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError("save_checkpoint writes safetensors: pip install safetensors") from error
    model = unwrap(model)
    if type(model) not in CLASSES.values():
        raise ValueError(f"cannot write down how to build a {type(model).__name__}; expected {' or '.join(CLASSES)}")
    arguments = arguments_of(model)
    with torch.device("meta"):
        changes = differences(model, type(model)(**arguments))
    if changes:
        raise ValueError(
            f"this model was changed after it was built, and its arguments would not rebuild it: {'; '.join(changes)}. "
            "torch.save(model.state_dict(), path) keeps the weights alone"
        )
    metadata = {
        "format": "pt",  # what other readers of safetensors look for
        "t2t_ref": __version__,
        "class": type(model).__name__,
        "arguments": json.dumps(arguments, default=float),
    }
    weights = {plain_name(name): entry.detach().cpu().contiguous() for name, entry in model.state_dict().items()}

    def write(draft: Path) -> None:
        try:
            save_file(weights, draft, metadata)
        except SafetensorError as error:  # a full disk, in words of its own
            raise OSError(f"cannot write {shown(path)}: {error}") from error

    write_whole(path, write)


def differences(model: nn.Module, twin: nn.Module) -> list[str]:
    """Where two models differ, values of weights and the mode aside: layers, their settings, shapes."""
    found = []
    # a wrapper around a part has the part's name without its own; what comes later, the part, stays
    ours, theirs = ({plain_name(f"{name}.")[:-1]: part for name, part in m.named_modules()} for m in (model, twin))
    for name in sorted(ours.keys() | theirs.keys()):
        here, there = (f"{type(modules.get(name)).__name__}" for modules in (ours, theirs))
        if here != there:
            found.append(f"{name} is {here}, not {there}")
            continue
        for key, value in vars(theirs[name]).items():
            if isinstance(value, (int, float, str, tuple)) and key != "training" and not key.startswith("_"):
                here = getattr(ours[name], key, None)
                if here != value:
                    found.append(f"{name}.{key} is {here}, not {value}".lstrip("."))
    shapes = [{plain_name(name): tuple(entry.shape) for name, entry in m.state_dict().items()} for m in (model, twin)]
    return found + [f"shape of {name}" for name in dict(shapes[0].items() ^ shapes[1].items())]


def load_model(path: str | bytes | os.PathLike | Stored, **overrides) -> Classifier:
    """Build the model that :func:`save_checkpoint` wrote, from its file alone: class, arguments, weights, dtype.

    It comes on the CPU and in training mode, as :func:`~t2t_ref.create.create_model` gives it.

    Args:
        path: may be a URL, or what :func:`~t2t_ref.weights.files.read_weights` read
        **overrides: arguments of the model that shall differ, such as num_classes or img_size: the weights are then
            adapted as :func:`load_checkpoint` does

    Raises:
        ValueError: for a file that save_checkpoint did not write or that is damaged, and for overrides that the weights
            do not fit
        FileNotFoundError: as :func:`load_checkpoint`
        ConnectionError: as :func:`load_checkpoint`
    """
    stored = read_weights(path)
    if stored.class_name not in CLASSES:
        raise ValueError(
            f"{stored.origin} does not say which model it holds, as files of save_checkpoint do; "
            "build the model with create_model, then load_checkpoint(model, path)"
        )
    build = CLASSES[stored.class_name]
    if overrides:
        model = build(**(stored.arguments | overrides))
        load_checkpoint(model, stored)
        return model
    weights = {name: entry.clone() for name, entry in stored.weights.items()} if stored is path else stored.weights
    try:
        with torch.device("meta"):  # no memory, no random numbers: every entry comes from the file
            model = build(**stored.arguments)
        model.load_state_dict(weights, assign=True)
    except Exception as error:
        raise ValueError(f"{stored.origin} is damaged: its arguments and its weights disagree ({error})") from error
    return model
