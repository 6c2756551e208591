"""Who looks at whom: attention weights, which no model holds, as maps (chapter 15)."""

import math
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from t2t_ref.inspection.taps import eval_without_gradients, tap
from t2t_ref.models.token_performer import TokenPerformer, log_features, without_autocast
from t2t_ref.models.token_transformer import TokenTransformer


def attention_maps(model: nn.Module, image: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "_ _ _ _"]]:
    """The attention weights of every block, exactly, although the model itself never holds them.

    A module says that it attends by a method ``attention_weights``, which takes what its ``forward`` takes.

    Shapes:
        image: ``b c h w``
        return: one b g q k for each such module, in the order of the run: head g, weight of key k for query q; rows sum
            to 1. In a T2TViT or a ViT token 0 is the class token. Windows, and words inside patches, stand in the place
            of b
    """
    maps = []

    def hook(module, inputs, named):
        maps.append(module.attention_weights(*inputs, **named))

    with ExitStack() as hooks, eval_without_gradients(model):
        for module in model.modules():
            if hasattr(module, "attention_weights"):
                hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        model(image)
    return maps


def class_token_maps(
    weights: Float[Tensor, "*lead q k"], grid: tuple[int, int], num_prefix_tokens: int = 1
) -> Float[Tensor, "*lead h w"]:
    """How much the class token takes from each patch, as a map. What it takes from tokens without a place is left out.

    Shapes:
        weights: ``... q k``, attention of one block, b g q k, or a rollout, b q k; token 0 is the class token
        return: ``... h w``, rows of the map sum to 1 minus the class token's weight for itself

    Raises:
        ValueError: if there are not num_prefix_tokens + h w tokens
    """
    rows, columns = grid
    if weights.shape[-1] != num_prefix_tokens + rows * columns:
        front = "a class token" if num_prefix_tokens == 1 else f"{num_prefix_tokens} tokens in front"
        raise ValueError(f"{weights.shape[-1]} tokens are not {front} and a grid of {rows}x{columns}")
    return rearrange(weights[..., 0, num_prefix_tokens:], "... (h w) -> ... h w", h=rows)


def attention_rollout(maps: Sequence[Float[Tensor, "b g q k"]], shortcut: float = 0.5) -> Float[Tensor, "b q k"]:
    """The attention of all blocks in a row, multiplied up: what would reach token q of the input token k.

    Each block is taken for a mean of its heads, mixed with the identity for its shortcut. Values, MLPs and norms are
    left out, so this is a story about the model and not the model.

    Shapes:
        maps: one b g q k for each block, first block first, as :func:`attention_maps` gives them
        return: ``b q k``, rows sum to 1

    Args:
        shortcut: the share of the identity, between 0 and 1

    Raises:
        ValueError: for no maps, or a share out of range

    Source:
        Abnar and Zuidema 2020, "Quantifying attention flow in transformers"
    """
    if not maps or not 0 <= shortcut <= 1:
        raise ValueError(f"expected at least one map and a share of 0 to 1, found {len(maps)} maps and {shortcut}")
    rollout = eye = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype, device=maps[0].device)
    for weights in maps:
        block = (1 - shortcut) * reduce(weights, "b g q k -> b q k", "mean") + shortcut * eye
        rollout = block @ rollout
    return rollout


def performer_weights(
    queries: Float[Tensor, "b n e"],
    keys: Float[Tensor, "b n e"],
    directions: Float[Tensor, "m e"],
    epsilon: float = 1e-8,
) -> Float[Tensor, "b n k"]:
    """The n x n weights that :func:`performer_attention` applies and never holds. Quadratic: for small n only.

    Shapes:
        queries, keys: ``b n e``
        directions: ``m e``
        return: ``b n k``, k = n; weights @ values is the layer's attention; rows sum to D / (D + epsilon)

    Source:
        chapter 5: each query mixes the features, each feature mixes the tokens
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    with without_autocast(queries.device.type):
        directions = directions.to(dtype)
        log_queries = log_features(queries.to(dtype), directions)
        log_keys = log_features(keys.to(dtype), directions)
        log_terms = log_queries + log_keys.logsumexp(dim=1, keepdim=True)
        weights = einsum(log_terms.softmax(dim=-1), log_keys.softmax(dim=1), "b n m, b k m -> b n k")
        if epsilon > 0:
            log_denominators = log_terms.logsumexp(dim=-1, keepdim=True) - math.log(len(directions))
            weights = weights * torch.sigmoid(log_denominators - math.log(epsilon))
    return weights


def token_attention_maps(model: nn.Module, image: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b q k"]]:
    """The attention weights of the T2T layers, exact ones or a performer's implicit ones. For small images.

    Shapes:
        image: ``b c h w``
        return: one b q k for each T2T layer; q and k are windows of its soft split, row by row
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, TokenPerformer | TokenTransformer)}
    with eval_without_gradients(model), tap(model, [f"{name}.norm1" for name in layers]) as seen:
        model(image)
        maps = []
        for name, layer in layers.items():
            tokens = seen[f"{name}.norm1"]
            if isinstance(layer, TokenPerformer):
                keys, queries, _ = rearrange(layer.kqv(tokens), "b n (three e) -> three b n e", three=3)
                maps.append(performer_weights(queries, keys, layer.w, layer.epsilon))
            else:
                queries, keys, _ = rearrange(layer.attn.qkv(tokens), "b n (three e) -> three b n e", three=3)
                scores = einsum(queries, keys, "b q e, b k e -> b q k") * layer.attn.scale
                maps.append(scores.softmax(dim=-1))
    return maps
