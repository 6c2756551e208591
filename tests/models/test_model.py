"""The whole model: sizes, refusals, precisions, variants."""

import pickle
import subprocess
import sys
import urllib.error

import pytest
import torch
from einops import rearrange

from t2t_ref import T2TViT, TokensToToken, count_parameters, create_model, list_models, restructure, token_grid

SMALL = dict(embed_dim=48, depth=2, num_heads=3, mlp_ratio=2.0, num_classes=10, token_dim=16)


def small(**arguments):
    torch.manual_seed(0)
    return T2TViT(**(SMALL | dict(img_size=32) | arguments)).eval()


@pytest.mark.parametrize("tokens_type", ["performer", "transformer", "convolution"])
@pytest.mark.parametrize("size", [(32, 32), (48, 80), (37, 101), (3, 3)])
def test_any_height_and_width(tokens_type, size):
    model = small(img_size=size, tokens_type=tokens_type)
    rows, columns = token_grid(size)
    image = torch.randn(2, 3, *size)
    assert model.tokens_to_token(image).shape == (2, rows * columns, 48)
    assert model.forward_features(image).shape == (2, 1 + rows * columns, 48)
    assert model(image).shape == (2, 10)


def test_a_wide_image_is_not_folded_as_a_square():
    """28 x 112 windows are as many as 56 x 56; the authors' code takes the one for the other."""
    module = TokensToToken(img_size=(112, 448), token_dim=16, embed_dim=48).eval()
    image = torch.randn(1, 3, 112, 448)
    left_part = module.soft_split0(image)  # b (28 112) d
    rows, columns = module.soft_split0.grid_size((112, 448))
    assert (rows, columns) == (28, 112)
    folded = restructure(module.attention1(left_part), (rows, columns))
    torch.testing.assert_close(folded[0, :, 3, 5], module.attention1(left_part)[0, 3 * 112 + 5])
    with pytest.raises(ValueError, match="3136 tokens do not fill a grid of 28x28 = 784"):
        restructure(left_part, (28, 28))


@pytest.mark.parametrize("size", [16, 100, 200, 227, 230])  # most of these the authors' code cannot take
def test_square_sizes_that_16_does_not_divide(size):
    assert small(img_size=size)(torch.randn(1, 3, size, size)).shape == (1, 10)


def test_dynamic_image_size():
    fixed, dynamic = small(), small(dynamic_img_size=True)
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(dynamic(image), fixed(image))
    assert dynamic(torch.randn(1, 3, 48, 80)).shape == (1, 10)
    assert dynamic.forward_features(torch.randn(1, 3, 48, 80)).shape == (1, 1 + 3 * 5, 48)
    taller = dynamic.position_table(torch.randn(1, 3, 48, 80))
    assert torch.equal(taller[:, 0], dynamic.pos_embed[:, 0])  # the class row stays


def test_wrong_channel_count_is_refused():
    with pytest.raises(ValueError, match="the image has 1 channels, expected in_chans=3"):
        small()(torch.randn(1, 1, 32, 32))


def test_wrong_size_is_refused_with_both_sizes():
    with pytest.raises(ValueError, match="48x80 pixels.*img_size=32x32.*dynamic_img_size=True"):
        small()(torch.randn(1, 3, 48, 80))


def test_an_image_smaller_than_one_window_is_refused():
    with pytest.raises(ValueError, match="a 7x7 window does not fit in an image of 2x2"):
        small(img_size=2)
    with pytest.raises(ValueError, match="a 7x7 window does not fit in an image of 2x9"):
        small(dynamic_img_size=True)(torch.randn(1, 3, 2, 9))


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ValueError, match="unknown model 'T2t_vit_14': did you mean 't2t_vit_14'"):
        create_model("T2t_vit_14")
    with pytest.raises(ValueError, match="unknown tokens_type 'preformer': did you mean 'performer'"):
        small(tokens_type="preformer")
    with pytest.raises(ValueError, match="unknown model 'bert': known are t2t_vit_7, "):
        create_model("bert")


def test_an_image_without_batch_axis_is_refused():
    """In a process of its own: here jaxtyping's checks would speak first."""
    code = "import torch, t2t_ref; t2t_ref.create_model('t2t_vit_7')(torch.zeros(3, 224, 224))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ValueError: expected an image of shape (b, c, h, w), found (3, 224, 224)" in done.stderr


def test_pretrained_explains_itself(tmp_path, monkeypatch):
    """Without a network: what was wanted, where it may be put, and nothing half done."""

    def no_network(request):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    cached = tmp_path / "checkpoints" / "81.5_T2T_ViT_14.pth.tar"
    with pytest.raises(ConnectionError, match="main/81.5_T2T_ViT_14.pth.tar: no route to host") as caught:
        create_model("t2t_vit_14", pretrained=True)
    assert f"then put it at {cached}, or give its path to load_checkpoint(model, path)" in str(caught.value)
    assert list(cached.parent.iterdir()) == []


def test_arguments_reach_the_model():
    model = create_model(
        "t2t_vit_7", num_classes=5, img_size=(64, 96), in_chans=1, drop_path_rate=0.2, qk_scale=0.1, depth=3
    )
    assert model(torch.randn(1, 1, 64, 96)).shape == (1, 5)
    assert [block.drop_path.drop_rate for block in model.blocks] == pytest.approx([0.0, 0.1, 0.2])
    assert {block.attn.scale for block in model.blocks} == {0.1}
    with pytest.raises(TypeError, match="breadth"):
        create_model("t2t_vit_7", breadth=3)


def test_without_classes_the_class_feature_comes_out():
    model, image = small(num_classes=0), torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model(image), model.forward_features(image)[:, 0])


@pytest.mark.parametrize("tokens_type", ["performer", "transformer", "convolution"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_precision_runs_forward_and_backward(tokens_type, dtype):
    reference = small(tokens_type=tokens_type)
    image = torch.randn(2, 3, 32, 32)
    expected = reference(image)
    model = small(tokens_type=tokens_type).to(dtype)
    logits = model(image.to(dtype))
    logits.float().square().mean().backward()
    assert logits.dtype == dtype
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    # in half precision at most 1.3 eps, over two kinds of kernels and five seeds
    tolerance = 1e-5 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps
    assert (logits.float() - expected).norm() < tolerance * expected.norm()
    if dtype != torch.float64:
        with torch.autocast("cpu", dtype=dtype):
            assert (reference(image).float() - expected).norm() < tolerance * expected.norm()


def test_convolution_form_is_three_strided_convolutions():
    """As a soft split, a flattened kernel and a re-structuring, thrice."""
    module = TokensToToken(tokens_type="convolution", token_dim=16, embed_dim=48)
    image = torch.randn(1, 3, 40, 56)
    size, by_hand = (40, 56), image
    for conv in (module.soft_split0, module.soft_split1, module.project):
        kernel, stride, padding = conv.kernel_size[0], conv.stride[0], conv.padding[0]
        windows = torch.nn.functional.unfold(by_hand, kernel, stride=stride, padding=padding)
        tokens = rearrange(windows, "b d n -> b n d") @ rearrange(conv.weight, "o c kh kw -> (c kh kw) o") + conv.bias
        size = tuple((side + 2 * padding - kernel) // stride + 1 for side in size)
        by_hand = restructure(tokens, size)
    torch.testing.assert_close(module(image), tokens, atol=1e-5, rtol=1e-4)


PAPER_COUNTS = {  # every parameter, frozen ones included
    "t2t_vit_7": 4_310_222,
    "t2t_vit_10": 5_889_230,
    "t2t_vit_12": 6_941_902,
    "t2t_vit_14": 21_545_550,
    "t2t_vit_19": 39_177_422,
    "t2t_vit_24": 64_105_934,
    "t2t_vit_t_14": 21_541_070,
    "t2t_vit_t_19": 39_172_942,
    "t2t_vit_t_24": 64_101_454,
    "t2t_vit_c_14": 21_421_992,
    "t2t_vit_14_resnext": 21_545_550,
    "t2t_vit_14_wide": 25_156_302,
    "vit_small_patch16": 48_754_408,
    "vit_base_patch16": 86_567_656,
    "vit_large_patch16": 304_326_632,
    "deit_small_patch16": 22_050_664,
    # the authors left no code for these: counts of the designs as chapter 13 chooses them, see test_cnn_designs.py
    "vit_small_patch16_dn": 24_405_352,
    "vit_small_patch16_sw": 48_193_512,
    "vit_small_patch16_resnext": 48_754_408,
    # theirs again
    "t2t_vit_14_se": 21_803_598,
    "t2t_vit_dense": 23_647_062,
    "t2t_vit_16_ghost": 16_253_262,
    # and ours
    "vit_small_patch16_se": 49_344_232,
    "vit_small_patch16_dense": 46_632_264,
    "vit_small_patch16_ghost": 32_248_552,
}


def test_every_variant_has_the_authors_parameter_count():
    assert set(PAPER_COUNTS) <= set(list_models())
    with torch.device("meta"):
        counts = {name: count_parameters(create_model(name)) for name in PAPER_COUNTS}
    assert counts == PAPER_COUNTS


def test_initial_weights():
    model = create_model("t2t_vit_7")
    assert abs(model.blocks[3].mlp.fc1.weight.std().item() - 0.02) < 1e-3
    assert abs(model.tokens_to_token.attention2.kqv.weight.std().item() - 0.02) < 1e-3
    assert model.cls_token.abs().max() > 0
    assert all((m.bias == 0).all() for m in model.modules() if isinstance(m, torch.nn.Linear) and m.bias is not None)


def test_a_seed_gives_the_same_weights_and_pickling_keeps_them():
    torch.manual_seed(3)
    first = small()
    again = pickle.loads(pickle.dumps(first))
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(first(image), again(image))
    assert torch.equal(first(image), small()(image))


def test_a_misspelt_argument_is_told_the_nearest():
    with pytest.raises(TypeError, match="unknown argument of vit_small_patch16 'patchsize': did you mean 'patch_size'"):
        create_model("vit_small_patch16", patchsize=8)
    with pytest.raises(TypeError, match="of t2t_vit_dense 'depth': did you mean 'depths'.*known are img_size, "):
        create_model("t2t_vit_dense", depth=3)
