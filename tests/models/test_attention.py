"""Exact attention, in the T2T layer and in the backbone, against one written out."""

import pytest
import torch
from einops import einsum, rearrange
from torch import nn

from t2t_ref import Attention, Block, DropPath, TokenTransformer


def by_hand(queries, keys, values, scale):
    weights = (scale * einsum(queries, keys, "... q d, ... k d -> ... q k")).softmax(dim=-1)
    return einsum(weights, values, "... q k, ... k d -> ... q d")


@pytest.mark.parametrize("qk_scale, expected", [(None, 147**-0.5), (0.3, 0.3)])
def test_token_attention_scales_by_the_input_width(qk_scale, expected):
    attention = TokenTransformer(147, token_dim=32, qk_scale=qk_scale).attn
    tokens = torch.randn(2, 40, 147)
    queries, keys, values = attention.qkv(tokens).chunk(3, dim=-1)
    mixed = by_hand(queries, keys, values, expected)
    torch.testing.assert_close(attention(tokens), values + attention.proj(mixed))


@pytest.mark.parametrize("qk_scale, expected", [(None, 16**-0.5), (0.3, 0.3)])
def test_attention_is_the_one_written_out(qk_scale, expected):
    attention = Attention(48, num_heads=3, qkv_bias=True, qk_scale=qk_scale)
    tokens = torch.randn(2, 40, 48)
    heads = attention.qkv(tokens).view(2, 40, 3, 3, 16)  # the authors' layout: (q k v), then heads, then width
    queries, keys, values = (heads[:, :, part].transpose(1, 2) for part in range(3))
    mixed = rearrange(by_hand(queries, keys, values, expected), "b g n e -> b n (g e)")
    torch.testing.assert_close(attention(tokens), attention.proj(mixed))


def test_attention_is_torchs_multi_head_attention():
    ours, theirs = Attention(48, num_heads=3, qkv_bias=True), nn.MultiheadAttention(48, 3, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.proj.weight,
            "out_proj.bias": ours.proj.bias,
        }
    )
    tokens = torch.randn(2, 40, 48)
    torch.testing.assert_close(ours(tokens), theirs(tokens, tokens, tokens)[0])


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="5 heads do not divide a width of 48"):
        Attention(48, num_heads=5)


def test_attention_dropout_acts_in_training_only():
    attention, tokens = Attention(48, num_heads=3, attn_drop_rate=0.5), torch.randn(2, 40, 48)
    assert not torch.equal(attention.train()(tokens), attention(tokens))
    assert torch.equal(attention.eval()(tokens), attention(tokens))


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    branch = torch.ones(4000, 3, 5)
    out = DropPath(0.25).train()(branch)
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert (out == out[:, :1, :1]).all()  # one coin a sample
    assert abs(out.mean() - 1) < 0.05
    assert DropPath(0.25).eval()(branch) is branch
    with pytest.raises(ValueError, match="drop_rate is 1.0"):
        DropPath(1.0)


def test_block_adds_both_branches_to_its_input():
    block, tokens = Block(48, num_heads=3), torch.randn(2, 10, 48)
    after = tokens + block.attn(block.norm1(tokens))
    torch.testing.assert_close(block(tokens), after + block.mlp(block.norm2(after)))
