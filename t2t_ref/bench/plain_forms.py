"""Other ways to compute what this package computes: the textbook's, and one that did not pay (chapter 16).

They are what :mod:`t2t_ref.bench` measures against, and the tests hold each of them equal to ours in float64, forward
and backward. No model uses them.
"""

import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from t2t_ref.models.backbone import Attention
from t2t_ref.models.soft_split import SoftSplit
from t2t_ref.models.token_performer import TokenPerformer, plain_performer_attention
from t2t_ref.models.token_transformer import TokenAttention


def attention_by_table(
    queries: Float[Tensor, "b g q e"], keys: Float[Tensor, "b g k e"], values: Float[Tensor, "b g k e"], scale: float
) -> Float[Tensor, "b g q e"]:
    """Attention as textbooks have it: the table of all weights is written out.

    Shapes:
        queries: ``b g q e``
        keys, values: ``b g k e``
        return: ``b g q e``

    Source:
        Vaswani et al. 2017, Eq. (1)
    """
    scores = einsum(queries, keys, "b g q e, b g k e -> b g q k") * scale
    return einsum(scores.softmax(dim=-1), values, "b g q k, b g k e -> b g q e")


class PlainAttention(Attention):
    """:class:`t2t_ref.Attention` by :func:`attention_by_table`.

    Shapes:
        tokens: ``b n d``
        return: ``b n d``
    """

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        queries, keys, values = self.split_heads(tokens)
        scores = einsum(queries, keys, "b g q e, b g k e -> b g q k") * self.scale
        weights = F.dropout(scores.softmax(dim=-1), self.attn_drop_rate, self.training)
        mixed = einsum(weights, values, "b g q k, b g k e -> b g q e")
        return self.proj_drop(self.proj(rearrange(mixed, "b g n e -> b n (g e)")))


class PlainTokenAttention(TokenAttention):
    """The attention of :class:`t2t_ref.TokenTransformer` by :func:`attention_by_table`.

    Shapes:
        tokens: ``b n d``
        return: ``b n e``
    """

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
        queries, keys, values = rearrange(self.qkv(tokens), "b n (three e) -> three b 1 n e", three=3)
        mixed = attention_by_table(queries, keys, values, self.scale)
        mixed, values = (rearrange(x, "b 1 n e -> b n e") for x in (mixed, values))
        return values + self.proj(mixed)


class PlainTokenPerformer(TokenPerformer):
    """:class:`t2t_ref.TokenPerformer` by the definition, epsilon in the denominator, as the authors have it."""

    def attend(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
        """Attention with the values as shortcut, by :func:`t2t_ref.plain_performer_attention`."""
        keys, queries, values = rearrange(self.kqv(tokens), "b n (three e) -> three b n e", three=3)
        mixed = plain_performer_attention(queries, keys, values, self.w, self.epsilon)
        return values + self.drop(self.proj(mixed))


PLAIN = {Attention: PlainAttention, TokenAttention: PlainTokenAttention, TokenPerformer: PlainTokenPerformer}


def plain(model: nn.Module) -> nn.Module:
    """Switch a model over to the plain textbook forms, in place: same weights, same function. Returns the model."""
    for module in model.modules():
        module.__class__ = PLAIN.get(type(module), type(module))
    return model


def fold_norm_into_split(
    image: Float[Tensor, "b c h w"], split: SoftSplit, norm: nn.LayerNorm, linear: nn.Linear
) -> Float[Tensor, "b n o"]:
    """``linear(norm(split(image)))`` as one convolution, so that the overlapping tokens are never written out.

    With the norm's weight inside the linear's, W, what is left of the norm are two numbers for each token: its mean and
    its standard deviation, which come from sums over the window.

        linear(norm(x)) = (W x - mean(x) W 1) / std(x) + constant

    No faster than the three steps on a CPU. And where a window holds one colour, the variance is the small difference
    of two large numbers: float32 loses several digits there, which the three steps do not.

    Shapes:
        image: ``b c h w``
        return: ``b n o``, o = linear.out_features
    """
    (kernel, stride, padding), channels = (split.kernel, split.stride, split.padding), image.shape[1]
    weight = linear.weight * norm.weight
    constant = einsum(linear.weight, norm.bias, "o d, d -> o")
    constant = constant if linear.bias is None else constant + linear.bias

    means = F.avg_pool2d(reduce(image, "b c h w -> b 1 h w", "mean"), kernel, stride, padding)
    squares = F.avg_pool2d(reduce(image.square(), "b c h w -> b 1 h w", "mean"), kernel, stride, padding)
    inverse_deviations = (squares - means.square() + norm.eps).rsqrt()

    windows = rearrange(weight, "o (c kh kw) -> o c kh kw", c=channels, kh=kernel)
    products = F.conv2d(image, windows, None, stride, padding)
    totals = rearrange(reduce(weight, "o d -> o", "sum"), "o -> o 1 1")
    folded = (products - means * totals) * inverse_deviations + rearrange(constant, "o -> o 1 1")
    return rearrange(folded, "b o h w -> b (h w) o")
