"""The comparison behind chapter 11: same terms for both arms, and a file that is gone on with."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from t2t_ref.train import compare
from t2t_ref.train.loop import build_model
from t2t_ref.train.sources import open_data


def test_the_arms_differ_in_how_tokens_are_made_and_in_nothing_else():
    one, other = (vars(compare.recipe_of(arm)) for arm in compare.ARMS)
    assert {field for field in one if one[field] != other[field]} == {"model", "model_options"}
    models = [build_model(compare.recipe_of(arm), 10) for arm in compare.ARMS]
    assert models[0].pos_embed.shape == models[1].pos_embed.shape == (1, 17, 96)
    shapes = [{k: v.shape for k, v in model.blocks.state_dict().items()} for model in models]
    assert shapes[0] == shapes[1] and models[0].blocks[0].attn.num_heads == models[1].blocks[0].attn.num_heads


def test_a_run_is_described(monkeypatch):
    fitted, fit = [], compare.fit
    monkeypatch.setattr(compare, "fit", lambda *a, **options: fitted.append(fit(*a, **options)) or fitted[-1])
    few = dict(epochs=2, warmup_epochs=0, cooldown_epochs=0, updates_per_epoch=1, batch_size=4, log_every=1)
    found = compare.run(compare.recipe_of("hard split", seed=3, **few, evaluate_every=2))
    assert found["seed"] == 3 and [update for update, _ in found["losses"]] == [1, 2]
    assert [loss for _, loss in found["losses"]] == pytest.approx([s["loss"] for s in fitted[0].steps], abs=5e-5)
    data, right, losses = open_data(compare.recipe_of("hard split")), 0, []
    for image, label in data.test:  # by hand, one image after the other, as far as it is quick
        with torch.no_grad():
            logits = fitted[0].best(torch.stack([(image - 0.5) / 0.5]))
        right += int(logits.argmax() == label)
        losses.append(F.cross_entropy(logits, torch.tensor([int(label)])).item())
    assert found["accuracy"] == pytest.approx(100 * right / len(data.test), abs=0.3)  # one image may change sides
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-3) and found["seconds"] > 0


@pytest.fixture
def fake(monkeypatch):
    """Runs that take no time: the accuracy follows from the rate, and the smaller loss decides ties."""
    done = []

    def run(recipe):
        done.append((recipe.model, recipe.lr, recipe.seed, recipe.test_split))
        accuracy = {1e-3: 90.0, 2e-3: 95.0, 4e-3: 95.0}[recipe.lr]
        loss = {1e-3: 0.3, 2e-3: 0.2, 4e-3: 0.1}[recipe.lr]
        return {"seed": recipe.seed, "accuracy": accuracy, "loss": loss, "losses": [], "seconds": 0.0}

    monkeypatch.setattr(compare, "run", run)
    return done


def test_rates_are_chosen_on_validation_and_only_the_chosen_one_sees_the_test(fake, tmp_path):
    result = compare.compare(tmp_path, seeds=(0, 1), say=lambda text: None)
    assert [arm["rate"] for arm in result["arms"].values()] == [4e-3, 4e-3]
    search, test = fake[:6], fake[6:]
    assert {(seed, split) for _, _, seed, split in search} == {(100, "val")}
    assert {lr for _, lr, _, _ in search} == {
        1e-3,
        2e-3,
        4e-3,
    }
    assert {(lr, split) for _, lr, _, split in test} == {(4e-3, "test")}
    assert [seed for _, _, seed, _ in test] == [0, 0, 1, 1]
    assert json.loads((tmp_path / "digits.json").read_text()) == json.loads(json.dumps(result))


def test_it_goes_on_where_it_was_interrupted(fake, tmp_path):
    compare.compare(tmp_path, seeds=(0,), say=lambda text: None)
    before = len(fake)
    compare.compare(tmp_path, seeds=(0, 1), say=lambda text: None)
    assert [(lr, seed) for _, lr, seed, _ in fake[before:]] == [(4e-3, 1), (4e-3, 1)]


def test_a_file_of_another_recipe_is_refused(fake, tmp_path, monkeypatch, capsys):
    compare.compare(tmp_path, seeds=(0,), say=lambda text: None)
    monkeypatch.setattr(compare, "CHANGES", {"epochs": 11})
    assert compare.main(["--output", str(tmp_path)]) == 2
    assert "made by another recipe" in capsys.readouterr().err


def problems(stored: dict) -> list[str]:
    """What is missing in results/digits.json, or differs from the code that should have made it."""
    found = [key for key, value in compare.describe().items() if stored[key] != value]
    found += [] if list(stored["arms"]) == list(compare.ARMS) else ["labels"]
    for name, arm in stored["arms"].items():
        found += [
            f"{name}: {key}" for key, value in compare.size_of(compare.recipe_of(name)).items() if arm[key] != value
        ]
        if sorted(run["seed"] for run in arm["runs"]) != list(compare.SEEDS):
            found.append(f"{name}: seeds")
        best = max(arm["search"][str(rate)]["accuracy"] for rate in compare.RATES)
        if arm["search"][str(arm["rate"])]["accuracy"] != best:
            found.append(f"{name}: rate")
        if not all(run["losses"][-1][0] == 370 and 0 <= run["accuracy"] <= 100 for run in arm["runs"]):
            found.append(f"{name}: a run was cut short")
    return found


def test_the_stored_file_is_complete_and_of_this_code():
    stored = json.loads((Path(__file__).resolve().parents[1] / "results" / "digits.json").read_text())
    assert problems(stored) == []
    arm = stored["arms"]["hard split"]
    arm["runs"].pop()
    arm["macs"] += 1
    stored["recipe"]["smoothing"] = 0.1
    assert problems(stored) == ["recipe", "hard split: macs", "hard split: seeds"]
