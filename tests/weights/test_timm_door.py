"""timm's ways with our models: its registry, its scripts' calls, its feature extraction, its files."""

import copy
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from einops import rearrange, reduce, repeat
from matplotlib.cbook import get_sample_data
from PIL import Image
from small import same, state, tiny
from with_timm import import_timm

import t2t_ref
from t2t_ref import T2TViT, ViT, count_parameters, create_model, load_model, save_checkpoint
from t2t_ref.inspection import frozen_entries, tap, token_maps
from t2t_ref.models import VARIANTS
from t2t_ref.models.dense import DenseT2TViT
from t2t_ref.models.relatives.patch_convnet import PatchConvNet
from t2t_ref.models.relatives.pvt import PVT
from t2t_ref.models.relatives.pvt_v2 import PVTv2
from t2t_ref.models.relatives.swin import Swin
from t2t_ref.models.relatives.tnt import TNT
from t2t_ref.weights.timm_registry import register

timm = import_timm()
from timm.models import group_parameters  # noqa: E402
from timm.models._hub import save_for_hf  # noqa: E402
from timm.optim import param_groups_layer_decay  # noqa: E402
from timm.utils import ModelEmaV3, unfreeze  # noqa: E402

import t2t_ref.timm  # noqa: E402

SMALL = dict(img_size=32, num_classes=5, drop_rate=0.1, drop_path_rate=0.2)
FLAT = SMALL | dict(embed_dim=24, depth=3, num_heads=3)
STAGES = SMALL | dict(embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 2, 4), depths=(1, 2, 1, 1), sr_ratios=(2, 2, 1, 1))
FAMILIES = {
    "performer": lambda **a: T2TViT(**(FLAT | dict(token_dim=8, performer_drop_rate=0.2) | a)),
    "transformer": lambda **a: T2TViT(**(FLAT | dict(token_dim=8, tokens_type="transformer") | a)),
    "convolution": lambda **a: T2TViT(**(FLAT | dict(token_dim=8, tokens_type="convolution") | a)),
    "vit": lambda **a: ViT(**(FLAT | a)),
    "dense": lambda **a: DenseT2TViT(
        **(SMALL | dict(embed_dim=24, depths=(2, 1), growth_rate=8, num_heads=4, token_dim=8) | a)
    ),
    "tnt": lambda **a: TNT(
        **(SMALL | dict(outer_dim=24, inner_dim=8, depth=2, outer_num_heads=3, inner_num_heads=2) | a)
    ),
    "pvt": lambda **a: PVT(**(STAGES | dict(patch_size=4) | a)),
    "pvt_v2": lambda **a: PVTv2(**(STAGES | a)),
    "swin": lambda **a: Swin(
        **(SMALL | dict(embed_dim=12, depths=(2, 1), num_heads=(2, 2), window_size=4, patch_size=4) | a)
    ),
    "patch_convnet": lambda **a: PatchConvNet(**(FLAT | dict(num_heads=1) | a)),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def build(family, **arguments):
    torch.manual_seed(0)
    return FAMILIES[family](**arguments)


def images(size=(32, 32), channels=3, batch=2):
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


# the door


def test_the_base_does_not_import_timm():
    code = "import sys, t2t_ref, t2t_ref.weights.timm_registry; sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_variant_is_known_and_timms_own_are_left_alone():
    ours = set(timm.list_models(module="timm"))
    assert set(VARIANTS) <= set(timm.list_models())
    assert "t2t_vit_14" in ours and "pvt_tiny" in ours and "swin_tiny_patch4_window7_224" not in ours
    assert timm.models.model_entrypoint("deit_tiny_patch16_224").__module__ == "timm.models.deit"
    released = timm.list_models("t2t_*", pretrained=True)
    assert len(released) == 10 and "t2t_vit_14.yitu_in1k_384" in released


def test_timm_builds_what_create_model_builds():
    options = dict(img_size=64, num_classes=10, depth=1)
    torch.manual_seed(0)
    theirs = timm.create_model("t2t_vit_7", **options)
    torch.manual_seed(0)
    assert same(state(theirs), state(create_model("t2t_vit_7", **options)))
    assert timm.create_model("t2t_vit_7", **options, device="meta", dtype=torch.bfloat16).head.weight.is_meta
    with pytest.raises(TypeError, match="breadth"):
        timm.create_model("t2t_vit_7", breadth=3)


def test_a_photograph_is_prepared_as_by_preprocess():
    with get_sample_data("grace_hopper.jpg") as file:
        photograph = Image.open(file).convert("RGB")
    for model in (timm.create_model("t2t_vit_7"), create_model("t2t_vit_7")):
        config = timm.data.resolve_data_config(model=model)
        assert config["crop_pct"] == 0.9 and config["input_size"] == (3, 224, 224)
        ours, theirs = t2t_ref.preprocess(photograph), timm.data.create_transform(**config)(photograph)
        torch.testing.assert_close(rearrange(theirs, "c h w -> 1 c h w"), ours, rtol=0, atol=0)


@every_family
def test_the_configuration_is_true(family):
    model = build(family, in_chans=2)
    cfg, names = model.pretrained_cfg, model.state_dict().keys()
    assert cfg is model.default_cfg and cfg["input_size"] == (2, 32, 32) and cfg["num_classes"] == 5
    first = cfg["first_conv"]
    if family in ("performer", "transformer", "dense"):
        assert first == ()  # a soft split is none
    else:
        assert model.get_parameter(first + ".weight").shape[1] == 2
    assert cfg["classifier"] + ".weight" in names
    assert cfg["mean"] == ((0.5,) * 3 if family == "tnt" else (0.485, 0.456, 0.406))


def test_released_files_say_whose_they_are():
    cfg = timm.create_model("t2t_vit_14").pretrained_cfg
    assert cfg["url"].endswith("81.5_T2T_ViT_14.pth.tar") and cfg["license"] == "bsd-3-clause-clear"
    assert "license" not in create_model("vit_small_patch16").pretrained_cfg


# fixed tables


@pytest.mark.parametrize("thaw", [lambda model: model.requires_grad_(True), unfreeze])
def test_fixed_tables_cannot_be_thawed(thaw):
    model = tiny()
    model.requires_grad_(False)
    model.head.requires_grad_(True)  # a linear probe
    before = {name: entry.clone() for name, entry in frozen_entries(tiny()).items()}
    assert set(before) == {"pos_embed", "tokens_to_token.attention1.w", "tokens_to_token.attention2.w"}
    thaw(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(images((64, 64))).sum().backward()
    optimizer.step()
    assert all(torch.equal(model.state_dict()[name], table) for name, table in before.items())
    assert list(model.state_dict())[:2] == ["cls_token", "pos_embed"]
    places = sum(table.numel() for table in before.values())
    assert count_parameters(model) - count_parameters(model, trainable_only=True) == places


def test_an_average_of_weights_is_whole():
    model = tiny()
    average = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        model.head.weight.add_(1)
    average.update(model)
    assert average.module.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(average.module.pos_embed, model.pos_embed)


# heads


@every_family
def test_what_the_head_sees(family):
    model = build(family).eval()
    features = model.forward_features(images())
    torch.testing.assert_close(model.head(model.forward_head(features, pre_logits=True)), model(images()))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    own = {"token": features[:, 0], "": features}
    own["avg"] = reduce(features[:, model.num_prefix_tokens :], "b n d -> b d", "mean")
    for pooling in model.poolings:
        model.reset_classifier(0, pooling)
        torch.testing.assert_close(model(images()), own[pooling])
    last = model.global_pool
    model.reset_classifier(3)
    assert model.global_pool == last and not model.head.training
    with pytest.raises(ValueError, match="unknown global_pool of .* 'max'"):
        model.reset_classifier(3, "max")


def test_pooling_is_saved(tmp_path):
    model = build("performer", global_pool="avg").eval()
    save_checkpoint(model, tmp_path / "m.safetensors")
    again = load_model(tmp_path / "m.safetensors").eval()
    assert again.global_pool == "avg" and torch.equal(again(images()), model(images()))
    assert create_model("t2t_vit_7", img_size=32, depth=1, global_pool="avg").global_pool == "avg"


# training


@every_family
def test_recomputing_changes_no_gradient(family):
    model = build(family).train()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        assert model.grad_checkpointing is enable
        model.zero_grad()
        torch.manual_seed(0)
        model(images()).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert same(state(copy.deepcopy(model)), state(model))


def test_recomputing_keeps_less():
    model, kept = build("performer").train(), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: (s.append(x.numel()), x)[1], lambda x: x):
            model(images())
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 3


@every_family
def test_rates_shrink_towards_the_image(family):
    model = build(family)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    last = max(layers.values())
    assert {layers["head.weight"], layers["head.bias"]} == {last}
    first = [name for name, layer in layers.items() if layer == 0]
    assert first and all(name.startswith(("tokens", "patch", "cls", "pos", "proj", "inner", "outer")) for name in first)
    if family in ("performer", "vit"):
        assert [layers[f"blocks.{number}.norm1.weight"] for number in range(3)] == [1, 2, 3]
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    assert min(group["lr_scale"] for group in groups) < max(group["lr_scale"] for group in groups) == 1.0
    assert len(set(group_parameters(model, model.group_matcher(coarse=True)))) > 1


# maps


@pytest.mark.parametrize("family", ["performer", "transformer", "convolution", "dense"])
def test_a_t2t_vit_has_three_maps(family):
    model = build(family, img_size=(32, 64)).eval()
    image = images((32, 64))
    fine, middle, coarse = model.forward_pyramid(image)
    assert fine.shape == (2, 8, 8, 16) and middle.shape == (2, 8, 4, 8)
    names = list(model.pyramid_sizes())
    assert [stride for _, stride in model.pyramid_sizes().values()] == [4, 8, 16]
    with tap(model, names) as seen:
        (expected,) = model.forward_intermediates(image, 1, intermediates_only=True)
    torch.testing.assert_close(coarse, expected)
    for name, got in zip(names[:2], (fine, middle), strict=True):
        own = seen[name] if family == "convolution" else token_maps(seen[name], got.shape[-2:], 0)
        torch.testing.assert_close(got, own)


@every_family
def test_block_sizes_are_those_of_the_maps(family):
    model = build(family, img_size=64 if family != "swin" else 32).eval()
    image = images(model.img_size)
    maps = model.forward_intermediates(image, intermediates_only=True)
    for got, (width, stride), info in zip(maps, model.block_sizes().values(), model.feature_info, strict=True):
        assert got.shape[1] == width == info["num_chs"] and got.shape[2] == model.img_size[0] // stride
        assert info["reduction"] == stride and model.get_submodule(info["module"]) is not None
    sizes = list(model.pyramid_sizes().values())
    for got, (width, stride) in zip(model.forward_pyramid(image), sizes, strict=True):
        assert got.shape[1:] == (width, model.img_size[0] // stride, model.img_size[1] // stride)


def test_features_only():
    options = dict(img_size=64, depth=2, features_only=True)
    backbone = timm.create_model("t2t_vit_7", **options).eval()
    assert backbone.feature_info.channels() == [64, 64, 256] and backbone.feature_info.reduction() == [4, 8, 16]
    maps = backbone(images((64, 64)))
    assert [tuple(x.shape) for x in maps] == [(2, 64, 16, 16), (2, 64, 8, 8), (2, 256, 4, 4)]
    (last,) = timm.create_model("t2t_vit_7", **options, out_indices=(-1,)).eval()(images((64, 64)))
    assert last.shape == (2, 256, 4, 4)
    assert all(p.grad is not None for p in _trained(backbone, images((64, 64))))
    with pytest.raises(ValueError, match="maps 0 to 2 are there"):
        timm.create_model("t2t_vit_7", **options, out_indices=(3,))
    by_block = timm.create_model("t2t_vit_7", **options, feature_cls="getter", out_indices=(0, 1)).eval()
    assert [tuple(x.shape) for x in by_block(images((64, 64)))] == 2 * [(2, 256, 4, 4)]
    assert len(timm.create_model("pvt_tiny", img_size=64, features_only=True)(images((64, 64)))) == 4


def _trained(model, image):
    sum(x.sum() for x in model.train()(image)).backward()
    return list(model.parameters())


def test_intermediates_as_a_dictionary():
    model = build("vit").eval()
    features, (first, _, last) = model.forward_intermediates(images())
    found = model.forward_intermediates(images(), output_dict=True, return_prefix_tokens=True)
    torch.testing.assert_close(found["image_features"], features)
    torch.testing.assert_close(found["image_intermediates"][0], first)
    torch.testing.assert_close(model.norm(found["image_intermediates_prefix"][2]), features[:, :1])
    only = model.forward_intermediates(images(), [2], output_dict=True, intermediates_only=True)
    assert only.keys() == {"image_intermediates"}
    torch.testing.assert_close(only["image_intermediates"][0], last)


# other shapes


@every_family
def test_pruning_keeps_what_is_asked_for(family):
    model = build(family).eval()
    expected = model.forward_intermediates(images(), [0], intermediates_only=True)
    assert model.prune_intermediate_layers([0], prune_norm=True) == [0]
    assert model.depth == 1 and model.num_classes == 0
    (got,) = model.forward_intermediates(images(), intermediates_only=True)
    torch.testing.assert_close(got, expected[0])
    with pytest.raises(ValueError, match="blocks 0 to 0"):
        model.prune_intermediate_layers([1])


@every_family
def test_another_size(family, tmp_path):
    size = (64, 32) if family != "swin" else (32, 64)
    model, larger = build(family).eval(), build(family, img_size=size).eval()
    source = {name: entry.clone() for name, entry in model.state_dict().items()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    model.set_input_size(size)
    assert model.img_size == size and model.arguments["img_size"] == size
    t2t_ref.load_checkpoint(larger, source, strict=family != "tnt")  # which resizes as well
    torch.testing.assert_close(model(images(size)), larger(images(size)))
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    save_checkpoint(model, tmp_path / "m.safetensors")
    assert torch.equal(load_model(tmp_path / "m.safetensors").eval()(images(size)), model(images(size)))
    if family == "vit":
        with pytest.raises(ValueError, match="patch_size is 8; a built model keeps its own, 16"):
            model.set_input_size(64, patch_size=8)


# weights


@pytest.mark.parametrize("tokens_type", ["performer", "transformer", "convolution"])
def test_weights_for_other_channels(tokens_type, tmp_path):
    options = dict(tokens_type=tokens_type, img_size=64, depth=1, num_classes=7)
    source = create_model("t2t_vit_7", **options).eval()
    norm = getattr(source.tokens_to_token, "attention1", SimpleNamespace(norm1=None)).norm1
    if norm is not None:
        torch.nn.init.normal_(norm.weight, 1, 0.2)
        torch.nn.init.normal_(norm.bias, 0, 0.0 if tokens_type == "transformer" else 0.2)
    torch.save({"state_dict_ema": source.state_dict()}, tmp_path / "m.pth")
    file = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "m.pth"), num_classes=7))
    grey = timm.create_model("t2t_vit_7", **options, **file, in_chans=1).eval()
    image = images((64, 64), channels=1)
    torch.testing.assert_close(grey(image), source(repeat(image, "b 1 h w -> b c h w", c=3)), rtol=1e-4, atol=1e-5)
    many = timm.create_model("t2t_vit_7", **options | dict(num_classes=2), **file, in_chans=6).eval()
    image = images((64, 64))
    twice = repeat(image, "b c h w -> b (two c) h w", two=2)
    torch.testing.assert_close(many.forward_features(twice), source.forward_features(image), rtol=1e-4, atol=1e-5)
    wide = timm.create_model("t2t_vit_7", **options | dict(img_size=(64, 96)), **file)
    torch.testing.assert_close(wide.pos_embed[:, 0], source.pos_embed[:, 0])


# the hub


@pytest.mark.parametrize("family", ["performer", "vit", "dense", "pvt"])
def test_timm_reads_our_folders(family, tmp_path):
    model = build(family, in_chans=1).eval()
    model.save_pretrained(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text(encoding="utf-8"))
    assert config["architecture"] in VARIANTS and config["num_classes"] == 5
    theirs = timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True).eval()
    assert torch.equal(theirs(images(channels=1)), model(images(channels=1)))
    other = timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True, num_classes=2)
    assert other.head.weight.shape[0] == 2


def test_we_read_timms_folders(tmp_path):
    theirs = timm.create_model("t2t_vit_7", img_size=64, depth=1, num_classes=5, global_pool="avg").eval()
    save_for_hf(theirs, tmp_path, model_args=dict(img_size=64, depth=1, global_pool="avg"), safe_serialization=True)
    ours = T2TViT.from_pretrained(tmp_path).eval()
    assert torch.equal(ours(images((64, 64))), theirs(images((64, 64))))
    assert T2TViT.from_pretrained(tmp_path, num_classes=3).num_classes == 3


def test_without_timm_the_door_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r'pip install "t2t-ref\[timm\]"'):
        register(t2t_ref.timm)
