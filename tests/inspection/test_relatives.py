"""Looking into models of other kinds: their attention, their shapes, their products."""

import inspect

import pytest
import torch
from einops import rearrange

from t2t_ref import Attention, attention_maps, count_macs, count_parameters, create_model, shape_table

PYRAMID = dict(embed_dims=[8, 16, 24, 32], num_heads=[1, 2, 3, 4], mlp_ratios=[2] * 4, depths=[1] * 4)
TINY = {
    "deit_tiny_distilled_patch16_224": dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3),
    "tnt_s_patch16_224": dict(
        img_size=32, patch_size=8, inner_stride=2, outer_dim=24, inner_dim=8, depth=1, outer_num_heads=3,
        inner_num_heads=2,
    ),
    "pvt_tiny": dict(img_size=64, **PYRAMID),
    "pvt_v2_b2_li": dict(img_size=64, **PYRAMID),
    "swin_tiny_patch4_window7_224": dict(
        img_size=32, patch_size=2, window_size=4, embed_dim=12, depths=[2, 2], num_heads=[2, 3]
    ),
    "patchconvnet_s60": dict(img_size=64, embed_dim=32, depth=1),
}  # fmt: skip


@pytest.fixture(params=TINY)
def model(request):
    torch.manual_seed(0)
    model = create_model(request.param, num_classes=10, **TINY[request.param]).eval()
    for name, table in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            torch.nn.init.normal_(table)
    return model


def test_attention_maps_are_the_weights_that_a_relative_uses(model):
    image, calls = torch.randn(2, 3, *model.img_size), []
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    hooks = [layer.register_forward_pre_hook(lambda module, inputs: calls.append([module, inputs])) for layer in layers]
    hooks += [layer.proj.register_forward_pre_hook(lambda module, inputs: calls[-1].extend(inputs)) for layer in layers]
    maps = attention_maps(model, image)
    for hook in hooks:
        hook.remove()
    assert len(maps) == len(calls) >= 1
    for weights, (layer, inputs, mixed) in zip(maps, calls, strict=True):
        with torch.no_grad():
            takes = len(inspect.signature(layer.split_heads).parameters)  # a mask concerns the weights alone
            _, _, values = layer.split_heads(*inputs[:takes])
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
        torch.testing.assert_close(rearrange(weights @ values, "b g q e -> b q (g e)"), mixed)


def test_tables_and_counts_take_every_relative(model):
    image = torch.randn(2, 3, *model.img_size)
    table = shape_table(model, image)
    assert table[-1].shape in ((2, 10), ()) and len(table) > 5
    assert sum(row.parameters for row in table) == count_parameters(model)
    assert count_macs(model, image) == count_macs(model, image[:1]) > 0
    heads = [row for row in table if row.name in model.head_names]
    assert [row.axes for row in heads] == ["b classes"] * len(model.head_names)
