"""The experiments: their arms, their one driver, and files that survive an interruption."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from t2t_ref import sinusoid_table
from t2t_ref.experiments import (
    EXPERIMENTS,
    PERFORMER,
    VIT_ARM,
    Experiment,
    arms,
    build_model,
    intervals,
    performers,
    recipe_of,
    runs,
    train_arm,
)
from t2t_ref.experiments.__main__ import main
from t2t_ref.train import Recipe, fit
from t2t_ref.train.loop import build_model as model_of_recipe

TINY = VIT_ARM | dict(embed_dim=16, depth=1, num_heads=2)
TINY_T2T = PERFORMER | dict(embed_dim=16, depth=1, num_heads=2, token_dim=8)
FEW = replace(arms.LONG, epochs=2, epoch_samples=40, batch_size=20, warmup_epochs=0)
SMALL = Experiment({"one": TINY, "two": TINY | dict(position="none")}, FEW, (1e-3, 2e-3), (100,), (0, 1), tested=50)


def quietly(text):
    pass


# arms


@pytest.mark.parametrize(
    "label, arm", [(label, arm) for experiment in EXPERIMENTS.values() for label, arm in experiment.arms.items()]
)
def test_every_arm_is_plain_values_and_runs(label, arm):
    assert json.loads(json.dumps(arm)) == arm
    with torch.no_grad():
        model = build_model(arm).eval()
        if arm["kind"].split()[0] in ("t2t", "vit"):
            assert model.forward_features(torch.zeros(1, 3, 64, 64)).shape[1] == 17, label
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 10)


def test_the_recipe_of_an_arm_is_what_is_trained():
    """By its recipe alone, ``t2t_ref.train`` builds the same model, but for positions and random directions."""
    for experiment in EXPERIMENTS.values():
        for arm in experiment.arms.values():
            recipe = recipe_of(arm, 1e-3, 5, experiment.recipe)
            assert (recipe.lr, recipe.seed, recipe.precision, recipe.smoothing) == (1e-3, 5, "no", 0.0)
            assert recipe.test_split == "val"  # what fit looks at while it trains
            if arm["kind"] != "resnet" and "position" not in arm:
                ours, theirs = build_model(arm), model_of_recipe(recipe, 10)
                assert type(ours) is type(theirs)
                shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (ours, theirs)]
                assert shapes[0] == shapes[1]


def test_arms_that_shall_be_equal_in_size_are():
    sizes = {
        name: {label: sum(p.numel() for p in build_model(arm).parameters()) for label, arm in experiment.arms.items()}
        for name, experiment in EXPERIMENTS.items()
    }
    for kind in ("T2T", "hard split"):
        deep, wide = (sizes["deep_narrow"][f"{kind}, {shape}"] for shape in ("deep", "wide"))
        assert abs(deep / wide - 1) < 0.01
    designs = sizes["cnn_designs"]
    assert abs(designs["ghost"] / designs["slim"] - 1) < 0.05
    assert all(abs(designs[name] / designs["plain"] - 1) < 0.02 for name in ("SE", "12 heads", "dense"))
    assert len(sizes["relatives"]) == 8
    assert all(abs(size / sizes["relatives"]["T2T-ViT"] - 1) < 0.03 for size in sizes["relatives"].values())


@pytest.mark.parametrize("name", ["tokenisers", "digits"])
def test_tokenisers_differ_in_how_tokens_are_made_and_in_nothing_else(name):
    one, *others = (build_model(arm) for arm in EXPERIMENTS[name].arms.values())
    for other in others:
        assert one.pos_embed.shape == other.pos_embed.shape == (1, 17, 96)
        shapes = [{k: v.shape for k, v in model.blocks.state_dict().items()} for model in (one, other)]
        assert shapes[0] == shapes[1] and one.blocks[0].attn.num_heads == other.blocks[0].attn.num_heads


def test_every_experiment_spends_what_it_says():
    seen = {name: runs.describe(name, experiment)["training"]["samples"] for name, experiment in EXPERIMENTS.items()}
    assert seen.pop("digits") == 10 * 37 * 32
    assert set(seen.values()) == {40_000}
    with pytest.raises(ValueError, match="unknown kind of model 'vit sea'.*did you mean 'vit se'"):
        recipe_of(TINY | dict(kind="vit sea"), 1e-3, 0)


def test_positions():
    table = build_model(TINY | dict(position="sinusoid")).pos_embed
    assert torch.equal(table, sinusoid_table(17, 16)) and not table.requires_grad
    none = build_model(TINY_T2T | dict(position="none")).pos_embed
    assert not none.any() and not none.requires_grad
    learned = build_model(TINY_T2T | dict(position="learned")).pos_embed
    assert learned.any() and learned.requires_grad and learned.std() < 0.03
    with pytest.raises(ValueError, match="unknown position 'rotary'"):
        build_model(TINY | dict(position="rotary"))


def test_without_attention_a_t2t_layer_sees_its_own_token_alone():
    """A change of one pixel reaches the tokens whose windows hold it and no others, before training and after."""
    torch.manual_seed(0)
    arm = PERFORMER | dict(token_attention=False)
    image = torch.rand(1, 3, 64, 64)
    other = image.clone()
    other[..., 0, 0] += 1
    trained = train_arm(arm, recipe_of(arm, 1e-2, 0, FEW)).model
    for model in (build_model(arm), trained):
        with torch.no_grad():
            changed = (model.eval().tokens_to_token(image) != model.tokens_to_token(other)).any(dim=-1)
        assert changed[0, 0] and not changed[0, 1:].any()
    with torch.no_grad():
        whole = build_model(PERFORMER).eval()
        assert (whole.tokens_to_token(image) != whole.tokens_to_token(other)).any(dim=-1).all()


def test_silence_is_counted_as_the_layer_computes_it():
    """Against the released formula in double precision, with keys so long that some denominators are below 1e-8."""
    model = build_model(PERFORMER).double().eval()
    assert arms.silence(model, 7) is None and arms.silence(build_model(VIT_ARM), 10) is None
    with torch.no_grad():
        for layer in performers(model):
            layer.kqv.weight.mul_(4)
        digits = arms.ScatteredDigits("val", seed=0, **arms.DATA).draw(range(arms.WATCHED_DIGITS))[0].double()
        layer, kept = performers(model)[0], []
        layer.norm1.register_forward_hook(lambda module, given, found: kept.append(found))
        model((digits - arms.MEAN) / arms.STD)
        k, q, _ = layer.kqv(kept[0]).chunk(3, dim=-1)
        features = [
            torch.exp(x @ layer.w.mT - x.square().sum(dim=-1, keepdim=True) / 2) / len(layer.w) ** 0.5 for x in (k, q)
        ]
        denominators = (features[1] * features[0].sum(dim=1, keepdim=True)).sum(dim=-1)
        model.float()
    expected = (denominators < 1e-8).double().mean().item()
    assert 0.02 < expected < 0.98
    assert arms.silence(model, 10)["silent"][0] == pytest.approx(expected, abs=0.01)


# one run


def test_a_run_is_that_of_fit_with_the_data_of_the_recipe():
    """The stream in memory against the same data set, drawn by ``t2t_ref.train`` itself: equal up to bytes."""
    recipe = replace(recipe_of(TINY, 1e-3, 3, FEW), log_every=1, evaluate_every=0)
    ours = train_arm(TINY, recipe)
    theirs = fit(recipe, model=runs.seeded_model(TINY, recipe), cpu=True)
    assert len(ours.steps) == 4
    for one, other in zip(ours.steps, theirs.steps, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-3)
    other_seed = train_arm(TINY, replace(recipe, seed=4))
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(ours.steps, other_seed.steps, strict=True)) > 1e-2


def test_a_run_is_described():
    looked = []
    experiment = replace(
        SMALL,
        recipe=replace(FEW, log_every=1),
        watch=lambda model, update: dict(norm=model.head.weight.norm().item()) if update % 2 == 0 else None,
        look=lambda model: looked.append(model.training) or dict(mean=model.head.weight.mean().item()),
    )
    torch.manual_seed(7)
    found = runs.run(experiment, "one", 1e-2, 3)
    after = torch.rand(1)
    torch.manual_seed(7)
    assert after == torch.rand(1)  # what the caller draws is left alone
    assert found["seed"] == 3 and 0 <= found["accuracy"] <= 100 and found["loss"] > 0 and found["seconds"] > 0
    assert [update for update, _ in found["losses"]] == [1, 2, 3, 4]
    assert [images for images, *_ in found["curve"]] == [40, 80]
    for epoch, (_, loss, accuracy) in enumerate(found["curve"]):
        assert loss == pytest.approx(sum(x for _, x in found["losses"][2 * epoch : 2 * epoch + 2]) / 2, abs=1e-4)
        assert 0 <= accuracy <= 100
    assert found["training_loss"] == found["curve"][-1][1]
    assert [line["update"] for line in found["watched"]] == [2, 4] and found["watched"][0]["norm"] > 0
    assert found["before"] != found["after"] and looked == [False, False]
    assert "before" not in runs.run(experiment, "one", 1e-2, 100, "val")  # the search is for the rate alone
    json.dumps(found)


def test_distinct_images_come_again_in_a_new_order():
    recipe = replace(FEW, epoch_samples=12, batch_size=6)
    images, labels = runs.first_digits("train", 0, 6)
    assert torch.equal(images, runs.first_digits("train", 0, 300)[0][:6])
    orders = []
    data = runs.open_stream(recipe, distinct=6).train
    for epoch in range(recipe.epochs):
        data.set_epoch(epoch)
        for first in (0, 6):
            batch = [data[index] for index in range(first, first + 6)]
            match = [int((images == image).all(dim=(1, 2, 3)).nonzero()) for image, _ in batch]
            assert sorted(match) == list(range(6)) and labels[match].tolist() == [label for _, label in batch]
            orders.append(tuple(match))
    assert len(data) == 12 and len(set(orders)) > 1
    endless = runs.open_stream(recipe).train
    endless.set_epoch(1)
    assert torch.equal(endless[0][0], runs.first_digits("train", 0, 13)[0][12])


def test_the_seed_fixes_images_and_weights():
    one, same, other = (recipe_of(TINY, 1e-3, seed, FEW) for seed in (0, 0, 1))
    for make in (lambda r: runs.seeded_model(TINY, r).head.weight, lambda r: runs.open_stream(r).train.images):
        assert torch.equal(make(one), make(same)) and not torch.equal(make(one), make(other))


# an experiment


@pytest.fixture
def fake(monkeypatch):
    """Runs that take no time. The accuracy follows from rate and seed, and the smaller loss decides ties."""
    done = []

    def run(experiment, label, rate, seed, split="test", folder=None):
        done.append((label, rate, seed, split))
        accuracy, loss = {1e-3: (90.0, 0.3), 2e-3: (95.0, 0.2), 4e-3: (95.0, 0.1)}[rate]
        accuracy += {101: {1e-3: 50.0}}.get(seed, {}).get(rate, 0.0)
        return dict(seed=seed, accuracy=accuracy, loss=loss, curve=[], losses=[], seconds=1.0)

    monkeypatch.setattr(runs, "run", run)
    return done


def test_rates_are_chosen_on_validation_and_only_the_chosen_one_sees_the_test(fake, tmp_path):
    three = replace(SMALL, rates=(1e-3, 2e-3, 4e-3))
    result = runs.run_experiment("small", three, tmp_path, say=quietly)
    assert [arm["rate"] for arm in result["arms"].values()] == [4e-3, 4e-3]
    search, test = fake[:6], fake[6:]
    assert {(seed, split) for _, _, seed, split in search} == {(100, "val")}
    assert {rate for _, rate, *_ in search} == {1e-3, 2e-3, 4e-3}
    assert {(rate, split) for _, rate, _, split in test} == {(4e-3, "test")}
    assert [(seed, label) for label, _, seed, _ in test] == [(0, "one"), (0, "two"), (1, "one"), (1, "two")]
    assert json.loads((tmp_path / "small.json").read_text(encoding="utf-8")) == result
    assert intervals.summary(result)[0]["seconds"] == 3 + 2


def test_several_search_seeds_are_averaged(fake, tmp_path):
    two = replace(SMALL, rates=(1e-3, 4e-3), search_seeds=(100, 101))
    arm = runs.run_experiment("small", two, tmp_path, say=quietly)["arms"]["one"]
    assert arm["search"]["0.001"]["accuracy"] == (90 + 140) / 2 and arm["rate"] == 1e-3
    assert [run["seed"] for run in arm["search"]["0.001"]["runs"]] == [100, 101]
    assert arm["search"]["0.001"]["seconds"] == 2


def test_one_rate_needs_no_search(fake, tmp_path):
    result = runs.run_experiment("small", replace(SMALL, rates=(1e-3,)), tmp_path, say=quietly)
    assert [(label, seed) for label, _, seed, _ in fake] == [("one", 0), ("two", 0), ("one", 1), ("two", 1)]
    assert result["arms"]["one"]["search"] == {} and result["arms"]["one"]["rate"] == 1e-3


def test_an_interrupted_experiment_goes_on(tmp_path):
    whole = runs.run_experiment("small", SMALL, tmp_path / "a", say=quietly)
    count = 0

    def stop_after_five(text):
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.run_experiment("small", SMALL, tmp_path / "b", say=stop_after_five)
    said = []
    resumed = runs.run_experiment("small", SMALL, tmp_path / "b", say=said.append)
    assert len(said) == 8 - 5  # two arms, two rates and two seeds each
    for label in whole["arms"]:
        ours, theirs = ([run["losses"] for run in r["arms"][label]["runs"]] for r in (whole, resumed))
        assert ours == theirs and whole["arms"][label]["rate"] == resumed["arms"][label]["rate"]
    assert json.loads((tmp_path / "b" / "small.json").read_text(encoding="utf-8")) == resumed
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["small.json"]


def test_an_arm_of_another_file_is_taken_over_if_the_terms_are_the_same(fake, tmp_path):
    first = runs.run_experiment("small", SMALL, tmp_path, say=quietly)
    said = []
    second = runs.run_experiment("other", replace(SMALL, arms={"again": TINY}), tmp_path, say=said.append)
    assert not said and second["arms"]["again"] == first["arms"]["one"]
    fewer = runs.run_experiment("fewer", replace(SMALL, arms={"again": TINY}, seeds=(1,)), tmp_path, say=said.append)
    assert not said and [run["seed"] for run in fewer["arms"]["again"]["runs"]] == [1]
    longer = replace(SMALL, arms={"again": TINY}, recipe=replace(FEW, weight_decay=0.1))
    runs.run_experiment("third", longer, tmp_path, say=said.append)
    assert len(said) == 4


@pytest.mark.parametrize(
    "changes, what",
    [
        (dict(recipe=replace(FEW, epoch_samples=60)), "training"),
        (dict(recipe=replace(FEW, weight_decay=0.1)), "recipe"),
        (dict(rates=(1e-3, 4e-3)), "training"),
        (dict(arms=SMALL.arms | {"one": TINY | dict(depth=2)}), "one"),
    ],
)
def test_a_file_of_other_terms_is_left_alone(changes, what, fake, tmp_path):
    runs.run_experiment("small", SMALL, tmp_path, say=quietly)
    before = (tmp_path / "small.json").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=f"made with another {what}; move it away"):
        runs.run_experiment("small", replace(SMALL, **changes), tmp_path, say=quietly)
    assert (tmp_path / "small.json").read_text(encoding="utf-8") == before


def test_what_the_first_seed_has_trained_is_kept_before_its_run_is_written_down(tmp_path):
    kept = []

    def keep(label, model, recipe, run, folder):
        there = json.loads((folder / "small.json").read_text(encoding="utf-8"))["arms"][label]["runs"]
        kept.append((label, recipe.seed, run["accuracy"], there))

    assert isinstance(FEW, Recipe)
    result = runs.run_experiment("small", replace(SMALL, keep=keep, rates=(1e-3,)), tmp_path, say=quietly)
    assert kept == [(label, 0, arm["runs"][0]["accuracy"], []) for label, arm in result["arms"].items()]


# the command


def test_the_command_names_what_it_does_not_know(capsys, tmp_path):
    assert main(["tokenizers", "--output", str(tmp_path)]) == 2
    assert "did you mean 'tokenisers'" in capsys.readouterr().err
    assert main(["tokenisers", "--jobs", "0", "--output", str(tmp_path)]) == 2
    assert "jobs is 0, expected at least 1" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main([]) == 0
    assert "positions: T2T, sinusoid; T2T, learned" in capsys.readouterr().out


def test_an_older_door_leads_to_the_same_command(fake, tmp_path, monkeypatch):
    import runpy

    monkeypatch.setattr(sys, "argv", ["t2t_ref.train.compare", "--output", str(tmp_path), "--seeds", "0"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("t2t_ref.train.compare", run_name="__main__")
    assert ended.value.code == 0
    content = json.loads((tmp_path / "digits.json").read_text(encoding="utf-8"))
    assert content["command"] == "python -m t2t_ref.experiments digits"


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_command_leaves_a_whole_file_and_no_process(tmp_path):
    """Killed while two processes compute: they end, the same call goes on, and two at a time gave what one gives."""
    root, path = Path(__file__).resolve().parents[2], tmp_path / "killed" / "small.json"
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
if __name__ == "__main__":
    from test_experiments import SMALL, Path, runs
    runs.run_experiment("small", SMALL, Path({str(path.parent)!r}), jobs=2)
""",
        encoding="utf-8",
    )
    environment = os.environ | {"PYTHONPATH": str(root)}
    process = subprocess.Popen([sys.executable, script], start_new_session=True, env=environment, cwd=root)
    try:
        until = time.monotonic() + 600
        while not (path.exists() and '"seconds"' in path.read_text(encoding="utf-8")):
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.05)
        process.kill()
        process.wait()
        while group_is_alive(process.pid):
            assert time.monotonic() < until
            time.sleep(0.05)
    finally:
        if group_is_alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    searches = [arm["search"] for arm in json.loads(path.read_text(encoding="utf-8"))["arms"].values()]
    done = sum(len(entry["runs"]) for search in searches for entry in search.values())
    said = []
    resumed = runs.run_experiment("small", SMALL, path.parent, say=said.append)
    assert len(said) == 8 - done < 8
    whole = runs.run_experiment("small", SMALL, tmp_path, say=quietly)
    for label, arm in whole["arms"].items():
        for rate, entry in arm["search"].items():
            assert entry["accuracy"] == resumed["arms"][label]["search"][rate]["accuracy"]
        assert [run["seed"] for run in resumed["arms"][label]["runs"]] == [0, 1]


def group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
