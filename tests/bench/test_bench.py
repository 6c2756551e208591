"""The measuring itself: what is compared is equal, ratios and spreads are right, memory is the child's own."""

import argparse
import builtins
import copy
import json
import statistics
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from with_timm import import_timm

from t2t_ref import SoftSplit, T2TViT, bench, count_macs, count_parameters, create_model
from t2t_ref.bench import cases, commands, plain_forms

ROOT = Path(__file__).resolve().parents[2]
SMALL = golden.TINY | dict(performer_drop_rate=0.0)


# what is compared computes the same


@pytest.mark.parametrize("tokens_type", ["performer", "transformer"])
def test_the_plain_form_is_the_same_function(tokens_type):
    torch.manual_seed(0)
    readable = T2TViT(**(SMALL | dict(tokens_type=tokens_type))).double()
    plain = plain_forms.plain(copy.deepcopy(readable))
    changed = sum(type(a) is not type(b) for a, b in zip(readable.modules(), plain.modules(), strict=True))
    assert changed == 2 + 2  # both T2T layers, and the attention of both blocks
    results = []
    for model in (readable, plain):
        image = golden.noise(2, 3, 64, 64).requires_grad_()
        logits = model(image)
        logits.square().sum().backward()
        results.append([logits, image.grad] + [p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("bias", [True, False])
def test_the_folded_norm_is_the_same_function(bias):
    torch.manual_seed(0)
    split, norm = SoftSplit(3, 2, 1), torch.nn.LayerNorm(45).double()
    linear = torch.nn.Linear(45, 7, bias=bias).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    weights = [*norm.parameters(), *linear.parameters()]
    image = golden.noise(2, 5, 9, 12).requires_grad_()
    steps = linear(norm(split(image)))
    folded = plain_forms.fold_norm_into_split(image, split, norm, linear)
    torch.testing.assert_close(folded, steps)
    gradients = [torch.autograd.grad(y.square().sum(), [image, *weights]) for y in (steps, folded)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(b, a, atol=1e-9, rtol=1e-7)


def test_the_folded_norm_loses_digits_where_a_window_has_one_colour():
    torch.manual_seed(0)
    split, norm, linear = SoftSplit(7, 4, 2), torch.nn.LayerNorm(147), torch.nn.Linear(147, 64)
    image = 2 + 1e-3 * torch.randn(1, 3, 64, 64)  # nearly one colour, the same in all channels
    image[..., 30:] = -1.5
    exact = linear.double()(norm.double()(split(image.double())))
    errors = []
    for form in (lambda *x: linear(norm(split(x[0]))), plain_forms.fold_norm_into_split):
        found = form(image, split, norm.float(), linear.float())
        errors.append(((found - exact).norm() / exact.norm()).item())
    assert errors[1] > 50 * errors[0]  # 396 to 562 times, over three kinds of kernels and five seeds


@golden.in_float64()
def test_all_pieces_of_a_group_compute_the_same():
    for group, runs in bench.pieces(batch=1).items():
        first, *others = runs.values()
        expected = first()
        for run in others:
            torch.testing.assert_close(run(), expected, atol=1e-9, rtol=1e-9, msg=lambda text, g=group: f"{g}: {text}")


@pytest.mark.parametrize("mode", ["forward", "train"])
@golden.in_float64()
def test_every_implementation_gives_the_same_result(mode, monkeypatch):
    case = bench.Case("t2t_vit_7", mode, batch=2, img_size=64)
    # dropout draws its numbers in the same order only where the layers run in the same way
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: x)
    results = {}
    for name in ("plain", "readable", "fused", "recompute"):
        step = bench.step_of(bench.build(name, case), case)
        results[name] = step(), step()  # in training the second loss has seen the first one's gradients
    assert (mode == "train") == (not torch.allclose(*results["plain"]))
    for name, result in results.items():
        torch.testing.assert_close(
            result, results["plain"], atol=1e-8, rtol=1e-8, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_half_precision_steps_are_finite_and_change_the_weights(precision, mode):
    case = bench.Case("t2t_vit_7", mode, batch=2, img_size=64, precision=precision)
    model = bench.build("readable", case)
    before = model.head.weight.detach().clone()
    step = bench.step_of(model, case)
    for _ in range(20):  # float16's scaler skips steps while its scale is too large: from 65536 down to 1 are 16
        assert step().isfinite().all()
        if mode == "forward" or not torch.equal(model.head.weight, before):
            break
    assert torch.equal(model.head.weight, before) == (mode == "forward")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


# timing


class Clock:
    """A clock that candidates move by hand."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def __call__(self):
        return self.now

    def candidate(self, name, *seconds):
        left = list(seconds)

        def run():
            self.order.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_candidates_take_turns_and_ratios_are_of_the_same_round():
    clock = Clock()
    slow = clock.candidate("a", 9, 2, 20, 200)  # the first is warm-up; the machine gets slower and slower
    fast = clock.candidate("b", 9, 1, 10, 100)
    seconds = bench.interleave({"a": slow, "b": fast}, rounds=3, warm_up=1, clock=clock)
    assert clock.order == list("ab" + "ab" + "ba" + "ab")
    assert seconds == {"a": [2, 20, 200], "b": [1, 10, 100]}
    timings = bench.compare_with_first(seconds)
    assert timings["a"].speed == 1.0 and timings["b"].speed == 2.0
    assert timings["b"].seconds == 10 and timings["b"].verdict == "faster"


@pytest.mark.parametrize(
    "own, verdict",
    [
        ([1.0, 1.0, 1.0, 1.0, 1.0], "faster"),
        ([4.0, 4.0, 4.0, 4.0, 4.0], "slower"),
        ([1.9, 2.1, 2.0, 1.95, 2.05], "no difference seen"),
        ([0.5, 1.0, 1.5, 0.7, 0.4], "too noisy to tell"),
    ],
)
def test_the_verdict_knows_the_spread(own, verdict):
    timing = bench.compare([2.0] * 5, own)
    assert timing.verdict == verdict and timing.seconds == statistics.median(own)
    quarters = np.quantile([2.0 / seconds for seconds in own], [0.25, 0.5, 0.75])
    assert (timing.speed_low, timing.speed, timing.speed_high) == pytest.approx(tuple(quarters))


def test_too_few_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds is 2, expected at least 3"):
        bench.interleave({"a": lambda: None}, rounds=2)


# the bound


@pytest.mark.parametrize("name", ["t2t_vit_7", "t2t_vit_t_14", "t2t_vit_c_14"])
def test_the_recorded_products_are_the_macs_of_the_model(name):
    case = bench.Case(name, batch=2, img_size=64)
    macs = bench.macs_of(bench.products_of(case))
    model = create_model(name, img_size=64)
    assert macs == 2 * count_macs(model, torch.zeros(1, 3, 64, 64))
    training = bench.macs_of(bench.products_of(bench.Case(name, "train", batch=2, img_size=64)))
    if name == "t2t_vit_t_14":
        assert training == 3 * macs  # two more for each: for the weights, for the input
    else:  # but none for the frozen w, and none for the pixels that a convolution takes
        assert 2.5 * macs < training < 3 * macs


def test_the_products_are_run_as_recorded():
    products = bench.products_of(bench.Case("t2t_vit_7", "train", batch=2, img_size=64))
    assert any(factor[3] for pair in products for factor in pair)  # some factors lie transposed in memory
    recorder = bench.ProductRecorder()
    run = bench.run_of(products)
    with recorder:
        run()

    def single(count):  # a batch of one product may have been recorded as bmm
        return Counter({tuple(f[:3] for f in pair): n for pair, n in count.items()})

    assert single(recorder.products) == single(products)


# memory


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a program itself has held")
def test_memory_is_that_of_the_child_alone():
    ballast = torch.ones(300_000_000)  # 1.2 GB in this process, which a child's ru_maxrss would begin with
    ours = bench.highest_memory("cpu") / 1e6
    case = bench.Case("t2t_vit_t_14", batch=4)
    peaks = {name: bench.peak_memory(name, case) for name in ("plain", "readable")}
    # a child holds what this process held before the ballast, or less, and one model
    assert all(peak["before"] < ours - ballast.nbytes / 2e6 for peak in peaks.values())
    # loose, since an allocator rounds and keeps: 1.8 to 1.9 tables of 157 megabytes, scores and softmax, on one machine
    table = 4 * 4 * 3136**2 / 1e6
    assert peaks["plain"]["peak"] > peaks["readable"]["peak"] + 0.5 * table


def test_a_child_that_fails_says_why():
    with pytest.raises(RuntimeError, match="unknown implementation 'quick': known are plain, readable"):
        bench.peak_memory("quick", bench.Case())


# the peer


def test_without_vit_pytorch_the_bench_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vit_pytorch.t2t", None)
    monkeypatch.setitem(sys.modules, "vit_pytorch", types.ModuleType("vit_pytorch"))
    with pytest.raises(ImportError, match="pip install vit-pytorch"):
        bench.build("vit-pytorch", bench.Case("t2t_vit_14"))
    options = argparse.Namespace(implementations=["readable", "vit-pytorch"], rounds=3, clock="wall", memory=False)
    found = bench.bench_case(bench.Case("t2t_vit_7", batch=1, img_size=64), options)
    assert [row["implementation"] for row in found["rows"]] == ["readable"]
    assert "pip install vit-pytorch" in bench.table_of(found)


def test_vit_pytorch_is_asked_for_the_same_sizes(monkeypatch):
    asked = {}

    class Peer(torch.nn.Module):
        def __init__(self, **arguments):
            super().__init__()
            asked.update(arguments)

    peer = types.ModuleType("vit_pytorch.t2t")
    peer.T2TViT = Peer
    monkeypatch.setitem(sys.modules, "vit_pytorch", types.ModuleType("vit_pytorch"))
    monkeypatch.setitem(sys.modules, "vit_pytorch.t2t", peer)
    bench.build("vit-pytorch", bench.Case("t2t_vit_14"))
    assert asked == dict(
        image_size=224, num_classes=1000, dim=384, depth=14, heads=6, mlp_dim=1152, dim_head=64,
        t2t_layers=((7, 4), (3, 2), (3, 2)),
    )  # fmt: skip


def test_timms_own_models_are_of_the_same_size():
    import_timm()
    for name in (*cases.TIMMS, "deit_small_patch16_224", "tnt_s_patch16_224", "pvt_v2_b2"):
        case = bench.Case(name, device="meta")
        with torch.device("meta"):
            theirs = bench.build("timm", case)
        assert type(theirs).__module__.startswith("timm.models.")
        assert count_parameters(theirs) == pytest.approx(count_parameters(cases.create_model_on_meta(case)), rel=0.05)
    import t2t_ref.timm  # noqa: F401  through this door timm has ours as well

    with pytest.raises(ImportError, match="timm is not measured: it has no pvt_small"):
        bench.build("timm", bench.Case("pvt_small"))


@pytest.mark.parametrize("broken", [None, RuntimeError("operator torchvision::nms does not exist")])
def test_without_timm_the_bench_says_how_to_get_it(broken, monkeypatch):
    def fail(name, *arguments, import_=builtins.__import__):
        if name == "timm":
            raise broken or ImportError("No module named 'timm'")
        return import_(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(ImportError, match="timm is not measured .*: pip install timm"):
        bench.build("timm", bench.Case("t2t_vit_14"))


# the command


def test_the_command_writes_numbers_text_and_a_picture(tmp_path, capsys):
    json_file, png = tmp_path / "found.json", tmp_path / "found.png"
    command = "models --models t2t_vit_7 --batch 1 --img-size 64 --modes forward train --rounds 3 --no-memory"
    implementations = "--implementations plain readable fused recompute"
    arguments = [*f"{command} {implementations}".split(), "--json", str(json_file), "--picture", str(png)]
    assert bench.main(arguments) == 0
    content = json.loads(json_file.read_text(encoding="utf-8"))
    assert content["command"].startswith("python -m t2t_ref.bench models --models t2t_vit_7")
    forward, train = content["found"]
    assert [row["implementation"] for row in forward["rows"]] == ["plain", "readable", "fused"]
    assert [row["implementation"] for row in train["rows"]] == ["plain", "readable", "fused", "recompute"]
    assert all(row["finite"] for row in forward["rows"] + train["rows"])
    assert content["machine"]["torch"] == torch.__version__
    text = capsys.readouterr().out
    assert "t2t_vit_7, forward, 1 images of 64 px" in text and "recompute" in text
    assert png.read_bytes().startswith(b"\x89PNG")


def test_the_other_commands_run(capsys):
    assert bench.main(["tokens", "--tokens", "16", "49", "--rounds", "3"]) == 0
    assert bench.main("kinds --models t2t_vit_7 --img-size 64 --batch 1 --rounds 3".split()) == 0
    text = capsys.readouterr().out
    assert "49 tokens, layer: exact" in text and "matrix products" in text
    with pytest.raises(SystemExit):
        bench.main(["speed"])


def test_the_memory_of_two_sizes_is_shown(capsys):
    pytest.importorskip("resource", reason="this system does not say what a process took")
    assert bench.main("memory --models t2t_vit_7 --img-size 32 224 --batch 1 1 --modes forward".split()) == 0
    shown = [float(line.split()[-2]) for line in capsys.readouterr().out.splitlines() if line.endswith(" MB")]
    assert len(shown) == 2 and min(shown) >= 0  # which is larger, the allocator decides


def test_pieces_and_roof_run(tmp_path, capsys, monkeypatch):
    weight = torch.ones(3, 3, requires_grad=True)
    pair = {"product": lambda: weight @ weight, "sum": lambda: weight + weight}
    monkeypatch.setattr(commands, "pieces", lambda: {"a pair": pair})  # those of t2t_vit_14 are compared above
    found = {}
    for command in ("pieces", "roof"):
        assert bench.main([command, "--rounds", "3", "--json", str(tmp_path / "found.json")]) == 0
        found[command] = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["found"]
    assert [(row["group"], row["mode"], list(row["rows"])) for row in found["pieces"]] == [
        ("a pair", mode, ["product", "sum"]) for mode in ("forward", "forward and backward")
    ]
    assert weight.grad is not None  # of the second mode
    assert [(row["what"], row["unit"]) for row in found["roof"]] == [("product", "FLOP"), ("copy", "bytes")]
    assert all(0 < row["low"] <= row["per_second"] <= row["high"] for row in found["roof"])
    text = capsys.readouterr().out
    assert "a pair, forward and backward\n  product" in text and "billion FLOP a second" in text


def test_start_takes_the_middle_of_its_children(tmp_path, capsys, monkeypatch):
    printed, codes = ["3.0\n", "1.0\n", "2.0\n"] * 2, []

    def run(command, **options):  # instead of six children, each of which imports torch
        codes.append(command[-1])
        return types.SimpleNamespace(stdout=printed[len(codes) - 1])

    monkeypatch.setattr(subprocess, "run", run)
    assert bench.main(["start", "--rounds", "3", "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["found"]
    assert [row["what"] for row in found] == ["import t2t_ref, after torch", "create t2t_vit_14"]
    assert all((row["seconds"], row["low"], row["high"]) == (2.0, 1.5, 2.5) for row in found)
    capsys.readouterr()
    for code in codes[::3]:  # what a child would do
        exec(code, {})
        assert float(capsys.readouterr().out) > 0


def test_stored_results_name_their_command_and_no_place_of_ours():
    files = sorted((ROOT / "results").glob("bench_*.json"))
    for path in files:
        content = json.loads(path.read_text(encoding="utf-8"))
        assert content["command"].startswith("python -m t2t_ref.bench "), path.name
        assert content["machine"]["threads"] >= 1 and content["found"], path.name
        assert not any(part in path.read_text(encoding="utf-8") for part in ('"/', "/tmp", "/home")), path.name
    assert files, "no stored results: chapter 16 reads them"
