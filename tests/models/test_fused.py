"""The fused forms compute what the readable ones compute: forward, backward, at every size and in every precision."""

import copy

import golden
import pytest
import torch
from einops import rearrange

from t2t_ref import SoftSplit, T2TViT, ViT, create_model, plain_performer_attention
from t2t_ref.models.fused import (
    FusedTokenPerformer,
    FusedTokensToToken,
    fuse,
    pixel_major_split,
    scaled_performer_attention,
)
from t2t_ref.models.token_performer import TokenPerformer
from t2t_ref.models.tokens_to_token import TokensToToken

SMALL = golden.TINY | dict(performer_drop_rate=0.0)


def pair_of(**changes):
    torch.manual_seed(0)
    readable = T2TViT(**(SMALL | changes)).double()
    return readable, fuse(copy.deepcopy(readable))


def inputs_at(scale, dtype=torch.float64):
    torch.manual_seed(0)
    directions = TokenPerformer(147).w.to(dtype)
    queries, keys, values = (0.25 * scale * torch.randn(3, 2, 100, 64)).to(dtype)
    return queries, keys, values, directions


@pytest.mark.parametrize("tokens_type", ["performer", "transformer"])
@pytest.mark.parametrize("size", [64, (48, 80), (37, 50)])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("to_the_pixels", [False, True])  # a gradient that goes there takes another way
def test_same_logits_and_gradients(tokens_type, size, recompute, to_the_pixels):
    readable, fused = pair_of(tokens_type=tokens_type, img_size=size)
    fuse(fused, recompute=recompute)
    results = []
    for model in (readable, fused):
        image = golden.noise(2, 3, *model.img_size).requires_grad_(to_the_pixels)
        logits = model.train()(image)
        logits.square().sum().backward()
        results.append([logits] + [p.grad for p in model.parameters() if p.requires_grad])
        results[-1] += [image.grad] if to_the_pixels else []
    assert all(tensor is not None for tensors in results for tensor in tensors)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("name", ["tiny_performer", "tiny_performer_1ch", "tiny_transformer"])
def test_the_authors_numbers(name):
    arguments = golden.TINY_MODELS[name]
    model = golden.fill(fuse(T2TViT(**arguments)), torch.float64)
    side, channels = arguments["img_size"], arguments.get("in_chans", 3)
    with torch.no_grad():
        logits = model(golden.noise(2, channels, side, side))
    expected = torch.tensor(golden.read(name)["logits"]["first16"], dtype=torch.float64)
    torch.testing.assert_close(logits, expected, atol=1e-9, rtol=0)


def test_names_and_weights_stay_and_the_way_back_is_exact():
    model = create_model("t2t_vit_7", depth=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    assert fuse(model) is model
    assert type(model.tokens_to_token) is FusedTokensToToken
    assert type(model.tokens_to_token.attention1) is FusedTokenPerformer
    assert list(model.state_dict()) == list(before)
    fuse(model, fused=False)
    assert [type(module) for module in model.modules()] == kinds
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_what_has_no_fused_form_is_left_alone():
    convolution = T2TViT(**(SMALL | dict(tokens_type="convolution")))
    vit = ViT(img_size=32, embed_dim=24, depth=1, num_heads=2)
    for model in (convolution, vit):
        kinds = [type(module) for module in model.modules()]
        fuse(model)
        assert [type(module) for module in model.modules()] == kinds
    assert type(convolution.tokens_to_token) is TokensToToken


def test_errors():
    module = fuse(T2TViT(**SMALL)).tokens_to_token
    with pytest.raises(ValueError, match="has 1 channels, expected in_chans=3"):
        module(torch.zeros(1, 1, 64, 64))
    with pytest.raises(ValueError, match="does not fit in an image of 2x64"):
        module(torch.zeros(1, 3, 2, 64))
    with pytest.raises(ValueError, match="recompute=True belongs to the fused form"):
        fuse(module, fused=False, recompute=True)


def test_pixel_major_tokens_are_the_tokens_in_another_order():
    image = rearrange(torch.arange(2 * 3 * 9 * 12.0), "(b c h w) -> b c h w", b=2, c=3, h=9)
    split = SoftSplit(3, 2, 1)
    tokens = pixel_major_split(rearrange(image, "b c h w -> b h w c"), split)
    expected = rearrange(split(image), "b n (c kh kw) -> b n (kh kw c)", kh=3, kw=3)
    assert torch.equal(tokens, expected)
    assert not torch.equal(tokens, split(image))  # the same shape, another order


# recompute


def kept_bytes(model, image):
    """Bytes of all tensors, other than weights, that a forward pass keeps for the backward pass."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(image)
    del output
    return sum(kept.values())


def test_recompute_keeps_little_of_the_tokens_to_token_module():
    image = torch.randn(2, 3, 64, 64)
    module = T2TViT(**SMALL).tokens_to_token.train()
    readable = kept_bytes(module, image)
    fused = kept_bytes(fuse(module), image)
    recomputed = kept_bytes(fuse(module, recompute=True), image)
    assert recomputed < 0.3 * min(fused, readable)
    assert kept_bytes(module.eval(), image) > 2 * recomputed  # in eval mode there is nothing to trade


def test_recompute_draws_the_same_dropout_again():
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = fuse(T2TViT(**(SMALL | dict(performer_drop_rate=0.5))), recompute=recompute).train()
        torch.manual_seed(1)
        model(torch.ones(1, 3, 64, 64)).sum().backward()
        gradients.append(model.tokens_to_token.attention1.kqv.weight.grad)
    torch.testing.assert_close(*gradients)


# the performer with maxima


@pytest.mark.parametrize("scale", [0.1, 1, 2, 4])
@pytest.mark.parametrize("epsilon", [1e-8, 0.0])
def test_scaled_form_equals_the_definition(scale, epsilon):
    inputs = [tensor.requires_grad_() for tensor in inputs_at(scale)]
    plain = plain_performer_attention(*inputs, epsilon=epsilon)
    scaled = scaled_performer_attention(*inputs, epsilon=epsilon)
    torch.testing.assert_close(scaled, plain, atol=1e-12, rtol=1e-9)
    gradients = [torch.autograd.grad(y.square().sum(), inputs) for y in (scaled, plain)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-7)


@pytest.mark.parametrize("scale", [1, 4, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("epsilon", [1e-8, 0.0])
def test_scaled_form_is_finite(scale, dtype, epsilon):
    inputs = [tensor.requires_grad_() for tensor in inputs_at(scale, dtype)]
    mixed = scaled_performer_attention(*inputs, epsilon=epsilon)
    assert mixed.dtype == dtype and mixed.isfinite().all()
    for gradient in torch.autograd.grad(mixed.float().sum(), inputs):
        assert gradient.isfinite().all()


def test_one_far_away_token_spoils_nothing():
    queries, keys, values, directions = inputs_at(1, torch.float32)
    keys[:, 0] *= 1e6
    inputs = queries, keys, values, directions
    exact = plain_performer_attention(*(x.double() for x in inputs))
    torch.testing.assert_close(scaled_performer_attention(*inputs).double(), exact, atol=1e-5, rtol=1e-4)


def test_a_token_of_zeros_has_finite_gradients():
    inputs = [torch.zeros(1, 5, 64, requires_grad=True) for _ in range(3)]
    scaled_performer_attention(*inputs, TokenPerformer(147).w).sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in inputs)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_close(precision):
    readable, fused = pair_of()
    exact = readable.eval()(golden.noise(2, 3, 64, 64))
    image = golden.noise(2, 3, 64, 64).float()
    fused = fused.float().eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=precision):
        cast = fused(image)
    whole = fused.to(precision)(image.to(precision))
    for logits in (cast, whole):
        # at most 1 eps, over two kinds of kernels and five seeds
        assert (logits.double() - exact).norm() < 8 * torch.finfo(precision).eps * exact.norm()
