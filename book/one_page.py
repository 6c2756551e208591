"""T2T-ViT on one page: from pixels to logits, with torch and einops alone.

    model = t2t_vit("t2t_vit_14")               # fresh weights
    load(model, "81.5_T2T_ViT_14.pth.tar")      # or those of a released file
    logits = model(image)                       # image 1 3 224 224, logits 1 1000

b images, c channels, h w rows and columns, kh kw those of a window, n tokens, d e
widths, g heads, q k tokens that ask and are asked, m random features. The comments
give the shapes in T2T-ViT-14 at 224 x 224 pixels.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce, repeat
from torch import nn


# ---- soft split and re-structure
def soft_split(image, kernel, stride, padding):
    """The tokens, one for each window, and in how many rows the windows lie."""
    rows = (image.shape[2] + 2 * padding - kernel) // stride + 1
    windows = F.unfold(image, kernel, stride=stride, padding=padding)
    return rearrange(windows, "b d n -> b n d"), rows  # d is (c kh kw)


def restructure(tokens, rows):
    return rearrange(tokens, "b (h w) d -> b d h w", h=rows)


# ---- attention and MLP
def attention(queries, keys, values, scale):
    """Each query takes a mean of the values, by how well it fits their keys."""
    scores = einsum(queries, keys, "b g q e, b g k e -> b g q k") * scale
    weights = scores.softmax(dim=-1)  # of one query, they sum to 1
    return einsum(weights, values, "b g q k, b g k e -> b g q e")


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens):
        return self.fc2(F.gelu(self.fc1(tokens)))


# ---- a T2T layer with exact attention
class TokenAttention(nn.Module):
    def __init__(self, width, token_dim):
        super().__init__()
        self.scale = width**-0.5  # of the input, not of the head
        self.qkv = nn.Linear(width, 3 * token_dim, bias=False)
        self.proj = nn.Linear(token_dim, token_dim)

    def forward(self, tokens):  # b 3136 147
        parts = self.qkv(tokens)
        parts = rearrange(parts, "b n (three e) -> three b 1 n e", three=3)
        queries, keys, values = parts  # b 1 3136 64, a single head
        tokens = values + self.proj(attention(queries, keys, values, self.scale))
        return rearrange(tokens, "b 1 n e -> b n e")  # values were the shortcut


class TokenTransformer(nn.Module):
    def __init__(self, width, token_dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = TokenAttention(width, token_dim)
        self.norm2 = nn.LayerNorm(token_dim)
        self.mlp = Mlp(token_dim, token_dim)

    def forward(self, tokens):  # b 3136 147
        tokens = self.attn(self.norm1(tokens))  # b 3136 64
        return tokens + self.mlp(self.norm2(tokens))


# ---- a T2T layer with random features
class TokenPerformer(nn.Module):
    def __init__(self, width, token_dim):
        super().__init__()
        m = token_dim // 2  # random directions, which are drawn once and stay
        directions = nn.init.orthogonal_(torch.empty(m, token_dim)) * math.sqrt(m)
        self.register_buffer("w", directions)
        self.kqv = nn.Linear(width, 3 * token_dim)  # keys first
        self.proj = nn.Linear(token_dim, token_dim)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(token_dim)
        first, second = (nn.Linear(token_dim, token_dim) for _ in range(2))
        self.mlp = nn.Sequential(first, nn.GELU(), second)

    def features(self, tokens):  # b n e, queries or keys
        projections = einsum(tokens, self.w, "b n e, m e -> b n m")
        half_squares = reduce(tokens.square(), "b n e -> b n 1", "sum") / 2
        return (projections - half_squares).exp() / math.sqrt(len(self.w))

    def forward(self, tokens):  # b 3136 147
        parts = self.kqv(self.norm1(tokens))
        parts = rearrange(parts, "b n (three e) -> three b n e", three=3)
        keys, queries, values = parts  # b 3136 64
        keys, queries = self.features(keys), self.features(queries)  # b 3136 32
        summary = einsum(keys, values, "b n m, b n e -> b m e")  # b 32 64
        totals = reduce(keys, "b n m -> b 1 m", "sum")
        numerators = einsum(queries, summary, "b n m, b m e -> b n e")
        denominators = reduce(queries * totals, "b n m -> b n 1", "sum")
        tokens = values + self.proj(numerators / (denominators + 1e-8))
        return tokens + self.mlp(self.norm2(tokens))


# ---- tokens to token
class TokensToToken(nn.Module):
    def __init__(self, layer, token_dim, width):
        super().__init__()
        self.attention1 = layer(3 * 7 * 7, token_dim)
        self.attention2 = layer(token_dim * 3 * 3, token_dim)
        self.project = nn.Linear(token_dim * 3 * 3, width)

    def forward(self, image):  # b 3 224 224
        tokens, rows = soft_split(image, 7, stride=4, padding=2)  # b 3136 147
        image = restructure(self.attention1(tokens), rows)  # b 64 56 56
        tokens, rows = soft_split(image, 3, stride=2, padding=1)  # b 784 576
        image = restructure(self.attention2(tokens), rows)  # b 64 28 28
        tokens, rows = soft_split(image, 3, stride=2, padding=1)  # b 196 576
        return self.project(tokens)  # b 196 384


# ---- positions
def sinusoid_table(n, width):
    """Sine, cosine, sine, ... of the place of a token, from fast to slow."""
    places, channels = torch.arange(n).double(), torch.arange(width)
    speeds = 10000.0 ** (-2.0 * (channels // 2).double() / width)
    angles = rearrange(places, "n -> n 1") * speeds
    table = torch.where(channels % 2 == 0, angles.sin(), angles.cos())
    return rearrange(table.float(), "n d -> 1 n d")


# ---- a block
class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens):  # b 197 384
        pattern = "b n (three g e) -> three b g n e"
        parts = rearrange(self.qkv(tokens), pattern, three=3, g=self.heads)
        queries, keys, values = parts  # b 6 197 64
        mixed = attention(queries, keys, values, scale=queries.shape[-1] ** -0.5)
        return self.proj(rearrange(mixed, "b g n e -> b n (g e)"))


class Block(nn.Module):
    def __init__(self, width, heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, tokens):  # b 197 384
        tokens = tokens + self.attn(self.norm1(tokens))  # the tokens talk
        return tokens + self.mlp(self.norm2(tokens))  # each thinks by itself


# ---- the whole model
class T2TViT(nn.Module):
    def __init__(self, size, layer, side=224, classes=1000, token_dim=64):
        super().__init__()
        width, depth, heads, mlp_ratio = size
        self.tokens_to_token = TokensToToken(layer, token_dim, width)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        table = sinusoid_table(1 + (side // 16) ** 2, width)
        self.register_buffer("pos_embed", table)  # in the files, and never trained
        blocks = (Block(width, heads, mlp_ratio) for _ in range(depth))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, image):  # b 3 224 224
        tokens = self.tokens_to_token(image)  # b 196 384
        class_token = repeat(self.cls_token, "1 1 d -> b 1 d", b=len(image))
        tokens = torch.cat([class_token, tokens], dim=1)  # b 197 384
        tokens = tokens + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens)[:, 0])  # b 1000


# ---- the sizes of the paper
SIZES = {  # width, depth, heads, hidden width of the MLP / width
    "7": (256, 7, 4, 2), "10": (256, 10, 4, 2), "12": (256, 12, 4, 2),
    "14": (384, 14, 6, 3), "19": (448, 19, 7, 3), "24": (512, 24, 8, 3),
}  # fmt: skip


def t2t_vit(name="t2t_vit_14", **options):
    """For example t2t_vit_7, or t2t_vit_t_14 with exact attention in front."""
    layer = TokenTransformer if "_t_" in name else TokenPerformer
    return T2TViT(SIZES[name.rpartition("_")[2]], layer, **options).eval()


# ---- weights from a file
def load(model, path):
    """The averaged weights of the file, or those that it has."""
    torch.serialization.add_safe_globals([argparse.Namespace])  # options of a run
    file = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(file.get("state_dict_ema", file))
    return model.eval()
