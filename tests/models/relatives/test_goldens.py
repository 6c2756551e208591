"""The relatives compute their authors' numbers: models, gradients, inner tensors, and each piece by itself."""

import json
import math
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange

from t2t_ref import count_parameters, create_model
from t2t_ref.models.backbone import Block
from t2t_ref.models.relatives import deit, patch_convnet, pvt, pvt_v2, pyramid, swin, tnt
from t2t_ref.models.vit import PatchEmbed

FOLDER = Path(__file__).resolve().parents[2] / "goldens" / "relatives"
COMPUTED = ("relative_position_index", "attn_mask")  # entries of the authors' files that are no weights


def read(name):
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def weight(name, shape):
    """The entry ``name`` of a state dict by the rule of the files, in float64."""
    z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    last = name.rpartition(".")[2]
    if re.fullmatch(r"(absolute_)?pos_embed\d?|outer_pos|inner_pos", last):
        z = 0.2 * z
    elif last in ("cls_token", "dist_token"):
        z = 0.02 * z
    elif last == "relative_position_bias_table":
        z = 0.5 * z
    elif last.startswith("gamma") or (len(shape) == 1 and "norm" in name and last == "weight"):
        z = 1 + 0.1 * z
    elif len(shape) == 1:
        z = 0.02 * z
    else:
        z = z / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(z)


def fill(model, dtype=torch.float64):
    model.to(dtype)
    with torch.no_grad():
        for name, entry in model.state_dict().items():
            entry.copy_(weight(name, entry.shape))
    return model.eval()


def noise(*shape, seed):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))


def agrees(tensor, record, atol=1e-9, what=""):
    """Compare with a record: its stored corner, and its sums as a check on all the rest."""
    assert list(tensor.shape) == record.get("shape", list(tensor.shape)), what
    wide = dict(atol=atol * math.sqrt(tensor.numel()), rtol=1e-10)
    close = torch.testing.assert_close
    sums = {
        "sum": lambda: tensor.sum(),
        "abs_sum": lambda: tensor.abs().sum(),
        "l2": lambda: tensor.norm(),
        # unlike the other sums it notices a changed order
        "probe": lambda: (tensor * noise(*tensor.shape, seed=2)).sum(),
    }
    for key, expected in record.items():
        if key in sums:
            close(sums[key]().item(), expected, **wide, msg=lambda text, key=key: f"{what} {key}: {text}")
            continue
        if key.startswith("sample_0"):  # sample_0_0_3_6 is [0, 0, :3, :6]
            part = tensor[tuple(slice(int(size)) if size != "0" else 0 for size in key.split("_")[1:])]
        elif key == "first16":
            part = tensor[:, :16]
        elif key in ("first4", "first12"):
            part = rearrange(tensor, "... -> (...)")[: int(key[5:])]
        else:
            continue
        expected = torch.tensor(expected, dtype=tensor.dtype)
        close(part, expected, atol=atol, rtol=0, msg=lambda text, key=key: f"{what} {key}: {text}")


def own_entries(record, left_out=COMPUTED):
    return [entry for entry in record["state_dict"] if entry[0].rpartition(".")[2] not in left_out]


def tapped(model, names, run):
    """What modules return while ``run`` runs, by name. Also what they are given: "into NAME", "into NAME 1"."""
    seen, hooks = {}, []
    for name in names:
        module = model.get_submodule(name)
        hooks.append(module.register_forward_hook(lambda m, i, o, name=name: seen.update({name: o})))
        hooks.append(module.register_forward_pre_hook(lambda m, i, name=name: seen.update({f"into {name}": i})))
    result = run()
    for hook in hooks:
        hook.remove()
    return result, seen


# ---- the pieces

PIECES = {  # file: the module, what it is called with after its tensors, the files' names of inner modules and ours
    "deit_patch_embed": (lambda: PatchEmbed(8, 3, 12), (), {}),
    "deit_block": (lambda: Block(24, 3, 2.0, qkv_bias=True, norm_eps=1e-6), (), {}),
    "tnt_patch_embed": (lambda: tnt.PixelEmbed(8, 3, 6, 2), (), {}),
    "tnt_attention": (lambda: tnt.TNTAttention(24, 3), (), {}),
    "tnt_block": (
        lambda: tnt.TNTBlock(24, 8, outer_num_heads=3, inner_num_heads=2, num_words=4, mlp_ratio=2.0),
        (),
        {},
    ),
    "pvt_patch_embed": (lambda: pyramid.ConvEmbed(6, 12, kernel=2, stride=2), (), {}),
    "pvt_sr_attention": (lambda: pvt.SpatialReductionAttention(12, 3, sr_ratio=4, qkv_bias=True), ((8, 12),), {}),
    "pvt_block": (lambda: pvt.PVTBlock(12, 3, mlp_ratio=2.0, sr_ratio=2, qkv_bias=True), ((6, 4),), {}),
    "pvt_v2_patch_embed": (lambda: pyramid.ConvEmbed(3, 12, kernel=7, stride=4, padding=3), (), {}),
    "pvt_v2_linear_attention": (lambda: pvt_v2.PooledAttention(12, 3, qkv_bias=True), ((10, 9),), {}),
    "pvt_v2_mlp": (lambda: pvt_v2.ConvMlp(12, 24), ((6, 4),), {}),
    "pvt_v2_mlp_linear": (lambda: pvt_v2.ConvMlp(12, 24, linear=True), ((6, 4),), {}),
    "pvt_v2_block": (lambda: pvt_v2.PVTv2Block(12, 3, mlp_ratio=2.0, sr_ratio=2, qkv_bias=True), ((6, 4),), {}),
    "swin_patch_embed": (lambda: pyramid.ConvEmbed(3, 12, kernel=4, stride=4), (), {}),
    "swin_window_attention": (lambda: swin.WindowAttention(12, 3, window_size=(4, 4)), (), {}),
    "swin_window_attention_masked": (
        lambda: swin.WindowAttention(12, 3, window_size=(4, 4)),
        (swin.shift_mask((8, 12), (4, 4), 2),),
        {},
    ),
    "swin_window_attention_2x3": (lambda: swin.WindowAttention(12, 3, window_size=(2, 3)), (), {}),
    "swin_block": (lambda: swin.SwinBlock(12, 3, window_size=4, shift_size=2, mlp_ratio=2.0), ((8, 12),), {}),
    "swin_patch_merging": (lambda: swin.PatchMerging(5), ((6, 4),), {}),
    "patchconvnet_stem": (lambda: patch_convnet.ConvStem(3, 16), (), {}),
    "patchconvnet_conv_block": (lambda: patch_convnet.ConvBlock(16), ((5, 5),), {"squeeze_excite": "attn.qkv_pos.4"}),
    "patchconvnet_squeeze_excite": (lambda: patch_convnet.ConvSqueezeExcite(16), (), {}),
    "patchconvnet_class_attention": (lambda: patch_convnet.AggregationBlock(16, 2, qkv_bias=True), (), {}),
}
OUTPUTS = {"tnt_block": ("inner_output", "outer_output")}


@pytest.mark.parametrize("name", PIECES)
def test_piece(name):
    record = read(f"piece_{name}")
    make, arguments, renamed = PIECES[name]
    module = fill(make())
    assert [[key, list(entry.shape)] for key, entry in module.state_dict().items()] == own_entries(record)
    assert sum(parameter.numel() for parameter in module.parameters()) == record["params_total"]

    shapes = [tuple(map(int, re.search(r"\(\((.*)\)\)", text)[1].split(","))) for text in record["input"].values()]
    inputs = [noise(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes, start=1)]
    inner = {key: renamed.get(key, key) for key, value in record.items() if isinstance(value, dict) and "l2" in value}
    expected_outputs = OUTPUTS.get(name, ("output",))
    inner = {key: ours for key, ours in inner.items() if key not in expected_outputs}
    known = dict(module.named_modules())
    outputs, seen = tapped(module, [n for n in inner.values() if n in known], lambda: module(*inputs, *arguments))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for key, ours in inner.items():
        if ours in known:
            agrees(seen[ours], record[key], what=key)
        else:
            assert key == "unfold"
    for key, output in zip(expected_outputs, outputs, strict=True):
        agrees(output, record[key], what=key)

    loss = sum(output.square().mean() for output in outputs)
    loss.backward()
    torch.testing.assert_close(loss.item(), record["loss"], atol=1e-9, rtol=1e-9)
    parameters = dict(module.named_parameters())
    assert set(record["grads"]) == set(parameters)
    for key, expected in record["grads"].items():
        agrees(parameters[key].grad, expected, what=f"gradient of {key}")
    for tensor, (key, expected) in zip(inputs, record["grad_input"].items(), strict=True):
        agrees(tensor.grad, expected, what=f"gradient of {key}")

    with torch.no_grad():
        single = fill(module, torch.float32)(*(tensor.detach().float() for tensor in inputs), *arguments)
    for output, alone in zip(outputs, single if isinstance(single, tuple) else (single,), strict=True):
        assert (output.detach() - alone.double()).abs().max() < 2e-5


def test_distillation_loss():
    record = read("piece_deit_distillation_loss")
    teacher, labels = 2 * noise(4, 10, seed=3), torch.tensor(record["input"]["labels"])
    for case in record["cases"]:
        logits = noise(4, 10, seed=1).requires_grad_()
        distillation_logits = noise(4, 10, seed=2).requires_grad_()
        options = {key: case[key] for key in ("distillation_type", "alpha", "tau")}
        loss = deit.distillation_loss(logits, distillation_logits, labels, teacher, **options)
        loss.backward()
        torch.testing.assert_close(loss.item(), case["loss"], atol=1e-9, rtol=1e-9)
        agrees(logits.grad, case["grad_class"])
        if "grad_distillation" in case:
            agrees(distillation_logits.grad, case["grad_distillation"])
        else:
            assert distillation_logits.grad is None
        shares = torch.nn.functional.one_hot(labels, 10).double()  # labels as shares of each class
        same = deit.distillation_loss(logits, distillation_logits, shares, teacher, **options)
        torch.testing.assert_close(same, loss)


def test_position_tables_resized():
    """Two rows in front kept and bicubic (DeiT), one row kept and bilinear (PVT), bias tables head by head (Swin)."""
    with torch.device("meta"):
        distilled, pyramid_, windowed = (
            create_model(name)
            for name in ("deit_tiny_distilled_patch16_224", "pvt_tiny", "swin_tiny_patch4_window7_224")
        )
    record = read("piece_deit_resize_pos_embed")
    resized = distilled.resize_table("pos_embed", 0.2 * noise(1, 198, 24, seed=1), (14, 14), (24, 24))
    agrees(resized, record["output"])
    for row in (300, 577):
        expected = torch.tensor(record["output"][f"row_{row}_first6"], dtype=torch.float64)
        torch.testing.assert_close(resized[0, row, :6], expected, atol=1e-9, rtol=0)

    record = read("piece_pvt_resize_pos_embed")
    table = 0.2 * noise(1, 17, 12, seed=1)
    resized = pyramid_.resize_table("pos_embed4", table, (4, 4), (4, 6))
    agrees(resized, record["output"])
    expected = torch.tensor(record["output"]["row_7_first6"], dtype=torch.float64)
    torch.testing.assert_close(resized[0, 7, :6], expected, atol=1e-9, rtol=0)
    without_class_row = pyramid_.resize_table("pos_embed1", table[:, 1:], (4, 4), (4, 6))
    assert torch.equal(without_class_row, resized[:, 1:])

    record = read("piece_swin_resize_bias_table")
    name = "layers.0.blocks.0.attn.relative_position_bias_table"
    assert windowed.position_tables()[name] == (13, 13)
    resized = windowed.resize_table(name, 0.5 * noise(169, 3, seed=1), (13, 13), (23, 23))
    agrees(resized, record["output"])
    for row, key in ((0, "row_0"), (264, "row_264_centre"), (528, "row_528")):
        expected = torch.tensor(record["output"][key], dtype=torch.float64)
        torch.testing.assert_close(resized[row], expected, atol=1e-9, rtol=0)


def test_windows():
    """Whole numbers: which token is in which window, which offset has which row, which pairs are masked."""
    record = read("piece_swin_windows")
    grid = rearrange(torch.arange(96.0), "(h w) -> 1 h w 1", h=8)
    for key, features in (("partition", grid), ("shift_2_then_partition", grid.roll((-2, -2), dims=(1, 2)))):
        windows = swin.to_windows(features, (4, 4))
        for name, expected in record[key].items():
            if name.startswith("window_") and name != "window_size":
                window = rearrange(windows[int(name[7:])], "(kh kw) 1 -> kh kw", kh=4)
                assert window.tolist() == expected
        assert torch.equal(swin.from_windows(windows, (4, 4), (8, 12)), features)

    assert swin.relative_position_index((2, 3)).tolist() == record["relative_position_index_2x3"]
    index, expected = swin.relative_position_index((7, 7)), record["relative_position_index_7x7"]
    assert list(index.shape) == expected["shape"] and index[0].tolist() == expected["row_0"]
    assert set(index.diagonal().tolist()) == {expected["diagonal"]} and index.sum() == expected["sum"]

    mask, expected = swin.shift_mask((8, 12), (4, 4), 2), record["attn_mask_8x12_window4_shift2"]
    assert list(mask.shape) == expected["shape"]
    assert mask.sum(dim=(1, 2)).tolist() == expected["masked_per_window"]
    for window in (2, 5):
        assert (-100.0 * mask[window, 0]).tolist() == expected[f"window_{window}_row_0"]
    masked = swin.shift_mask((56, 56), (7, 7), 3).sum(dim=(1, 2)).tolist()
    expected = record["attn_mask_56x56_window7_shift3"]["masked_per_window_count"]
    assert {number: masked.count(number) for number in set(masked)} == {int(k): v for k, v in expected.items()}


# ---- the models

TINY = sorted(path.stem for path in FOLDER.glob("tiny_*.json"))
FULL = ["deit_tiny_distilled_patch16_224", "pvt_tiny", "pvt_v2_b0", "swin_tiny_patch4_window7_224"]


def built(record):
    return create_model(
        record.get("model", record["name"]), **record["overrides"], **record.get("project_overrides") or {}
    )


def place(stage, name):
    """Where in our model an inner tensor of a file is to be seen: (module, which of its outputs or inputs)."""
    if stage.endswith("with_position"):
        before = {"with_position": "blocks.0"}.get(stage, f"block{stage[5:6]}.0")
        return before, "in", 1 if "tnt" in name else 0
    stem, _, last = stage.rpartition(".")
    if last == "reduced":
        return f"{stem}.norm", "out", 0
    if last in ("inner", "outer"):
        return stem, "out", ("inner", "outer").index(last)
    return (f"{stem}.attn.qkv_pos.4" if last == "squeeze_excite" else stage), "out", 0


@pytest.mark.parametrize("name", [*TINY, *FULL])
def test_model(name):
    record = read(name)
    model = built(record)
    assert [[key, list(entry.shape)] for key, entry in model.state_dict().items()] == own_entries(record)
    assert count_parameters(model) == record["params_total"]
    assert count_parameters(model, trainable_only=True) == record["params_trainable"]

    fill(model)
    image = noise(*record["input_shape"], seed=0)
    tiny = name in TINY
    with torch.set_grad_enabled(tiny):
        places = {stage["at"]: place(stage["at"], name) for stage in record["stages"]}
        names = {module for module, _, _ in places.values()}
        features, seen = tapped(model, names, lambda: model.forward_features(image))
        logits = model.forward_head(features)
    for stage in record["stages"]:
        module, way, number = places[stage["at"]]
        value = seen[f"into {module}" if way == "in" else module]
        agrees(value[number] if isinstance(value, tuple) else value, stage, what=stage["at"])
    agrees(model.pool(features), record["cls_feature"])
    agrees(logits, record["logits"])
    assert logits.argmax(dim=-1).tolist() == record["argmax"]

    if tiny:
        logits.square().mean().backward()
        gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
        assert {key for key, gradient in gradients.items() if gradient is None} == set(record.get("no_grad") or ())
        for key, expected in record["grads"].items():
            agrees(gradients[key], expected, what=f"gradient of {key}")
    if "train_mode" in record:
        agrees(features[:, 1], record["dist_feature"])
        first, second = model.train()(image)
        agrees(first.detach(), record["train_mode"]["logits_cls"])
        agrees(second.detach(), record["train_mode"]["logits_dist"])

    with torch.no_grad():
        single = model.eval().float()(image.float()).double()
    assert (single - logits.detach()).abs().max() < 2e-5
