"""Squeeze-and-excitation, ghost, dense: what each block does, and that the models of them do all that others do."""

import pytest
import torch
from einops import einsum, rearrange

from t2t_ref import (
    attention_maps,
    count_macs,
    count_parameters,
    create_model,
    load_checkpoint,
    load_model,
    save_checkpoint,
    shape_table,
)
from t2t_ref.models.backbone import Attention, Block
from t2t_ref.models.cnn_designs import (
    GhostAttention,
    GhostMlp,
    GhostT2TViT,
    GhostViT,
    SEAttention,
    SET2TViT,
    SEViT,
    SqueezeExcite,
)
from t2t_ref.models.dense import DenseBlock, DenseT2TViT, DenseViT, dense_widths
from t2t_ref.weights.saving import arguments_of

CLASSES = [SET2TViT, GhostT2TViT, DenseT2TViT, SEViT, GhostViT, DenseViT]


def small(cls, **arguments):
    torch.manual_seed(0)
    sizes = dict(img_size=(32, 48), embed_dim=48, num_heads=4, mlp_ratio=3.0, num_classes=10)
    sizes |= dict(depths=(2, 1, 2), growth_rate=16) if "Dense" in cls.__name__ else dict(depth=3)
    sizes |= dict(token_dim=16) if "T2T" in cls.__name__ else {}
    return cls(**(sizes | arguments)).eval()


@pytest.fixture(params=CLASSES, ids=lambda cls: cls.__name__)
def cls(request):
    return request.param


@pytest.fixture
def image():
    return torch.randn(2, 3, 32, 48)


# squeeze-and-excitation


def test_gates_are_one_for_each_channel_and_image():
    torch.manual_seed(0)
    layer, tokens = SqueezeExcite(32), torch.randn(2, 5, 32)
    mean = sum(tokens[:, n] for n in range(5)) / 5
    squeeze, excite = layer.fc[0].weight, layer.fc[2].weight
    assert squeeze.shape == (2, 32) and excite.shape == (32, 2)
    gates = (excite @ (squeeze @ mean[1]).relu()).sigmoid()
    for n in range(5):  # the same for every token
        torch.testing.assert_close(layer(tokens)[1, n], tokens[1, n] * gates)


def test_the_class_token_counts_in_the_mean():
    """As in the authors' code: change token 0, and the gates of all the others change."""
    torch.manual_seed(0)
    layer, tokens = SqueezeExcite(32), torch.randn(1, 5, 32)
    louder = tokens.clone()
    louder[:, 0] *= 10
    assert (layer(louder)[:, 1:] - layer(tokens)[:, 1:]).abs().max() > 1e-3


def test_a_narrow_layer_squeezes_to_one_number():
    assert SqueezeExcite(8).fc[0].weight.shape == (1, 8)


def test_se_attention_is_attention_with_gated_channels():
    torch.manual_seed(0)
    layer, tokens = SEAttention(32, 4, qkv_bias=True).eval(), torch.randn(2, 5, 32)
    plain = Attention(32, 4, qkv_bias=True).eval()
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "se_layer" not in k})
    torch.testing.assert_close(layer(tokens), layer.se_layer(plain(tokens)))
    layer.se_layer.fc[2].weight.data.zero_()  # then every gate is 1/2
    torch.testing.assert_close(layer(tokens), plain(tokens) / 2)


# ghost


def test_half_of_the_heads_are_ghosts():
    torch.manual_seed(0)
    layer, tokens = GhostAttention(32, 4), torch.randn(2, 5, 32)
    names = "qkv"
    for name, heads in zip(names, layer.split_heads(tokens), strict=True):
        real = getattr(layer, name)(tokens)
        factors = getattr(layer, f"cheap_operation_{name}").weight
        assert factors.shape == (16, 1, 1) and heads.shape == (2, 4, 5, 8)
        torch.testing.assert_close(heads[:, 0], real[:, :, :8])
        torch.testing.assert_close(heads[:, 1], real[:, :, 8:])
        torch.testing.assert_close(heads[:, 2], real[:, :, :8] * factors[:8, 0, 0])
        torch.testing.assert_close(heads[:, 3], real[:, :, 8:] * factors[8:, 0, 0])


def test_a_ghost_attention_is_an_attention_with_tied_weights():
    """Fill a plain layer with the real rows and their multiples: the same function."""
    torch.manual_seed(0)
    ghost, plain, tokens = GhostAttention(32, 4), Attention(32, 4), torch.randn(2, 5, 32)
    rows = []
    for name in "qkv":
        weight, factors = getattr(ghost, name).weight, getattr(ghost, f"cheap_operation_{name}").weight
        rows += [weight, weight * rearrange(factors, "d 1 1 -> d 1")]
    plain.load_state_dict(
        {"qkv.weight": torch.cat(rows)} | {f"proj.{k}": v for k, v in ghost.proj.state_dict().items()}
    )
    torch.testing.assert_close(ghost(tokens), plain(tokens))


def test_a_width_without_a_half_is_refused():
    with pytest.raises(ValueError, match="a width of 27 has no half for the ghosts"):
        GhostAttention(27, 3)
    with pytest.raises(ValueError, match="5 heads do not divide a width of 32"):
        GhostAttention(32, 5)


@pytest.mark.parametrize("hidden, ghosts", [(96, [32, 32]), (128, [32, 32, 32]), (80, [32, 16]), (32, []), (20, [])])
def test_ghost_mlp_for_every_ratio(hidden, ghosts):
    """The authors' works for a ratio of 3, the first of these."""
    torch.manual_seed(0)
    layer, tokens = GhostMlp(32, hidden), torch.randn(2, 5, 32)
    assert [getattr(layer, name).weight.shape[0] for name in layer.cheap_names] == ghosts
    assert list(layer.cheap_names) == [f"cheap_operation{2 + i}" for i in range(len(ghosts))]
    gelu = torch.nn.functional.gelu
    real = gelu(layer.fc1(tokens))
    parts = [real] + [
        gelu(real[..., :width] * getattr(layer, name).weight[:, 0, 0])
        for name, width in zip(layer.cheap_names, ghosts, strict=True)
    ]
    torch.testing.assert_close(layer(tokens), layer.fc2(torch.cat(parts, dim=-1)))
    assert layer.fc2.in_features == hidden


# dense


def test_a_dense_block_appends_and_adds_nothing():
    torch.manual_seed(0)
    block, tokens = DenseBlock(32, 4, growth_rate=8, mlp_ratio=2.0), torch.randn(2, 5, 32)
    plain = Block(32, 4, mlp_ratio=2.0)
    plain.load_state_dict({k: v for k, v in block.state_dict().items() if "dense_linear" not in k})
    grown = block(tokens)
    assert grown.shape == (2, 5, 40)
    assert torch.equal(grown[..., :32], tokens)
    torch.testing.assert_close(grown[..., 32:], block.dense_linear(plain(tokens)))


def test_widths_of_the_dense_model():
    widths = dense_widths(128, (3, 6, 6, 4), 64)
    assert [stage[0] for stage in widths] == [128, 160, 272, 328]
    assert [stage[-1] for stage in widths] == [320, 544, 656, 584]
    with pytest.raises(ValueError, match=r"depths is \(3, 0\), expected a number of blocks, 1 or more"):
        dense_widths(128, (3, 0), 64)


def test_transitions_halve_and_bend():
    model = small(DenseT2TViT)
    transition, tokens = model.blocks[2], torch.randn(1, 5, 80)
    assert transition(tokens).shape == (1, 5, 40)
    torch.testing.assert_close(transition(tokens), torch.nn.functional.gelu(transition.linear(tokens)))


def test_drop_path_rates_of_dense_are_the_authors():
    """A line for 12 blocks, read off at the number of the stage."""
    model = create_model("t2t_vit_dense", img_size=32, drop_path_rate=0.11)
    rates = [block.drop_path.drop_rate for block in model.blocks if isinstance(block, DenseBlock)]
    assert rates == pytest.approx([0.0] * 3 + [0.01] * 6 + [0.02] * 6 + [0.03] * 4)


@pytest.mark.parametrize("cls", [DenseT2TViT, DenseViT])
def test_dense_heads(cls, image):
    """In the authors' code reset_classifier makes a head for the width at the start, and the next run fails."""
    model = small(cls)
    assert (model.embed_dim, model.num_features) == (48, 60)
    assert model.get_classifier().in_features == 60
    features = model.forward_features(image)
    model.reset_classifier(7)
    assert model(image).shape == (2, 7)
    model.reset_classifier(0)
    torch.testing.assert_close(model(image), features[:, 0])
    assert small(cls, num_classes=0)(image).shape == (2, 60)


def test_norms_of_a_dense_model_are_those_of_its_kind():
    for cls, eps in ((DenseT2TViT, 1e-5), (DenseViT, 1e-6)):
        assert {m.eps for m in small(cls).modules() if isinstance(m, torch.nn.LayerNorm)} == {eps}


def test_dense_intermediates_have_the_width_of_their_block(image):
    model = small(DenseT2TViT)
    features, maps = model.forward_intermediates(image)
    assert [m.shape[1] for m in maps] == [64, 80, 40, 56, 28, 44, 60]  # blocks, with a transition after 2 and after 1
    assert {tuple(m.shape[2:]) for m in maps} == {(2, 3)}
    torch.testing.assert_close(features, model.forward_features(image))
    ((last,),) = [model.forward_intermediates(image, 1, norm=True, output_fmt="NLC", intermediates_only=True)]
    torch.testing.assert_close(last, features[:, 1:])
    with pytest.raises(ValueError, match="the last norm is for 60 channels, block 0 puts out 64: pass norm=False"):
        model.forward_intermediates(image, [0, -1], norm=True)


# all of them


def test_features_intermediates_and_heads(cls, image):
    model = small(cls)
    features = model.forward_features(image)
    assert features.shape == (2, 1 + 6, model.num_features)
    torch.testing.assert_close(model.forward_head(features), model(image))
    _, maps = model.forward_intermediates(image, indices=[0, -1])
    tokens = model.embed(image)
    torch.testing.assert_close(rearrange(maps[0], "b d h w -> b (h w) d"), model.blocks[0](tokens)[:, 1:])
    model.reset_classifier(3)
    assert model(image).shape == (2, 3)
    assert model.no_weight_decay() <= set(dict(model.named_parameters()))


def test_attention_maps_are_those_of_the_heads(cls, image):
    model = small(cls)
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    maps = attention_maps(model, image)
    assert len(maps) == len(blocks) and {tuple(m.shape) for m in maps} == {(2, 4, 7, 7)}
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, 4, 7))
    attn, tokens = blocks[0].attn, blocks[0].norm1(model.embed(image))
    mixed = einsum(maps[0], attn.split_heads(tokens)[2], "b g q k, b g k e -> b g q e")
    mixed = attn.proj(rearrange(mixed, "b g n e -> b n (g e)"))
    mixed = attn.se_layer(mixed) if isinstance(attn, SEAttention) else mixed
    torch.testing.assert_close(attn(tokens), mixed)


class Front(torch.nn.Module):
    """What comes before the first block."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image):
        return self.model.embed(image)


def test_shapes_parameters_and_macs(cls, image):
    model = small(cls)
    table = shape_table(model, image)
    assert table.shape("head") == (2, 10)
    assert sum(row.parameters for row in table) == count_parameters(model)
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    products = sum(2 * 7 * 7 * block.norm1.normalized_shape[0] for block in blocks)
    matrices = sum(  # each meets every token; those of squeeze-and-excitation meet their mean alone
        layer.weight.numel() * (1 if ".se_layer." in name else 7)
        for name, layer in model.blocks.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv1d)
    )
    assert count_macs(model, image) == count_macs(Front(model), image) + products + matrices + 10 * model.num_features


def test_other_sizes(cls, image):
    fixed, dynamic = small(cls), small(cls, dynamic_img_size=True)
    torch.testing.assert_close(dynamic(image), fixed(image))
    assert dynamic(torch.randn(1, 3, 64, 32)).shape == (1, 10)
    with pytest.raises(ValueError, match="64x32 pixels.*img_size=32x48"):
        fixed(torch.randn(1, 3, 64, 32))
    one_channel = small(cls, in_chans=1)
    assert one_channel(image[:, :1]).shape == (2, 10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_precision_runs_forward_and_backward(cls, dtype, image):
    reference = small(cls)
    expected = reference(image)
    model = small(cls).to(dtype)
    logits = model(image.to(dtype))
    logits.float().square().mean().backward()
    assert logits.dtype == dtype
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    # in half precision at most 2.6 eps, over two kinds of kernels and five seeds
    tolerance = 1e-5 if dtype == torch.float64 else 15 * torch.finfo(dtype).eps
    assert (logits.float() - expected).norm() < tolerance * expected.norm()
    if dtype != torch.float64:
        with torch.autocast("cpu", dtype=dtype):
            assert (reference(image).float() - expected).norm() < tolerance * expected.norm()


def test_rates_are_off_in_eval_and_on_in_training(cls, image):
    model = small(cls, drop_rate=0.2, attn_drop_rate=0.2, drop_path_rate=0.5)
    torch.testing.assert_close(model(image), small(cls)(image))
    quiet = small(cls, **({"performer_drop_rate": 0.0} if "T2T" in cls.__name__ else {})).train()
    assert torch.equal(quiet(image), quiet(image))
    assert not torch.equal(model.train()(image), model(image))


def test_saved_models_come_back(cls, tmp_path, image):
    model = small(cls, drop_path_rate=0.1)
    save_checkpoint(model, tmp_path / "m.safetensors")
    again = load_model(tmp_path / "m.safetensors")
    assert type(again) is cls and arguments_of(again) == arguments_of(model) and repr(again) == repr(model)
    assert torch.equal(again.eval()(image), model(image))
    other = load_model(tmp_path / "m.safetensors", img_size=64, num_classes=3).eval()
    assert other(torch.randn(1, 3, 64, 64)).shape == (1, 3)


NAMES = ["t2t_vit_14_se", "t2t_vit_dense", "t2t_vit_16_ghost"]


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_of_another_design_is_refused_by_name(name):
    source = create_model(name, num_classes=3).state_dict()
    with pytest.raises(ValueError, match=f"its shapes are those of {name}: create_model"):
        load_checkpoint(create_model("t2t_vit_14"), source)
    wrapped = {"state_dict_ema": {f"module.{key}": value for key, value in source.items()}, "arch": name}
    report = load_checkpoint(create_model(name, img_size=384), wrapped)
    assert [entry.name for entry in report.adapted] == ["pos_embed"]
    assert [entry.name for entry in report.skipped] == ["head.weight", "head.bias"]


@pytest.mark.parametrize("name", NAMES)
def test_pretrained_says_that_there_are_no_weights(name):
    with pytest.raises(ValueError, match=f"no weights for '{name}'"):
        create_model(name, pretrained=True)


def test_arguments_reach_every_block(cls):
    model = small(cls, qkv_bias=True, qk_scale=0.3, drop_rate=0.1, attn_drop_rate=0.2)
    for block in model.blocks:
        if isinstance(block, Block):
            attn = block.attn
            linears = [attn.q, attn.k, attn.v] if isinstance(attn, GhostAttention) else [attn.qkv]
            assert all(linear.bias is not None for linear in linears)
            assert (attn.scale, attn.attn_drop_rate, attn.proj_drop.p, block.mlp.drop.p) == (0.3, 0.2, 0.1, 0.1)


@pytest.mark.parametrize("name", NAMES)
def test_fresh_weights(name):
    """Linear layers as everywhere in the model; ghosts as torch draws a convolution, evenly between -1 and 1."""
    torch.manual_seed(0)
    layers = dict(create_model(name, img_size=32).blocks.named_modules())
    for path, layer in layers.items():
        if isinstance(layer, torch.nn.Linear):
            assert abs(layer.weight.std() - 0.02) < 2e-3, path
        if isinstance(layer, torch.nn.Conv1d):
            assert abs(layer.weight.std() - 3**-0.5) < 0.1 and layer.weight.abs().max() <= 1, path


TABLE_6 = {  # millions of parameters as printed; of ours, all of them; of ours, without what is frozen or the table
    "t2t_vit_14_wide": ("25.1", 25.156, 25.001),
    "t2t_vit_dense": ("23.7", 23.647, 23.618),
    "t2t_vit_14_se": ("21.9", 21.804, 21.724),
    "t2t_vit_14_resnext": ("21.5", 21.546, 21.466),
    "t2t_vit_16_ghost": ("16.3", 16.253, 16.174),
    "vit_small_patch16": ("48.6", 48.754, 48.603),
    "vit_small_patch16_dn": ("24.5", 24.405, 24.330),
    "vit_small_patch16_sw": ("47.9", 48.194, 47.992),
    "vit_small_patch16_dense": ("46.7", 46.632, 46.607),
    "vit_small_patch16_se": ("49.2", 49.344, 49.193),
    "vit_small_patch16_resnext": ("48.6", 48.754, 48.603),
    "vit_small_patch16_ghost": ("32.1", 32.249, 32.097),
}


def counts(name):
    with torch.device("meta"):
        model = create_model(name)
    every = count_parameters(model)
    places = sum(p.numel() for key, p in model.state_dict().items() if key == "pos_embed" or key.endswith(".w"))
    return every / 1e6, (every - places) / 1e6


@pytest.mark.parametrize("name", TABLE_6)
def test_sizes_beside_those_of_table_6(name):
    printed, every, lean = TABLE_6[name]
    assert counts(name) == (pytest.approx(every, abs=6e-4), pytest.approx(lean, abs=6e-4))
    fits = printed in (f"{every:.1f}", f"{lean:.1f}")
    off = min(abs(count / float(printed) - 1) for count in (every, lean))
    if name.startswith("vit") and not fits:  # where the printed numbers do not determine the design
        assert name in {"vit_small_patch16_dn", "vit_small_patch16_sw", "vit_small_patch16_dense"} and off < 0.004
    else:
        assert fits or off < 0.005
