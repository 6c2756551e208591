"""What other libraries ask of a model: its data, its stages, recomputing, cutting, other sizes (chapter 9).

The names are timm's, so that its scripts and whatever was written for its models work with these. Nothing here imports
it: ``t2t_ref.timm`` is the door.
"""

import functools
import re
from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from t2t_ref.arguments import pair
from t2t_ref.models.soft_split import check_channels
from t2t_ref.models.tokens_to_token import restructure

STEM = r"^(?!blocks|block\d|layers\.|norm\d?\.|head|(?:patch_embed|pos_embed)[2-9])"  # all before the first block
GROUPS = (  # names of parameters, and what is put behind the numbers in them; one group has one learning rate
    (r"^blocks\.(\d+)\.", None),
    (r"^block(\d+)\.(\d+)\.", None),
    (r"^layers\.(\d+)\.blocks\.(\d+)\.", None),
    (r"^(?:patch_embed|pos_embed)(\d+)\b", (0,)),
    (r"^norm(\d+)\.", (99999,)),
    (r"^layers\.(\d+)\.downsample\.", (99999,)),
    (r"^(?:norm|blocks_token_only)\.", (99999,)),
)
STAGES = (r"^(?:blocks|layers)\.(\d+)\.", r"^(?:block|norm|patch_embed|pos_embed)(\d+)\b")
RECOMPUTED = re.compile(r"tokens_to_token|blocks\.\d+|block\d+\.\d+|layers\.\d+\.blocks\.\d+")


def recomputed(part: nn.Module, *inputs):
    """The forward of a part; in training it keeps its inputs alone, and runs once more in the backward pass."""
    forward = type(part).forward
    if part.training and torch.is_grad_enabled() and not getattr(part, "recompute", False):  # fuse() does it, too
        return checkpoint(forward, part, *inputs, use_reentrant=False)
    return forward(part, *inputs)


def t2t_layers(t2t: nn.Module) -> dict[str, tuple[nn.Module, ...]]:
    """The two stages in front of the last split: the name of the layer that ends each, and what it is made of."""
    if t2t.tokens_type == "convolution":
        return {"soft_split0": (t2t.soft_split0,), "soft_split1": (t2t.soft_split1,)}
    return {"attention1": (t2t.soft_split0, t2t.attention1), "attention2": (t2t.soft_split1, t2t.attention2)}


def t2t_sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Name, width and distance of the two maps that a T2T module has on its way; nothing for other models."""
    if not hasattr(model, "tokens_to_token"):
        return {}
    names, width = t2t_layers(model.tokens_to_token), model.arguments["token_dim"]
    return {f"tokens_to_token.{name}": (width, stride) for name, stride in zip(names, (4, 8), strict=True)}


def t2t_maps(model: nn.Module, image: Tensor) -> list[Tensor]:
    """The way of an image through a T2T-ViT, with its maps at three distances.

    Shapes:
        image: b c h w
        return: b e h w, b e h w and b d h w, 4, 8 and 16 pixels apart
    """
    model.check_image(image)
    t2t, maps, inner = model.tokens_to_token, [], image
    check_channels(image, t2t.in_chans)
    for first, *layer in t2t_layers(t2t).values():
        if layer:
            grid = first.grid_size((inner.shape[-2], inner.shape[-1]))
            inner = restructure(layer[0](first(inner)), grid)
        else:
            inner = first(inner)
        maps.append(inner)
    if t2t.tokens_type == "convolution":
        tokens = rearrange(t2t.project(inner), "b d h w -> b (h w) d")
    else:
        tokens = t2t.project(t2t.soft_split2(inner))
    prefix = repeat(model.prefix_tokens(), "1 p d -> b p d", b=tokens.shape[0])
    tokens = model.pos_drop(torch.cat([prefix, tokens], dim=1) + model.position_table(image))
    for block in model.blocks:
        tokens = block(tokens)
    grid = model.grid_of((image.shape[-2], image.shape[-1]))
    return [*maps, restructure(tokens[:, model.num_prefix_tokens :], grid)]


class Adaptable(nn.Module):
    """The base of :class:`~t2t_ref.models.classifier.Classifier`. It is told there what the methods here ask for."""

    # what a photograph goes through on its way to this model, in timm's words
    preprocessing: dict = dict(
        interpolation="bicubic",
        crop_pct=0.9,
        crop_mode="center",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )

    @property
    def in_chans(self) -> int:
        """How many channels an image has."""
        return self.arguments["in_chans"]

    @property
    def head_hidden_size(self) -> int:
        """The width of what enters the head."""
        return self.num_features

    # ---- what it was made for

    @functools.cached_property
    def pretrained_cfg(self) -> dict:
        """Size and preparation of the images and the names of the layers at both ends, as timm wants to know them.

        ``first_conv`` is empty where no convolution meets the image, as in a soft split.
        """
        first = next((name for name, part in self.named_modules() if isinstance(part, nn.Conv2d)), "")
        linear = [name for name, part in self.named_modules() if isinstance(part, nn.Linear)]
        heads = tuple(name for name in linear if name.partition(".")[0] in self.head_names) or self.head_names
        return dict(
            self.preprocessing,
            input_size=(self.in_chans, *self.img_size),
            fixed_input_size=not self.dynamic_img_size,
            num_classes=self.num_classes,
            pool_size=None,
            first_conv=first if first.startswith(("patch_embed", "tokens_to_token.soft_split0")) else (),
            classifier=heads[0] if len(heads) == 1 else heads,
        )

    @functools.cached_property
    def default_cfg(self) -> dict:
        """An older name of ``pretrained_cfg``."""
        return self.pretrained_cfg

    # ---- its stages

    @property
    def stride(self) -> int:
        """How many pixels apart, down and across, the tokens of the last block are."""
        side = 16 * self.img_size[0]  # many times the size, so that what is rounded at the border does not count
        return side // self.grid_of((side, side))[0]

    def block_sizes(self) -> dict[str, tuple[int, int]]:
        """For each of ``block_outputs``: the name of the module, the width of its tokens, and how far they are apart.

        Units:
            the distance is pixels of the image
        """
        return {f"blocks.{number}": (self.embed_dim, self.stride) for number in range(self.depth)}

    def pyramid_sizes(self) -> dict[str, tuple[int, int]]:
        """The same for each of ``forward_pyramid``: of all blocks with one distance the last."""
        last = {stride: (name, (width, stride)) for name, (width, stride) in self.block_sizes().items()}
        return t2t_sizes(self) | dict(last.values())

    def forward_pyramid(self, image: Tensor) -> list[Tensor]:
        """Maps of the image from fine to coarse, as detectors and segmenters want them: one for each distance.

        A T2T-ViT has three, 4, 8 and 16 pixels apart: its two T2T layers, and its last block. No norm is applied.

        Shapes:
            image: b c h w
            return: of each, b d h w; widths and distances are those of ``pyramid_sizes``
        """
        if hasattr(self, "tokens_to_token"):
            return t2t_maps(self, image)
        names = list(self.block_sizes())
        indices = [names.index(name) for name in self.pyramid_sizes()]
        return self.forward_intermediates(image, indices, intermediates_only=True)

    @property
    def feature_info(self) -> list[dict]:
        """``block_sizes`` in timm's words."""
        sizes = self.block_sizes().items()
        return [dict(num_chs=width, reduction=stride, module=name) for name, (width, stride) in sizes]

    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns that sort the parameters by depth, for learning rates that shrink towards the image.

        Args:
            coarse: stages in place of blocks, where a model has stages
        """
        blocks = [(pattern, None) for pattern in STAGES] + [GROUPS[-1]] if coarse else list(GROUPS)
        return dict(stem=STEM, blocks=blocks)

    # ---- changes

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training: blocks and T2T module run once more in the backward pass.

        The gradients are the same to the bit, also with dropout.
        """
        for name, part in self.named_modules():
            if RECOMPUTED.fullmatch(name):
                part.__dict__.pop("forward", None)
                if enable:
                    part.forward = functools.partial(recomputed, part)

    @property
    def grad_checkpointing(self) -> bool:
        """Whether ``set_grad_checkpointing`` is on."""
        return any("forward" in vars(part) for part in self.modules())

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Take away what ``forward_intermediates`` does not need for these indices, in place.

        Args:
            indices: as those of ``forward_intermediates``

        Raises:
            ValueError: for an index that is not there
        """
        wanted = self.block_numbers(indices)
        width = list(self.block_sizes().values())[max(wanted)][0]
        self.keep_blocks(max(wanted) + 1)
        if prune_norm:
            self.norm, self.num_features = nn.Identity(), width
        if prune_head:
            self.reset_classifier(0, "" if "" in self.poolings else None)
        return wanted

    def keep_blocks(self, number: int) -> None:
        """Take away all blocks but the first ``number``."""
        self.blocks = self.blocks[:number]
        if "depth" in self.arguments:
            self.arguments = self.arguments | {"depth": number}

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Make it a model for images of another size, in place: tables of positions are resized, the rest stays.

        Units:
            both are pixels

        Raises:
            ValueError: for a size that the model cannot take, and for another patch size
        """
        own_patch = self.arguments.get("patch_size")
        if patch_size is not None and pair(patch_size) != pair(own_patch or 0):
            raise ValueError(f"patch_size is {patch_size}; a built model keeps its own, {own_patch}")
        if img_size is None or pair(img_size) == self.img_size:
            return
        with torch.device("meta"):  # what depends on the size, as the constructor computes it
            before, after = (type(self)(**(self.arguments | {"img_size": size})) for size in (self.img_size, img_size))
        new, old = after.position_tables(), self.position_tables()
        for name in new.keys() & old.keys():
            place, _, last = name.rpartition(".")
            owner = self.get_submodule(place)
            table, trained = getattr(owner, last), owner._parameters.get(last)
            table = self.resize_table(name, table.detach(), old[name], new[name])
            setattr(owner, last, table if trained is None else nn.Parameter(table, trained.requires_grad))
        own = dict(self.named_parameters())
        for name, there in after.named_parameters():  # TNT has zeros that nobody reads, one for each place
            if name in own and name not in new and not there.requires_grad and there.shape != own[name].shape:
                own[name].data = own[name].new_zeros(there.shape)
        parts = dict(self.named_modules())
        for (name, here), there in zip(before.named_modules(), after.modules(), strict=True):
            for key, value in vars(there).items():
                if isinstance(value, (int, tuple, list)) and value != vars(here)[key] and name in parts:
                    vars(parts[name])[key] = value
        self.arguments = self.arguments | {"img_size": img_size}
        for name in ("_traits", "_model_args"):  # what timm has noted of a model that it made
            if hasattr(self, name):
                setattr(self, name, getattr(self, name) | {"img_size": self.img_size})
