"""Taps, maps and statistics, each on a case whose answer is known."""

import math

import pytest
import torch
from einops import einsum, rearrange, reduce, repeat
from torch import nn

from t2t_ref import T2TViT, TokenPerformer, ViT, attention_maps, performer_attention, shape_table
from t2t_ref.inspection import (
    attention_rollout,
    class_token_maps,
    performer_weights,
    tap,
    token_attention_maps,
    token_maps,
)
from t2t_ref.inspection.statistics import (
    attention_distance,
    channel_health,
    channel_similarity,
    channel_spread,
    cosine_waves,
    high_frequency_share,
    layer_similarity,
    shift_response,
)

SMALL = dict(img_size=(32, 48), embed_dim=16, depth=3, num_heads=2, mlp_ratio=2.0, num_classes=5)


@pytest.fixture(scope="module")
def image():
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["performer", "transformer", "vit"])
def model(request):
    torch.manual_seed(0)
    if request.param == "vit":
        return ViT(**SMALL).eval()
    return T2TViT(**SMALL, tokens_type=request.param, token_dim=8).eval()


# taps


def test_a_tap_sees_what_the_model_computes(model, image):
    with torch.no_grad(), tap(model, ["norm", "blocks.*", "into blocks.1", "into head"]) as seen:
        logits = model(image)
    assert list(seen) == ["blocks.0", "into blocks.1", "blocks.1", "blocks.2", "norm", "into head"]
    torch.testing.assert_close(seen["into blocks.1"], seen["blocks.0"], rtol=0, atol=0)
    final, between = model.forward_intermediates(image)
    torch.testing.assert_close(seen["norm"], final)
    for number, maps in enumerate(between):
        torch.testing.assert_close(token_maps(seen[f"blocks.{number}"], model.grid), maps)
    torch.testing.assert_close(model.head(seen["into head"]), logits)


def test_a_tap_knows_every_name_of_the_shape_table(model, image):
    rows = [row for row in shape_table(model, image, depth=3) if row.name[0] != "(" and len(row.shape) > 1]
    names = [row.name for row in rows if "-" not in row.name]
    assert len(names) > 4
    with torch.no_grad(), tap(model, names) as seen:
        model(image)
    for row in rows:
        if "-" not in row.name:
            assert tuple(seen[row.name].shape) == row.shape, row.name


def test_a_tap_takes_a_copy():
    """Layers that work in place must not change what was seen before them."""
    model = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True))
    data = torch.tensor([[-1.0, 2.0]])
    with tap(model, ["0", "into 1", "1"]) as seen:
        model(data.clone())
    assert seen["0"].tolist() == seen["into 1"].tolist() == [[-1.0, 2.0]]
    assert seen["1"].tolist() == [[0.0, 2.0]]


def test_a_tap_on_a_module_that_runs_twice_keeps_the_last():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.twofold, self.end = nn.Linear(1, 1, bias=False), nn.Identity()
            nn.init.constant_(self.twofold.weight, 2.0)

        def forward(self, x):
            return self.end(self.twofold(self.end(self.twofold(x))))

    model = Twice()
    with tap(model, ["twofold", "end"]) as seen:
        model(torch.ones(1, 1))
    assert seen["twofold"].item() == seen["end"].item() == 4.0
    assert list(seen) == ["twofold", "end"]


def test_a_tap_lets_go_and_says_what_it_does_not_know(model, image):
    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    with pytest.raises(ValueError, match=r"unknown module 'blocks.0.atn': did you mean 'blocks.0.attn'"):
        with tap(model, ["norm", "blocks.0.atn"]):
            pass
    assert hooks() == 0
    with pytest.raises(RuntimeError, match="own"), tap(model, "blocks.*"):
        assert hooks() == 3  # a star stands for one part: not for blocks.0.attn
        raise RuntimeError("the reader's own")
    assert hooks() == 0
    with tap(model, "norm") as seen:  # gradients flow through what was tapped
        model(image)
    assert seen["norm"].requires_grad


def test_a_tap_keeps_what_is_no_tensor():
    model = nn.Sequential(nn.LSTM(2, 3))
    with tap(model, "0") as seen:
        output = model(torch.randn(4, 1, 2))
    assert torch.equal(seen["0"][0], output[0])


def test_token_maps():
    grid = (2, 3)
    patches = rearrange(torch.arange(12.0), "(n d) -> 1 n d", n=6)
    maps = token_maps(patches, grid)
    assert maps[0, 1].tolist() == [[1, 3, 5], [7, 9, 11]]
    with_class = torch.cat([torch.full((1, 1, 2), -1.0), patches], dim=1)
    assert torch.equal(token_maps(with_class, grid), maps)
    with pytest.raises(ValueError, match="8 tokens do not fill a grid of 2x3 = 6"):
        token_maps(torch.zeros(1, 8, 2), grid)


# attention


def test_attention_maps_of_another_size(model, image):
    torch.manual_seed(0)
    dynamic = type(model)(**{**model.arguments, "dynamic_img_size": True}).eval()
    other = torch.randn(1, 3, 64, 32)
    maps = attention_maps(dynamic, other)
    assert [tuple(weights.shape) for weights in maps] == 3 * [(1, 2, 1 + 4 * 2, 1 + 4 * 2)]
    assert class_token_maps(maps[0], dynamic.grid_of((64, 32))).shape == (1, 2, 4, 2)


def test_class_token_maps():
    weights = rearrange(torch.arange(49.0), "(q k) -> 1 1 q k", q=7)
    assert class_token_maps(weights, (2, 3)).tolist() == [[[[1, 2, 3], [4, 5, 6]]]]
    assert class_token_maps(weights[0], (3, 2)).tolist() == [[[1, 2], [3, 4], [5, 6]]]
    with pytest.raises(ValueError, match="7 tokens are not a class token and a grid of 7x1"):
        class_token_maps(weights, (7, 1))


def test_rollout():
    eye = repeat(torch.eye(3), "q k -> 1 g q k", g=2)
    assert torch.equal(attention_rollout([eye, eye])[0], torch.eye(3))
    # one block that moves everything one token on, taken half for its shortcut, twice: 1/4 stays, 1/4 moves by two
    step = repeat(torch.eye(3).roll(1, dims=1), "q k -> 1 g q k", g=2)
    expected = torch.tensor([[0.25, 0.5, 0.25], [0.25, 0.25, 0.5], [0.5, 0.25, 0.25]])
    torch.testing.assert_close(attention_rollout([step, step])[0], expected)
    torch.testing.assert_close(attention_rollout([step, step], shortcut=0.0)[0], torch.eye(3).roll(2, dims=1))
    # the first block comes first: what token 0 takes in block 2 is what its source took in block 1
    first, second = torch.eye(3)[[0, 0, 2]], torch.eye(3)[[1, 1, 2]]
    both = attention_rollout([repeat(x, "q k -> 1 1 q k") for x in (first, second)], shortcut=0.0)
    assert both[0, 0].tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match="found 0 maps"):
        attention_rollout([])
    with pytest.raises(ValueError, match="and 1.5"):
        attention_rollout([eye], shortcut=1.5)


@pytest.mark.parametrize("epsilon", [1e-8, 1e-2, 0.0])
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_performer_weights_are_those_that_the_layer_applies(epsilon, scale):
    torch.manual_seed(0)
    queries, keys, values = scale * torch.randn(3, 2, 10, 8, dtype=torch.float64)
    directions = torch.randn(4, 8, dtype=torch.float64)
    weights = performer_weights(queries, keys, directions, epsilon)
    mixed = performer_attention(queries, keys, values, directions, epsilon)
    torch.testing.assert_close(weights @ values, mixed)

    # pair by pair, from the definition
    def features(x):
        half = reduce(x.square(), "b n e -> b n 1", "sum") / 2
        return (einsum(x, directions, "b n e, m e -> b n m") - half).exp() / math.sqrt(len(directions))

    kernel = einsum(features(queries), features(keys), "b q m, b k m -> b q k")
    denominators = reduce(kernel, "b q k -> b q 1", "sum")
    torch.testing.assert_close(weights, kernel / (denominators + epsilon))
    rows = reduce(weights, "b q k -> b q 1", "sum")
    torch.testing.assert_close(rows, denominators / (denominators + epsilon))
    assert epsilon == 0 or rows.min() < 1 - 1e-9  # the share is really there


def test_token_attention_maps(model, image):
    maps = token_attention_maps(model, image)
    if isinstance(model, ViT):
        assert maps == []
        return
    assert [tuple(weights.shape) for weights in maps] == [(2, 8 * 12, 8 * 12), (2, 4 * 6, 4 * 6)]
    layers = [model.tokens_to_token.attention1, model.tokens_to_token.attention2]
    names = ["tokens_to_token.attention1", "tokens_to_token.attention2"]
    with torch.no_grad(), tap(model, [f"{name}.norm1" for name in names]) as seen:
        model(image)
        for weights, layer, name in zip(maps, layers, names, strict=True):
            tokens = seen[f"{name}.norm1"]
            if isinstance(layer, TokenPerformer):
                _, _, values = layer.kqv(tokens).chunk(3, dim=-1)
                attended, proj = layer.attend(tokens), layer.proj
            else:
                _, _, values = layer.attn.qkv(tokens).chunk(3, dim=-1)
                attended, proj = layer.attn(tokens), layer.attn.proj
            torch.testing.assert_close(values + proj(weights @ values), attended, atol=1e-5, rtol=1e-4)


# channels


def test_spread():
    maps = torch.zeros(2, 3, 1, 2)
    maps[:, 1] = torch.tensor([[0.0, 2.0]])  # the same map for both images
    maps[1, 2] = 4.0  # flat, but another value for each image
    assert channel_spread(maps).tolist() == [0, 1, 2]
    assert channel_spread(maps, count_places=False).tolist() == [0, 0, 2]


def test_dead_and_saturated_channels_are_counted():
    torch.manual_seed(0)
    maps = torch.randn(4, 20, 5, 5)
    assert channel_health(maps) == (0, 0)
    maps[:, 0] = 0  # dead
    maps[:, 1] = 3  # dead: a constant says as little as 0
    maps[:, 2] *= 0.01  # dead: next to nothing
    maps[:, 3] *= 0.2  # quiet, but alive
    maps[:, 4] += 50  # saturated, alive
    maps[:, 5] = 50  # saturated and dead
    assert channel_health(maps) == pytest.approx((4 / 20, 2 / 20))
    # only the line moves the count
    assert channel_health(maps, flat=0.5) == pytest.approx((5 / 20, 2 / 20))
    assert channel_health(maps, loud=2.0) == pytest.approx((4 / 20, 3 / 20))
    # another unit, the same health
    assert channel_health(1e-4 * maps) == channel_health(maps)


def test_nearly_all_dead_is_seen_too():
    torch.manual_seed(0)
    assert channel_health(torch.zeros(4, 20, 5, 5)) == (1, 0)
    maps = 1e-3 * torch.randn(4, 20, 5, 5)
    maps[:, :3] *= 1e3
    assert channel_health(maps)[0] == pytest.approx(17 / 20)


def test_a_channel_that_shows_places_only_is_blind():
    torch.manual_seed(0)
    maps = torch.randn(4, 10, 5, 5)
    maps[:, :4] = torch.randn(4, 5, 5)
    assert channel_health(maps)[0] == 0
    assert channel_health(maps, count_places=False)[0] == pytest.approx(4 / 10)


def test_channel_similarity():
    one, other = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.tensor([1.0, 1.0, -1.0, -1.0])

    def similarity(*channels):
        return channel_similarity(rearrange(torch.stack(channels), "c (b h w) -> b c h w", b=1, h=2))

    assert similarity(one, other) == pytest.approx(0, abs=1e-12)
    assert similarity(one, 5 - 3 * one, 0.1 * one) == pytest.approx(1)  # shift, scale and sign do not count
    assert similarity(one, one, other) == pytest.approx(1 / 3)  # one pair of three
    assert similarity(one, one, torch.zeros(4)) == pytest.approx(1)  # the constant is left out
    assert math.isnan(similarity(one, torch.ones(4)))


# spectrum


def test_cosine_waves_are_orthonormal():
    waves = cosine_waves(7, dtype=torch.float64)
    torch.testing.assert_close(waves @ waves.T, torch.eye(7, dtype=torch.float64))


def test_high_frequency_share_of_known_maps():
    places = torch.arange(16) + 0.5
    stripes = torch.cos(math.pi * 3 / 16 * places)  # 3/32 cycles per cell
    fine = torch.cos(math.pi * 12 / 16 * places)  # 12/32
    board = torch.cos(math.pi * torch.arange(16))  # +1 -1 +1
    maps = [
        repeat(stripes, "h -> h w", w=16),
        repeat(fine, "w -> h w", h=16),
        torch.ones(16, 16) + 3 * repeat(fine, "w -> h w", h=16) + 4 * repeat(stripes, "h -> h w", w=16),
        einsum(board, board, "h, w -> h w"),
        torch.full((16, 16), 7.3),
        repeat(torch.arange(16.0), "w -> h w", h=16),  # a ramp is smooth, although its ends differ
    ]
    share = high_frequency_share(rearrange(torch.stack(maps), "c h w -> 1 c h w"))[0]
    torch.testing.assert_close(share[:3], torch.tensor([0, 1, 9 / 25]).double(), atol=1e-6, rtol=0)
    assert share[3] > 0.99 and share[4].isnan() and share[5] < 0.01
    line = high_frequency_share(rearrange(fine, "w -> 1 1 1 w"), cutoff=12.1 / 32)
    assert line.item() == pytest.approx(0, abs=1e-6)  # just below that cutoff


@pytest.mark.parametrize("size", [(16, 16), (5, 12)])
def test_high_frequency_share_of_white_noise(size):
    noise = torch.randn(200, 3, *size, generator=torch.Generator().manual_seed(0))
    h, w = size
    coarse = math.ceil(h / 2) * math.ceil(w / 2) - 1
    assert high_frequency_share(noise).mean().item() == pytest.approx(1 - coarse / (h * w - 1), abs=0.01)


# layers


def test_layer_similarity():
    torch.manual_seed(0)
    features = torch.randn(40, 3, 4, 4)
    turned = rearrange(features, "b c h w -> b (c h w)") @ torch.linalg.qr(torch.randn(48, 48))[0]
    unrelated = torch.randn(40, 2000)
    table = layer_similarity([features, 3 * turned + 1, unrelated])
    assert table.shape == (3, 3)
    torch.testing.assert_close(table[:2, :2], torch.ones(2, 2, dtype=torch.float64), atol=1e-5, rtol=0)
    assert abs(table[0, 2]) < 0.1  # the plain form would say 0.6
    # half of the variance shared, half of its own: tables add up, so the cosine is that of two equal parts
    shared, own, other = torch.randn(3, 400, 100)
    halves = layer_similarity([torch.cat([shared, own], 1), torch.cat([shared, other], 1)])[0, 1]
    assert halves.item() == pytest.approx(0.5, abs=0.05)
    with pytest.raises(ValueError, match="3 images are too few"):
        layer_similarity([torch.randn(3, 2)])


# distance


def test_attention_distance():
    h, w = 3, 4
    places = [(row, column) for row in range(h) for column in range(w)]
    uniform = torch.full((12, 12), 1 / 12)
    right = torch.eye(12)[[row * w + min(column + 1, w - 1) for row, column in places]]  # the neighbour on the right
    weights = rearrange(torch.stack([torch.eye(12), uniform, right]), "g q k -> 1 g q k")
    mean = sum(math.dist(a, b) for a in places for b in places) / 144
    expected = torch.tensor([0, mean, 3 / 4], dtype=torch.float64)  # the last column has no right neighbour
    torch.testing.assert_close(attention_distance(weights, (h, w)), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(attention_distance(weights, (h, w), cell=16.0), 16 * expected, atol=1e-5, rtol=0)

    with_class = torch.zeros(1, 3, 13, 13)  # half of every row goes to the class token: left out
    with_class[:, :, 0, 0], with_class[:, :, 1:, 0], with_class[:, :, 1:, 1:] = 1, 0.5, weights / 2
    torch.testing.assert_close(attention_distance(with_class, (h, w)), expected, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="12 tokens do not fit a grid of 3x5 = 15"):
        attention_distance(weights, (3, 5))


# shifts


def test_shift_response():
    noise = torch.randn(500, 1, 1, 40, generator=torch.Generator().manual_seed(0))

    def windows(kernel, stride):  # the mean of a window, of pixels that know nothing of each other
        return lambda image: nn.functional.avg_pool2d(image, (1, kernel), stride)

    # windows of 8 pixels that moved by s share 8 - s of them
    response = shift_response(windows(8, 4), noise, 32, [0, 2, 4, 8, 16 - 8])
    torch.testing.assert_close(response, torch.tensor([0, 0.25, 0.5, 1, 1]).double(), atol=0.05, rtol=0)
    assert response[0] == 0
    stripes = torch.randn(10, 1, 1, 1).expand(10, 1, 1, 40)  # nothing changes along the row
    assert shift_response(windows(8, 8), stripes, 32, [3]).item() == 0
    with pytest.raises(ValueError, match="40 columns have no room for 32 columns and a shift of 9"):
        shift_response(windows(8, 4), noise, 32, [9])
