"""The Hugging Face hub: three methods for the models, which know nothing of files themselves (chapter 14)."""

import functools
import os
from pathlib import Path

from t2t_ref.models.classifier import Classifier
from t2t_ref.weights.saving import arguments_of, load_model, save_checkpoint


@functools.cache
def hub_form() -> type:
    """A model in the form of huggingface_hub's mixin: a folder or repository with model.safetensors and config.json.

    The mixin is a class of its own around a model, so that the models are the same with and without huggingface_hub.

    Raises:
        ImportError: with the remedy, if that is not installed
    """
    try:
        from huggingface_hub import ModelHubMixin, hf_hub_download
    except ImportError as error:
        raise ImportError("this needs the Hugging Face hub's client: pip install huggingface_hub") from error

    class HubForm(ModelHubMixin, library_name="t2t_ref", tags=["image-classification"]):
        FILE = "model.safetensors"

        def __init__(self, model: Classifier):
            self.model = model

        def _save_pretrained(self, save_directory: Path) -> None:
            save_checkpoint(self.model, Path(save_directory) / self.FILE)

        @classmethod
        def _from_pretrained(
            cls, *, model_id, revision, cache_dir, force_download, local_files_only, token, **overrides
        ) -> Classifier:
            if os.path.isdir(model_id):
                return load_model(Path(model_id) / cls.FILE, **overrides)
            where = dict(revision=revision, cache_dir=cache_dir, force_download=force_download)
            path = hf_hub_download(model_id, cls.FILE, local_files_only=local_files_only, token=token, **where)
            return load_model(path, **overrides)

    return HubForm


def from_pretrained(cls: type, source: str | os.PathLike, **options) -> Classifier:
    """A model from the Hugging Face hub ("owner/name"), or from a folder that ``save_pretrained`` wrote.

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
    """Write model.safetensors, config.json and a model card into a folder, as huggingface_hub's mixin does."""
    hub_form()(self).save_pretrained(folder, config=arguments_of(self), **options)


def push_to_hub(self: Classifier, repo_id: str, **options) -> str:
    """Upload what ``save_pretrained`` writes, by huggingface_hub's mixin and with its options. The address."""
    return hub_form()(self).push_to_hub(repo_id, config=arguments_of(self), **options)


# given to the models here, and not written there: the rooms below know nothing of this one
Classifier.from_pretrained = classmethod(from_pretrained)
Classifier.save_pretrained = save_pretrained
Classifier.push_to_hub = push_to_hub
