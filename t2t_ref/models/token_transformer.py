"""The T2T layer with exact attention (chapter 4; paper, Sec. 3.1 and Eq. 1)."""

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from t2t_ref.models.backbone import Mlp


class TokenAttention(nn.Module):
    """Single-head attention that changes the width of its tokens from d to e.

    An ordinary shortcut cannot be added, since input and output differ in width. The values take
    its place: the layer returns values + proj(attention).

    Shapes:
        tokens: ``b n d``
        return: ``b n e``, e = token_dim

    Args:
        qk_scale: multiplies the scores; None means d ** -0.5, by the *input* width, as the authors have it

    Source:
        authors' code; the paper does not mention the shortcut on the values
    """

    def __init__(self, dim: int, token_dim: int, *, qk_scale: float | None = None):
        super().__init__()
        self.scale = dim**-0.5 if qk_scale is None else qk_scale
        self.qkv = nn.Linear(dim, 3 * token_dim, bias=False)
        self.proj = nn.Linear(token_dim, token_dim)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
        # an axis for the one head: the fused kernels, which never hold the n x n weights, want four axes
        queries, keys, values = rearrange(self.qkv(tokens), "b n (three e) -> three b 1 n e", three=3)
        mixed = F.scaled_dot_product_attention(queries, keys, values, scale=self.scale)
        mixed, values = (rearrange(x, "b 1 n e -> b n e") for x in (mixed, values))
        return values + self.proj(mixed)


class TokenTransformer(nn.Module):
    """A T2T layer: attention over all tokens, then an MLP, at a width of token_dim.

    Shapes:
        tokens: ``b n d``, d = 147 at the first split, 576 at the second
        return: ``b n e``, e = token_dim, 64 in every model of the paper

    Source:
        paper, Eq. (1); ``Token_transformer`` of the authors' code
    """

    def __init__(self, dim: int, token_dim: int = 64, *, mlp_ratio: float = 1.0, qk_scale: float | None = None):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = TokenAttention(dim, token_dim, qk_scale=qk_scale)
        self.norm2 = nn.LayerNorm(token_dim)
        self.mlp = Mlp(token_dim, int(token_dim * mlp_ratio))

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
        tokens = self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))
