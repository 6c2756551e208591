"""One run: what it trains, and its state, which it can be taken up from (chapters 11 and 17)."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import IterableDataset

from t2t_ref.train.augment import Augment
from t2t_ref.train.evaluate import Evaluation, evaluate
from t2t_ref.train.log import LOGGER, Log
from t2t_ref.train.optimizer import WeightAverage, make_optimizer, make_scheduler
from t2t_ref.train.plots import draw_curve
from t2t_ref.train.progress import Progress
from t2t_ref.train.recipes import Recipe
from t2t_ref.train.state import check_room, difference, disk_errors, inventory, save_state
from t2t_ref.train.stopping import CannotStart, NotFinite
from t2t_ref.train.update import Parts
from t2t_ref.weights import save_checkpoint
from t2t_ref.weights._version import __version__

try:
    import accelerate
except ImportError as error:
    raise ImportError(f'training needs the package {error.name}: pip install "t2t-ref[train]"') from error

# these may differ between a run and its continuation: they do not change what is computed
FREE_TO_CHANGE = ("workers", "evaluate_every", "save_every", "save_every_updates", "log_every")
WEIGHTS, AVERAGED, CURVE = "weights.safetensors", "weights-ema.safetensors", "curve.png"


class Run:
    """What is trained, where it is, what it writes.

    Args:
        folder: None in memory, and in all processes but the main one
        say: shows a line to people

    Raises:
        ValueError: if there are fewer images than one update takes
    """

    def __init__(
        self,
        recipe: Recipe,
        data,
        model: nn.Module,
        accelerator,
        folder: Path | None = None,
        log: Log | None = None,
        say: Callable[[str], object] = print,
    ):
        self.recipe, self.data, self.model, self.accelerator = recipe, data, model, accelerator
        self.folder, self.log, self.say = folder, log or Log(), say
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.global_batch = recipe.batch_size * recipe.accumulate * self.world  # images in an update
        self.progress = Progress(recipe, updates_in_epoch(recipe, data, self.world))
        self.augment = Augment(recipe, data.num_classes).to(accelerator.device)
        self.average = WeightAverage(model, recipe.ema_decay, recipe.ema_warmup) if recipe.ema_decay else None
        self.optimizer = make_optimizer(model, recipe)
        # not prepared: accelerate would step it once for every process
        self.scheduler = make_scheduler(self.optimizer, recipe, self.progress.updates_per_epoch)
        prepared, stepper = accelerator.prepare(torch.compile(model) if recipe.compile else model, self.optimizer)
        self.parts = Parts(accelerator, model, prepared, stepper, self.augment, recipe.clip_grad)
        if self.average:
            self.average.to(accelerator.device)
        self.inventory: dict = {}  # of the images, once it is needed
        self.window = empty_window()
        self.seconds, self.lr, self.skipped = 0.0, 0.0, 0
        self.last_state: Path | None = None

    # ---- state

    def state_size(self) -> int:
        """Bytes that a state will take: weights, what the optimizer keeps of each, their average, and a margin."""
        all_bytes = sum(entry.nbytes for entry in self.model.state_dict().values())
        trained = sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        kept = {"adamw": 2, "sgd": 1}[self.recipe.optimizer]
        return all_bytes + kept * trained + (all_bytes if self.average else 0) + 2**20

    def try_folder(self) -> None:
        """See now, not after the last epoch, that states and weights can be written down."""
        if self.folder:
            self.inventory = self.inventory or inventory(self.data, self.recipe.data)
            check_room(self.folder, self.state_size())
            trial = self.folder / "trial.safetensors"
            try:
                save_checkpoint(self.model, trial)
            finally:
                trial.unlink(missing_ok=True)

    def save(self) -> None:
        """Write the state. Once it is there, everything before it is done for good.

        Raises:
            NotFinite: for weights with a NaN
            OSError: with the way on, if the disk does not take it
        """
        if not self.folder:
            return
        place = self.progress
        if not all(entry.isfinite().all() for entry in self.model.state_dict().values()):
            raise NotFinite(f"the weights are not finite after update {place.update}, and not saved; {self.way_on()}")
        with disk_errors("saving the state", self.folder, self.way_on()):
            state = {
                "position": {
                    "log_size": self.log.sync(),
                    **{name: getattr(place, name) for name in ("epoch", "start", "update", "finished")},
                    **{name: getattr(self, name) for name in ("seconds", "lr", "skipped")},
                },
                "window": self.window,
                "recipe": asdict(self.recipe),
                "data": self.inventory,
                "images_per_update": self.global_batch,
                "versions": versions(),
                # this name and state_dict_ema are the authors': load_checkpoint reads a state
                "state_dict": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
            }
            if self.average:
                state["state_dict_ema"] = self.average.module.state_dict()
                state["averaged"] = int(self.average.n_averaged)
            if self.accelerator.scaler:
                state["scaler"] = self.accelerator.scaler.state_dict()
            self.last_state = save_state(self.folder, state)

    def restore(self, path: Path, state: dict) -> None:
        """Take up a saved state, if it is one of this recipe.

        Raises:
            CannotStart: with the fields that differ
        """
        self.inventory = inventory(self.data, self.recipe.data)
        self.check_state(path, state)
        if state["versions"] != versions():
            self.say(f"going on with other versions: {state['versions']} then, {versions()} now")
        self.model.load_state_dict(state["state_dict"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.average:
            self.average.module.load_state_dict(state["state_dict_ema"])
            self.average.n_averaged.fill_(state["averaged"])
        if self.accelerator.scaler and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for name in ("epoch", "start", "update", "finished"):
            setattr(self.progress, name, state["position"][name])
        self.seconds, self.lr, self.skipped = (state["position"][name] for name in ("seconds", "lr", "skipped"))
        self.window, self.last_state = state["window"], path
        self.say(f"going on from {path}: epoch {self.progress.epoch}, update {self.progress.update}")

    def check_state(self, path: Path, state: dict) -> None:
        """Refuse a state of another recipe or other images. Images that have only moved are the same.

        Raises:
            CannotStart
        """
        own, theirs = asdict(self.recipe), state["recipe"]
        changed = [name for name in own if plain(own[name]) != plain(theirs.get(name))]
        shared = {"batch_size", "accumulate"} if state["images_per_update"] == self.global_batch else set()
        changed = [name for name in changed if name not in FREE_TO_CHANGE and name not in shared | {"data"}]
        # the same source under another name, if it can be known again
        before = state.get("data")
        differs = difference(before, self.inventory) if before else ""
        if own["data"] != theirs["data"]:
            if not before or before["kind"] != self.inventory["kind"]:
                changed = ["data", *changed]
            elif differs:
                raise CannotStart(f"{own['data']} does not hold the images of {theirs['data']}, to go on: {differs}")
        if not changed and state["images_per_update"] != self.global_batch:
            raise CannotStart(
                f"{path} was trained with {state['images_per_update']} images an update, and now there are "
                f"{self.global_batch}: with {self.world} processes, change batch_size or accumulate"
            )
        if changed:
            changes = [f"{name} was {theirs.get(name)!r}, is {own[name]!r}" for name in changed]
            raise CannotStart(f"{path} belongs to another recipe: {'; '.join(changes)}")
        if differs:
            LOGGER.warning("the images of %s are not those that the run began with: %s", own["data"], differs)
        elif own["data"] != theirs["data"]:
            self.say(
                f"the images were in {theirs['data']} and are in {own['data']}: as many files in each of the same "
                f"{len(self.inventory['classes'])} classes{', and their names' * ('names' in self.inventory)}"
            )

    def way_on(self) -> str:
        """How to go on after a stop, for people."""
        if not self.last_state:
            return "no state was saved yet"
        return f"the last good state is {self.last_state}, and --resume goes on from it"

    # ---- what it measures and writes

    def note(self, kind: str, **values) -> None:
        """A line of the log.

        Raises:
            OSError: with the way on, if the disk does not take it
        """
        with disk_errors("writing the log", self.folder or Path(), self.way_on()):
            self.log.write(kind, **values)

    def evaluate(self) -> Evaluation:
        """The test set, by the average of the weights if there is one.

        Raises:
            NotFinite: if the answers are no numbers
        """
        options = dict(batch_size=self.recipe.batch_size, workers=self.recipe.workers, accelerator=self.accelerator)
        try:
            with self.accelerator.autocast():
                model, classes = self.average or self.model, self.data.num_classes
                return evaluate(model, self.data.test, self.augment.normalise, classes, **options)
        except ValueError as error:
            epoch = self.progress.epoch + 1
            raise NotFinite(f"evaluation after epoch {epoch}: {error}; {self.way_on()}") from error

    def write_results(self) -> None:
        """Weights and curve, into the folder.

        Raises:
            OSError: with the way on, if the disk does not take them
        """
        if self.folder:
            with disk_errors("writing the weights", self.folder, self.way_on()):
                save_checkpoint(self.model, self.folder / WEIGHTS)
                if self.average:
                    save_checkpoint(self.average.module, self.folder / AVERAGED)
                draw_curve(self.log.lines, self.folder / CURVE)


def updates_in_epoch(recipe: Recipe, data, processes: int) -> int:
    """Updates in an epoch.

    Raises:
        ValueError: if there are fewer images than one update takes
    """
    if recipe.updates_per_epoch:
        return recipe.updates_per_epoch
    streamed = isinstance(data.train, IterableDataset)
    images = len(data.train) * (processes if streamed else 1)  # a stream has the length of one process's part
    needed = recipe.batch_size * recipe.accumulate * processes
    if images < needed:
        raise ValueError(
            f"{images} images are less than one update of {needed}: {recipe.batch_size} images "
            f"x {recipe.accumulate} batches x {processes} processes. Lower batch_size or accumulate"
        )
    return images // needed


def empty_window() -> dict:
    """The running sums between two lines of the log."""
    return {"updates": 0, "loss": 0.0, "correct": 0.0, "grad_norm": 0.0, "seconds": 0.0}


def plain(value: object) -> object:
    """A field for comparison: tuples and lists are one."""
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def versions() -> dict[str, str]:
    """Of the packages that the numbers of a run depend on."""
    return {"t2t_ref": __version__, "torch": str(torch.__version__), "accelerate": accelerate.__version__}
