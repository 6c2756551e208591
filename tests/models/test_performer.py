"""The performer: its stable form equals the definition, and stays finite where the definition does not."""

from contextlib import nullcontext

import pytest
import torch

from t2t_ref import TokenPerformer, performer_attention, plain_performer_attention

PRECISIONS = {  # dtype of the layer, dtype of autocast
    "float32": (torch.float32, None),
    "float16 autocast": (torch.float32, torch.float16),
    "bfloat16 autocast": (torch.float32, torch.bfloat16),
    "half()": (torch.float16, None),
    "bfloat16()": (torch.bfloat16, None),
}
SCALES = [1, 2, 4, 8, 16, 32, 64]


def layer_at(dim, scale):
    torch.manual_seed(0)
    layer = TokenPerformer(dim)
    for linear in (layer.kqv, layer.proj, layer.mlp[0], layer.mlp[2]):
        torch.nn.init.trunc_normal_(linear.weight, std=0.02)
    with torch.no_grad():
        layer.kqv.weight *= scale
    return layer.eval()


def inputs_at(scale, dtype=torch.float64):
    torch.manual_seed(0)
    directions = TokenPerformer(147).w.to(dtype)
    queries, keys, values = (0.25 * scale * torch.randn(3, 2, 100, 64)).to(dtype)
    return queries, keys, values, directions


@pytest.mark.parametrize("scale", [0.1, 1, 2, 4])
@pytest.mark.parametrize("epsilon", [1e-8, 0.0])
def test_stable_form_equals_the_definition(scale, epsilon):
    inputs = [tensor.requires_grad_() for tensor in inputs_at(scale)]
    plain = plain_performer_attention(*inputs, epsilon=epsilon)
    stable = performer_attention(*inputs, epsilon=epsilon)
    torch.testing.assert_close(stable, plain, atol=1e-12, rtol=1e-9)
    gradients = [torch.autograd.grad(y.square().sum(), inputs) for y in (stable, plain)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-7)


def test_epsilon_decides_where_the_denominator_is_small():
    inputs = inputs_at(6)
    kept = performer_attention(*inputs).norm() / performer_attention(*inputs, epsilon=0.0).norm()
    assert kept < 0.5  # and the definition agrees, above: epsilon is part of the function, not a guard


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("epsilon", [1e-8, 0.0])
def test_finite_forward_and_backward(scale, precision, epsilon):
    dtype, autocast = PRECISIONS[precision]
    for dim, count in ((147, 784), (576, 196)):
        layer = layer_at(dim, scale).to(dtype)
        layer.epsilon = epsilon
        torch.manual_seed(1)
        tokens = torch.randn(1, count, dim).to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=autocast) if autocast else nullcontext():
            output = layer(tokens)
        output.float().square().mean().backward()
        assert output.isfinite().all()
        assert tokens.grad.isfinite().all()
        for name, parameter in layer.named_parameters():
            assert name == "w" or parameter.grad.isfinite().all(), name


def test_the_definition_is_not_finite_in_half_precision():
    """The trap that the stable form avoids is real: 1e-8 is zero in float16."""
    inputs = inputs_at(6, torch.float16)
    assert plain_performer_attention(*inputs).isnan().any()
    assert performer_attention(*inputs).isfinite().all()


def test_half_precision_stays_close_to_float64():
    exact = performer_attention(*inputs_at(2))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 5e-2)):
        error = (performer_attention(*inputs_at(2, dtype)).double() - exact).norm() / exact.norm()
        assert error < tolerance, dtype


def test_permuting_the_tokens_permutes_the_output():
    layer = layer_at(147, 1)
    tokens, order = torch.randn(1, 50, 147), torch.randperm(50)
    torch.testing.assert_close(layer(tokens[:, order]), layer(tokens)[:, order])


def test_directions_are_orthogonal_frozen_and_saved():
    layer = TokenPerformer(147, token_dim=64)
    assert layer.w.shape == (32, 64)
    torch.testing.assert_close(layer.w @ layer.w.T, 32 * torch.eye(32), atol=1e-4, rtol=0)
    assert not layer.w.requires_grad
    assert "w" in layer.state_dict()


def test_dropout_comes_from_the_argument():
    tokens = torch.randn(1, 20, 147)
    noisy, quiet = TokenPerformer(147).train(), TokenPerformer(147, drop_rate=0.0).train()
    assert not torch.equal(noisy(tokens), noisy(tokens))  # the authors' 0.1 is the default
    assert torch.equal(quiet(tokens), quiet(tokens))


def test_negative_epsilon_is_refused():
    with pytest.raises(ValueError, match="epsilon is -1"):
        TokenPerformer(147, epsilon=-1.0)
