"""The committed models of chapter 15, and the functions that look at them."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from t2t_ref import T2TViT, ViT, save_checkpoint
from t2t_ref.experiments import what_it_sees
from t2t_ref.experiments.resnet import ResidualBlock, ResNet
from t2t_ref.experiments.runs import recipe_of, run_experiment
from t2t_ref.experiments.what_it_sees import (
    ARMS,
    EXPERIMENT,
    NAMES,
    SHIFTS,
    accuracy,
    build,
    feature_maps,
    load,
    released_models,
    rounded,
    save,
    shown_digits,
    silent_shares,
    without_token_attention,
)
from t2t_ref.inspection.statistics import channel_health, channel_similarity, high_frequency_share

RESULTS = Path(__file__).resolve().parents[2] / "results"
SMALL = dict(img_size=64, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2.0)


@pytest.mark.parametrize("kind", NAMES)
def test_the_committed_weights_are_as_good_as_they_say(kind):
    path = RESULTS / "weights" / f"{kind}.safetensors"
    about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert path.stat().st_size <= 3_000_000
    model = load(path)
    images = about["quickly_tested"]
    # another processor may round another way: two images may change sides
    assert accuracy(model, images) == pytest.approx(about["quick_accuracy"], abs=200 / images)
    # the quick test is a part of the full one: the two agree as far as 400 images can tell
    assert about["quick_accuracy"] == pytest.approx(about["accuracy"], abs=6)
    assert about["seed"] == EXPERIMENT.seeds[0]
    assert about["command"] == "python -m t2t_ref.experiments what_it_sees"
    recipe = recipe_of(ARMS[kind], about["recipe"]["lr"], about["seed"], EXPERIMENT.recipe)
    assert about["recipe"] == json.loads(json.dumps(asdict(recipe)))
    fresh = build(kind).eval()
    assert accuracy(fresh, 200) < 30 < about["accuracy"]


def test_the_results_tell_of_the_committed_weights():
    result = json.loads((RESULTS / "what_it_sees.json").read_text(encoding="utf-8"))
    for kind, about in result["arms"].items():
        beside = json.loads((RESULTS / "weights" / f"{kind}.json").read_text(encoding="utf-8"))
        assert about["runs"][0]["accuracy"] == beside["accuracy"]
        # a quarter of the images shows nearly the same: at most 0.008 from the stored numbers
        maps = feature_maps(load(RESULTS / "weights" / f"{kind}.safetensors"), shown_digits(64)[0])
        after = about["runs"][0]["after"]["layers"]
        assert list(maps) == list(after)
        for name, layer in maps.items():
            found = channel_similarity(layer), high_frequency_share(layer).nanmean().item()
            assert found == pytest.approx((after[name]["similarity"], after[name]["fine"]), abs=0.04), name
            assert channel_health(layer) == pytest.approx((after[name]["dead"], after[name]["saturated"]), abs=0.04)
        for run in about["runs"]:
            for statistics in (run["before"], run["after"]):
                assert len(statistics["shift_response"]) == len(result["shifts"])
                assert all(0 <= layer["dead"] <= 1 for layer in statistics["layers"].values())


def test_names_of_the_layers():
    image = torch.zeros(1, 3, 64, 96)
    t2t = T2TViT(**SMALL | dict(img_size=(64, 96)), token_dim=8)
    maps = feature_maps(t2t, image)
    shapes = {name: tuple(layer.shape) for name, layer in maps.items()}
    assert shapes == {
        "T2T layer 1": (1, 8, 16, 24),
        "T2T layer 2": (1, 8, 8, 12),
        "tokens": (1, 16, 4, 6),
        "block 1": (1, 16, 4, 6),
        "block 2": (1, 16, 4, 6),
    }
    vit = feature_maps(ViT(**SMALL), torch.zeros(1, 3, 64, 64))
    assert list(vit) == ["tokens", "block 1", "block 2"]
    resnet = feature_maps(ResNet(widths=(4, 8)), image)
    assert {name: tuple(layer.shape) for name, layer in resnet.items()} == {
        "stem": (1, 4, 16, 24),
        "stage 1, block 1": (1, 4, 16, 24),
        "stage 1, block 2": (1, 4, 16, 24),
        "stage 2, block 1": (1, 8, 8, 12),
        "stage 2, block 2": (1, 8, 8, 12),
    }
    with pytest.raises(ValueError, match="features of a Linear are: use tap"):
        feature_maps(nn.Linear(2, 2), image)


class TorchvisionLike(nn.Module):
    """A residual network with the names that torchvision gives to its parts."""

    def __init__(self):
        super().__init__()
        self.conv1, self.relu, self.maxpool = nn.Conv2d(3, 4, 7, 2, 3), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(ResidualBlock(4, 4, 1), ResidualBlock(4, 4, 1))
        self.layer2 = nn.Sequential(ResidualBlock(4, 8, 2))

    def forward(self, image):
        return self.layer2(self.layer1(self.maxpool(self.relu(self.conv1(image)))))


def test_released_models_on_stand_ins(tmp_path):
    """The same code with small files in the form of the large ones: the authors' pickle, timm's safetensors."""
    torch.manual_seed(0)
    t2t, vit = T2TViT(**SMALL | dict(img_size=224)), ViT(**SMALL)
    torch.save({"state_dict_ema": t2t.state_dict()}, tmp_path / "t2t.pth.tar")
    save_file(vit.state_dict(), tmp_path / "vit.safetensors", {"format": "pt"})
    sizes = {name: value for name, value in SMALL.items() if name != "img_size"}
    models = released_models(tmp_path / "t2t.pth.tar", tmp_path / "vit.safetensors", TorchvisionLike(), **sizes)
    assert list(models) == ["t2t", "vit", "resnet"] and not any(model.training for model in models.values())
    image = torch.randn(1, 3, 96, 64)
    for name, model in models.items():
        maps = feature_maps(model, image)
        assert all(layer.isfinite().all() for layer in maps.values()), name
    assert list(maps) == ["stem", "stage 1, block 1", "stage 1, block 2", "stage 2, block 1"]
    assert maps["stem"].shape == (1, 4, 24, 16)
    torch.testing.assert_close(models["t2t"].blocks[0].mlp.fc1.weight, t2t.blocks[0].mlp.fc1.weight)


@pytest.mark.parametrize("kind", NAMES)
def test_saved_models_come_back(kind, tmp_path):
    torch.manual_seed(0)
    model, (images, _) = build(kind).eval(), shown_digits(4)
    save(model, tmp_path / "x.safetensors")
    again = load(tmp_path / "x.safetensors")
    assert type(again) is type(model) and not again.training
    torch.testing.assert_close(again(images), model(images), rtol=0, atol=0)


def test_the_experiment(tmp_path, monkeypatch):
    """On a few images: trains, looks before and after, keeps the weights of the first seed."""
    for name in ("LOOKED_AT", "TESTED", "QUICKLY_TESTED"):
        monkeypatch.setattr(f"t2t_ref.experiments.what_it_sees.{name}", 8)
    short = replace(EXPERIMENT.recipe, epochs=2, epoch_samples=8, batch_size=4)
    few = replace(EXPERIMENT, arms={"resnet": dict(kind="resnet")}, recipe=short, seeds=(0, 1), tested=8)
    result = run_experiment("what_it_sees", few, tmp_path, say=lambda text: None)
    one, other = result["arms"]["resnet"]["runs"]
    assert (one["seed"], other["seed"]) == (0, 1) and one["before"] != one["after"] != other["after"]
    assert result["shifts"] == list(SHIFTS)
    beside = json.loads((tmp_path / "weights" / "resnet.json").read_text(encoding="utf-8"))
    assert (beside["seed"], beside["accuracy"], beside["recipe"]["seed"]) == (0, one["accuracy"], 0)
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == ["resnet.json", "resnet.safetensors"]
    kept = load(tmp_path / "weights" / "resnet.safetensors")
    assert what_it_sees.statistics(kept) == one["after"]


def test_silent_tokens():
    """Long keys send the denominator below epsilon; then the layer without attention is the same layer."""
    torch.manual_seed(0)
    model, (images, _) = build("t2t").eval(), shown_digits(4)
    assert silent_shares(model, images) == [0, 0]
    assert not torch.allclose(without_token_attention(model)(images), model(images), atol=1e-4)
    before = model.state_dict()["tokens_to_token.attention1.proj.weight"].clone()
    for layer in (model.tokens_to_token.attention1, model.tokens_to_token.attention2):
        with torch.no_grad():
            layer.kqv.weight *= 60
    assert silent_shares(model, images) == [1, 1]
    torch.testing.assert_close(without_token_attention(model)(images), model(images))
    assert torch.equal(model.tokens_to_token.attention1.proj.weight, before)  # it was a copy


def test_rounding():
    assert rounded({"a": [0.123456, {"b": 1}], "c": "x"}) == {"a": [0.1235, {"b": 1}], "c": "x"}


def test_other_transformers_have_no_place_in_a_resnet_file(tmp_path):
    model = T2TViT(**SMALL, token_dim=8, num_classes=3)
    save_checkpoint(model, tmp_path / "t.safetensors")
    assert isinstance(load(tmp_path / "t.safetensors"), T2TViT)
