"""What is compared: the experiments of chapters 11 to 13 and 24 as tables of plain values, and the models they name.

An arm is a table: ``kind`` picks the model, ``ARM_OPTIONS`` are read here, the rest are arguments of the model. An
:class:`Experiment` is its arms and the terms that hold for all of them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from t2t_ref.arguments import check_known
from t2t_ref.create import create_model
from t2t_ref.data.digits import ScatteredDigits
from t2t_ref.data.sources import TEST_SAMPLES
from t2t_ref.experiments.resnet import ResNet
from t2t_ref.inspection import eval_without_gradients, tap
from t2t_ref.models.position import sinusoid_table
from t2t_ref.models.token_performer import TokenPerformer, log_features
from t2t_ref.train import Recipe, find_recipe

MEAN, STD = 0.4, 0.25  # of the pixels of scattered digits, roughly
DATA = dict(size=64, digit_size=(40, 56), polarity="light", contrast=0.7, clutter=0, noise=0.05)


def scattered(contrast: float, **changes) -> Recipe:
    """The recipe of all runs on scattered digits: AdamW, one epoch of warm-up, a cosine to 0, clipped gradients."""
    options = {name: value for name, value in DATA.items() if name != "size"} | dict(contrast=contrast)
    same = dict(
        data_options=tuple(options.items()), img_size=DATA["size"], weight_decay=0.05, min_lr=0.0, warmup_epochs=1,
        cooldown_epochs=0, lr_per_update=True, clip_grad=1.0, mean=3 * (MEAN,), std=3 * (STD,), save_every=0,
        log_every=10, test_split="val",
    )  # fmt: skip
    return find_recipe("scattered-digits", same | changes)


LONG = scattered(DATA["contrast"], epochs=8, epoch_samples=5000, batch_size=50)  # 40,000 images
CENTRED = find_recipe("digits", dict(epochs=10, smoothing=0.0, test_split="val"))  # 1,184 images, ten times


@dataclass(frozen=True)
class Experiment:
    """What is compared, and on which terms.

    Note:
        recipe is what all arms share; an arm sets the model. More rates than one are all tried with every search seed.
        Then each of seeds trains the arm. tested is the number of test digits. watch(model, update) may return numbers
        to be kept, look(model) describes a model before and after training, keep(label, model, recipe, run, folder)
        stores what the first seed has trained; about is what the file says of such numbers; cpu keeps off any GPU
    """

    arms: dict[str, dict]
    recipe: Recipe = LONG
    rates: tuple[float, ...] = (5e-4, 1e-3)
    search_seeds: tuple[int, ...] = (100, 101)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tested: int = TEST_SAMPLES
    watch: Callable[[nn.Module, int], dict | None] | None = None
    look: Callable[[nn.Module], dict] | None = None
    keep: Callable[[str, nn.Module, Recipe, dict, Path], object] | None = None
    cpu: bool = True
    about: dict = field(default_factory=dict)


# arms

BACKBONE = dict(embed_dim=96, depth=4, num_heads=4, mlp_ratio=2.0)
# dropout in the performer alone would be one more difference between the arms
T2T = BACKBONE | dict(token_dim=32, performer_drop_rate=0.0)
DEEP, WIDE = dict(embed_dim=64, num_heads=2), dict(embed_dim=132, num_heads=4, depth=2)
SLIM = dict(embed_dim=80)  # about the parameters of a ghost model, without ghosts

# by name, so that the recipe of a run says which model it trains
CLASSES = {"cifar10": 10, "cifar100": 100}  # the digits have 10
MODELS = {
    "t2t": "t2t_vit_7",
    "t2t ghost": "t2t_vit_16_ghost",
    "vit": "vit_small_patch16",
    "vit se": "vit_small_patch16_se",
    "vit ghost": "vit_small_patch16_ghost",
    "vit dense": "vit_small_patch16_dense",
    "resnet": "resnet",  # of this folder
    "deit": "deit_tiny_patch16_224",
    "tnt": "tnt_s_patch16_224",
    "pvt": "pvt_tiny",
    "pvt v2": "pvt_v2_b0",
    "swin": "swin_tiny_patch4_window7_224",
    "patchconvnet": "patchconvnet_s60",
}
ARM_OPTIONS = ("kind", "position", "token_attention", "distinct")
VIT_ARM = dict(kind="vit", qkv_bias=False, **BACKBONE)
PERFORMER = dict(kind="t2t", tokens_type="performer", **T2T)
VIT_SINUSOID = VIT_ARM | dict(position="sinusoid")
CONVOLUTIONS = dict(kind="t2t", tokens_type="convolution", **T2T)
DENSE = {name: value for name, value in VIT_SINUSOID.items() if name != "depth"} | dict(  # of about equal size
    kind="vit dense", embed_dim=80, depths=[2, 2], growth_rate=32
)
CENTRED_SIZES = dict(depth=6, num_heads=3)
PYRAMID = dict(depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 4], mlp_ratios=[2, 2, 2, 2], qkv_bias=True)
RELATIVES = {  # each as it is, with about the parameters of T2T-ViT
    "DeiT": dict(kind="deit", **BACKBONE),
    "TNT": dict(kind="tnt", outer_dim=92, inner_dim=12, depth=4, outer_num_heads=4, inner_num_heads=2, mlp_ratio=2.0),
    "PVT": dict(kind="pvt", embed_dims=[24, 48, 80, 120], **PYRAMID),
    "PVT v2": dict(kind="pvt v2", embed_dims=[24, 48, 72, 108], **PYRAMID),
    "Swin": dict(kind="swin", embed_dim=32, depths=[1, 2, 2], num_heads=[1, 2, 4], window_size=4, mlp_ratio=2.0),
    "PatchConvNet": dict(kind="patchconvnet", embed_dim=96, depth=9),
}

ABLATIONS: dict[str, dict[str, dict]] = {
    # what each ingredient adds. T2T comes with a sinusoid and ViT with a learned table, so that the table is an arm of
    # its own; and the attention of the T2T layers as released, without epsilon, exact, and not there at all
    "tokenisers": {
        "hard split": VIT_ARM,
        "hard split, sinusoid": VIT_SINUSOID,
        "three convolutions": CONVOLUTIONS,
        "T2T, performer": PERFORMER,
        "T2T, epsilon 0": PERFORMER | dict(performer_epsilon=0.0),
        "T2T, transformer": PERFORMER | dict(tokens_type="transformer"),
        "T2T, values alone": PERFORMER | dict(token_attention=False),
    },
    "deep_narrow": {
        "T2T, deep": PERFORMER | DEEP | dict(depth=9),
        "T2T, wide": PERFORMER | WIDE,
        "hard split, deep": VIT_SINUSOID | DEEP | dict(depth=10),
        "hard split, wide": VIT_SINUSOID | WIDE,
    },
    "positions": {
        "T2T, sinusoid": PERFORMER,
        "T2T, learned": PERFORMER | dict(position="learned"),
        "T2T, none": PERFORMER | dict(position="none"),
        "hard split, sinusoid": VIT_SINUSOID,
        "hard split, learned": VIT_ARM,
        "hard split, none": VIT_ARM | dict(position="none"),
    },
    "sample_efficiency": {
        f"{name}, {'endless' if n is None else f'{n} images'}": arm if n is None else arm | dict(distinct=n)
        for name, arm in {"T2T": PERFORMER, "hard split": VIT_SINUSOID, "convolutions": CONVOLUTIONS}.items()
        for n in (1000, 5000, None)
    },
    "cnn_designs": {
        "plain": VIT_SINUSOID,
        "SE": VIT_SINUSOID | dict(kind="vit se"),
        "12 heads": VIT_SINUSOID | dict(num_heads=12),
        "ghost": VIT_SINUSOID | dict(kind="vit ghost"),
        "slim": VIT_SINUSOID | SLIM,
        "dense": DENSE,
    },
}

# models


def recipe_of(values: dict, lr: float, seed: int, recipe: Recipe = LONG, **changes) -> Recipe:
    """The recipe of one run of an arm.

    Raises:
        ValueError: for an unknown kind
    """
    check_known("kind of model", values["kind"], list(MODELS))
    options = {name: value for name, value in values.items() if name not in ARM_OPTIONS}
    changes = dict(model=MODELS[values["kind"]], model_options=tuple(options.items()), lr=lr, seed=seed) | changes
    return replace(recipe, **changes)


def build_model(values: dict, num_classes: int = 10, img_size: int = DATA["size"]) -> nn.Module:
    """The model of an arm, with fresh weights from torch's global generator."""
    options = {name: value for name, value in values.items() if name not in ARM_OPTIONS}
    if values["kind"] == "resnet":
        return ResNet(num_classes=num_classes, **options)
    model = create_model(MODELS[values["kind"]], num_classes=num_classes, img_size=img_size, **options)
    set_position(model, values.get("position"))
    if values.get("token_attention") is False:
        for layer in performers(model):  # values + proj(...) becomes values + a bias, and stays so
            nn.init.zeros_(layer.proj.weight).requires_grad_(False)
    return model


def set_position(model: nn.Module, kind: str | None) -> None:
    """Give a model a fixed sinusoid, a learned table or none; None leaves the one it has."""
    if kind is None:
        return
    check_known("position", kind, ("sinusoid", "learned", "none"))
    _, n, dim = model.pos_embed.shape
    del model.pos_embed  # a parameter in a ViT, a buffer in a T2T-ViT
    if kind == "learned":
        model.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.zeros(1, n, dim), std=0.02))  # as ViT starts
    else:
        model.register_buffer("pos_embed", sinusoid_table(n, dim) if kind == "sinusoid" else torch.zeros(1, n, dim))


def performers(model: nn.Module) -> list[TokenPerformer]:
    """The T2T layers with random features, from the first to the last."""
    return [module for module in model.modules() if isinstance(module, TokenPerformer)]


WATCHED_DIGITS, WATCH_EVERY = 32, 10


def silence(model: nn.Module, update: int) -> dict | None:
    """The shares of silent tokens on validation digits, every tenth update; none for a model without a performer."""
    if update % WATCH_EVERY or not performers(model):
        return None
    digits, _ = ScatteredDigits("val", seed=0, **DATA).draw(range(WATCHED_DIGITS))
    return dict(silent=[round(share, 4) for share in silent_shares(model, (digits - MEAN) / STD)])


def silent_shares(model: nn.Module, image: Float[Tensor, "b c h w"], epsilon: float = 1e-8) -> list[float]:
    """For each performer: the share of tokens whose denominator lies below epsilon, whatever that of the model is.

    With the released epsilon these get less than half of their attention.

    Shapes:
        image: ``b c h w``
    """
    names = [name for name, module in model.named_modules() if isinstance(module, TokenPerformer)]
    with eval_without_gradients(model), tap(model, [f"{name}.norm1" for name in names]) as seen:
        model(image)
        shares = []
        for name in names:
            layer = model.get_submodule(name)
            keys, queries, _ = rearrange(layer.kqv(seen[f"{name}.norm1"]), "b n (three e) -> three b n e", three=3)
            totals = log_features(keys, layer.w).logsumexp(dim=1, keepdim=True)
            log_denominators = (log_features(queries, layer.w) + totals).logsumexp(dim=-1) - math.log(len(layer.w))
            shares.append((log_denominators < math.log(epsilon)).double().mean().item())
    return shares


EXPERIMENTS = {name: Experiment(arms) for name, arms in ABLATIONS.items()} | {
    "relatives": Experiment({"ViT": VIT_ARM, "T2T-ViT": PERFORMER} | RELATIVES),
    "tokenisers": Experiment(ABLATIONS["tokenisers"], watch=silence),
    # two arms of it with twice the seeds: one late start in five is too many for a verdict
    "attention": Experiment(
        {label: ABLATIONS["tokenisers"][label] for label in ("T2T, performer", "T2T, values alone")},
        seeds=tuple(range(10)),
    ),
    "digits": Experiment(
        {
            label: ABLATIONS["tokenisers"][label] | CENTRED_SIZES
            for label in ("hard split", "hard split, sinusoid", "three convolutions", "T2T, performer")
        },
        CENTRED,
        rates=(1e-3, 2e-3, 4e-3),
        tested=400,  # all there are
    ),
}
