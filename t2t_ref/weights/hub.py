"""The Hugging Face hub: three methods for the models, which know nothing of files themselves (chapter 14)."""

import functools
import inspect
import json
import os
from pathlib import Path

from t2t_ref.models import VARIANTS, build
from t2t_ref.models.classifier import Classifier
from t2t_ref.weights.card import model_card
from t2t_ref.weights.files import read_weights
from t2t_ref.weights.loading import load_checkpoint
from t2t_ref.weights.saving import arguments_of, load_model, save_checkpoint

CARD = tuple(inspect.signature(model_card).parameters)[1:]  # what save_pretrained passes on to the card


@functools.cache
def hub_form() -> type:
    """A model in the form of huggingface_hub's mixin: a folder or repository with model.safetensors and config.json.

    The mixin is a class of its own around a model, so that the models are the same with and without huggingface_hub.

    Raises:
        ImportError: with the remedy, if that is not installed
    """
    try:
        from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
    except ImportError as error:
        raise ImportError("this needs the Hugging Face hub's client: pip install huggingface_hub") from error

    class HubForm(ModelHubMixin, library_name="t2t_ref", tags=["image-classification"]):
        FILE = "model.safetensors"

        def __init__(self, model: Classifier):
            self.model = model

        def _save_pretrained(self, save_directory: Path) -> None:
            save_checkpoint(self.model, Path(save_directory) / self.FILE)

        def generate_model_card(self, **facts) -> ModelCard:
            return ModelCard(model_card(self.model, **facts))

        @classmethod
        def _from_pretrained(
            cls, *, model_id, revision, cache_dir, force_download, local_files_only, token, **overrides
        ) -> Classifier:
            where = dict(revision=revision, cache_dir=cache_dir, force_download=force_download)
            if os.path.isdir(model_id):
                path, config = (Path(model_id) / name for name in (cls.FILE, "config.json"))
            else:
                path, config = (
                    hf_hub_download(model_id, name, local_files_only=local_files_only, token=token, **where)
                    for name in (cls.FILE, "config.json")
                )
            return rebuild(path, config, overrides)

    return HubForm


def rebuild(path: str | os.PathLike, config: str | os.PathLike, overrides: dict) -> Classifier:
    """The model of a folder: as ``save_pretrained`` wrote it, or as timm did, of a model that this package has, too.

    Raises:
        ValueError: for a folder of neither
    """
    stored = read_weights(path)
    known = json.loads(Path(config).read_text(encoding="utf-8")) if Path(config).is_file() else {}
    name = known.get("architecture")
    if stored.class_name or name not in VARIANTS:
        return load_model(stored, **overrides)
    taken = inspect.signature(VARIANTS[name].model).parameters
    theirs = {key: known[key] for key in ("num_classes", "global_pool") if key in known} | known.get("model_args", {})
    theirs = {key: tuple(value) if isinstance(value, list) else value for key, value in theirs.items() if key in taken}
    model = build(name, **(theirs | overrides))
    load_checkpoint(model, stored)
    return model


def config_of(model: Classifier) -> dict:
    """What stands in config.json: the arguments of the model, and what timm needs to build it through its door.

    timm reads a folder by the name of an architecture and the arguments that it shall get besides. The name is that of
    the model, if :func:`~t2t_ref.create.create_model` made it, else the first variant of its class.
    """
    arguments = arguments_of(model)
    own = next((name for name, variant in VARIANTS.items() if variant.model is type(model)), None)
    name = model.pretrained_cfg.get("architecture", own)
    signature = inspect.signature(type(model)).parameters
    usual = {key: entry.default for key, entry in signature.items()} | vars(VARIANTS[name])
    changed = {key: value for key, value in arguments.items() if usual.get(key) != value}
    source = ("url", "tag", "file", "hf_hub_id", "source", "description", "license", "origin_url")  # of other weights
    cfg = {key: value for key, value in model.pretrained_cfg.items() if key not in source}
    cfg |= dict(input_size=(model.in_chans, *model.img_size), num_classes=model.num_classes)
    timms = dict(architecture=name, num_features=model.num_features, pretrained_cfg=cfg, model_args=changed)
    return json.loads(json.dumps(arguments | timms, default=float))


def from_pretrained(cls: type, source: str | os.PathLike, **options) -> Classifier:
    """A model from the Hugging Face hub ("owner/name"), or from a folder that ``save_pretrained`` or timm wrote.

    ``options`` are those of huggingface_hub's mixin (revision, token, ...) and arguments of the model that shall
    differ, such as num_classes.

    Raises:
        ValueError: if a model of another class is there
        ImportError: with the remedy, without huggingface_hub
    """
    model = hub_form().from_pretrained(source, **options)
    if not isinstance(model, cls):
        raise ValueError(f"{source} holds a {type(model).__name__}, expected a {cls.__name__}")
    return model


def save_pretrained(self: Classifier, folder: str | os.PathLike, **options) -> None:
    """Write model.safetensors, config.json and a model card into a folder, as huggingface_hub's mixin does.

    timm reads it too: ``timm.create_model("local-dir:FOLDER", pretrained=True)``, once t2t_ref.timm is imported.

    Args:
        **options: the mixin's, and for the card those of :func:`~t2t_ref.weights.card.model_card`: run, trained,
            measured, command, license
    """
    facts = {name: options.pop(name) for name in CARD if name in options}
    hub_form()(self).save_pretrained(folder, config=config_of(self), model_card_kwargs=facts, **options)


def push_to_hub(self: Classifier, repo_id: str, **options) -> str:
    """Upload what ``save_pretrained`` writes, by huggingface_hub's mixin and with its options. The address."""
    facts = {name: options.pop(name) for name in CARD if name in options}
    return hub_form()(self).push_to_hub(repo_id, config=config_of(self), model_card_kwargs=facts, **options)


# given to the models here, and not written there: the rooms below know nothing of this one
Classifier.from_pretrained = classmethod(from_pretrained)
Classifier.save_pretrained = save_pretrained
Classifier.push_to_hub = push_to_hub
