"""The transformer blocks of the backbone (chapter 8; paper, Sec. 3.2 and Eq. 5)."""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, applied to each token by itself.

    Shapes:
        tokens: ``b n d``
        return: ``b n d``, through a hidden width f

    Source:
        paper, Eq. (5), its MLP; state-dict names as in the authors' code
    """

    def __init__(self, dim: int, hidden_dim: int, *, drop_rate: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(tokens)))))


class Attention(nn.Module):
    """Multi-head self-attention: every token gathers from all tokens, in g heads side by side.

    Shapes:
        tokens: ``b n d``
        return: ``b n d``

    Args:
        qk_scale: multiplies the scores; None means head_dim ** -0.5, which the released weights need

    Raises:
        ValueError: if num_heads does not divide dim

    Source:
        Vaswani et al. 2017; state-dict names as in the authors' code
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide a width of {dim}")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.attn_drop_rate = attn_drop_rate
        self.make_qkv(dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop_rate)

    def make_qkv(self, dim: int, *, bias: bool) -> None:
        """Make the layers that ``split_heads`` uses. Chapter 13 has others."""
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)

    def split_heads(
        self, tokens: Float[Tensor, "b n d"]
    ) -> tuple[Float[Tensor, "b g n e"], Float[Tensor, "b g n e"], Float[Tensor, "b g n e"]]:
        """Queries, keys and values, one set for each of the g heads.

        Shapes:
            tokens: ``b n d``
            return: ``(b g n e, b g n e, b g n e)``, e = d / g, the width of a head
        """
        qkv = rearrange(self.qkv(tokens), "b n (three g e) -> three b g n e", three=3, g=self.num_heads)
        queries, keys, values = qkv
        return queries, keys, values

    def attention_weights(self, *inputs) -> Float[Tensor, "b g q k"]:
        """The weights that ``forward``, given the same, mixes the values by and never holds, for those who want to see.

        Shapes:
            return: ``b g q k``, rows sum to 1
        """
        queries, keys, _ = self.split_heads(*inputs)
        scores = einsum(queries, keys, "b g q e, b g k e -> b g q k") * self.scale
        return scores.softmax(dim=-1)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        queries, keys, values = self.split_heads(tokens)
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, dropout_p=self.attn_drop_rate if self.training else 0.0, scale=self.scale
        )
        return self.proj_drop(self.proj(rearrange(mixed, "b g n e -> b n (g e)")))


class DropPath(nn.Module):
    """Stochastic depth: while training, drop a whole branch for some of the samples of a batch.

    A kept sample is divided by the probability of keeping it, so that the mean stays what it was.
    In eval mode nothing happens.

    Shapes:
        branch: ``b n d``
        return: ``b n d``

    Raises:
        ValueError: unless 0 <= drop_rate < 1

    Source:
        Huang et al. 2016, "Deep networks with stochastic depth"
    """

    def __init__(self, drop_rate: float = 0.0):
        super().__init__()
        if not 0.0 <= drop_rate < 1.0:
            raise ValueError(f"drop_rate is {drop_rate}, expected 0 <= drop_rate < 1")
        self.drop_rate = drop_rate

    def forward(self, branch: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        if not self.training or self.drop_rate == 0.0:
            return branch
        keep_rate = 1.0 - self.drop_rate
        kept = torch.empty_like(branch[:, :1, :1]).bernoulli_(keep_rate)  # one coin a sample
        return branch * kept / keep_rate

    def extra_repr(self) -> str:
        """The rate, for print."""
        return f"drop_rate={self.drop_rate}"


class Block(nn.Module):
    """One transformer block, norms first: tokens + attention, then tokens + MLP.

    Shapes:
        tokens: ``b n d``
        return: ``b n d``

    Source:
        paper, Eq. (5)
    """

    attention_class, mlp_class = Attention, Mlp  # chapter 13 derives blocks with others

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = self.attention_class(
            dim, num_heads, qkv_bias=qkv_bias, qk_scale=qk_scale, drop_rate=drop_rate, attn_drop_rate=attn_drop_rate
        )
        self.drop_path = DropPath(drop_path_rate)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = self.mlp_class(dim, int(dim * mlp_ratio), drop_rate=drop_rate)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens)))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))
