"""What moves the weights: groups of parameters, learning rate, and the average of the weights (chapter 11)."""

import math
from functools import partial

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from t2t_ref.train.recipes import Recipe


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """Trainable parameters, by rate and weight decay.

    The recipe's rate is that of the heads, which ``model.head_names`` names; all others have it times
    ``backbone_lr_factor``. Matrices decay. Biases, the weights of norms (one axis each) and what
    ``model.no_weight_decay()`` names, the class token and a learned position table, do not. Frozen parameters are in no
    group: the sinusoid table, and the performer's random directions.

    Raises:
        ValueError: for a model without trainable parameters

    Source:
        authors' code, with timm's ``add_weight_decay``; the rates of transfer from their transfer_learning.py
    """
    heads = tuple(f"{name}." for name in getattr(model, "head_names", ("head",)))
    spared = set() if recipe.decay_all else set(getattr(model, "no_weight_decay", set)())
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = recipe.decay_all or (parameter.ndim > 1 and name not in spared)
        rate = recipe.lr * (1.0 if name.startswith(heads) else recipe.backbone_lr_factor)
        decay = recipe.weight_decay if decays else 0.0
        group = groups.setdefault((rate, decay), {"params": [], "names": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise ValueError("the model has no trainable parameter")
    return list(groups.values())


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW or SGD over :func:`parameter_groups`."""
    groups = parameter_groups(model, recipe)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)
    return torch.optim.AdamW(groups, lr=recipe.lr)


def learning_rate(recipe: Recipe, epoch: int | float, base: float | None = None) -> float:
    """The rate at a moment of training: a line up, a cosine down, then constant.

    The cosine counts from epoch 0, as if it had run during the warm-up, so the curve jumps a little where the warm-up
    ends.

    Args:
        epoch: counts from 0, whole where the rate moves once an epoch
        base: the top rate of the group of parameters, None means that of the recipe

    Source:
        timm's ``CosineLRScheduler`` without ``warmup_prefix``, as the authors use it
    """
    base = recipe.lr if base is None else base
    if epoch < recipe.warmup_epochs:
        return recipe.warmup_lr + epoch * (base - recipe.warmup_lr) / recipe.warmup_epochs
    length = recipe.epochs - recipe.cooldown_epochs
    if epoch >= length:
        return recipe.min_lr
    return recipe.min_lr + 0.5 * (base - recipe.min_lr) * (1 + math.cos(math.pi * epoch / length))


def make_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, updates_per_epoch: int) -> LambdaLR:
    """:func:`learning_rate` for every group, to be stepped once an update or once an epoch, as the recipe says."""

    def factor(steps: int, base: float) -> float:
        epoch = steps / updates_per_epoch if recipe.lr_per_update else steps
        return learning_rate(recipe, epoch, base) / base

    return LambdaLR(optimizer, [partial(factor, base=group["lr"]) for group in optimizer.param_groups])


class WeightAverage(AveragedModel):
    """Exponential moving average of the weights, starting from those that the model has now.

    Source:
        decay and start as timm's ``ModelEma``, which the authors use; the decay of a warm-up as TensorFlow's
        ``ExponentialMovingAverage``
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = False):
        super().__init__(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        self.decay, self.warmup = decay, warmup
        self.n_averaged.fill_(1)  # at 0 the first update would copy the model: the initial weights would not count
        self.requires_grad_(False)
        self.eval()

    def update_parameters(self, model: nn.Module) -> None:
        """Take in the weights of one more update."""
        if self.warmup:
            updates = int(self.n_averaged)
            self.multi_avg_fn = get_ema_multi_avg_fn(min(self.decay, (1 + updates) / (10 + updates)))
        super().update_parameters(model)
