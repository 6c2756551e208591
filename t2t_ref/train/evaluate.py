"""How good are these weights: top-1, top-5, the loss, and what is taken for what (chapters 11 and 14)::

    python -m t2t_ref.evaluate 81.5_T2T_ViT_14.pth.tar --data imagefolder:PATH
    python -m t2t_ref.evaluate runs/digits-seed0/weights.safetensors --output runs/digits-seed0
    torchrun --nproc-per-node 8 -m t2t_ref.evaluate WEIGHTS --data imagefolder:PATH --model t2t_vit_14

WEIGHTS is a path or a URL: a file of ``save_checkpoint``, or any that ``load_checkpoint`` reads. For the first nothing
more has to be said; files of the authors are known by their names, for others ``--model`` says what they are.
"""

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Int
from torch import Tensor, nn

from t2t_ref.arguments import Parser
from t2t_ref.create import create_model, list_models
from t2t_ref.models.classifier import TokenClassifier
from t2t_ref.train.log import escape_unknown_letters
from t2t_ref.train.plots import MOST_CLASSES, draw_confusion
from t2t_ref.train.recipes import RECIPES, Recipe
from t2t_ref.train.sampling import evaluation_batches
from t2t_ref.weights import RELEASED, load_checkpoint, load_model, read_weights
from t2t_ref.weights.writing import path_of, write_whole


def wilson(hits: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share: where the true share lies, if ``hits`` of ``total`` independent trials succeeded.

    Source:
        E. B. Wilson, "Probable inference", 1927. Unlike share +- 1.96 s it stays within 0 and 1
    """
    from scipy.stats import binomtest  # not at the top: it takes longer to import than all the rest

    if not total:
        return 0.0, 1.0
    interval = binomtest(hits, total).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of a data set. Prints as text.

    Shapes:
        confusion: ``k k``, images of class (row) that were taken for class (column)

    Units:
        loss is in nats

    Note:
        loss is the mean cross-entropy; unread is the number of images that could not be read, which are not counted;
        top5_hits counts the true classes among the five (or k) likeliest
    """

    confusion: Int[Tensor, "k k"]
    top5_hits: int
    loss: float
    unread: int = 0
    class_names: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Images that were counted."""
        return int(self.confusion.sum())

    @property
    def top1_hits(self) -> int:
        """Images whose likeliest class is the true one."""
        return int(self.confusion.trace())

    @property
    def top1(self) -> float:
        """Share of the images whose likeliest class is the true one."""
        return self.top1_hits / max(self.count, 1)

    @property
    def top5(self) -> float:
        """Share of the images whose true class is among the five likeliest; all of them, if there are five or fewer."""
        return self.top5_hits / max(self.count, 1)

    def name(self, label: int) -> str:
        """What a class is called, or its number where nobody says."""
        return self.class_names[label] if self.class_names else str(label)

    def confused(self, most: int = 10) -> list[tuple[str, str, int, float]]:
        """The pairs (true, taken for) that happen most, with their number and their share of the true class."""
        wrong = self.confusion.clone().fill_diagonal_(0)
        totals = reduce(self.confusion, "true taken -> true", "sum").tolist()
        order = rearrange(wrong, "true taken -> (true taken)").argsort(descending=True, stable=True)[:most].tolist()
        pairs = [divmod(place, len(wrong)) for place in order]
        return [
            (self.name(true), self.name(taken), number, number / totals[true])
            for true, taken in pairs
            if (number := int(wrong[true, taken]))
        ]

    def summary(self) -> dict:
        """Everything as plain values, for a JSON file. The whole confusion matrix only where it is small."""
        found = {"images": self.count, "unread": self.unread, "classes": len(self.confusion), "loss": self.loss}
        for name, hits in (("top1", self.top1_hits), ("top5", self.top5_hits)):
            interval = wilson(hits, self.count)
            found |= {name: hits / max(self.count, 1), f"{name}_hits": hits, f"{name}_interval": interval}
        found["confused"] = self.confused(20)
        if len(self.confusion) <= MOST_CLASSES:
            found |= {"class_names": self.class_names, "confusion": self.confusion.tolist()}
        return found

    def __str__(self) -> str:
        lines = [f"{self.count:,} images of {len(self.confusion)} classes"]
        if self.unread:
            lines[0] += f"; {self.unread} more could not be read"
        rows = [("top-1", self.top1_hits)]
        if len(self.confusion) > 5:
            rows.append(("top-5", self.top5_hits))
        for name, hits in rows:
            low, high = (100 * bound for bound in wilson(hits, self.count))
            share = 100 * hits / max(self.count, 1)
            lines.append(f"{name}  {share:6.2f} %   {hits:,} right, 95 % interval {low:.2f} to {high:.2f} %")
        lines.append(f"loss   {self.loss:6.4f}")
        pairs = self.confused(5)
        if pairs:
            lines.append("taken for another most often:")
            lines += [f"  {true} for {taken}: {n}, {100 * part:.1f} %" for true, taken, n, part in pairs]
        return "\n".join(lines)


def evaluate(
    model: nn.Module,
    data,
    preprocess: Callable[[Tensor], Tensor],
    num_classes: int,
    *,
    class_names: tuple[str, ...] = (),
    batch_size: int = 64,
    workers: int = 0,
    accelerator=None,
    progress: bool = False,
) -> Evaluation:
    """Show every image of ``data`` to ``model`` once, and count.

    Args:
        data: yields (image c h w, label), a label of -1 for an image that is not to be counted
        preprocess: makes a batch ready for the model, as ``Augment.normalise`` does
        accelerator: an accelerate.Accelerator, whose processes share the images, and each gets the result of all;
            without one the device is the model's

    Raises:
        ValueError: if model and data do not have the same number of classes, or if the model's answers are not finite
    """
    device = accelerator.device if accelerator else next(model.parameters()).device
    share = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    model = accelerator.unwrap_model(model) if accelerator else model  # alone: processes may have unequal shares
    confusion = torch.zeros(num_classes**2, dtype=torch.int64)
    loss, top5_hits, unread = 0.0, 0, 0
    batches = evaluation_batches(data, batch_size, *share, workers)
    if progress and share[0] == 0:
        from tqdm import tqdm

        batches = tqdm(batches, "batches", disable=None)  # not into a file
    training = model.training
    model.eval()
    try:
        for images, labels in batches:
            known = labels >= 0
            unread += int((~known).sum())
            images, labels = images[known], labels[known]
            if not len(labels):
                continue
            with torch.no_grad():
                logits = model(preprocess(images.to(device))).float().cpu()
            if logits.shape[1] != num_classes or int(labels.max()) >= num_classes:
                raise ValueError(
                    f"the model tells {logits.shape[1]} classes apart, the data has {num_classes}, "
                    f"and the largest label is {int(labels.max())}"
                )
            if not logits.isfinite().all():
                raise ValueError("the model's answers are not finite: its weights are damaged, or float16 too small")
            best = logits.topk(min(5, num_classes)).indices
            confusion += torch.bincount(labels * num_classes + best[:, 0], minlength=num_classes**2)
            top5_hits += int((best == rearrange(labels, "b -> b 1")).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    finally:
        model.train(training)
    if accelerator and share[1] > 1:
        counts = torch.cat([confusion, torch.tensor([top5_hits, unread])]).to(device)
        counts = accelerator.reduce(counts, "sum").cpu()
        loss = float(accelerator.reduce(torch.tensor(loss, device=device), "sum"))
        confusion, (top5_hits, unread) = counts[:-2], counts[-2:].tolist()
    confusion = rearrange(confusion, "(true taken) -> true taken", true=num_classes)
    return Evaluation(confusion, top5_hits, loss / max(int(confusion.sum()), 1), unread, class_names)


# ---- from files


def recipe_beside(weights: str | os.PathLike) -> Recipe | None:
    """The recipe by which t2t_ref.train made these weights, from the log in the same folder; None without one."""

    def frozen(value):
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    log = path_of(weights).with_name("log.jsonl")
    if not log.is_file():
        return None
    with log.open(encoding="utf-8") as lines:
        first = json.loads(next(lines, "{}"))
    known = [field.name for field in fields(Recipe)]  # another version may have had more
    values = {key: frozen(value) for key, value in first.get("recipe", {}).items() if key in known}
    return Recipe(**values) if values else None


def find_model(weights: str | os.PathLike, name: str | None = None, img_size: int | None = None) -> TokenClassifier:
    """The model that a file holds, whoever wrote it, with its weights and its number of classes. Reads it once.

    Args:
        name: where the file does not say or shall not have it as it says
        img_size: likewise

    Note:
        what load_checkpoint raises is raised here, too

    Raises:
        ValueError: if nobody says which model it is, or if it has no head
    """
    size = {} if img_size is None else {"img_size": img_size}
    stored, shown = read_weights(weights), os.fsdecode(weights)
    if name is None and stored.class_name:
        return load_model(stored, **size)
    released = next((row for row in RELEASED if row.file == re.split(r"[/\\]", shown)[-1]), None)
    name = name or (released.model if released else stored.variant)
    if not name:
        raise ValueError(f"{shown} does not say which model it holds: --model, one of {', '.join(list_models())}")
    model = create_model(name, **({"img_size": released.pixels} if released else {}) | size)
    report = load_checkpoint(model, stored)
    heads = [entry.stored for entry in report.skipped if entry.name == f"{model.head_names[0]}.weight"]
    if heads == [None]:
        raise ValueError(f"the weights in {shown} have no head, which is what tells classes apart")
    if heads:  # of another number of classes than ImageNet's
        model.reset_classifier(heads[0][0])
        load_checkpoint(model, stored)
    return model


def evaluate_recipe(
    model: TokenClassifier, recipe: Recipe, accelerator=None, progress: bool = False
) -> tuple[Evaluation, Recipe]:
    """Evaluate a model on the test data of a recipe, at the model's own image size: the recipe returned has that.

    Raises:
        ValueError: for a model of images that are not square; as :func:`evaluate` and ``open_data``
    """
    from t2t_ref.data.sources import open_data
    from t2t_ref.train.augment import Augment

    height, width = model.img_size
    if height != width:
        raise ValueError(f"the model takes images of {height}x{width} pixels; only squares are cut here: set img_size")
    recipe = replace(recipe, img_size=height)
    data = open_data(recipe, training=False)
    device = accelerator.device if accelerator else next(model.parameters()).device
    result = evaluate(
        model.to(device),
        data.test,
        Augment(recipe, data.num_classes).to(device).normalise,
        data.num_classes,
        class_names=data.class_names,
        batch_size=recipe.batch_size,
        workers=recipe.workers,
        accelerator=accelerator,
        progress=progress,
    )
    return result, recipe


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status."""
    escape_unknown_letters()
    parser = Parser("python -m t2t_ref.evaluate", description="Evaluate weights: the authors', yours, anybody's.")
    parser.add_argument("weights", metavar="WEIGHTS", help="path or URL")
    parser.add_argument("--data", metavar="SPEC", help="as of t2t_ref.train; default: what the run was trained on")
    parser.add_argument("--model", metavar="NAME", help="where neither the file nor its name says so")
    parser.add_argument("--img-size", type=int, metavar="PIXELS", help="default: what the file says")
    parser.add_argument("--crop-pct", type=float, help="side of the crop, as a share of the resized image")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, help="processes that read images")
    parser.add_argument("--cpu", action="store_true", help="keep off any GPU")
    parser.add_argument("--output", metavar="DIR", help="write evaluation.json and confusion.png there")
    try:
        options = parser.parse_args(argv)

        import accelerate

        recipe = recipe_beside(options.weights)
        if recipe is None and options.data is None:
            raise ValueError("--data says what to evaluate on, such as imagefolder:PATH")
        if recipe is None:  # mean, deviation and crop are those of the data
            recipe = RECIPES.get(options.data.partition(":")[0].replace("_", "-"), RECIPES["imagenet"])
        changes = {key: getattr(options, key) for key in ("data", "img_size", "crop_pct", "batch_size", "workers")}
        recipe = replace(recipe, **{key: value for key, value in changes.items() if value is not None})
        if options.output:
            Path(options.output).mkdir(parents=True, exist_ok=True)  # an hour later would be late to find out
        accelerator = accelerate.Accelerator(cpu=options.cpu)
        model = find_model(options.weights, options.model, options.img_size)
        result, recipe = evaluate_recipe(model, recipe, accelerator, progress=True)
        if accelerator.is_main_process:
            print(f"{options.weights} on {recipe.data}, {recipe.img_size} pixels, crop {recipe.crop_pct}\n{result}")
            if options.output:
                write_results(Path(options.output), options.weights, recipe, result)
        accelerator.end_training()
    except KeyboardInterrupt:
        print("t2t_ref.evaluate: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except (ValueError, OSError, ImportError) as error:
        remedy = ': pip install "t2t-ref[train]"' if isinstance(error, ModuleNotFoundError) else ""
        print(f"t2t_ref.evaluate: {error}{remedy}", file=sys.stderr)
        return 2
    return 0


def write_results(folder: Path, weights: str, recipe: Recipe, result: Evaluation) -> None:
    """evaluation.json, and confusion.png where it can be seen."""
    known = asdict(recipe)
    how = {key: known[key] for key in ("data", "data_options", "img_size", "crop_pct", "interpolation", "mean", "std")}
    content = {"weights": weights, **how, "torch": str(torch.__version__), **result.summary()}
    text = json.dumps(content, indent=1) + "\n"
    write_whole(folder / "evaluation.json", lambda draft: draft.write_text(text, encoding="utf-8"))
    if len(result.confusion) <= MOST_CLASSES:
        draw_confusion(result, folder / "confusion.png")
