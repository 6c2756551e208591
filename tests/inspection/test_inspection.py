"""Shape tables, counts and attention maps, against numbers found another way."""

import pytest
import torch

from t2t_ref import attention_maps, count_macs, count_parameters, create_model, shape_table

WIDE = dict(img_size=(64, 96), num_classes=10)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("t2t_vit_7", **WIDE)


@pytest.fixture(scope="module")
def image():
    return torch.randn(2, 3, 64, 96)


def test_shape_table_of_the_whole_model(model, image):
    table = shape_table(model, image)
    assert [(row.name, row.axes, row.shape) for row in table] == [
        ("(input)", "b c h w", (2, 3, 64, 96)),
        ("tokens_to_token.soft_split0", "b n d", (2, 16 * 24, 147)),
        ("tokens_to_token.attention1", "b n e", (2, 16 * 24, 64)),
        ("into tokens_to_token.soft_split1", "b c h w", (2, 64, 16, 24)),
        ("tokens_to_token.soft_split1", "b n d", (2, 8 * 12, 576)),
        ("tokens_to_token.attention2", "b n e", (2, 8 * 12, 64)),
        ("into tokens_to_token.soft_split2", "b c h w", (2, 64, 8, 12)),
        ("tokens_to_token.soft_split2", "b n d", (2, 4 * 6, 576)),
        ("tokens_to_token.project", "b n d", (2, 4 * 6, 256)),
        ("into pos_drop", "b n d", (2, 1 + 4 * 6, 256)),
        ("blocks.0-6", "b n d", (2, 1 + 4 * 6, 256)),
        ("norm", "b n d", (2, 1 + 4 * 6, 256)),
        ("into head", "b d", (2, 256)),
        ("head", "b classes", (2, 10)),
        ("cls_token, pos_embed", "", ()),
    ]
    assert sum(row.parameters for row in table) == count_parameters(model)
    assert table.shape("norm") == (2, 25, 256)
    with pytest.raises(KeyError, match="no stage 'nrom'; there are .*norm"):
        table.shape("nrom")


def test_shape_table_prints_as_text_and_as_html(model, image):
    table = shape_table(model, image)
    assert str(table) == repr(table)
    lines = str(table).splitlines()
    assert lines[0].split() == ["stage", "what", "axes", "shape", "parameters"]
    assert len(lines) == 1 + len(table)
    assert "2 x 384 x 147" in lines[2]
    html = table._repr_html_()
    assert html.count("<tr>") == 1 + len(table)
    assert "<td><code>blocks.0-6</code></td>" in html


def test_shape_table_follows_the_run_not_the_description(image):
    """Another stride gives other rows: nothing in the table is typed."""
    model = create_model("t2t_vit_7", **WIDE)
    model.tokens_to_token.soft_split0.padding = 1
    table = shape_table(model.tokens_to_token, image, depth=1)
    assert table.shape("soft_split0") == (2, 15 * 23, 147)


def test_shape_table_of_pieces(model):
    tokens = torch.randn(1, 24, 256)
    table = shape_table(model.blocks[0], tokens)
    assert table.shape("attn.qkv") == (1, 24, 768)
    assert table.shape("mlp.fc1") == (1, 24, 512)
    alone = shape_table(torch.nn.Linear(256, 8), tokens)
    assert [row.shape for row in alone][:2] == [(1, 24, 256), (1, 24, 8)]


def test_looking_leaves_the_model_as_it_was(model, image):
    model.train()
    model.blocks[2].eval()
    shape_table(model, image), count_macs(model, image), attention_maps(model, image)
    assert model.training and model.blocks[1].training and not model.blocks[2].training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def macs_by_formula(depth, dim, mlp_ratio, patches=196):
    """Multiply-accumulates of the backbone and the head, from the sizes alone."""
    n = patches + 1
    linear = n * dim * dim * (3 + 1 + 2 * mlp_ratio)
    return int(depth * linear + 1000 * dim), int(depth * 2 * n * n * dim)


def test_macs_of_t2t_vit_14_by_formula():
    model = create_model("t2t_vit_14")
    image = torch.randn(1, 3, 224, 224)
    linear, products = macs_by_formula(14, 384, 3)
    m, e = 32, 64
    linear += 3136 * (147 * 3 * e + e * e * 3) + 784 * (576 * 3 * e + e * e * 3) + 196 * 576 * 384
    products += (3136 + 784) * m * e * 4  # two features, summaries, mixing
    assert count_macs(model, image, products_of_activations=False) == linear
    assert count_macs(model, image) == linear + products
    model.requires_grad_(False)  # then torch runs a linear layer after a soft split as another operation
    assert count_macs(model, image, products_of_activations=False) == linear


@pytest.mark.parametrize(
    "name, printed",
    [("t2t_vit_7", 1.1), ("t2t_vit_12", 1.8), ("t2t_vit_14", 4.8), ("t2t_vit_19", 8.5), ("t2t_vit_t_14", 6.1)],
)
def test_macs_are_those_the_paper_prints(name, printed):
    with torch.device("meta"):
        model, image = create_model(name), torch.empty(2, 3, 224, 224)
    assert round(count_macs(model, image) / 1e9, 1) == printed


def test_attention_maps_are_the_weights_the_model_uses(model, image):
    maps = attention_maps(model, image)
    assert len(maps) == 7
    assert all(weights.shape == (2, 4, 25, 25) for weights in maps)
    torch.testing.assert_close(maps[3].sum(dim=-1), torch.ones(2, 4, 25))

    attention, seen = model.blocks[3].attn, {}
    hooks = [
        attention.register_forward_pre_hook(lambda module, inputs: seen.update(tokens=inputs[0])),
        attention.proj.register_forward_pre_hook(lambda module, inputs: seen.update(mixed=inputs[0])),
    ]
    with torch.no_grad():
        model.eval()(image)
        _, _, values = attention.split_heads(seen["tokens"])
    for hook in hooks:
        hook.remove()
    mixed = (maps[3] @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixed, seen["mixed"], atol=1e-5, rtol=1e-4)


class Two(torch.nn.Module):
    """Two tensors in, two out, and a number that is none: as the blocks of some relatives."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(4, 4), torch.nn.Linear(8, 8)

    def forward(self, inner, outer, rows=1):
        return self.inner(inner), self.outer(outer)


class TwoByTwo(torch.nn.Module):
    door_notes = {"head": "the first outer token"}

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Two() for _ in range(3))
        self.head = torch.nn.Linear(8, 5)

    def forward(self, outer):
        inner = outer[..., :4]
        for block in self.blocks:
            inner, outer = block(inner, outer=outer, rows=2)
        return self.head(outer[:, 0])


def test_shape_table_of_modules_with_several_tensors():
    table = shape_table(TwoByTwo(), torch.zeros(1, 6, 8))
    assert [(row.name, row.kind, row.shape, row.parameters) for row in table] == [
        ("(input)", "", (1, 6, 8), 0),
        ("into blocks.0[0]", "", (1, 6, 4), 0),
        ("blocks.0-2[0]", "Two", (1, 6, 4), 3 * (20 + 72)),
        ("blocks.0-2[1]", "Two", (1, 6, 8), 0),
        ("into head", "the first outer token", (1, 8), 0),
        ("head", "Linear", (1, 5), 45),
    ]
    inputs = torch.zeros(1, 6, 4), torch.zeros(1, 6, 8)
    table = shape_table(Two(), inputs)
    assert [row.name for row in table] == [
        *("(input)[0]", "(input)[1]", "inner", "into outer", "outer", "(output)[0]", "(output)[1]")
    ]
    assert count_macs(Two(), inputs) == 6 * (4 * 4 + 8 * 8)


def test_a_list_of_layers_alone_is_folded_too():
    layers = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    assert [row.name for row in shape_table(layers, torch.zeros(2, 4), depth=1)][:2] == ["(input)", "0-2"]


def test_any_module_can_say_how_it_attends(image):
    class Halves(torch.nn.Module):
        def attention_weights(self, tokens):
            return torch.full((len(tokens), 1, 1, 2), 0.5)

        def forward(self, tokens):
            return tokens

    (weights,) = attention_maps(torch.nn.Sequential(Halves()), image)
    assert weights.shape == (2, 1, 1, 2)
