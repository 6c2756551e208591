"""The Hugging Face hub's form of a saved model."""

import base64
import json
import os
import pathlib
import re
import subprocess
import sys
import zlib

import pytest
from small import same, state, tiny
from werkzeug import Response

import t2t_ref
from t2t_ref import T2TViT, ViT, count_parameters, create_model, load_checkpoint, save_checkpoint
from t2t_ref.weights.card import UNKNOWN, model_card
from t2t_ref.weights.released import released_file
from t2t_ref.weights.saving import arguments_of

ROOT = pathlib.Path(__file__).resolve().parents[2]


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


def test_the_card_says_what_is_known_and_no_more(trained, tmp_path):
    pytest.importorskip("huggingface_hub")
    trained.save_pretrained(tmp_path / "silent")
    text = (tmp_path / "silent" / "README.md").read_text(encoding="utf-8")
    numbers = f"{count_parameters(trained):,} parameters, images of 64 x 64 pixels and 3 channels,\n5 classes"
    assert numbers in text and text.count(UNKNOWN) == 4 and "license:" not in text
    assert "the crop is 90% of the shorter side (bicubic)" in text and "t2t_ref.T2TViT.from_pretrained" in text

    run = tmp_path / "run"
    run.mkdir()
    (run / "log.jsonl").write_text(
        '{"kind": "start", "recipe": {"data": "digits", "epochs": 3}}\n{"kind": "epoch", "test_accuracy": 0.925}\n',
        encoding="utf-8",
    )
    (run / "evaluation.json").write_text('{"data": "digits", "top1": 0.93, "classes": [1]}', encoding="utf-8")
    options = dict(run=run, command="python -m t2t_ref.train digits", license="mit")
    trained.save_pretrained(tmp_path / "told", **options)
    text = (tmp_path / "told" / "README.md").read_text(encoding="utf-8")
    for words in (
        "digits, 3 epochs.",
        "at the end of the run: 92.50%",
        '"top1": 0.93',
        "    python -m t2t_ref.train digits",
    ):
        assert words in text
    assert UNKNOWN not in text and "license: mit\n" in text.split("---")[1]
    (run / "log.jsonl").write_text("no log", encoding="utf-8")
    with pytest.raises(ValueError, match="is no log of t2t_ref.train"):
        model_card(trained, run=run)
    with pytest.raises(FileNotFoundError):
        model_card(trained, run=tmp_path / "nowhere")


def test_a_card_of_released_weights_names_their_origin():
    model = create_model("t2t_vit_7", img_size=32, depth=1)
    assert "yitu" not in model_card(model)
    model.pretrained_cfg |= released_file("t2t_vit_7").cfg  # as create_model(pretrained=True) notes it
    text = model_card(model)
    assert "It began as the file https://github.com/yitu-opensource" in text and "bsd-3-clause-clear" in text


@pytest.fixture
def hub(httpserver):
    """As much of the Hugging Face hub as one repository needs: its address, and the files that were sent to it."""
    files, commit = {}, "0" * 40

    def send(request):
        name = request.path.rpartition("/")[2]
        if name not in files:
            return Response(status=404, headers={"X-Error-Code": "EntryNotFound"})
        return Response(files[name], headers={"ETag": f'"{zlib.crc32(files[name])}"', "X-Repo-Commit": commit})

    def plan(request):
        how = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
        return Response(json.dumps({"files": [{"path": asked["path"], **how} for asked in request.json["files"]]}))

    def receive(request):
        for line in map(json.loads, request.data.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return Response(json.dumps({"commitUrl": f"{url}/commit/{commit}", "commitOid": commit, "success": True}))

    url = httpserver.url_for("/somebody/tiny")
    httpserver.expect_request(re.compile("/somebody/tiny/resolve/.*")).respond_with_handler(send)
    httpserver.expect_request(re.compile(".*/preupload/main")).respond_with_handler(plan)
    httpserver.expect_request(re.compile(".*/commit/main")).respond_with_handler(receive)
    httpserver.expect_request("/api/repos/create").respond_with_json({"url": url, "name": "somebody/tiny"})
    httpserver.expect_request("/api/validate-yaml").respond_with_json({})
    about = {"id": "somebody/tiny", "sha": commit, "siblings": []}
    httpserver.expect_request(re.compile("/api/models/.*"), method="GET").respond_with_json(about)
    return httpserver.url_for("")[:-1], files


ROUND_TRIP = """
import sys, torch, t2t_ref
model = t2t_ref.load_model(sys.argv[1]).eval()
model.push_to_hub("somebody/tiny", token="none", trained="noise", license="mit")
again = t2t_ref.T2TViT.from_pretrained("somebody/tiny", cache_dir=sys.argv[2]).eval()
image = torch.randn(1, 3, 64, 64)
assert torch.equal(again(image), model(image))
"""


def test_a_round_trip_over_a_server(trained, tmp_path, hub):
    pytest.importorskip("huggingface_hub")
    address, files = hub
    save_checkpoint(trained, tmp_path / "m.safetensors")
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        ROUND_TRIP,
        str(tmp_path / "m.safetensors"),
        str(tmp_path / "cache"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {"README.md", "config.json", "model.safetensors"} <= set(files)
    assert b"noise" in files["README.md"]
