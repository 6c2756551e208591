"""Each improvement of the fused form by itself, before and after (chapter 16)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from t2t_ref.bench import plain_forms
from t2t_ref.create import create_model
from t2t_ref.models.fused import pixel_major_split, pixel_major_weights, scaled_performer_attention
from t2t_ref.models.token_performer import performer_attention, plain_performer_attention


def pieces(batch: int = 8) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """Each improvement by itself: before, after. All of one group compute the same from the same tensors.

    Sizes are those of t2t_vit_14 and t2t_vit_t_14 at 224 x 224.
    """
    torch.manual_seed(0)
    model = create_model("t2t_vit_14", performer_drop_rate=0.0)
    module = model.tokens_to_token
    images = torch.randn(batch, 3, 224, 224)  # in training no gradient is asked of them
    queries, keys, values = torch.randn(3, batch, 1, 3136, 64).requires_grad_()
    head_queries, head_keys, head_values = torch.randn(3, batch, 6, 197, 64).requires_grad_()
    keys_queries_values = (0.25 * torch.randn(batch, 3136, 192)).requires_grad_()
    inner = torch.randn(batch, 784, 64, requires_grad=True)  # what leaves the second T2T layer
    middle = torch.randn(batch, 3136, 64, requires_grad=True)  # and the first
    layer, split, last, project = module.attention1, module.soft_split0, module.soft_split2, module.project

    def performer(function):
        k, q, v = rearrange(keys_queries_values, "b n (three e) -> three b n e", three=3)
        return function(q, k, v, layer.w)

    def pixel_major(images, split, layer):
        tokens = pixel_major_split(rearrange(images, "b c h w -> b h w c"), split)
        weights = pixel_major_weights(layer, split.kernel)
        normed = F.layer_norm(tokens, layer.norm1.normalized_shape, weights["norm1.weight"], weights["norm1.bias"])
        return F.linear(normed, weights["kqv.weight"], layer.kqv.bias)

    def channel_major(images, split, layer):
        return layer.kqv(layer.norm1(split(images)))

    def folded(images, split, layer):
        return plain_forms.fold_norm_into_split(images, split, layer.norm1, layer.kqv)

    def restructured(tokens, rows):
        return rearrange(tokens, "b (h w) e -> b e h w", h=rows)

    def convolution():
        weight = rearrange(project.weight, "d (c kh kw) -> d c kh kw", kh=3, kw=3)
        image = F.conv2d(restructured(inner, 28), weight, project.bias, last.stride, last.padding)
        return rearrange(image, "b d h w -> b (h w) d")

    second = module.soft_split1, module.attention2
    table = plain_forms.attention_by_table
    return {
        "attention of 3136 tokens": {
            "table": lambda: table(queries, keys, values, 147**-0.5),
            "fused attention": lambda: F.scaled_dot_product_attention(queries, keys, values, scale=147**-0.5),
        },
        "attention of a block": {
            "table": lambda: table(head_queries, head_keys, head_values, 1 / 8),
            "fused attention": lambda: F.scaled_dot_product_attention(head_queries, head_keys, head_values),
        },
        "performer": {
            "definition": lambda: performer(plain_performer_attention),
            "log space": lambda: performer(performer_attention),
            "scaled": lambda: performer(scaled_performer_attention),
        },
        "first split, norm, linear": {
            "channel-major": lambda: channel_major(images, split, layer),
            "pixel-major": lambda: pixel_major(images, split, layer),
            "folded": lambda: folded(images, split, layer),
        },
        "second split, norm, linear": {
            "channel-major": lambda: channel_major(restructured(middle, 56), *second),
            "pixel-major": lambda: pixel_major(restructured(middle, 56), *second),
            "folded": lambda: folded(restructured(middle, 56), *second),
        },
        "last split, linear": {
            "split, linear": lambda: project(last(restructured(inner, 28))),
            "convolution": convolution,
        },
    }


def without_gradients(run: Callable[[], Tensor]) -> Callable[[], object]:
    """The same run as a step of inference."""

    def step():
        with torch.no_grad():
            run()

    return step


def with_gradients(run: Callable[[], Tensor]) -> Callable[[], object]:
    """The same run with its backward pass."""

    def step():
        run().sum().backward()

    return step
