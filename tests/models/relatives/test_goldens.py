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

from t2t_ref.models.backbone import Block
from t2t_ref.models.relatives import patch_convnet, pvt, pvt_v2, pyramid, swin, tnt
from t2t_ref.models.vit import PatchEmbed

FOLDER = Path(__file__).resolve().parents[2] / "goldens" / "relatives"
COMPUTED = ("relative_position_index", "attn_mask")  # entries of the authors' files that are no weights


def read(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


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
    "deit_block": (lambda: make_deit_block(24, 3), (), {}),
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
    "swin_block": (lambda: swin.SwinBlock(12, 3, grid=(8, 12), window_size=4, shift_size=2, mlp_ratio=2.0), (), {}),
    "swin_patch_merging": (lambda: swin.PatchMerging(5, grid=(6, 4)), (), {}),
    "patchconvnet_stem": (lambda: patch_convnet.ConvStem(3, 16), (), {}),
    "patchconvnet_conv_block": (lambda: patch_convnet.ConvBlock(16), ((5, 5),), {"squeeze_excite": "attn.qkv_pos.4"}),
    "patchconvnet_squeeze_excite": (lambda: patch_convnet.ConvSqueezeExcite(16), (), {}),
    "patchconvnet_class_attention": (lambda: patch_convnet.AggregationBlock(16, 2, qkv_bias=True), (), {}),
}
OUTPUTS = {"tnt_block": ("inner_output", "outer_output")}


def make_deit_block(dim, num_heads):
    return Block(dim, num_heads, mlp_ratio=2.0, qkv_bias=True)


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
