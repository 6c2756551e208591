"""What the pyramids PVT, PVT v2 and Swin share: an embedding for each stage, and maps of several sizes (chapter 20)."""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from t2t_ref.models.soft_split import grid_size


class ConvEmbed(nn.Module):
    """A convolution with a norm behind it: an image, or the tokens of the stage before laid out as one, to tokens.

    Shapes:  image   b c h w
             return  b n d     row by row
    Units:   kernel, stride and padding are pixels; rows and columns that fill no window are left out
    Raises:  ValueError if the number of channels is wrong
    Source:  the authors of PVT, PVT v2 and Swin, all with an epsilon of 1e-5 in this norm
    """

    def __init__(
        self, in_chans: int, embed_dim: int, *, kernel: int, stride: int, padding: int = 0, patch_norm: bool = True
    ):
        super().__init__()
        self.in_chans = in_chans
        self.kernel, self.stride, self.padding = kernel, stride, padding
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel, stride=stride, padding=padding)
        self.norm = nn.LayerNorm(embed_dim) if patch_norm else nn.Identity()

    def grid_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the tokens of an image of (h, w) pixels."""
        return grid_size(size, self.kernel, self.stride, self.padding)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        if image.shape[1] != self.in_chans:
            raise ValueError(f"the image has {image.shape[1]} channels, expected in_chans={self.in_chans}")
        return self.norm(rearrange(self.proj(image), "b d h w -> b (h w) d"))
