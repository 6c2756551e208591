"""One update of the weights (chapters 11 and 17)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2t_ref.train import sampling
from t2t_ref.train.stopping import NotFinite, largest_outputs

SKIPPED_IN_A_ROW = 30  # updates that float16's scaler may skip: from 65536 down to 1 are 16


@dataclass(frozen=True)
class Parts:
    """What an update works with.

    Note:
        model is what learns, prepared and stepper are what accelerate made of it and of its optimizer; augment makes
        images and labels ready; clip_grad is the largest norm of all gradients together
    """

    accelerator: object
    model: nn.Module
    prepared: nn.Module
    stepper: torch.optim.Optimizer
    augment: nn.Module
    clip_grad: float | None = None


@dataclass(frozen=True)
class Measured:
    """What an update was like, over all processes.

    Units:
        loss is in nats; correct is a number of images

    Note:
        loss is a mean; stop is above 0 if a process was asked to; skipped counts updates without effect, this one
        included, since the last that had one
    """

    loss: float
    correct: float
    grad_norm: float
    stop: float = 0.0
    skipped: int = 0


def update(parts: Parts, batches: Iterable, where: str, skipped: int = 0, stop: int = 0) -> Measured | None:
    """Move the weights once, by the gradients of several batches. None, and nothing moved, if they were too few.

    Args:
        batches: yields (key, (images, labels)): the key seeds all that is drawn for that batch
        where: says which update it is, for people
        skipped: that of the update before
        stop: a wish of this process to stop

    Raises:
        NotFinite: before the weights are moved
    """
    accelerator, losses, correct = parts.accelerator, [], 0
    measured = None
    for key, (images, labels) in batches:
        sampling.seed_all(sampling.AUGMENT, *key)
        images, targets = parts.augment(images.to(accelerator.device, non_blocking=True), labels.to(accelerator.device))
        sampling.seed_all(sampling.FORWARD, *key)  # dropout, drop path: a second time the same, if need be
        with accelerator.accumulate(parts.prepared):
            loss, logits = judge_answers(parts.prepared(images), targets)
            accelerator.backward(loss)
            losses.append(loss.detach())
            correct = correct + (logits.argmax(1) == targets.argmax(1)).sum()
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(parts.model.parameters(), parts.clip_grad or math.inf)
                loss_mean, correct, stop = reduced(accelerator, losses, correct, stop)
                measured = Measured(loss_mean, correct, float(norm), stop)
                measured = judged(parts, measured, skipped, where, key, images)
            parts.stepper.step()  # both do nothing until the last of the batches
            parts.stepper.zero_grad()
    return measured


def judge_answers(answers: Tensor | tuple[Tensor, ...], targets: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the logits that count as the model's answer.

    A model with several heads answers once with each while it trains (DeiT). Then every head is asked for the labels,
    and the mean of their logits counts, as it does in eval mode. With a teacher:
    :func:`~t2t_ref.models.relatives.deit.distillation_loss`.

    Shapes:
        answers: ``b k``, or a tuple of such
        targets: ``b k``, shares of the classes
        return: ``(one number, b k)``
    """
    heads = answers if isinstance(answers, tuple) else (answers,)
    loss = sum(F.cross_entropy(logits, targets) for logits in heads) / len(heads)
    return loss, sum(heads) / len(heads)


def reduced(accelerator, losses: list[Tensor], correct: Tensor, stop: int) -> tuple[float, float, float]:
    """Mean loss, hits and wish to stop of all processes: each then decides the same."""
    loss = torch.stack(losses).mean().float()
    values = torch.stack([loss, correct.float(), torch.tensor(float(stop), device=loss.device)])
    loss, correct, stop = accelerator.reduce(values, "sum").tolist()
    return loss / accelerator.num_processes, correct, stop


def judged(parts: Parts, measured: Measured, skipped: int, where: str, key: tuple, images: Tensor) -> Measured:
    """The measurement with its ``skipped``. float16's scaler may skip a few updates in a row, not many.

    Shapes:
        images: ``b c h w``, the last batch, to be looked at if something is wrong

    Raises:
        NotFinite: with the update, the rate, and the modules with the largest outputs
    """
    is_finite = math.isfinite(measured.loss), math.isfinite(measured.grad_norm)
    if all(is_finite):
        return measured
    skipped, scaled = skipped + 1, parts.accelerator.scaler is not None
    if scaled and is_finite[0] and skipped <= SKIPPED_IN_A_ROW:
        return Measured(measured.loss, measured.correct, measured.grad_norm, measured.stop, skipped)
    name, value = ("grad_norm", measured.grad_norm) if is_finite[0] else ("loss", measured.loss)
    again = f", skipped {skipped} times in a row" if scaled else ""
    rates = sorted({f"{group['lr']:.3e}" for group in parts.stepper.param_groups})

    def run_again() -> None:
        sampling.seed_all(sampling.FORWARD, *key)
        with parts.accelerator.autocast():
            parts.model(images)

    outputs = largest_outputs(parts.model, run_again)
    if not images.isfinite().all():
        outputs += "\nthe images themselves are not finite"
    raise NotFinite(f"{name} is {value} at {where}{again}, learning rate {', '.join(rates)}\n{outputs}")
