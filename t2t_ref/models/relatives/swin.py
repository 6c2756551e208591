"""Swin: attention in windows of 7x7 tokens, which every second block moves (chapter 22; Liu et al. 2021)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from t2t_ref.models.backbone import Attention, DropPath, Mlp
from t2t_ref.models.classifier import init_weights, remember_arguments
from t2t_ref.models.relatives.pyramid import ConvEmbed, Pyramid


def to_windows(features: Float[Tensor, "b h w d"], window_size: tuple[int, int]) -> Float[Tensor, "windows n d"]:
    """Cut a grid of tokens into windows, row by row; windows of one image stand side by side.

    Shapes:
        features: ``b h w d``
        return: ``windows n d``, windows = b times those of an image; n = kh kw tokens
    """
    kh, kw = window_size
    return rearrange(features, "b (h kh) (w kw) d -> (b h w) (kh kw) d", kh=kh, kw=kw)


def from_windows(
    windows: Float[Tensor, "windows n d"], window_size: tuple[int, int], grid: tuple[int, int]
) -> Float[Tensor, "b h w d"]:
    """The way back: windows to a grid of tokens.

    Shapes:
        windows: windows n d
        return: ``b h w d``, (h, w) = grid
    """
    (kh, kw), (rows, columns) = window_size, grid
    pattern = "(b h w) (kh kw) d -> b (h kh) (w kw) d"
    return rearrange(windows, pattern, kh=kh, kw=kw, h=rows // kh, w=columns // kw)


def relative_position_index(window_size: tuple[int, int], device=None) -> Int[Tensor, "q k"]:
    """Which row of the bias table belongs to a query and a key of a window: the offset query minus key, as one number.

    Shapes:
        return: ``q k``, (dy + kh - 1) * (2 kw - 1) + dx + kw - 1

    Source:
        paper, Sec. 3.2
    """
    kh, kw = window_size
    y = repeat(torch.arange(kh, device=device), "kh -> (kh kw)", kw=kw)
    x = repeat(torch.arange(kw, device=device), "kw -> (kh kw)", kh=kh)
    dy, dx = (rearrange(place, "q -> q 1") - rearrange(place, "k -> 1 k") for place in (y, x))
    return (dy + kh - 1) * (2 * kw - 1) + dx + kw - 1


def shift_mask(
    grid: tuple[int, int], window_size: tuple[int, int], shift: int, device=None
) -> Bool[Tensor, "windows q k"]:
    """Which pairs in a window only the roll has brought together: one came over the border of the image, one did not.

    Shapes:
        return: ``windows q k``, of one image, row by row; true where there shall be no attention

    Source:
        paper, Fig. 4
    """
    (rows, columns), (kh, kw) = grid, window_size
    came_down = torch.arange(rows, device=device) >= rows - shift
    came_right = torch.arange(columns, device=device) >= columns - shift
    region = 2 * rearrange(came_down, "h -> h 1") + rearrange(came_right, "w -> 1 w")
    region = rearrange(region, "(h kh) (w kw) -> (h w) (kh kw)", kh=kh, kw=kw)
    return rearrange(region, "windows q -> windows q 1") != rearrange(region, "windows k -> windows 1 k")


class WindowAttention(Attention):
    """Self-attention inside each window, with a learned bias for each offset of two tokens.

    Shapes:
        windows: ``windows n d``, windows = those of all images, of one image side by side
        mask: ``s q k``, of one image; true where there shall be no attention
        return: windows n d

    Args:
        window_size: (rows, columns) of tokens
        **options: those of :class:`~t2t_ref.models.backbone.Attention`

    Source:
        paper, Eq. (4); authors' code
    """

    def __init__(self, dim: int, num_heads: int, *, window_size: tuple[int, int], qkv_bias: bool = True, **options):
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, **options)
        self.window_size = kh, kw = window_size
        table = torch.zeros((2 * kh - 1) * (2 * kw - 1), num_heads)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))

    def bias(self, mask: Bool[Tensor, "s q k"] | None) -> Float[Tensor, "s g q k"]:
        """What is added to the scores: the bias of each offset, and -100 where the mask forbids attention.

        Shapes:
            mask: ``s q k``, or None
            return: ``s g q k``, s = 1 without a mask
        """
        table = self.relative_position_bias_table
        index = relative_position_index(self.window_size, table.device)
        bias = rearrange(table[index], "q k g -> 1 g q k")
        return bias if mask is None else bias - 100.0 * rearrange(mask, "s q k -> s 1 q k")

    def attention_weights(
        self, windows: Float[Tensor, "windows n d"], mask: Bool[Tensor, "s q k"] | None = None
    ) -> Float[Tensor, "windows g q k"]:
        """The weights that ``forward``, given the same, mixes the values by and never holds, for those who want to see.

        Shapes:
            windows: windows n d
            mask: ``s q k``
            return: ``windows g q k``, rows sum to 1
        """
        queries, keys, _ = self.split_heads(windows)
        scores = einsum(queries, keys, "windows g q e, windows g k e -> windows g q k") * self.scale
        bias = self.bias(mask).to(scores.dtype)
        scores = rearrange(scores, "(b s) g q k -> b s g q k", s=bias.shape[0]) + bias
        return rearrange(scores, "b s g q k -> (b s) g q k").softmax(dim=-1)

    def forward(
        self, windows: Float[Tensor, "windows n d"], mask: Bool[Tensor, "s q k"] | None = None
    ) -> Float[Tensor, "windows n d"]:
        queries, keys, values = self.split_heads(windows)
        bias = self.bias(mask).to(queries.dtype)
        # as many heads as windows and heads: so one bias, without a copy for each image, serves them all
        s = bias.shape[0]
        queries, keys, values = (rearrange(x, "(b s) g n e -> b (s g) n e", s=s) for x in (queries, keys, values))
        mixed = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=rearrange(bias, "s g q k -> 1 (s g) q k"),
            dropout_p=self.attn_drop_rate if self.training else 0.0,
            scale=self.scale,
        )
        return self.proj_drop(self.proj(rearrange(mixed, "b (s g) n e -> (b s) n (g e)", s=s)))


class SwinBlock(nn.Module):
    """A transformer block with :class:`WindowAttention`, in windows that may be moved.

    A grid no larger than the window is one window, or a row of them, and is not moved.

    Shapes:
        tokens: ``b n d``, on a grid of rows and columns, tiled by the windows
        return: ``b n d``

    Units:
        window_size and shift_size are tokens

    Source:
        paper, Eq. (3) and Fig. 4; authors' code
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int = 7,
        shift_size: int = 0,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        **attention,
    ):
        super().__init__()
        self.window_size = (window_size, window_size)
        self.shift_size = shift_size
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window_size=self.window_size, drop_rate=drop_rate, **attention)
        self.drop_path = DropPath(drop_path_rate)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop_rate=drop_rate)

    def attend(self, tokens: Float[Tensor, "b n d"], grid: tuple[int, int]) -> Float[Tensor, "b n d"]:
        """Roll the grid, attend in windows, roll it back.

        Shapes:
            tokens: ``b n d``
            return: ``b n d``
        """
        shift, mask = self.shift_size, None
        features = rearrange(tokens, "b (h w) d -> b h w d", h=grid[0], w=grid[1])
        if min(grid) <= self.window_size[0]:
            shift = 0
        if shift:
            features = features.roll((-shift, -shift), dims=(1, 2))
            mask = shift_mask(grid, self.window_size, shift, tokens.device)
        windows = self.attn(to_windows(features, self.window_size), mask)
        features = from_windows(windows, self.window_size, grid)
        if shift:
            features = features.roll((shift, shift), dims=(1, 2))
        return rearrange(features, "b h w d -> b (h w) d")

    def forward(self, tokens: Float[Tensor, "b n d"], grid: tuple[int, int]) -> Float[Tensor, "b n d"]:
        tokens = tokens + self.drop_path(self.attend(self.norm1(tokens), grid))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))


class PatchMerging(nn.Module):
    """Join each square of 2x2 tokens to one of twice the width.

    The four lie side by side column by column: (0, 0), (1, 0), (0, 1), (1, 1) as (row, column).

    Shapes:
        tokens: ``b n d``, on a grid of rows and columns, both even
        return: ``b k e``, k = n / 4, e = 2 d

    Source:
        authors' code; the norm is not in the paper
    """

    def __init__(self, dim: int):
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, tokens: Float[Tensor, "b n d"], grid: tuple[int, int]) -> Float[Tensor, "b k e"]:
        rows, columns = grid
        pattern = "b (h kh w kw) d -> b (h w) (kw kh d)"
        return self.reduction(self.norm(rearrange(tokens, pattern, h=rows // 2, w=columns // 2, kh=2, kw=2)))


class SwinStage(nn.Module):
    """The blocks of a stage. Beside them stands ``downsample``, the merging that leads to the next stage, or None.

    Shapes:
        tokens: ``b n d``, on a grid of rows and columns
        return: ``b n d``
    """

    def __init__(self, blocks: list[SwinBlock], downsample: PatchMerging | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, tokens: Float[Tensor, "b n d"], grid: tuple[int, int]) -> Float[Tensor, "b n d"]:
        for block in self.blocks:
            tokens = block(tokens, grid)
        return tokens


class Swin(Pyramid):
    """Swin Transformer: stages of window attention with patch merging in between.

    Shapes:
        image: ``b c h w``
        return: ``b classes``, logits; with num_classes=0 the mean of the last tokens, b d

    Args:
        img_size: an int or (height, width)
        ape: add a learned position table
        patch_norm: put a norm behind the patch embedding

    Units:
        img_size is pixels; window_size is tokens

    Note:
        lists have a number for each stage

    Raises:
        ValueError: for a wrong number of channels, for a size whose grids the windows do not tile or that has no
            squares of 2x2 tokens to merge, for a size other than img_size unless dynamic_img_size

    Source:
        paper, Sec. 3; ``SwinTransformer`` of the authors' code, with the same state-dict names, but that index and mask
        of the windows are computed in the forward
    """

    computed = ("relative_position_index", "attn_mask")

    @remember_arguments
    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        ape: bool = False,
        patch_norm: bool = True,
        dynamic_img_size: bool = False,
    ):
        super().__init__(img_size, num_classes, dynamic_img_size)
        if len(depths) != len(num_heads):
            raise ValueError(f"depths {tuple(depths)} and num_heads {tuple(num_heads)} differ in the number of stages")
        self.embed_dim = embed_dim
        self.window_size = window_size
        self.reductions = (1,) * len(depths)
        self.num_features = embed_dim * 2 ** (len(depths) - 1)

        self.patch_embed = ConvEmbed(in_chans, embed_dim, kernel=patch_size, stride=patch_size, patch_norm=patch_norm)
        self.grids = self.grids_of(self.img_size)
        self.pos_drop = nn.Dropout(drop_rate)
        self.absolute_pos_embed = None
        if ape:
            table = nn.Parameter(torch.zeros(1, math.prod(self.grids[0]), embed_dim))
            self.absolute_pos_embed = nn.init.trunc_normal_(table, std=0.02)

        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.layers = nn.ModuleList()
        for stage, grid in enumerate(self.grids):
            dim = embed_dim * 2**stage
            blocks = [
                SwinBlock(
                    dim,
                    num_heads[stage],
                    window_size=self.window_of(grid),
                    shift_size=window_size // 2 if index % 2 else 0,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    qk_scale=qk_scale,
                    drop_rate=drop_rate,
                    attn_drop_rate=attn_drop_rate,
                    drop_path_rate=next(rates),
                )
                for index in range(depths[stage])
            ]
            self.layers.append(SwinStage(blocks, PatchMerging(dim) if stage + 1 < len(depths) else None))
        self.norm = nn.LayerNorm(self.num_features)
        self.head = self.make_head()
        self.apply(init_weights)

    def run_stage(self, stage: int, below: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """One stage, counted from 0: patch embedding and position table, or merging; then the blocks.

        Shapes:
            below: ``b c h w``, the image, or the stage below laid out as one
            return: ``b n d``
        """
        grid = (below.shape[-2], below.shape[-1])
        if stage == 0:
            tokens, grid = self.patch_embed(below), self.patch_embed.grid_size(grid)
            if self.absolute_pos_embed is not None:
                table = self.resize_table("absolute_pos_embed", self.absolute_pos_embed, self.grids[0], grid)
                tokens = tokens + table
            tokens = self.pos_drop(tokens)
        else:
            tokens = self.layers[stage - 1].downsample(rearrange(below, "b d h w -> b (h w) d"), grid)
            grid = (grid[0] // 2, grid[1] // 2)
        return self.layers[stage](tokens, grid)

    def grids_of(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """(rows, columns) of the tokens of every stage, for an image of (h, w) pixels.

        Raises:
            ValueError: if windows do not tile one of them, or one that is to be merged is odd
        """
        (h, w), grids = size, []
        rows, columns = self.patch_embed.grid_size(size)
        for stage in range(1, self.depth + 1):
            window, where = self.window_of((rows, columns)), f"stage {stage} has a grid of {rows}x{columns} tokens"
            if rows % window or columns % window:
                raise ValueError(f"an image of {h}x{w} pixels: {where}, which windows of {window}x{window} do not tile")
            if stage < self.depth and (rows % 2 or columns % 2):
                raise ValueError(f"an image of {h}x{w} pixels: {where}, which is odd and cannot be merged 2x2")
            grids.append((rows, columns))
            rows, columns = rows // 2, columns // 2
        return grids

    def window_of(self, grid: tuple[int, int]) -> int:
        """The side of a window on a grid: window_size, but no longer than the grid."""
        return min(self.window_size, *grid)

    def check_image(self, image: Float[Tensor, "b c h w"]) -> None:
        """Refuse an image that this model cannot take, and say what it takes.

        Raises:
            ValueError: as every model, and if the image is so small, or so large, that its windows are others
        """
        super().check_image(image)
        windows, own = (
            [self.window_of(grid) for grid in grids]
            for grids in (self.grids_of((image.shape[-2], image.shape[-1])), self.grids)
        )
        if windows != own:
            raise ValueError(f"the windows of the stages would be {windows} tokens wide, those of this model are {own}")

    def position_tables(self, size: tuple[int, int] | None = None) -> dict[str, tuple[int, int]]:
        """The bias table of every block and its (rows, columns) of offsets, and the position table if there is one."""
        grids = self.grids if size is None else self.grids_of(size)
        tables = {} if self.absolute_pos_embed is None else {"absolute_pos_embed": grids[0]}
        for stage, grid in enumerate(grids):
            side = 2 * self.window_of(grid) - 1
            for block, _ in enumerate(self.layers[stage].blocks):
                tables[f"layers.{stage}.blocks.{block}.attn.relative_position_bias_table"] = (side, side)
        return tables

    def resize_table(self, name: str, table: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
        """A table fitted to another grid, bicubically, or a bias table to other windows, head by head.

        Raises:
            ValueError: if ``grid`` does not fit the table

        Source:
            authors' loader, for the bias tables
        """
        if name == "absolute_pos_embed":
            return super().resize_table(name, table, grid, new_grid)
        table = super().resize_table(name, rearrange(table, "n g -> 1 n g"), grid, new_grid)
        return rearrange(table, "1 n g -> n g")

    def load_state_dict(self, state_dict, *arguments, **named):
        """As every module; also from the authors' files, which hold index and mask of the windows, too."""
        kept = {name: entry for name, entry in state_dict.items() if name.rpartition(".")[2] not in self.computed}
        return super().load_state_dict(kept, *arguments, **named)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone, beside biases and norms."""
        spared = ("absolute_pos_embed", "relative_position_bias_table")
        return {name for name, _ in self.named_parameters() if name.endswith(spared)}


@dataclass(frozen=True)
class SwinVariant:
    """The sizes that tell one Swin from another: arguments of its class, ``model``."""

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    model: type[Swin] = Swin


VARIANTS = {  # paper, Sec. 3.3
    "swin_tiny_patch4_window7_224": SwinVariant(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "swin_small_patch4_window7_224": SwinVariant(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "swin_base_patch4_window7_224": SwinVariant(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
}
