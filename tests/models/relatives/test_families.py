"""The relatives beside their numbers: counts, sizes, refusals, heads, precision, graphs, initial weights."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from einops import einsum, rearrange
from torch import nn

from t2t_ref import (
    attention_maps,
    count_macs,
    count_parameters,
    create_model,
    list_models,
    load_checkpoint,
    load_model,
    save_checkpoint,
    shape_table,
)
from t2t_ref.models import VARIANTS
from t2t_ref.models.backbone import Attention
from t2t_ref.models.relatives import deit, swin
from t2t_ref.models.relatives.patch_convnet import ConvStem

COUNTS = {  # parameters, and billions of multiply-accumulates at 224 pixels, of the authors' models
    "deit_tiny_patch16_224": (5_717_416, 1.254),
    "deit_small_patch16_224": (22_050_664, 4.599),
    "deit_base_patch16_224": (86_567_656, 17.564),
    "deit_base_patch16_384": (86_859_496, None),
    "deit_tiny_distilled_patch16_224": (5_910_800, 1.261),
    "deit_small_distilled_patch16_224": (22_436_432, 4.624),
    "deit_base_distilled_patch16_224": (87_338_192, 17.657),
    "deit_base_distilled_patch16_384": (87_630_032, None),
    "tnt_ti_patch16_224": (6_114_040, 1.404),
    "tnt_s_patch16_224": (23_843_848, 5.217),
    "tnt_b_patch16_224": (65_554_120, 14.049),
    "pvt_tiny": (13_229_288, 1.933),
    "pvt_small": (24_485_864, 3.816),
    "pvt_medium": (44_208_104, 6.659),
    "pvt_large": (61_369_320, 9.814),
    "pvt_v2_b0": (3_666_760, 0.566),
    "pvt_v2_b1": (14_009_000, 2.108),
    "pvt_v2_b2": (25_362_856, 4.027),
    "pvt_v2_b2_li": (22_553_512, 3.889),
    "pvt_v2_b3": (45_238_696, 6.897),
    "pvt_v2_b4": (62_556_072, 10.101),
    "pvt_v2_b5": (81_956_008, 11.717),
    "swin_tiny_patch4_window7_224": (28_288_354, 4.491),
    "swin_small_patch4_window7_224": (49_606_258, 8.741),
    "swin_base_patch4_window7_224": (87_768_224, 15.431),
    "patchconvnet_s60": (25_231_096, 3.979),
    "patchconvnet_s120": (47_723_896, 7.493),
    "patchconvnet_b60": (99_388_936, 15.803),
    "patchconvnet_b120": (188_611_336, None),
    "patchconvnet_s60_multi": (25_614_712, 5.308),
}
COUNTED = [name for name, (_, macs) in COUNTS.items() if macs and macs < 6]  # the others are only deeper or wider

PVT_SIZES = dict(embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4), mlp_ratios=(2, 2, 2, 2), depths=(1, 1, 1, 1))
SMALL = {  # arguments that make them small
    "deit_tiny_patch16_224": dict(img_size=32, patch_size=8, embed_dim=24, depth=2),
    "deit_tiny_distilled_patch16_224": dict(img_size=32, patch_size=8, embed_dim=24, depth=2),
    "tnt_s_patch16_224": dict(
        img_size=32, patch_size=8, inner_stride=2, outer_dim=24, inner_dim=8, depth=2, outer_num_heads=3
    ),
    "pvt_tiny": dict(img_size=64, **PVT_SIZES),
    "pvt_v2_b0": dict(img_size=64, **PVT_SIZES),
    "pvt_v2_b2_li": dict(img_size=64, **PVT_SIZES),
    "swin_tiny_patch4_window7_224": dict(
        img_size=32, patch_size=2, window_size=4, embed_dim=12, depths=(2, 2, 2), num_heads=(2, 3, 4)
    ),
    "patchconvnet_s60": dict(img_size=64, embed_dim=32, depth=2),
    "patchconvnet_s60_multi": dict(img_size=64, embed_dim=32, depth=2),
}
everyone = pytest.mark.parametrize("name", SMALL)


def small(name, **arguments):
    """A small model whose weights are as large as those of a trained one: fresh ones would hide mistakes."""
    torch.manual_seed(0)
    model = create_model(name, **({"num_classes": 10} | SMALL[name] | arguments))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or parameter.shape[0] == 1:  # biases, norms, layer scales; tokens and tables
                parameter.add_(0.3 * torch.randn(parameter.shape))
            else:
                parameter.copy_(torch.randn(parameter.shape) / math.sqrt(math.prod(parameter.shape[1:])))
    return model.eval()


def noise(model, b=2):
    return torch.randn(b, 3, *model.img_size, generator=torch.Generator().manual_seed(1))


# ---- counts


def test_every_variant_has_the_authors_parameter_count():
    assert [name for name in list_models() if name in COUNTS] == list(COUNTS)
    with torch.device("meta"):
        counts = {name: count_parameters(create_model(name)) for name in COUNTS}
    assert counts == {name: parameters for name, (parameters, _) in COUNTS.items()}


@pytest.mark.parametrize("name", COUNTED)
def test_macs_are_the_published_ones(name):
    with torch.device("meta"):
        model = create_model(name)
        image = torch.empty(1, 3, 224, 224)
    whole = count_macs(model, image)
    assert round(whole / 1e9, 3) == COUNTS[name][1]
    if name in ("tnt_s_patch16_224", "swin_tiny_patch4_window7_224"):
        without = count_macs(model, image, products_of_activations=False)
        # scores and mixing: n * n * d of all blocks, twice
        words, windows = 196 * 16 * 16 * 24, sum(n * 49 * d * blocks for n, d, blocks in SWIN_STAGES)
        attention = 2 * 12 * (words + 197 * 197 * 384) if name.startswith("tnt") else 2 * windows
        assert whole - without == attention


SWIN_STAGES = [(3136, 96, 2), (784, 192, 2), (196, 384, 6), (49, 768, 2)]


# ---- what every model can do


@everyone
def test_features_head_and_classes(name):
    model = small(name)
    image = noise(model)
    features = model.forward_features(image)
    logits = model.forward_head(features)
    torch.testing.assert_close(logits, model(image))
    assert logits.shape == (2, 10)
    torch.testing.assert_close(model(image[:1]), logits[:1])  # samples do not mix

    model.double().reset_classifier(3)
    assert model.num_classes == 3 and model(image.double()).shape == (2, 3)
    heads = model.get_classifier()
    for head in heads if isinstance(heads, tuple) else (heads,):
        assert {entry.dtype for entry in head.state_dict().values()} == {torch.float64}
    model.float().reset_classifier(0)
    assert model(image).shape == (2, model.num_features)
    assert small(name, num_classes=0)(image).shape == (2, model.num_features)


@everyone
def test_intermediates(name):
    model = small(name)
    image = noise(model)
    features, maps = model.forward_intermediates(image)
    torch.testing.assert_close(features, model.forward_features(image))
    assert len(maps) == model.depth
    rows, columns = model.grid_of(model.img_size)
    assert maps[-1].shape == (2, model.num_features, rows, columns)
    ((tokens, prefix),) = model.forward_intermediates(
        image, [-1], return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
    )
    assert tokens.shape == (2, rows * columns, model.num_features)
    if not name.startswith("patchconvnet"):  # its class tokens come after the trunk
        torch.testing.assert_close(torch.cat([prefix, tokens], dim=1), features)
    if name.startswith("pvt"):
        assert [tuple(x.shape[1:]) for x in maps] == [(8, 16, 16), (16, 8, 8), (24, 4, 4), (32, 2, 2)]
    if name.startswith("swin"):
        assert [tuple(x.shape[1:]) for x in maps] == [(12, 16, 16), (24, 8, 8), (48, 4, 4)]
    early = model.forward_intermediates(image, [0], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early[0], maps[0])


@everyone
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name, dtype):
    model = small(name)
    image = noise(model)
    expected = model(image)
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype] * expected.norm()
    with torch.autocast("cpu", dtype=dtype):
        assert (model(image).float() - expected).norm() < tolerance
    logits = model.to(dtype)(image.to(dtype))
    assert logits.dtype == dtype and (logits.float() - expected).norm() < tolerance
    logits.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@everyone
def test_rates_reach_the_layers(name):
    """Without rates training mode is eval mode; each rate alone makes a difference in training, and none in eval."""
    quiet = small(name)
    image = noise(quiet)
    distilled = isinstance(quiet, deit.DistilledViT)

    def training(model):
        torch.manual_seed(2)
        logits = model.train()(image)
        return sum(logits) / 2 if distilled else logits

    expected = quiet(image)
    torch.testing.assert_close(training(quiet), expected)
    for rate in ("drop_rate", "attn_drop_rate", "drop_path_rate"):
        model = small(name, **{rate: 0.5})
        torch.testing.assert_close(model(image), expected)
        assert (training(model) - expected).abs().max() > 1e-3, rate


@everyone
def test_scale_of_the_scores(name):
    image = noise(small(name))
    assert (small(name, qk_scale=2.0)(image) - small(name)(image)).abs().max() > 1e-4


@everyone
def test_no_weight_decay_names_parameters(name):
    model = small(name)
    spared = model.no_weight_decay()
    assert spared <= set(dict(model.named_parameters()))
    expected = {"deit_tiny_distilled_patch16_224": {"cls_token", "pos_embed", "dist_token"}, "pvt_v2_b0": set()}
    assert spared == expected.get(name, spared)


@everyone
def test_tables_have_the_grids_they_say(name):
    model = small(name)
    shapes = {key: tuple(entry.shape) for key, entry in model.state_dict().items()}
    for key, grid in model.position_tables().items():
        positions = shapes[key][1] if shapes[key][0] == 1 else shapes[key][0]
        assert positions - math.prod(grid) in (0, model.num_prefix_tokens, 1)
    assert model.position_tables(model.img_size) == model.position_tables()


# ---- sizes


@pytest.mark.parametrize(
    "name", ["deit_tiny_patch16_224", "tnt_s_patch16_224", "pvt_tiny", "swin_tiny_patch4_window7_224"]
)
def test_another_size_is_refused_or_the_tables_are_resized(name):
    model = small(name)
    h, w = model.img_size
    image = torch.randn(1, 3, h, 2 * w)
    with pytest.raises(ValueError, match=f"{h}x{2 * w} pixels.*img_size={h}x{w}.*dynamic_img_size=True"):
        model(image)
    dynamic = small(name, dynamic_img_size=True)
    torch.testing.assert_close(dynamic(image[..., :w]), model(image[..., :w]))
    assert dynamic(image).shape == (1, 10)
    # the same as a model that was built for that size and has the resized tables
    other = small(name, img_size=(h, 2 * w))
    weights = dynamic.state_dict()
    for key, grid in other.position_tables().items():
        weights[key] = dynamic.resize_table(key, weights[key], dynamic.position_tables()[key], grid)
    weights["outer_tokens"] = other.state_dict().get("outer_tokens")
    other.load_state_dict({key: weights[key] for key in other.state_dict()})
    torch.testing.assert_close(other(image), dynamic(image))


@pytest.mark.parametrize("name", ["pvt_tiny", "pvt_v2_b0", "patchconvnet_s60"])
def test_a_wide_image_is_not_taken_for_a_square(name):
    """112 x 448 pixels have as many patches as 224 x 224. Here it is 16 x 64 and 32 x 32, or thereabouts.

    A wide image is the same as itself on its side, with every kernel and table turned as well.
    """
    sizes = dict(sr_ratios=(2, 2, 1, 1)) if name.startswith("pvt") else {}
    wide = small(name, **sizes, img_size=(32, 128))
    tall = small(name, **sizes, img_size=(128, 32))
    weights = {key: entry.clone() for key, entry in wide.state_dict().items()}
    for key, entry in weights.items():
        if entry.ndim == 4:
            weights[key] = rearrange(entry, "o c kh kw -> o c kw kh")
    for key, (rows, columns) in wide.position_tables().items():
        prefix = weights[key].shape[1] - rows * columns
        cells = rearrange(weights[key][:, prefix:], "1 (h w) d -> 1 (w h) d", h=rows)
        weights[key] = torch.cat([weights[key][:, :prefix], cells], dim=1)
    tall.load_state_dict(weights)
    image = noise(wide)
    torch.testing.assert_close(tall(rearrange(image, "b c h w -> b c w h")), wide(image))
    square = small(name, **sizes, img_size=64, dynamic_img_size=True)
    assert square(image).shape == (2, 10)  # the authors' code takes its 64 patches for 8 x 8
    assert square.forward_intermediates(image, [0], intermediates_only=True)[0].shape[-1] in (32, 8)


def test_any_size_without_tables():
    assert small("patchconvnet_s60")(torch.randn(1, 3, 1, 1)).shape == (1, 10)
    assert small("patchconvnet_s60")(torch.randn(1, 3, 50, 23)).shape == (1, 10)
    assert ConvStem(3, 16)(torch.randn(1, 3, 50, 23)).shape == (1, 4 * 2, 16)  # rounded up
    assert small("pvt_v2_b2_li")(torch.randn(1, 3, 1, 1)).shape == (1, 10)
    assert small("pvt_v2_b0")(torch.randn(1, 3, 29, 70)).shape == (1, 10)
    with pytest.raises(ValueError, match="28x70 pixels is too small: stage 1 has a grid of 7x18 .* reduced 8 times"):
        small("pvt_v2_b0")(torch.randn(1, 3, 28, 70))
    with pytest.raises(ValueError, match="28x28 pixels is too small: stage 1 has a grid of 7x7"):
        small("pvt_tiny", img_size=28)
    with pytest.raises(ValueError, match="the image is 48x48 pixels"):
        small("pvt_v2_b0", dynamic_img_size=False)(torch.randn(1, 3, 48, 48))


def test_sizes_that_windows_of_7_take():
    """The ones of the facts: 224 to 227 and 448 to 451 of all squares up to 512."""
    taken = []
    with torch.device("meta"):
        model = create_model("swin_tiny_patch4_window7_224")
    for side in range(28, 513):
        try:
            model.grids_of((side, side))
        except ValueError:
            continue
        taken.append(side)
    assert taken == [*range(224, 228), *range(448, 452)]
    assert model.grids_of((224, 448)) == [(56, 112), (28, 56), (14, 28), (7, 14)]


def test_windows_that_do_not_fit_are_refused():
    for size, words in (
        (230, "stage 1 has a grid of 57x57 tokens, which windows of 7x7 do not tile"),
        (28, "stage 1 has a grid of 7x7 tokens, which is odd"),
        ((112, 448), "112x448 pixels: stage 3 has a grid of 7x28 tokens, which is odd"),
    ):
        with torch.device("meta"), pytest.raises(ValueError, match=words):
            create_model("swin_tiny_patch4_window7_224", img_size=size)
    dynamic = small("swin_tiny_patch4_window7_224", dynamic_img_size=True)
    with pytest.raises(ValueError, match=r"would be \[2, 1, 1\] tokens wide|would be \[4, 4, 2\] tokens wide"):
        dynamic(torch.randn(1, 3, 16, 16))


def test_only_odd_blocks_move_their_windows_and_the_last_stage_does_not():
    shifts = []
    model = small("swin_tiny_patch4_window7_224", depths=(2, 2, 2))
    for block in (block for layer in model.layers for block in layer.blocks):
        block.attn.register_forward_pre_hook(lambda module, inputs: shifts.append(inputs[1] is not None))
    model(noise(model))
    assert shifts == [False, True, False, True, False, False]


def test_a_token_sees_its_window_alone():
    """A change of one token reaches the 16 of its window; with shift those of the moved window."""
    for shift, rows, columns in ((0, range(4), range(4, 8)), (2, range(2, 6), range(2, 6))):
        torch.manual_seed(0)
        block = swin.SwinBlock(12, 3, window_size=4, shift_size=shift).eval()
        tokens = torch.randn(1, 64, 12)
        changed = tokens.clone()
        changed[0, 3 * 8 + 5] = torch.randn(12)  # row 3, column 5
        difference = rearrange((block(changed, (8, 8)) - block(tokens, (8, 8))).abs().sum(-1), "1 (h w) -> h w", h=8)
        seen = {(int(row), int(column)) for row, column in torch.nonzero(difference > 1e-6)}
        assert seen == {(row, column) for row in rows for column in columns}


# ---- errors


def test_wrong_arguments_are_refused():
    with torch.device("meta"):
        for name in SMALL:
            with pytest.raises(ValueError, match="1 channels, expected in_chans=3"):
                create_model(name)(torch.empty(1, 1, 224, 224))
        with pytest.raises(ValueError, match="5 heads do not divide a width of 384"):
            create_model("tnt_s_patch16_224", outer_num_heads=5)
        with pytest.raises(ValueError, match="patches of 16 pixels do not tile an image of 230x230"):
            create_model("tnt_s_patch16_224", img_size=230)
        with pytest.raises(ValueError, match=r"depths is \(2, 2\), expected 4 numbers, one for each stage"):
            create_model("pvt_tiny", depths=(2, 2))
        with pytest.raises(ValueError, match="num_stages is 3, expected 4"):
            create_model("pvt_v2_b0", num_stages=3)
        with pytest.raises(ValueError, match="sr_ratios ends in 2, expected 1"):
            create_model("pvt_tiny", sr_ratios=(8, 4, 2, 2))
        with pytest.raises(ValueError, match="differ in the number of stages"):
            create_model("swin_tiny_patch4_window7_224", depths=(2, 2))
        with pytest.raises(TypeError, match="dimension"):
            create_model("pvt_tiny", dimension=3)
    logits, labels = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="unknown distillation_type 'sotf': did you mean 'soft'"):
        deit.distillation_loss(logits, logits, labels, logits, distillation_type="sotf")


# ---- single models


def test_tnt_does_not_write_into_what_it_was_given():
    model = small("tnt_s_patch16_224")
    words, sentences = model.embed(noise(model))
    before = sentences.clone()
    model.blocks[0](words, sentences.requires_grad_())
    assert torch.equal(sentences, before)


def test_tnt_words_of_a_patch_see_no_other_patch():
    model = small("tnt_s_patch16_224")
    image = noise(model)
    changed = image.clone()
    changed[:, :, 8:16, 16:24] += 1.0  # patch 6: row 1 of 4, column 2
    difference = (model.patch_embed(changed) - model.patch_embed(image)).abs().amax(dim=(1, 2))
    assert difference.nonzero().tolist() == [[6], [16 + 6]]


def test_tnt_gate():
    """The option that no released model has: its output times a gate, added to itself."""
    model, plain = small("tnt_s_patch16_224", se=1), small("tnt_s_patch16_224")
    assert [key for key in model.state_dict() if "blocks.0.se_layer" in key] == [
        f"blocks.0.se_layer.fc.{layer}.{kind}" for layer in (0, 1, 3) for kind in ("weight", "bias")
    ]
    plain.load_state_dict(model.state_dict(), strict=False)
    block, other = model.blocks[0], plain.blocks[0]
    words, sentences = model.embed(noise(model))
    _, with_gate = block(words, sentences)
    _, without = other(words, sentences)
    seen = {}
    other.outer_mlp.register_forward_hook(lambda m, i, output: seen.update(change=output))
    other(words, sentences)
    change = seen["change"]
    fc = block.se_layer.fc
    gate = torch.tanh(fc[3](torch.relu(fc[1](fc[0](change.mean(dim=1, keepdim=True))))))
    torch.testing.assert_close(with_gate, without + change * gate)


def test_swin_with_a_position_table_and_without_the_first_norm():
    model = small("swin_tiny_patch4_window7_224", ape=True, patch_norm=False)
    assert model.absolute_pos_embed.shape == (1, 256, 12)
    assert "patch_embed.norm.weight" not in model.state_dict()
    assert "absolute_pos_embed" in model.no_weight_decay()
    image = noise(model)
    before = model(image)
    with torch.no_grad():
        model.absolute_pos_embed.add_(torch.randn(1, 256, 12))
    assert (model(image) - before).abs().max() > 1e-3


def test_pooled_attention_ignores_sr_ratios_and_pvt_v2_the_patch_size():
    one, other = (
        small("pvt_v2_b2_li", sr_ratios=ratios, patch_size=p) for ratios, p in (((8, 4, 2, 1), 4), ((1, 1, 1, 1), 9))
    )
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(other(noise(one)), one(noise(one)))


def test_convolution_before_the_mean_is_convolution_after_it():
    """The order in the paper's figure and in the code of the linear attention: the same function."""
    attention = small("pvt_v2_b2_li").block1[0].attn
    image = torch.randn(1, 8, 9, 10)
    torch.testing.assert_close(attention.sr(attention.pool(image)), attention.pool(attention.sr(image)))


def test_multiclass_has_a_token_a_query_and_a_head_for_each_class():
    model = small("patchconvnet_s60_multi")
    image = noise(model)
    assert model.cls_token.shape == (1, 10, 32) and model.num_prefix_tokens == 10
    features = model.forward_features(image)
    assert features.shape == (2, 10 + 16, 32)
    by_hand = torch.cat([model.head.get_submodule(str(i))(features[:, i]) for i in range(10)], dim=1)
    torch.testing.assert_close(model(image), by_hand)
    keys = []
    model.blocks_token_only[0].attn.k.register_forward_hook(lambda m, i, output: keys.append(output.shape[1]))
    model(image)
    small_one = small("patchconvnet_s60")
    small_one.blocks_token_only[0].attn.k.register_forward_hook(lambda m, i, output: keys.append(output.shape[1]))
    small_one(image)
    assert keys == [16, 17]  # one class token is among its keys, many are not
    model.reset_classifier(3)
    assert model.cls_token.shape == (1, 3, 32) and model(image).shape == (2, 3)


def test_patchconvnet_options():
    model = small("patchconvnet_s60", depth_token_only=2, drop_path_rate=0.2, dpr_constant=False, init_scale=0.5)
    assert len(model.blocks_token_only) == 2
    assert [block.drop_path.drop_rate for block in model.blocks] == pytest.approx([0.0, 0.2])
    constant = create_model("patchconvnet_s60", **SMALL["patchconvnet_s60"], drop_path_rate=0.2, init_scale=0.5)
    assert [block.drop_path.drop_rate for block in constant.blocks] == pytest.approx([0.2, 0.2])
    assert (constant.blocks[0].gamma_1 == 0.5).all() and (constant.blocks_token_only[0].gamma_2 == 0.5).all()


def test_distilled_heads():
    model = small("deit_tiny_distilled_patch16_224")
    image = noise(model)
    first, second = model.train()(image)
    assert (first - second).abs().max() > 1e-3
    torch.testing.assert_close(model.eval()(image), (first + second) / 2)
    teacher = torch.randn(2, 10)
    loss = deit.distillation_loss(
        first, second, torch.tensor([1, 2]), teacher.requires_grad_(), distillation_type="soft"
    )
    loss.backward()
    assert teacher.grad is None and model.dist_token.grad is not None


def test_initial_weights():
    torch.manual_seed(0)
    models = {
        name: create_model(name, **(SMALL[name] if "384" in name else {"num_classes": 10}))
        for name in ("pvt_v2_b0", "pvt_tiny", "deit_tiny_distilled_patch16_224")
    }
    v2 = models["pvt_v2_b0"].patch_embed2.proj
    assert v2.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.05) and (v2.bias == 0).all()
    depthwise = models["pvt_v2_b0"].block1[0].mlp.dwconv.dwconv
    assert depthwise.weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.05)
    v1 = models["pvt_tiny"].patch_embed2.proj  # torch's own: uniform up to 1 / sqrt(inputs)
    assert v1.weight.abs().max() <= 1 / math.sqrt(4 * 64) and (v1.bias != 0).any()
    for name in ("pos_embed1", "pos_embed4", "cls_token"):
        assert getattr(models["pvt_tiny"], name).std().item() == pytest.approx(0.02, rel=0.1)
    distilled = models["deit_tiny_distilled_patch16_224"]
    assert distilled.head_dist.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert (distilled.head_dist.bias == 0).all() and distilled.dist_token.abs().max() > 0
    for model in models.values():
        assert all((m.bias == 0).all() for m in model.modules() if isinstance(m, nn.Linear) and m.bias is not None)


# ---- files

AUTHORS_KEY = {"tnt": "state_dict", "pvt": "", "pvt_v2": "", "swin": "model", "deit": "model", "patchconvnet": "model"}


@everyone
def test_authors_files_are_loaded(name, tmp_path):
    """Their names, and the key under which they put the weights; Swin's with the entries that it computes here."""
    theirs = small(name).state_dict()
    if name.startswith("swin"):
        theirs["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
        theirs["layers.0.blocks.1.attn_mask"] = torch.zeros(16, 16, 16)
    key = AUTHORS_KEY[name.partition("_")[0]]
    torch.save({key: theirs, "epoch": 1} if key else theirs, tmp_path / "theirs.pth")
    torch.manual_seed(5)
    model = create_model(name, **SMALL[name], num_classes=10).eval()
    report = load_checkpoint(model, tmp_path / "theirs.pth")
    assert not report.adapted and not report.skipped
    assert any("computes it" in note for note in report.notes) == name.startswith("swin")
    torch.testing.assert_close(model(noise(model)), small(name)(noise(model)))
    model.load_state_dict(theirs)

    save_checkpoint(model, tmp_path / "ours.safetensors")
    again = load_model(tmp_path / "ours.safetensors").eval()
    assert torch.equal(again(noise(model)), model(noise(model)))


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "tnt_s_patch16_224", "pvt_tiny"])
def test_a_file_of_another_size_is_resized_and_of_other_classes_keeps_the_head_fresh(name):
    stored = small(name)
    h, w = stored.img_size
    model = create_model(name, **(SMALL[name] | dict(img_size=(h, 2 * w), num_classes=4)))
    fresh = {key: entry.clone() for key, entry in model.state_dict().items()}
    theirs = stored.state_dict()
    theirs.pop("outer_tokens", None)  # of TNT: never read, and of another length
    report = load_checkpoint(model, theirs, strict=name != "tnt_s_patch16_224")
    assert {entry.name for entry in report.adapted} == set(model.position_tables())
    for key, grid in model.position_tables().items():
        expected = stored.resize_table(key, theirs[key], stored.position_tables()[key], grid)
        assert torch.equal(model.state_dict()[key], expected)
    for head in model.head_names:
        assert torch.equal(model.state_dict()[f"{head}.weight"], fresh[f"{head}.weight"])


def test_bias_tables_of_other_windows_are_resized():
    stored = small("swin_tiny_patch4_window7_224")
    sizes = dict(img_size=48, window_size=6)
    model = create_model(
        "swin_tiny_patch4_window7_224", **(SMALL["swin_tiny_patch4_window7_224"] | sizes), num_classes=10
    )
    report = load_checkpoint(model, stored.state_dict())
    assert len(report.adapted) == 6 and model.layers[0].blocks[0].attn.relative_position_bias_table.shape == (121, 2)


# ---- inspection, graphs


@everyone
def test_shape_table(name):
    model = small(name)
    for depth in (1, 2, 4):
        table = shape_table(model, noise(model, b=1), depth=depth)
        assert sum(row.parameters for row in table) == count_parameters(model)
        assert table[-1].shape == (1, 10) or table[-1].kind == "held outside the stages"


@everyone
def test_attention_maps_mix_the_values(name):
    """The maps, times the values and through the last layer, are what each attention layer returns."""
    model = small(name)
    image, layers = noise(model), [m for m in model.modules() if isinstance(m, Attention)]
    maps, seen = attention_maps(model, image), []
    for layer in layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.append((module, inputs, output)))
    model(image)
    assert len(maps) == len(seen) == len(layers) > 0
    for weights, (layer, inputs, output) in zip(maps, seen, strict=True):
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
        split = inputs[:1] if isinstance(layer, swin.WindowAttention) else inputs
        mixed = einsum(weights, layer.split_heads(*split)[2], "b g q k, b g k e -> b g q e")
        torch.testing.assert_close(layer.proj(rearrange(mixed, "b g q e -> b q (g e)")), output, atol=1e-5, rtol=1e-4)


# one of each kind: words and sentences, windows; a reduced grid, many heads, two outputs
GRAPHS = """
import sys, torch
sys.path.insert(0, {folder!r})
from test_families import noise, small
one_stage = dict(depths=(2,), num_heads=(2,))
for name, sizes in (("tnt_s_patch16_224", dict(depth=1)), ("swin_tiny_patch4_window7_224", one_stage)):
    model = small(name, **sizes)
    image = noise(model)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(image), model(image))
for name in ("pvt_v2_b2_li", "patchconvnet_s60_multi", "deit_tiny_distilled_patch16_224"):
    model = small(name)
    batches = torch.export.export(model, (noise(model),), dynamic_shapes=({{0: torch.export.Dim("b")}},)).module()
    for b in (1, 5):
        torch.testing.assert_close(batches(noise(model, b=b)), model(noise(model, b=b)))
"""


def test_compile_and_export():
    """In a process of its own: the checks of the test run are no part of a graph."""
    code = GRAPHS.format(folder=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_table_of_variants_has_one_class_for_each_file():
    modules = {VARIANTS[name].model.__module__ for name in COUNTS}
    assert len(modules) == 7  # DeiT without distillation is ViT
