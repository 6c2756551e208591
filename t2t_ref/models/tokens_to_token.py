"""The tokens-to-token module: three soft splits with two T2T layers between them (chapter 6; paper, Sec. 3.1)."""

from functools import partial

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from t2t_ref.arguments import check_known, pair
from t2t_ref.models.soft_split import SoftSplit, check_channels, grid_size
from t2t_ref.models.token_performer import TokenPerformer
from t2t_ref.models.token_transformer import TokenTransformer

SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))  # kernel, stride, padding; paper Sec. 3.3, padding from the code
TOKENS_TYPES = ("performer", "transformer", "convolution")


def token_grid(size: int | tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of the tokens that the three splits leave of an image: 14 x 14 of 224 x 224.

    Raises:
        ValueError: if not even one token is left

    Source:
        paper, Eq. (3), three times
    """
    grid = pair(size)
    for kernel, stride, padding in SPLITS:
        grid = grid_size(grid, kernel, stride, padding)
    return grid


def restructure(tokens: Float[Tensor, "b n d"], grid: tuple[int, int]) -> Float[Tensor, "b d h w"]:
    """Lay tokens out as an image again: token number row * w + column becomes the pixel (row, column).

    Shapes:
        tokens: ``b n d``, n = h w
        grid: ``(h, w)``
        return: ``b d h w``

    Raises:
        ValueError: if the grid does not have as many cells as there are tokens

    Source:
        paper, Eq. (2)
    """
    h, w = grid
    if tokens.shape[1] != h * w:
        raise ValueError(f"{tokens.shape[1]} tokens do not fill a grid of {h}x{w} = {h * w}")
    return rearrange(tokens, "b (h w) d -> b d h w", h=h, w=w)


class TokensToToken(nn.Module):
    """Image to tokens, in three soft splits of stride 4, 2 and 2.

    Shapes:
        image: ``b c h w``
        return: ``b n d``, n = 196 for 224 x 224 pixels, d = embed_dim

    Args:
        img_size: an int or (height, width), the size that ``grid`` and ``num_patches`` are stated for; the module
            itself takes any size that leaves a token

    Note:
        compiled with the debugging backend "aot_eager", a performer with dropout fails in the backward pass. Up to
        torch 2.13 at least, that backend takes the gradient of a dropout for contiguous, which it is not where tokens
        become an image: a linear layer, a dropout, a transpose and F.unfold are enough. The default backend is not
        concerned, and performer_drop_rate=0 helps

    Raises:
        ValueError: for an unknown tokens_type, a size that leaves no token, a wrong number of channels

    Source:
        paper, Eq. (4) and Fig. 4; ``T2T_module`` of the authors' code. tokens_type "convolution" is the T2T-ViT_c of
        Table 7: three convolutions of the same kernels and strides, with nothing between them; the authors define its
        layers but left its forward out.
    """

    door_notes = {"soft_split1": "re-structured", "soft_split2": "re-structured"}  # for shape_table

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        tokens_type: str = "performer",
        in_chans: int = 3,
        *,
        embed_dim: int = 768,
        token_dim: int = 64,
        performer_drop_rate: float = 0.1,
        performer_epsilon: float = 1e-8,
    ):
        super().__init__()
        check_known("tokens_type", tokens_type, TOKENS_TYPES)
        self.tokens_type = tokens_type
        self.in_chans = in_chans
        self.grid = token_grid(img_size)
        self.num_patches = self.grid[0] * self.grid[1]
        (k0, s0, p0), (k1, s1, p1), (k2, s2, p2) = SPLITS
        if tokens_type == "convolution":
            self.soft_split0 = nn.Conv2d(in_chans, token_dim, k0, s0, p0)
            self.soft_split1 = nn.Conv2d(token_dim, token_dim, k1, s1, p1)
            self.project = nn.Conv2d(token_dim, embed_dim, k2, s2, p2)
            return
        layer = TokenTransformer
        if tokens_type == "performer":
            layer = partial(TokenPerformer, drop_rate=performer_drop_rate, epsilon=performer_epsilon)
        self.soft_split0 = SoftSplit(k0, s0, p0)
        self.soft_split1 = SoftSplit(k1, s1, p1)
        self.soft_split2 = SoftSplit(k2, s2, p2)
        self.attention1 = layer(in_chans * k0 * k0, token_dim)
        self.attention2 = layer(token_dim * k1 * k1, token_dim)
        self.project = nn.Linear(token_dim * k2 * k2, embed_dim)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        check_channels(image, self.in_chans)
        if self.tokens_type == "convolution":
            image = self.project(self.soft_split1(self.soft_split0(image)))
            return rearrange(image, "b d h w -> b (h w) d")

        grid = self.soft_split0.grid_size((image.shape[-2], image.shape[-1]))
        tokens = self.attention1(self.soft_split0(image))
        image = restructure(tokens, grid)

        grid = self.soft_split1.grid_size(grid)
        tokens = self.attention2(self.soft_split1(image))
        image = restructure(tokens, grid)

        return self.project(self.soft_split2(image))
