"""What T2TViT and ViT share with timm's models: features, intermediates, heads."""

import golden
import pytest
import torch
from einops import rearrange, reduce

from t2t_ref import T2TViT, ViT, create_model
from t2t_ref.models.cnn_designs import GhostT2TViT, SET2TViT

SMALL = dict(embed_dim=48, depth=4, num_heads=3, mlp_ratio=2.0, num_classes=10, img_size=(48, 80))
GRID = (3, 5)


@pytest.fixture(params=[T2TViT, ViT, SET2TViT, GhostT2TViT], ids=lambda cls: cls.__name__)
def model(request):
    torch.manual_seed(0)
    extra = {} if request.param is ViT else dict(token_dim=16)
    return request.param(**SMALL, **extra).eval()


@pytest.fixture
def image():
    return torch.randn(2, 3, 48, 80)


def test_features_then_head_is_the_model(model, image):
    features = model.forward_features(image)
    assert features.shape == (2, 1 + 15, 48)
    torch.testing.assert_close(model.forward_head(features), model(image))
    torch.testing.assert_close(model(image), model.head(features[:, 0]))


def test_class_feature_is_the_golden_one():
    record = golden.read("tiny_performer")
    model = golden.fill(T2TViT(**golden.TINY), torch.float64)
    feature = model.forward_features(golden.noise(2, 3, 64, 64))[:, 0]
    expected = torch.tensor(record["cls_feature"]["sample_0_16"], dtype=torch.float64)
    torch.testing.assert_close(feature[0, :16], expected, atol=1e-9, rtol=0)


def outputs_of_blocks(model, image):
    """The output of every block, by hooks: another way than forward_intermediates takes."""
    seen = []
    hooks = [block.register_forward_hook(lambda module, inputs, output: seen.append(output)) for block in model.blocks]
    model(image)
    for hook in hooks:
        hook.remove()
    return seen


def test_intermediates_are_the_outputs_of_the_blocks(model, image):
    seen = outputs_of_blocks(model, image)
    features, intermediates = model.forward_intermediates(image)
    torch.testing.assert_close(features, model.forward_features(image))
    assert len(intermediates) == 4
    for tokens, maps in zip(seen, intermediates, strict=True):
        assert maps.shape == (2, 48, *GRID)
        torch.testing.assert_close(maps[:, :, 1, 2], tokens[:, 1 + 1 * 5 + 2])
        torch.testing.assert_close(rearrange(maps, "b d h w -> b (h w) d"), tokens[:, 1:])


@pytest.mark.parametrize(
    "indices, blocks", [(None, [0, 1, 2, 3]), (2, [2, 3]), ([1], [1]), ([0, -1], [0, 3]), ((-2, 1), [1, 2])]
)
def test_indices_as_in_timm(model, image, indices, blocks):
    seen = outputs_of_blocks(model, image)
    given = model.forward_intermediates(image, indices, output_fmt="NLC", intermediates_only=True)
    assert len(given) == len(blocks)
    for tokens, block in zip(given, blocks, strict=True):
        torch.testing.assert_close(tokens, seen[block][:, 1:])


def test_norm_prefix_tokens_and_stopping_early(model, image):
    seen = outputs_of_blocks(model, image)
    ((tokens, cls_token),) = model.forward_intermediates(
        image, [1], return_prefix_tokens=True, norm=True, stop_early=True, output_fmt="NLC", intermediates_only=True
    )
    torch.testing.assert_close(cls_token, model.norm(seen[1])[:, :1])
    torch.testing.assert_close(tokens, model.norm(seen[1])[:, 1:])
    ran = []
    hooks = [block.register_forward_hook(lambda *a: ran.append(1)) for block in model.blocks]
    model.forward_intermediates(image, [1], stop_early=True, intermediates_only=True)
    assert len(ran) == 2
    features, _ = model.forward_intermediates(image, [1], stop_early=True)
    assert len(ran) == 4
    torch.testing.assert_close(features, model.norm(seen[1]))  # of the last block that ran
    for hook in hooks:
        hook.remove()


def test_intermediates_refuse_what_is_not_there(model, image):
    with pytest.raises(ValueError, match=r"indices \[4\] are not all blocks of this model, which has blocks 0 to 3"):
        model.forward_intermediates(image, [4])
    with pytest.raises(ValueError, match="output_fmt is 'NHWC', expected 'NCHW' or 'NLC'"):
        model.forward_intermediates(image, output_fmt="NHWC")


def test_another_head(model, image):
    features = model.forward_features(image)
    assert model.get_classifier() is model.head
    model.double().reset_classifier(7)
    assert model.num_classes == 7
    assert model.get_classifier().weight.shape == (7, 48)
    assert model.get_classifier().weight.dtype == torch.float64  # as the rest of the model
    assert model(image.double()).shape == (2, 7)
    model.float().reset_classifier(0)
    torch.testing.assert_close(model(image), features[:, 0])


def test_names_without_weight_decay_exist(model):
    assert model.no_weight_decay() <= set(dict(model.named_parameters()))
    assert model.no_weight_decay() == ({"cls_token", "pos_embed"} if isinstance(model, ViT) else {"cls_token"})


# ViT alone


def test_vit_has_timms_names():
    model = create_model("deit_small_patch16", depth=1)
    assert list(model.state_dict()) == [
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        *(
            f"blocks.0.{name}"
            for name in (
                "norm1.weight norm1.bias attn.qkv.weight attn.qkv.bias attn.proj.weight attn.proj.bias "
                "norm2.weight norm2.bias mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias"
            ).split()
        ),
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
    ]
    assert model.pos_embed.requires_grad and model.pos_embed.abs().max() > 0
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}
    assert "blocks.0.attn.qkv.bias" not in create_model("vit_small_patch16", depth=1).state_dict()


def test_vit_splits_hard():
    """A token depends on the pixels of its own patch, and is their linear function."""
    patch_embed = create_model("deit_small_patch16", depth=1).patch_embed
    image = torch.randn(1, 3, 224, 224)
    tokens = patch_embed(image)
    assert tokens.shape == (1, 196, 384)
    patch = rearrange(image[:, :, 32:48, 80:96], "b c h w -> b (c h w)")
    weight = rearrange(patch_embed.proj.weight, "d c h w -> d (c h w)")
    expected = patch @ weight.T + patch_embed.proj.bias
    torch.testing.assert_close(tokens[:, 2 * 14 + 5], expected, atol=1e-5, rtol=1e-4)


def test_vit_forward_written_out(image):
    torch.manual_seed(0)
    model = ViT(**SMALL).eval()
    tokens = rearrange(model.patch_embed.proj(image), "b d h w -> b (h w) d")
    tokens = torch.cat([model.cls_token.expand(2, 1, 48), tokens], dim=1) + model.pos_embed
    for block in model.blocks:
        tokens = tokens + block.attn(block.norm1(tokens))
        tokens = tokens + block.mlp(block.norm2(tokens))
    torch.testing.assert_close(model(image), model.head(model.norm(tokens)[:, 0]))


def test_vit_refusals(image):
    with pytest.raises(ValueError, match="patches of 16 pixels do not tile an image of 50x80"):
        ViT(**(SMALL | dict(img_size=(50, 80))))
    with pytest.raises(ValueError, match="the image has 1 channels, expected in_chans=3"):
        ViT(**SMALL)(image[:, :1])
    with pytest.raises(ValueError, match="32x32 pixels.*img_size=48x80"):
        ViT(**SMALL)(torch.randn(1, 3, 32, 32))
    dynamic = ViT(**SMALL, dynamic_img_size=True)
    assert dynamic(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    with pytest.raises(ValueError, match="do not tile an image of 32x33"):
        dynamic(torch.randn(1, 3, 32, 33))


def test_mean_pooling_is_another_readout(model, image):
    """The head reads the class token, not the mean: the two differ."""
    features = model.forward_features(image)
    pooled = reduce(features[:, 1:], "b n d -> b d", "mean")
    assert not torch.allclose(model.head(pooled), model(image), atol=1e-3)
