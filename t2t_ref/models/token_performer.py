"""The T2T layer with random-feature attention (chapter 5; paper, Sec. 3.1).

Two functions compute the same attention. :func:`plain_performer_attention` is the definition, as one
would write it down; half precision breaks it. :func:`performer_attention` is the form the layer uses: it
stays in log space, so that no feature and no sum of features can underflow.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn


def log_features(tokens: Float[Tensor, "b n e"], directions: Float[Tensor, "m e"]) -> Float[Tensor, "b n m"]:
    """Logarithms of m positive random features, up to the constant -ln(m) / 2.

    feature_i(x) = exp(w_i . x - |x|^2 / 2) / sqrt(m), for the rows w_i of ``directions``.

    Shapes:
        tokens: ``b n e``, queries or keys
        directions: ``m e``
        return: ``b n m``, w_i . x - |x|^2 / 2

    Source:
        Choromanski et al. 2021, "Rethinking attention with performers", positive features
    """
    projections = einsum(tokens, directions, "b n e, m e -> b n m")
    half_squared_norms = reduce(tokens.square(), "b n e -> b n 1", "sum") / 2
    return projections - half_squared_norms


def plain_performer_attention(
    queries: Float[Tensor, "b n e"],
    keys: Float[Tensor, "b n e"],
    values: Float[Tensor, "b n e"],
    directions: Float[Tensor, "m e"],
    epsilon: float = 1e-8,
) -> Float[Tensor, "b n e"]:
    """Random-feature attention by its definition. Use :func:`performer_attention` in a model.

    Shapes:
        queries, keys, values: ``b n e``
        directions: ``m e``
        return: ``b n e``

    Note:
        in float16 an epsilon of 1e-8 is zero, and 0 / 0 gives NaN, without an error

    Source:
        ``Token_performer.single_attn`` of the authors' code
    """
    root_m = math.sqrt(directions.shape[0])
    query_features = log_features(queries, directions).exp() / root_m
    key_features = log_features(keys, directions).exp() / root_m
    feature_totals = reduce(key_features, "b n m -> b m", "sum")
    denominators = einsum(query_features, feature_totals, "b n m, b m -> b n")
    summaries = einsum(key_features, values, "b n m, b n e -> b m e")
    numerators = einsum(query_features, summaries, "b n m, b m e -> b n e")
    return numerators / (rearrange(denominators, "b n -> b n 1") + epsilon)


def without_autocast(device_type: str) -> AbstractContextManager:
    """A context in which autocast leaves the dtypes alone; nothing on a device that has no autocast, such as meta."""
    # while it compiles, torch 2.4 cannot answer the last question
    if device_type != "meta" and (torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def performer_attention(
    queries: Float[Tensor, "b n e"],
    keys: Float[Tensor, "b n e"],
    values: Float[Tensor, "b n e"],
    directions: Float[Tensor, "m e"],
    epsilon: float = 1e-8,
) -> Float[Tensor, "b n e"]:
    """The same function as :func:`plain_performer_attention`, finite at any scale that a network will meet.

    Each feature takes a mean of the values, weighted by a softmax over the tokens; each query mixes the m means by a
    softmax over the features. The denominator D survives only in the factor D / (D + epsilon), which is a
    sigmoid of ln D - ln epsilon.

    Shapes:
        queries, keys, values: ``b n e``
        directions: ``m e``
        return: ``b n e``

    Note:
        at least float32 inside, also under autocast; returns the dtype of ``values``. Finite as long as |x|^2 is, that
        is up to queries and keys of length 1e18 in float32

    Source:
        the algebra is chapter 5's; the function is the authors', epsilon included
    """
    dtype = torch.promote_types(values.dtype, torch.float32)
    with without_autocast(values.device.type):
        directions = directions.to(dtype)
        log_queries = log_features(queries.to(dtype), directions)
        log_keys = log_features(keys.to(dtype), directions)

        token_weights = log_keys.softmax(dim=1)  # for each feature, over the tokens
        means = einsum(token_weights, values.to(dtype), "b n m, b n e -> b m e")
        log_terms = log_queries + log_keys.logsumexp(dim=1, keepdim=True)  # D is the mean of their exponentials
        mixed = einsum(log_terms.softmax(dim=-1), means, "b n m, b m e -> b n e")
        if epsilon > 0:
            log_denominators = log_terms.logsumexp(dim=-1, keepdim=True) - math.log(directions.shape[0])
            mixed = mixed * torch.sigmoid(log_denominators - math.log(epsilon))
    return mixed.to(values.dtype)


class TokenPerformer(nn.Module):
    """A T2T layer whose attention costs time and memory linear in the number of tokens.

    Shapes:
        tokens: ``b n d``, d = 147 at the first split, 576 at the second
        return: ``b n e``, e = token_dim, 64 in every model of the paper

    Args:
        drop_rate: the authors' hard-wired dropout
        epsilon: added to the denominator, 0 switches it off

    Raises:
        ValueError: for a negative epsilon

    Source:
        paper, Sec. 3.1; ``Token_performer`` of the authors' code. The random directions ``w`` are frozen and belong to
        the checkpoint, so they are a buffer; the linear layer yields keys, queries, values, in this order.
    """

    def __init__(
        self,
        dim: int,
        token_dim: int = 64,
        *,
        kernel_ratio: float = 0.5,
        drop_rate: float = 0.1,
        epsilon: float = 1e-8,
    ):
        super().__init__()
        if epsilon < 0:
            raise ValueError(f"epsilon is {epsilon}, expected 0 or more")
        self.epsilon = epsilon
        self.kqv = nn.Linear(dim, 3 * token_dim)
        self.proj = nn.Linear(token_dim, token_dim)
        self.drop = nn.Dropout(drop_rate)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(token_dim)
        self.mlp = nn.Sequential(
            nn.Linear(token_dim, token_dim), nn.GELU(), nn.Linear(token_dim, token_dim), nn.Dropout(drop_rate)
        )
        num_features = int(token_dim * kernel_ratio)
        directions = nn.init.orthogonal_(torch.empty(num_features, token_dim)) * math.sqrt(num_features)
        self.register_buffer("w", directions)  # in the state dict, and out of reach of training

    def attend(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
        """Attention with the values as shortcut: values + proj(attention).

        Shapes:
            tokens: ``b n d``, after the first norm
            return: ``b n e``
        """
        keys, queries, values = rearrange(self.kqv(tokens), "b n (three e) -> three b n e", three=3)
        mixed = performer_attention(queries, keys, values, self.w, self.epsilon)
        return values + self.drop(self.proj(mixed))

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
        tokens = self.attend(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))
