"""Our models for timm: what ``t2t_ref.timm``, the door, puts into its registry (chapter 9).

A name that timm has already is left alone. All else is registered as timm's own models are: with a ``pretrained_cfg``,
with a filter for weights, and with ``features_only``. timm is imported by the functions here, not with the module.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from types import ModuleType

import einops
import torch
from torch import Tensor, nn

from t2t_ref.models import VARIANTS, build
from t2t_ref.models.classifier import Classifier, check_size
from t2t_ref.models.cnn_designs import GhostAttention
from t2t_ref.models.fused import FusedTokensToToken
from t2t_ref.models.relatives.tnt import PixelEmbed
from t2t_ref.models.tokens_to_token import TokensToToken
from t2t_ref.models.vit import PatchEmbed
from t2t_ref.weights.channels import adapt_channels
from t2t_ref.weights.files import read_weights
from t2t_ref.weights.loading import rename, resize_tables, shapes_of
from t2t_ref.weights.released import RELEASED


class PyramidFeatures(nn.Module):
    """Images in, a list of maps out: what ``features_only=True`` gives of a model with maps of several distances.

    Shapes:
        image: b c h w
        return: of each, b d h w

    Args:
        out_indices: which maps of ``forward_pyramid``, counted from the finest; an int n means the n coarsest

    Raises:
        ValueError: for a map that is not there
    """

    def __init__(self, model: Classifier, out_indices: int | Sequence[int] = (0, 1, 2), output_fmt: str = "NCHW"):
        super().__init__()
        sizes, number = model.pyramid_sizes(), len(model.pyramid_sizes())
        wanted = range(number - out_indices, number) if isinstance(out_indices, int) else out_indices
        if output_fmt != "NCHW" or not all(-number <= index < number for index in wanted):
            raise ValueError(
                f"maps 0 to {number - 1} are there, as NCHW; found out_indices={tuple(wanted)}, output_fmt={output_fmt}"
            )
        self.out_indices = tuple(index % number for index in wanted)
        from timm.models import FeatureInfo

        info = [dict(num_chs=width, reduction=stride, module=name) for name, (width, stride) in sizes.items()]
        self.feature_info = FeatureInfo(info, self.out_indices)
        model.prune_intermediate_layers(1, prune_norm=True)
        self.model = model

    def forward(self, image: Tensor) -> list[Tensor]:
        maps = self.model.forward_pyramid(image)
        return [maps[index] for index in self.out_indices]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As the model's."""
        self.model.set_grad_checkpointing(enable)


def filter_weights(weights: dict, model: Classifier) -> dict:
    """What timm has read of a file, made to fit: names, tables of positions, channels. timm sees to the head.

    Files are those that :func:`~t2t_ref.weights.loading.load_checkpoint` reads.

    Raises:
        ValueError: for what holds no weights
    """
    stored = read_weights(weights)
    own = shapes_of(model.state_dict())
    renamed, _ = rename(stored.weights, own, True, stored.origin)
    renamed = {name: value for name, value in renamed.items() if name.rpartition(".")[2] not in model.computed}
    resized, _ = resize_tables(renamed, own, model, None, stored.arguments)
    return adapt_channels(renamed | resized, model.in_chans)


def entry_point(name: str, module: str) -> Callable[..., nn.Module]:
    """The function that timm calls for a name. ``module`` is where timm shall believe it to be defined."""
    from timm.models import build_model_with_cfg

    def create(pretrained: bool = False, *, device=None, dtype=None, **arguments) -> nn.Module:
        features = dict(feature_cls="getter", out_indices=3)
        with torch.device("meta"):
            levels = len(build(name).pyramid_sizes()) if arguments.get("features_only") else 1
        if levels > 1 and "feature_cls" not in arguments:
            features = dict(feature_cls=PyramidFeatures, out_indices=levels)
        with torch.device(device) if device is not None else nullcontext():
            model = build_model_with_cfg(
                partial(build, name),
                name,
                pretrained,
                pretrained_filter_fn=filter_weights,
                feature_cfg=features,
                **arguments,
            )
        return model.to(dtype) if dtype is not None else model

    create.__name__, create.__qualname__, create.__module__ = name, name, module
    create.__doc__ = f"{VARIANTS[name].model.__name__}, the variant {name} of t2t_ref."
    return create


def cfgs_of(name: str) -> dict[str, dict]:
    """For a variant, timm's ``pretrained_cfg`` by name and tag: one for each released file, or one without weights."""
    with torch.device("meta"):
        own = build(name).pretrained_cfg
    own.pop("architecture")
    released = [row for row in RELEASED if row.model == name and row.in_create_model]
    tags = ["yitu_in1k" + (f"_{row.pixels}" if row.pixels != 224 else "") for row in released]
    return {f"{name}.{tag}": own | row.cfg for tag, row in zip(tags, released, strict=True)} or {name: own}


def register(door: ModuleType) -> None:
    """Give timm all variants that it lacks, and tell its tracer which functions and layers are one step.

    The models are entered as those of ``door``, which gets what timm looks for in a module: ``default_cfgs``, and a
    function for each model, by its name.

    Raises:
        ImportError: with the remedy, without timm
    """
    try:
        import timm
        from timm.models import (
            generate_default_cfgs,
            register_model,
            register_notrace_function,
            register_notrace_module,
        )
    except ImportError as error:
        raise ImportError(f'this is the door to timm: pip install "t2t-ref[timm]" ({error})') from error

    names = [name for name in VARIANTS if not timm.is_model(name)]
    door.default_cfgs = generate_default_cfgs({tag: cfg for name in names for tag, cfg in cfgs_of(name).items()})
    for name in names:
        setattr(door, name, register_model(entry_point(name, door.__name__)))
    for function in (einops.rearrange, einops.repeat, einops.reduce, einops.einsum, check_size):
        register_notrace_function(function)
    for module in (TokensToToken, FusedTokensToToken, PatchEmbed, PixelEmbed, GhostAttention):
        register_notrace_module(module)
