"""The package computes the authors' numbers: forward, backward, names and counts."""

import golden
import pytest
import torch

from t2t_ref import (
    SoftSplit,
    T2TViT,
    TokenPerformer,
    TokenTransformer,
    count_parameters,
    create_model,
    resize_position_table,
    sinusoid_table,
)

MODELS = [
    "tiny_performer",
    "tiny_performer.kqv025",
    "tiny_performer_1ch",
    "tiny_transformer",
    "tiny_transformer_qkvbias_qkscale",
    "t2t_vit_7",
    "t2t_vit_7.kqv025",
    "t2t_vit_14_nc10",
    "t2t_vit_t_14",
    "t2t_vit_14_se",
    "t2t_vit_dense",
    "t2t_vit_16_ghost",
]


def agrees(tensor, record, atol):
    """Compare with a record: its stored corner, and its sums as a check on all the rest."""
    assert list(tensor.shape) == record["shape"]
    for key, expected in record.items():
        if key.startswith("sample"):  # sample_0_3_6 is [0, :3, :6]
            sizes = [int(size) for size in key.split("_")[1:]]
            corner = tensor[0][tuple(slice(size) for size in sizes[1:])]
        elif key.startswith("first"):
            corner = tensor[:, : int(key[5:])]
        elif key in ("sum", "abs_sum", "l2"):
            whole = {"sum": tensor.sum(), "abs_sum": tensor.abs().sum(), "l2": tensor.norm()}[key]
            torch.testing.assert_close(whole.item(), expected, atol=atol * tensor.numel() ** 0.5, rtol=1e-10)
            continue
        else:
            continue
        torch.testing.assert_close(corner, torch.tensor(expected, dtype=tensor.dtype), atol=atol, rtol=0)


def build(name):
    stem, _, rule = name.partition(".")
    if stem in golden.TINY_MODELS:
        model = T2TViT(**golden.TINY_MODELS[stem])
    else:
        model = create_model(stem.removesuffix("_nc10"), num_classes=10 if stem.endswith("_nc10") else 1000)
    return model, 0.25 if rule else 1.0


@pytest.mark.parametrize("name", MODELS)
def test_model_in_float64_and_float32(name):
    record = golden.read(name)
    model, kqv_scale = build(name)
    assert [[key, list(entry.shape)] for key, entry in model.state_dict().items()] == record["state_dict"]
    assert count_parameters(model) == record["params_total"]
    assert count_parameters(model, trainable_only=True) == record["params_trainable"]

    image = golden.noise(2, model.tokens_to_token.in_chans, *model.img_size)
    golden.fill(model, torch.float64, kqv_scale)
    features = model.forward_features(image)
    logits = model.forward_head(features)
    agrees(model.tokens_to_token(image), record["tokens"], 1e-9)
    agrees(features[:, 0], record["cls_feature"], 1e-9)
    agrees(logits, record["logits"], 1e-9)

    logits.square().mean().backward()
    parameters = dict(model.named_parameters())
    for key, expected in record["grads"].items():
        gradient = parameters[key].grad
        torch.testing.assert_close(gradient.norm().item(), expected["l2"], atol=1e-9, rtol=0)
        first = torch.tensor(expected["first4"], dtype=torch.float64)
        torch.testing.assert_close(gradient.flatten()[:4], first, atol=1e-9, rtol=0)

    with torch.no_grad():
        logits32 = model.float()(image.float()).double()
    assert (logits32 - logits.detach()).abs().max() < 2e-5


@pytest.mark.parametrize("name", ["Token_performer", "Token_performer.kqv025", "Token_transformer"])
def test_t2t_layer(name):
    record = golden.read(f"module_{name}")
    layer = TokenTransformer(147) if name.endswith("transformer") else TokenPerformer(147)
    assert [[key, list(entry.shape)] for key, entry in layer.state_dict().items()] == record["state_dict"]
    golden.fill(layer, torch.float64, 0.25 if name.endswith("kqv025") else 1.0)
    tokens = golden.noise(2, 196, 147, seed=1).requires_grad_()

    normed = layer.norm1(tokens)
    agrees(normed, record["norm1"], 1e-9)
    if isinstance(layer, TokenPerformer):
        for part, key in zip(layer.kqv(normed).chunk(3, dim=-1), "kqv", strict=True):
            agrees(part, record[key], 1e-9)
        agrees(layer.attend(normed), record["after_attention"], 1e-9)
    else:
        agrees(layer.attn(normed), record["after_attention"], 1e-9)
    output = layer(tokens)
    agrees(output, record["output"], 1e-9)
    output.square().mean().backward()
    agrees(tokens.grad, record["grad_input"], 1e-9)
    for key, expected in record["grads_of_mean_square_output"].items():
        gradient = dict(layer.named_parameters())[key].grad
        torch.testing.assert_close(gradient.norm().item(), expected["l2"], atol=1e-9, rtol=0)


def test_sinusoid_table():
    for size, record in golden.read("sinusoid").items():
        n, dim = map(int, size.split("x"))
        table = sinusoid_table(n, dim)
        assert table.dtype == torch.float32
        agrees(table.double(), {key: record[key] for key in ("shape", "sum", "abs_sum", "l2")}, 1e-9)
        for row in (0, 1, 100):  # a shorter table has its last row there
            expected = torch.tensor(record[f"row{row}_first6"])
            torch.testing.assert_close(table[0, min(row, n - 1), :6], expected, atol=1e-9, rtol=0)
        torch.testing.assert_close(table[0, -1, -6:], torch.tensor(record["last_last6"]), atol=1e-9, rtol=0)


def test_resized_position_table():
    record = golden.read("resize_pos_embed_224_to_384")
    table = sinusoid_table(197, 384)
    for dtype, expected in ((torch.float32, record["float32"]), (torch.float64, record["float64"])):
        resized = resize_position_table(table.to(dtype), (14, 14), (24, 24))
        assert list(resized.shape) == expected["shape"]
        for row in (1, 300):
            first = torch.tensor(expected[f"row{row}_first6"], dtype=dtype)
            atol = {torch.float32: 1e-6, torch.float64: 1e-9}[dtype]
            torch.testing.assert_close(resized[0, row, :6], first, atol=atol, rtol=0)
        torch.testing.assert_close(resized.double().norm().item(), expected["l2"], atol=1e-4, rtol=0)
    fresh = sinusoid_table(577, 384)
    resized = resize_position_table(table, (14, 14), (24, 24))
    assert abs((fresh - resized).abs().max().item() - record["diff_from_fresh_sinusoid_577"]["max_abs"]) < 1e-5


def test_soft_split():
    record = golden.read("soft_split")
    tokens = SoftSplit(kernel=7, stride=4, padding=2)(golden.noise(2, 3, 224, 224))
    twelve = torch.tensor(record["soft_split0"].pop("sample_0_57_first12"), dtype=torch.float64)
    torch.testing.assert_close(tokens[0, 57, :12], twelve, atol=1e-9, rtol=0)
    agrees(tokens, record["soft_split0"], 1e-9)
    agrees(SoftSplit(kernel=3, stride=2, padding=1)(golden.noise(2, 64, 56, 56, seed=2)), record["soft_split1"], 1e-9)
