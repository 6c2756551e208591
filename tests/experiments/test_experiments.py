"""The experiments: their arms, their loop, and files that survive an interruption."""

import json

import pytest
import torch
import torch.nn.functional as F

from t2t_ref import sinusoid_table
from t2t_ref.experiments import EXPERIMENTS, PERFORMER, VIT_ARM, build_model
from t2t_ref.experiments import runs as experiments

TINY = VIT_ARM | dict(embed_dim=16, depth=1, num_heads=2)
TINY_T2T = PERFORMER | dict(embed_dim=16, depth=1, num_heads=2, token_dim=8)


@pytest.fixture
def small(monkeypatch):
    """Two tiny arms, few images."""
    monkeypatch.setitem(experiments.TRAINING, "samples", 40)
    monkeypatch.setitem(experiments.TRAINING, "batch_size", 20)
    monkeypatch.setattr(experiments, "RATES", (1e-3, 2e-3))
    monkeypatch.setitem(EXPERIMENTS, "small", {"one": TINY, "two": TINY | dict(position="none")})
    monkeypatch.setitem(EXPERIMENTS, "other", {"again": TINY})
    images, labels = experiments.stream(0, 40)
    monkeypatch.setattr(experiments, "held_out", lambda split, samples=2000: (images, labels))


@pytest.mark.parametrize("label, arm", [(label, arm) for arms in EXPERIMENTS.values() for label, arm in arms.items()])
def test_every_arm_runs_on_sixteen_tokens(label, arm):
    with torch.no_grad():
        features = build_model(arm).eval().forward_features(torch.zeros(1, 3, 64, 64))
    assert features.shape[1] == 17, label


def test_arms_that_shall_be_equal_in_size_are():
    sizes = {
        name: {label: sum(p.numel() for p in build_model(arm).parameters()) for label, arm in arms.items()}
        for name, arms in EXPERIMENTS.items()
    }
    for kind in ("T2T", "hard split"):
        deep, wide = (sizes["deep_narrow"][f"{kind}, {shape}"] for shape in ("deep", "wide"))
        assert abs(deep / wide - 1) < 0.01
        ghost, slim = (sizes["cnn_designs"][f"{kind}, {design}"] for design in ("ghost", "slim"))
        assert abs(ghost / slim - 1) < 0.05


def test_positions():
    table = build_model(TINY | dict(position="sinusoid")).pos_embed
    assert torch.equal(table, sinusoid_table(17, 16)) and not table.requires_grad
    none = build_model(TINY_T2T | dict(position="none")).pos_embed
    assert not none.any() and not none.requires_grad
    learned = build_model(TINY_T2T | dict(position="learned")).pos_embed
    assert learned.any() and learned.requires_grad and learned.std() < 0.03
    with pytest.raises(ValueError, match="unknown position 'rotary'"):
        build_model(TINY | dict(position="rotary"))


@pytest.mark.parametrize("m, dim", [(8, 32), (32, 32), (64, 32), (40, 32)])
def test_random_directions_are_orthogonal_in_blocks(m, dim):
    rows = experiments.random_directions(m, dim)
    assert rows.shape == (m, dim)
    for block in rows.split(dim):
        torch.testing.assert_close(block @ block.mT, m * torch.eye(len(block)), atol=1e-4, rtol=0)


def test_features_and_redrawing_reach_both_performers():
    model = build_model(TINY_T2T | dict(features=24))
    before = [layer.w.clone() for layer in experiments.performers(model)]
    assert [w.shape for w in before] == [(24, 8), (24, 8)]
    experiments.redraw_directions(model)
    for old, layer in zip(before, experiments.performers(model), strict=True):
        assert not torch.equal(old, layer.w) and not layer.w.requires_grad


def test_the_loop_is_plain_adamw_with_a_cosine(monkeypatch):
    """Against the same training written out by hand, without schedule objects or parameter groups."""
    monkeypatch.setitem(experiments.TRAINING, "batch_size", 20)
    model = experiments.train(TINY, 1e-2, seed=1, samples=200)

    torch.manual_seed(1)
    hand = build_model(TINY)
    images, labels = experiments.stream(1, 200)
    names = [name for name, p in hand.named_parameters() if p.requires_grad]
    state = {name: [0.0, 0.0] for name in names}
    for step in range(10):
        batch = slice(20 * step, 20 * step + 20)
        loss = F.cross_entropy(hand((images[batch] / 255 - 0.4) / 0.25), labels[batch])
        grads = dict(zip(names, torch.autograd.grad(loss, [hand.get_parameter(n) for n in names]), strict=True))
        norm = sum(g.square().sum() for g in grads.values()).sqrt()
        rate = 1e-2 * min(1, step + 1) * (1 + torch.cos(torch.tensor(torch.pi * step / 10))) / 2
        with torch.no_grad():
            for name, grad in grads.items():
                grad = grad * min(1.0, 1.0 / (norm + 1e-6))
                parameter, (first, second) = hand.get_parameter(name), state[name]
                if parameter.ndim > 1 and name not in ("cls_token", "pos_embed"):
                    parameter.mul_(1 - rate * 0.05)
                first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
                state[name] = [first, second]
                root = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                parameter.sub_(rate * first / (1 - 0.9 ** (step + 1)) / root)
    for (name, ours), theirs in zip(model.named_parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4, msg=name)


def test_distinct_images_come_again_in_a_new_order():
    seen = list(experiments.batches(0, 24, 6, distinct=6))
    reference, labels = experiments.stream(0, 6)
    assert [len(images) for images, _ in seen] == [6] * 4
    orders = []
    for images, shown in seen:
        match = [int((experiments.normalise(reference) - image).abs().sum(dim=(1, 2, 3)).argmin()) for image in images]
        assert sorted(match) == list(range(6)) and torch.equal(labels[match], shown)
        orders.append(match)
    assert len({tuple(order) for order in orders}) > 1


def test_an_interrupted_experiment_goes_on(small, tmp_path):
    whole = experiments.run_experiment("small", tmp_path / "a", seeds=(0, 1), say=lambda text: None)

    count = 0

    def stop_after_five(text):
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiments.run_experiment("small", tmp_path / "b", seeds=(0, 1), say=stop_after_five)
    said = []
    resumed = experiments.run_experiment("small", tmp_path / "b", seeds=(0, 1), say=said.append)
    assert len(said) == 8 - 5  # two arms, two rates and two seeds each
    for arm in whole["arms"]:
        ours, theirs = ([run["accuracy"] for run in r["arms"][arm]["runs"]] for r in (whole, resumed))
        assert ours == theirs
    assert json.loads((tmp_path / "b" / "small.json").read_text()) == resumed
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["small.json"]


def test_two_runs_at_a_time_give_the_same():
    arm = dict(values=TINY | dict(samples=100))
    runs = [(arm, 1e-3, seed, "val") for seed in (0, 1)]
    alone, together = ({which[2]: found for which, found in experiments.run_all(runs, jobs)} for jobs in (1, 2))
    for seed in (0, 1):
        assert alone[seed]["curve"] == together[seed]["curve"] and alone[seed]["accuracy"] == together[seed]["accuracy"]
    assert alone[0]["curve"][-1][0] == 100


def test_an_arm_of_another_file_is_taken_over(small, tmp_path):
    first = experiments.run_experiment("small", tmp_path, seeds=(0,), say=lambda text: None)
    said = []
    second = experiments.run_experiment("other", tmp_path, seeds=(0,), say=said.append)
    assert not said and second["arms"]["again"] == first["arms"]["one"]


def test_a_file_of_other_settings_is_left_alone(small, tmp_path, monkeypatch):
    experiments.run_experiment("small", tmp_path, seeds=(0,), say=lambda text: None)
    before = (tmp_path / "small.json").read_text()
    monkeypatch.setitem(experiments.TRAINING, "samples", 60)
    with pytest.raises(ValueError, match="made with other data or training; move it away"):
        experiments.run_experiment("small", tmp_path, say=lambda text: None)
    assert (tmp_path / "small.json").read_text() == before


def test_the_command_names_what_it_does_not_know(capsys, tmp_path):
    assert experiments.main(["tokenizers", "--output", str(tmp_path)]) == 2
    assert "did you mean 'tokenisers'" in capsys.readouterr().err
    assert experiments.main([]) == 0
    assert "positions: T2T, sinusoid; T2T, learned" in capsys.readouterr().out
