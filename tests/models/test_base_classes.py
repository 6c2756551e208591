"""The base classes carry models of other kinds: two prefix tokens and two heads; no prefix token, a mean, stages."""

import pytest
import torch
from einops import rearrange, reduce
from torch import nn

from t2t_ref import T2TViT, ViT
from t2t_ref.inspection import class_token_maps, token_maps
from t2t_ref.models.classifier import Classifier, TokenClassifier, init_weights, remember_arguments

SMALL = dict(img_size=(32, 48), patch_size=16, embed_dim=12, depth=2, num_heads=2, num_classes=5)


class TwoTokens(ViT):
    """As DeiT: a second token behind the class token, with a head of its own; the logits are the mean of both."""

    num_prefix_tokens = 2
    head_names = ("head", "head_dist")

    def __init__(self, **options):
        super().__init__(**options)
        self.dist_token = nn.Parameter(torch.randn(1, 1, self.embed_dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 2 + self.grid[0] * self.grid[1], self.embed_dim))
        self.head_dist = self.make_head()

    def prefix_tokens(self):
        return torch.cat([self.cls_token, self.dist_token], dim=1)

    def forward_head(self, features):
        return (self.head(features[:, 0]) + self.head_dist(features[:, 1])) / 2


class Stages(Classifier):
    """As a pyramid: two stages with a table each, no token in front, a mean at the end."""

    num_prefix_tokens = 0

    @remember_arguments
    def __init__(self, img_size=(32, 48), widths=(4, 8), num_classes=5, dynamic_img_size=False):
        super().__init__(img_size, num_classes, dynamic_img_size)
        self.num_features = widths[-1]
        self.embeds = nn.ModuleList(nn.Conv2d(c, d, 4, stride=4) for c, d in zip((3, 4), widths, strict=True))
        for number, ((rows, columns), width) in enumerate(zip(self.grids(self.img_size), widths, strict=True)):
            setattr(self, f"pos_embed{number}", nn.Parameter(torch.randn(1, rows * columns, width)))
        self.norm = nn.LayerNorm(widths[-1])
        self.head = self.make_head()

    depth = 2

    def grids(self, size):
        return [tuple(side // cell for side in size) for cell in (4, 16)]

    def grid_of(self, size):
        return self.grids(size)[-1]

    def position_tables(self, size=None):
        return {f"pos_embed{number}": grid for number, grid in enumerate(self.grids(size or self.img_size))}

    def block_outputs(self, image):
        self.check_image(image)
        size = (image.shape[-2], image.shape[-1])
        for embed, (name, own), grid in zip(self.embeds, self.position_tables().items(), self.grids(size), strict=True):
            tokens = rearrange(embed(image), "b d h w -> b (h w) d")
            tokens = tokens + self.resize_table(name, getattr(self, name), own, grid)
            yield tokens, grid
            image = rearrange(tokens, "b (h w) d -> b d h w", h=grid[0])

    def forward_features(self, image):
        *_, (tokens, _) = self.block_outputs(image)
        return self.norm(tokens)

    def pool(self, features):
        return reduce(features, "b n d -> b d", "mean")


@pytest.fixture
def image():
    return torch.randn(2, 3, 32, 48)


def test_two_prefix_tokens_and_two_heads(image):
    model = TwoTokens(**SMALL).eval()
    features = model.forward_features(image)
    assert features.shape == (2, 2 + 6, 12)
    torch.testing.assert_close(model(image), (model.head(features[:, 0]) + model.head_dist(features[:, 1])) / 2)
    _, ((maps, prefix), _) = model.forward_intermediates(image, return_prefix_tokens=True)
    assert maps.shape == (2, 12, 2, 3) and prefix.shape == (2, 2, 12)
    table = model.resize_table("pos_embed", model.pos_embed, model.grid, (4, 6))
    assert table.shape == (1, 2 + 24, 12) and torch.equal(table[:, :2], model.pos_embed[:, :2])
    model.dynamic_img_size = True
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 5)
    model.double().reset_classifier(7)
    assert model.head.weight.shape == model.head_dist.weight.shape == (7, 12)
    assert model(image.double()).shape == (2, 7)
    assert token_maps(features, model.grid, model.num_prefix_tokens).shape == (2, 12, 2, 3)
    assert class_token_maps(torch.rand(2, 8, 8), model.grid, model.num_prefix_tokens).shape == (2, 2, 3)
    with pytest.raises(ValueError, match="9 tokens are not 2 tokens in front and a grid of 2x3"):
        class_token_maps(torch.rand(2, 9, 9), model.grid, model.num_prefix_tokens)


def test_stages_without_prefix_tokens(image):
    model = Stages().eval()
    assert model.arguments == dict(img_size=(32, 48), widths=(4, 8), num_classes=5, dynamic_img_size=False)
    features, (first, second) = model.forward_intermediates(image)
    assert first.shape == (2, 4, 8, 12) and second.shape == (2, 8, 2, 3) and features.shape == (2, 6, 8)
    torch.testing.assert_close(features, model.forward_features(image))
    torch.testing.assert_close(model(image), model.head(features.mean(dim=1)))
    (tokens,) = model.forward_intermediates(image, [0], output_fmt="NLC", intermediates_only=True, stop_early=True)
    assert tokens.shape == (2, 96, 4)
    assert model.position_tables((64, 64)) == {"pos_embed0": (16, 16), "pos_embed1": (4, 4)}
    with pytest.raises(ValueError, match="pass norm=False"):
        model.forward_intermediates(image, norm=True)
    model.dynamic_img_size = True
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)
    model.reset_classifier(0)
    assert model(image).shape == (2, 8)
    assert model.no_weight_decay() == set()


def test_the_arguments_are_those_of_the_class_that_was_called():
    class Named(T2TViT):
        @remember_arguments
        def __init__(self, name, depth=1):
            super().__init__(32, depth=depth, embed_dim=12, num_heads=2, token_dim=8)

    assert Named("mine").arguments == {"name": "mine", "depth": 1}
    model = T2TViT((32, 48), depth=1, embed_dim=12, num_heads=2, token_dim=8)
    assert model.arguments["img_size"] == (32, 48) and model.arguments["qk_scale"] is None
    assert list(model.arguments)[:3] == ["img_size", "tokens_type", "in_chans"]
    with pytest.raises(TypeError, match="unexpected keyword argument 'deep'"):
        T2TViT(deep=1)


def test_the_forward_stands_in_the_base_class_alone():
    shared = ("forward", "forward_features", "forward_head", "embed", "check_image", "position_table")
    for name in shared:
        assert name not in vars(T2TViT) and name not in vars(ViT)
        assert getattr(T2TViT, name) is getattr(ViT, name) is getattr(TokenClassifier, name)


def test_a_fresh_head_starts_as_at_the_start_of_training():
    model = ViT(**SMALL)
    model.reset_classifier(1000)
    assert abs(model.head.weight.std().item() - 0.02) < 2e-3 and not model.head.bias.any()
    linear = nn.Linear(3, 4)
    init_weights(linear)
    assert not linear.bias.any()
