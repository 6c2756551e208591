"""The Hugging Face hub's form of a saved model."""

import json
import pathlib
import sys

import pytest
from small import same, state, tiny

import t2t_ref
from t2t_ref import T2TViT, ViT, load_checkpoint, save_checkpoint
from t2t_ref.weights.saving import arguments_of


def test_hub_folders(trained, tmp_path):
    pytest.importorskip("huggingface_hub")
    wide = tiny(seed=1, img_size=(48, 80))
    wide.save_pretrained(tmp_path / "wide")
    assert {path.name for path in (tmp_path / "wide").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert json.loads((tmp_path / "wide" / "config.json").read_text(encoding="utf-8"))["img_size"] == [48, 80]
    again = T2TViT.from_pretrained(tmp_path / "wide")
    assert type(again) is T2TViT and arguments_of(again) == arguments_of(wide) and same(state(again), state(wide))
    assert T2TViT.from_pretrained(str(tmp_path / "wide"), num_classes=3).head.weight.shape == (3, 24)
    with pytest.raises(ValueError, match="holds a T2TViT, expected a ViT"):
        ViT.from_pretrained(tmp_path / "wide")


def test_push_to_hub_uploads_that_folder(trained, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    uploaded = {}

    def upload_folder(self, *, repo_id, folder_path, **options):
        uploaded.update({path.name: path.read_bytes() for path in pathlib.Path(folder_path).iterdir()})
        return f"https://huggingface.co/{repo_id}/commit/0"

    class Repo:
        repo_id = "somebody/tiny"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, *a, **k: Repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    assert "somebody/tiny" in trained.push_to_hub("somebody/tiny")
    assert {"config.json", "model.safetensors"} <= set(uploaded)


def test_optional_packages_are_named(trained, tmp_path, monkeypatch):
    t2t_ref.weights.hub.hub_form.cache_clear()
    save_checkpoint(trained, tmp_path / "m.safetensors")
    for name in ("huggingface_hub", "safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    for call, package in (
        (lambda: T2TViT.from_pretrained("somebody/tiny"), "huggingface_hub"),
        (lambda: trained.push_to_hub("somebody/tiny"), "huggingface_hub"),
        (lambda: save_checkpoint(trained, tmp_path / "n.safetensors"), "safetensors"),
        (lambda: load_checkpoint(trained, tmp_path / "m.safetensors"), "safetensors"),
    ):
        with pytest.raises(ImportError, match=f"pip install {package}"):
            call()
