"""The same function with less time and memory: :func:`fuse` switches a built model over (chapter 16).

Weights, names and numbers stay as they are. Only the way changes: windows are cut in the order in which the pixels lie
in memory, and the weights follow; the last split and its linear layer are one convolution; the performer keeps its
maxima instead of logarithms of sums. The readable forms, in their own modules, stay the default.
"""

import math

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from t2t_ref.models.soft_split import SoftSplit, check_channels
from t2t_ref.models.token_performer import TokenPerformer, without_autocast
from t2t_ref.models.tokens_to_token import TokensToToken


def pixel_major_split(image: Float[Tensor, "b h w c"], split: SoftSplit) -> Float[Tensor, "b n d"]:
    """:func:`t2t_ref.soft_split` of an image whose channels come last, with the channels last in the token as well.

    One copy instead of two, and each of them moves kw * c neighbours at once.

    Shapes:
        image: ``b h w c``
        return: ``b n d``, d = (kh kw c), channel *fastest*: see :func:`pixel_major_weights`

    Raises:
        ValueError: if the padded image is smaller than one window
    """
    kernel, stride, padding = split.kernel, split.stride, split.padding
    split.grid_size((image.shape[1], image.shape[2]))  # refuses an image with room for no window
    image = F.pad(image, (0, 0, padding, padding, padding, padding))
    windows = image.unfold(1, kernel, stride).unfold(2, kernel, stride)  # a view: no number has moved yet
    return rearrange(windows, "b h w c kh kw -> b (h w) (kh kw c)")


def pixel_major_weights(layer: nn.Module, kernel: int) -> dict[str, Tensor]:
    """The weights of a T2T layer that see the d axis of its input, reordered from (c kh kw) to (kh kw c).

    Shapes:
        return: by name: norm1.weight and norm1.bias, d; the first linear layer's weight, o d
    """
    first = "kqv.weight" if isinstance(layer, TokenPerformer) else "attn.qkv.weight"
    names = ("norm1.weight", "norm1.bias", first)
    pattern = "... (c kh kw) -> ... (kh kw c)"
    return {name: rearrange(layer.get_parameter(name), pattern, kh=kernel, kw=kernel) for name in names}


def scaled_performer_attention(
    queries: Float[Tensor, "b n e"],
    keys: Float[Tensor, "b n e"],
    values: Float[Tensor, "b n e"],
    directions: Float[Tensor, "m e"],
    epsilon: float = 1e-8,
) -> Float[Tensor, "b n e"]:
    """:func:`t2t_ref.performer_attention` in fewer passes over its tensors, and as finite.

    Key features are divided by the largest of their feature, which is given to the queries instead; query features are
    divided by the largest of their token. Both maxima cancel, so that no gradient need flow through them. What the
    length of a query does, it does to epsilon's share alone.

    Shapes:
        queries, keys, values: ``b n e``
        directions: ``m e``
        return: ``b n e``

    Note:
        dtype and range as :func:`t2t_ref.performer_attention`
    """
    dtype = torch.promote_types(values.dtype, torch.float32)
    with without_autocast(values.device.type):
        queries, keys = queries.to(dtype), keys.to(dtype)
        directions = directions.to(dtype)
        half_squared_norms = [torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / 2 for x in (queries, keys)]
        log_keys = einsum(keys, directions, "b n e, m e -> b n m")
        log_keys = log_keys - half_squared_norms[1]
        key_maxima = log_keys.detach().amax(dim=1, keepdim=True)
        key_features = (log_keys - key_maxima).exp()
        summaries = einsum(key_features, values.to(dtype), "b n m, b n e -> b m e")

        log_terms = einsum(queries, directions, "b n e, m e -> b n m") + key_maxima
        query_maxima = log_terms.detach().amax(dim=-1, keepdim=True)
        query_features = (log_terms - query_maxima).exp()
        totals = reduce(key_features, "b n m -> b m", "sum")
        denominators = einsum(query_features, totals, "b n m, b m -> b n")
        denominators = rearrange(denominators, "b n -> b n 1")  # never below 1
        factors = 1 / denominators
        if epsilon > 0:
            log_denominators = query_maxima + denominators.log()
            log_denominators = log_denominators - half_squared_norms[0]
            share = log_denominators - math.log(len(directions)) - math.log(epsilon)
            factors = factors * torch.sigmoid(share)
        # not to the e results of a query but to its m features: half as many
        mixed = einsum(query_features * factors, summaries, "b n m, b m e -> b n e")
    return mixed.to(values.dtype)


class FusedTokenPerformer(TokenPerformer):
    """:class:`t2t_ref.TokenPerformer` with :func:`scaled_performer_attention`."""

    def attend(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
        """Attention with the values as shortcut, by :func:`scaled_performer_attention`."""
        keys, queries, values = rearrange(self.kqv(tokens), "b n (three e) -> three b n e", three=3)
        mixed = scaled_performer_attention(queries, keys, values, self.w, self.epsilon)
        return values + self.drop(self.proj(mixed))


class FusedTokensToToken(TokensToToken):
    """:class:`t2t_ref.TokensToToken`, channels last from end to end.

    Shapes:
        image: ``b c h w``
        return: ``b n d``

    Note:
        with ``recompute``, training keeps nothing of the first two stages but their inputs, and computes them again in
        the backward pass

    Raises:
        ValueError: for a wrong number of channels, and for a size that leaves no token
    """

    recompute = False

    def stage(self, image: Float[Tensor, "b h w c"], split: SoftSplit, layer: nn.Module) -> Float[Tensor, "b h2 w2 e"]:
        """Soft split, T2T layer, re-structured image.

        Shapes:
            image: ``b h w c``
            return: ``b h2 w2 e``, h2 w2 windows
        """
        rows, _ = split.grid_size((image.shape[1], image.shape[2]))
        if torch.is_grad_enabled() and image.requires_grad:
            # the way back through a pixel-major split is slower than through F.unfold
            tokens = layer(split(rearrange(image, "b h w c -> b c h w")))
        else:
            tokens = pixel_major_split(image, split)
            tokens = functional_call(layer, pixel_major_weights(layer, split.kernel), (tokens,))
        return rearrange(tokens, "b (h w) e -> b h w e", h=rows)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        check_channels(image, self.in_chans)
        image = rearrange(image, "b c h w -> b h w c")
        for split, layer in ((self.soft_split0, self.attention1), (self.soft_split1, self.attention2)):
            if self.recompute and self.training:
                image = checkpoint(self.stage, image, split, layer, use_reentrant=False)
            else:
                image = self.stage(image, split, layer)
        last = self.soft_split2
        last.grid_size((image.shape[1], image.shape[2]))
        weight = rearrange(self.project.weight, "d (c kh kw) -> d c kh kw", kh=last.kernel, kw=last.kernel)
        image = rearrange(image, "b h w c -> b c h w")
        image = F.conv2d(image, weight, self.project.bias, last.stride, last.padding)
        return rearrange(image, "b d h w -> b (h w) d")


READABLE_TO_FUSED = {TokenPerformer: FusedTokenPerformer, TokensToToken: FusedTokensToToken}
FUSED_TO_READABLE = {fused: readable for readable, fused in READABLE_TO_FUSED.items()}


def fuse(model: nn.Module, fused: bool = True, *, recompute: bool = False) -> nn.Module:
    """Switch a model over to the fused forms, in place, or back with ``fused=False``. Returns the model.

    The function that the model computes stays the same, and so do its parameters, their names, and its state dict. What
    has no fused form (a ViT, tokens_type "convolution") is left as it is.

    Args:
        recompute: trade time for memory in training: the T2T layers run once more in the backward pass

    Raises:
        ValueError: for recompute without fused
    """
    if recompute and not fused:
        raise ValueError("recompute=True belongs to the fused form: pass fused=True with it")
    classes = READABLE_TO_FUSED if fused else FUSED_TO_READABLE
    for module in model.modules():
        if getattr(module, "tokens_type", None) != "convolution":
            module.__class__ = classes.get(type(module), type(module))
        if isinstance(module, FusedTokensToToken):
            module.recompute = recompute
    return model
