"""The training loop: :func:`fit` runs a recipe, in memory or with everything in a folder (chapters 11 and 17)."""

import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import IterableDataset

import t2t_ref
from t2t_ref.create import create_model
from t2t_ref.inspection.tables import count_parameters
from t2t_ref.train import sampling
from t2t_ref.train.evaluate import Evaluation, evaluate
from t2t_ref.train.log import LOGGER, Log, WarningsToLog, draw_curve
from t2t_ref.train.optimizer import WeightAverage, make_optimizer, make_scheduler
from t2t_ref.train.recipes import Recipe, find_recipe
from t2t_ref.train.state import CannotStart, check_room, load_state, save_state, states_of
from t2t_ref.train.stopping import Interrupted, NotFinite, Signals, largest_outputs
from t2t_ref.weights import load_checkpoint, save_checkpoint

try:
    import accelerate
    import kornia  # noqa: F401  augment.py needs it: all that is missing shall be found here
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list
    from tqdm.auto import tqdm
except ImportError as error:
    raise ImportError(f'training needs the package {error.name}: pip install "t2t-ref[train]"') from error

# these may differ between a run and its continuation: they do not change what is computed
FREE_TO_CHANGE = ("workers", "evaluate_every", "save_every", "save_every_updates", "log_every")
SKIPPED_IN_A_ROW = 30  # updates that float16's scaler may skip: from 65536 down to 1 are 16
WEIGHTS, AVERAGED, CURVE = "weights.safetensors", "weights-ema.safetensors", "curve.png"


@dataclass
class Result:
    """What a run gives back."""

    recipe: Recipe
    model: nn.Module  # with the weights that the last update left, in eval mode
    average: nn.Module | None  # its moving average, if the recipe asks for one
    log: list[dict]

    @property
    def best(self) -> nn.Module:
        """The weights to use: the average if there is one."""
        return self.model if self.average is None else self.average

    @property
    def steps(self) -> list[dict]:
        """Lines of the log with the mean loss of some updates."""
        return [line for line in self.log if line["kind"] == "step"]

    @property
    def epochs(self) -> list[dict]:
        """Lines of the log with the numbers of the test set."""
        return [line for line in self.log if line["kind"] == "epoch"]


def fit(
    recipe: Recipe | str,
    output: str | Path | None = None,
    *,
    data=None,
    model: nn.Module | None = None,
    resume: bool = False,
    quiet: bool = True,
    cpu: bool = False,
    after_update: Callable[[nn.Module, int], object] | None = None,
) -> Result:
    """Train what the recipe says.

    ``recipe`` is what ``find_recipe`` returns, or the name of one of ``RECIPES``. Without ``output`` nothing is
    written. With it the folder gets the log, the states to resume from, and at the end the weights and the curve;
    ``resume`` goes on from the last state there, and starts afresh if there is none. ``quiet`` prints nothing. Run
    under torchrun or ``accelerate launch``, the processes share the work. The global generators of Python, numpy and
    torch are left as they were. The test accuracy at the end is ``fit("digits").epochs[-1]["test_accuracy"]``.

    Units:   data is what :func:`t2t_ref.data.sources.open_data` returns, and model a model to train in place, if they
             are not those of the recipe; cpu=True keeps off any accelerator; after_update is called with the model and
             the number of updates so far
    Raises:  CannotStart for whatever goes wrong before the first update: a folder that holds another run or has no
             room, data that is not there; NotFinite; Interrupted; OSError if a state cannot be written. All but the
             last are to be had from t2t_ref.train
    """
    recipe = find_recipe(recipe) if isinstance(recipe, str) else recipe
    with sampling.generators_kept():
        run = Run(recipe, output, quiet, after_update)
        try:
            try:
                run.start_up(data, model, resume, cpu)
            except (ValueError, OSError) as error:
                raise CannotStart(str(error)) from error
            except ImportError as error:
                raise CannotStart(f'{error}: pip install "t2t-ref[train]"') from error
            # in memory there is nothing to save, so nothing to finish first
            with nullcontext() if output is None else run.signals.noted():
                return run.train()
        finally:
            run.close()


def build_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """The model of a recipe, with the weights it starts from."""
    torch.manual_seed(sampling.mixed(recipe.seed))
    model = create_model(
        recipe.model,
        num_classes=num_classes,
        img_size=recipe.img_size,
        drop_path_rate=recipe.drop_path,
        pretrained=recipe.model_weights == "released",
        **dict(recipe.model_options),
    )
    if recipe.model_weights not in (None, "released"):
        load_checkpoint(model, recipe.model_weights, progress=False)
    return model


def check_folder(folder: Path, resume: bool) -> None:
    """Refuse a folder that holds a run which is not to be resumed.

    Raises:  CannotStart
    """
    if not resume and ((folder / "log.jsonl").exists() or states_of(folder)):
        raise CannotStart(
            f"{folder} holds an earlier run: --resume goes on with it, --output names another folder; or remove it"
        )


class Run:
    """One run: what it trains, where it is, what it writes."""

    def __init__(self, recipe: Recipe, output, quiet: bool, after_update):
        self.recipe, self.folder, self.quiet, self.after_update = recipe, output and Path(output), quiet, after_update
        self.log, self.signals, self.main = Log(), Signals(), True
        self.handler = WarningsToLog(self.log, self.say)
        LOGGER.addHandler(self.handler)
        self.epoch = self.update = self.start = 0  # start: the updates of this epoch that are done
        self.seconds, self.window, self.lr = 0.0, empty_window(), 0.0
        self.finished, self.skipped = False, 0
        self.last_state: Path | None = None
        self.model: nn.Module | None = None
        self.attributes: set[str] = set()

    # ---- before the first update

    def start_up(self, data, model: nn.Module | None, resume: bool, cpu: bool) -> None:
        """Everything that can go wrong before training, and the state of an earlier run."""
        from t2t_ref.data.sources import open_data
        from t2t_ref.train.augment import Augment

        recipe = self.recipe
        AcceleratorState._reset_state()  # a notebook trains more than once, and not always at one precision
        self.accelerator = accelerate.Accelerator(
            mixed_precision=recipe.precision,
            cpu=cpu,
            # as a plugin, since an environment variable of accelerate overrides the plain number
            gradient_accumulation_plugin=GradientAccumulationPlugin(recipe.accumulate, sync_with_dataloader=False),
        )
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        if not self.main:
            self.folder = None
        if self.folder:
            check_folder(self.folder, resume)

        self.data = open_data(recipe) if data is None else data
        self.augment = Augment(recipe, self.data.num_classes).to(self.device)
        self.updates_per_epoch = self.count_updates()
        self.model = build_model(recipe, self.data.num_classes) if model is None else model
        self.average = WeightAverage(self.model, recipe.ema_decay, recipe.ema_warmup) if recipe.ema_decay else None
        self.optimizer = make_optimizer(self.model, recipe)
        # not prepared: accelerate would step it once for every process
        self.scheduler = make_scheduler(self.optimizer, recipe, self.updates_per_epoch)
        self.attributes = set(vars(self.model))
        compiled = torch.compile(self.model) if recipe.compile else self.model
        self.prepared, self.stepper = self.accelerator.prepare(compiled, self.optimizer)
        if self.average:
            self.average.to(self.device)
        self.open_folder(resume)

    def count_updates(self) -> int:
        """Updates in an epoch.

        Raises:  ValueError if there are fewer images than one update takes
        """
        if self.recipe.updates_per_epoch:
            return self.recipe.updates_per_epoch
        streamed = isinstance(self.data.train, IterableDataset)
        images = len(self.data.train) * (self.world if streamed else 1)  # a stream has the length of one process's part
        if images < self.global_batch:
            raise ValueError(
                f"{images} images are less than one update of {self.global_batch}: {self.recipe.batch_size} images "
                f"x {self.recipe.accumulate} batches x {self.world} processes. Lower batch_size or accumulate"
            )
        return images // self.global_batch

    @property
    def global_batch(self) -> int:
        """Images in an update, over all processes."""
        return self.recipe.batch_size * self.recipe.accumulate * self.world

    def open_folder(self, resume: bool) -> None:
        """Find the state to go on from, see that there is room for more, and open the log."""
        found, kept = None, 0
        if self.folder:
            check_room(self.folder, self.state_size())
            trial = self.folder / "trial.safetensors"
            save_checkpoint(self.model, trial)  # see now, not after the last epoch, that the model can be written down
            trial.unlink()
            found = load_state(self.folder, self.say) if resume else None
        # from the main process to all: the folder need not be seen by the other nodes
        path, state = broadcast_object_list([found])[0] or (None, None)
        if state:
            self.restore(state, path)
            kept = state["position"]["log_size"]
        early = self.log.lines if not state else []  # warnings while the data was opened; a resumed log has them
        self.log = self.handler.log = Log(self.folder, kept)
        if self.finished:
            return
        self.log.write(
            "resume" if state else "run",
            **({"update": self.update, "epoch": self.epoch} if state else {"recipe": asdict(self.recipe)}),
            versions=versions(),
            device=device_name(self.device),
            processes=self.world,
            images_per_update=self.global_batch,
            updates_per_epoch=self.updates_per_epoch,
            command=" ".join(sys.argv),
        )
        for line in early:
            self.log.write(**line)
        if not state:
            self.say(
                f"{self.recipe.model} ({count_parameters(self.model) / 1e6:.2f} M parameters) on {self.recipe.data}: "
                f"{self.recipe.epochs} epochs of {self.updates_per_epoch} updates, {self.global_batch} images each, "
                f"on {self.world} x {device_name(self.device)}"
            )

    def state_size(self) -> int:
        """Bytes that a state will take: weights, what the optimizer keeps of each, their average, and a margin."""
        all_bytes = sum(p.nbytes for p in self.model.parameters())
        trained = sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        kept = {"adamw": 2, "sgd": 1}[self.recipe.optimizer]
        return all_bytes + kept * trained + (all_bytes if self.average else 0) + 2**20

    # ---- state

    def save(self) -> None:
        """Write the state. Once it is there, everything before it is done for good.

        Raises:  NotFinite for weights that are none; OSError, with the way on, if the disk does not take it
        """
        if not self.folder:
            return
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise NotFinite(f"the weights are not finite after update {self.update}, and not saved; {self.way_on()}")
        state = {
            "position": {
                "log_size": self.log.sync(),
                "epoch": self.epoch,
                "start": self.start,
                "update": self.update,
                "seconds": self.seconds,
                "lr": self.lr,
                "finished": self.finished,
                "skipped": self.skipped,
            },
            "window": self.window,
            "recipe": asdict(self.recipe),
            "images_per_update": self.global_batch,
            "versions": versions(),
            "state_dict": self.model.state_dict(),  # these two names are the authors': load_checkpoint reads a state
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }
        if self.average:
            state["state_dict_ema"] = self.average.module.state_dict()
            state["averaged"] = int(self.average.n_averaged)
        if self.accelerator.scaler:
            state["scaler"] = self.accelerator.scaler.state_dict()
        try:
            self.last_state = save_state(self.folder, state)
        except OSError as error:
            raise OSError(
                error.errno, f"saving the state failed ({error.strerror}); {self.way_on()}", str(self.folder)
            ) from error

    def restore(self, state: dict, path: Path) -> None:
        """Take up a saved state, if it is one of this recipe.

        Raises:  CannotStart, with the fields that differ
        """
        own = asdict(self.recipe)
        differing = [name for name in own if plain(own[name]) != plain(state["recipe"].get(name))]
        shared = {"batch_size", "accumulate"} if state["images_per_update"] == self.global_batch else set()
        differing = [name for name in differing if name not in FREE_TO_CHANGE and name not in shared]
        if not differing and state["images_per_update"] != self.global_batch:
            raise CannotStart(
                f"{path} was trained with {state['images_per_update']} images an update, and now there are "
                f"{self.global_batch}: with {self.world} processes, change batch_size or accumulate"
            )
        if differing:
            changes = [f"{name} was {state['recipe'].get(name)!r}, is {own[name]!r}" for name in differing]
            raise CannotStart(f"{path} belongs to another recipe: {'; '.join(changes)}")
        if state["versions"] != versions():
            self.say(f"going on with other versions: {state['versions']} then, {versions()} now")
        self.model.load_state_dict(state["state_dict"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.optimizer._opt_called = True  # it was, before: else a step of the scheduler alone earns a warning
        if self.average:
            self.average.module.load_state_dict(state["state_dict_ema"])
            self.average.n_averaged.fill_(state["averaged"])
        if self.accelerator.scaler and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for name in ("epoch", "start", "update", "seconds", "lr", "finished", "skipped"):
            setattr(self, name, state["position"][name])
        self.window, self.last_state = state["window"], path
        self.say(f"going on from {path}: epoch {self.epoch}, update {self.update}")

    def way_on(self) -> str:
        """How to go on after a stop, for people."""
        if not self.last_state:
            return "no state was saved yet"
        return f"the last good state is {self.last_state}, and --resume goes on from it"

    # ---- the loop

    def train(self) -> Result:
        """All epochs that are not done yet, then the results."""
        if self.finished:
            self.say(f"this run is finished: {self.update} updates; for another one choose another --output")
            return self.result()
        self.clock = time.perf_counter()
        total = self.recipe.epochs * self.updates_per_epoch
        hidden = self.quiet or not self.main or not sys.stderr.isatty()
        with tqdm(total=total, initial=self.update, disable=hidden, unit="update", dynamic_ncols=True) as self.bar:
            while self.epoch < self.recipe.epochs:
                self.train_epoch()
                self.end_epoch()
        self.finished = True
        self.write_results()
        self.log.write("end", reason="finished", update=self.update, seconds=round(self.seconds, 1))
        self.save()
        self.accelerator.wait_for_everyone()
        if self.folder:
            self.say(f"written to {self.folder}: {WEIGHTS}{f', {AVERAGED}' * bool(self.average)}, {CURVE}, log.jsonl")
        return self.result()

    def train_epoch(self) -> None:
        """The updates of one epoch that are not done yet."""
        recipe = self.recipe
        self.prepared.train()
        self.augment.train()
        batches = sampling.training_batches(
            self.data.train, recipe.seed, self.epoch, recipe.batch_size, self.rank, self.world,
            first=self.start * recipe.accumulate, workers=recipe.workers,
        )  # fmt: skip
        while self.start < self.updates_per_epoch:
            measured = self.train_update(list(islice(batches, recipe.accumulate)))
            self.start, self.update = self.start + 1, self.update + 1
            self.lr = self.optimizer.param_groups[-1]["lr"]  # that of the head
            if recipe.lr_per_update:
                self.scheduler.step()
            if self.after_update:
                self.after_update(self.model, self.update)
            self.note(measured)
            if measured["stop"]:
                self.interrupt()
            if recipe.save_every_updates and self.update % recipe.save_every_updates == 0:
                self.save()

    def train_update(self, batches: list) -> dict:
        """One update of the weights, from the gradients of ``accumulate`` batches. Returns what was measured.

        Raises:  ValueError if the data ended too early
        """
        if len(batches) < self.recipe.accumulate:
            raise ValueError(f"the data ended at update {self.start} of {self.updates_per_epoch} of an epoch")
        losses, correct, seen = [], 0, []
        for index, (images, labels) in enumerate(batches, start=self.start * self.recipe.accumulate):
            key = (self.recipe.seed, self.epoch, index, self.rank)
            sampling.seed_all(sampling.AUGMENT, *key)
            images, targets = self.augment(images.to(self.device, non_blocking=True), labels.to(self.device))
            seen.append((key, images))
            sampling.seed_all(sampling.FORWARD, *key)  # dropout, drop path: a second time the same, if need be
            with self.accelerator.accumulate(self.prepared):
                logits = self.prepared(images)
                loss = F.cross_entropy(logits, targets)
                self.accelerator.backward(loss)
                losses.append(loss.detach())
                correct = correct + (logits.argmax(1) == targets.argmax(1)).sum()
                if self.accelerator.sync_gradients:
                    limit = self.recipe.clip_grad or float("inf")
                    norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
                    measured = self.measure(losses, correct, norm)
                    self.check_finite(measured, seen)
                self.stepper.step()  # both do nothing until the last of the batches
                self.stepper.zero_grad()
        if self.average:
            self.average.update_parameters(self.model)
        return measured

    def measure(self, losses: list[Tensor], correct: Tensor, norm: Tensor) -> dict:
        """Mean loss, hits and a request to stop, over all processes: each then decides the same."""
        loss = torch.stack(losses).mean().float()
        values = torch.stack([loss, correct.float(), torch.tensor(float(self.signals.number), device=self.device)])
        loss_sum, correct, stop = self.accelerator.reduce(values, "sum").tolist()
        return {"loss": loss_sum / self.world, "correct": correct, "stop": stop, "grad_norm": float(norm)}

    def note(self, measured: dict) -> None:
        """Add one update to the running means, and log them when it is time."""
        now = time.perf_counter()
        window, self.clock, passed = self.window, now, now - self.clock
        self.seconds += passed
        window["updates"] += 1
        window["seconds"] += passed
        window["loss"] += measured["loss"]
        window["correct"] += measured["correct"]
        window["grad_norm"] += 0.0 if self.skipped else measured["grad_norm"]
        self.bar.update()
        self.bar.set_postfix(loss=f"{measured['loss']:.3f}", refresh=False)
        if self.recipe.log_every and self.update % self.recipe.log_every == 0:
            images = window["updates"] * self.global_batch
            self.log.write(
                "step",
                epoch=round(self.update / self.updates_per_epoch, 4),
                update=self.update,
                samples=self.update * self.global_batch,
                lr=self.lr,
                loss=window["loss"] / window["updates"],
                accuracy=window["correct"] / images,
                grad_norm=window["grad_norm"] / window["updates"],
                seconds=round(self.seconds, 2),
                images_per_second=round(images / max(window["seconds"], 1e-9), 1),
            )
            self.window = empty_window()

    def end_epoch(self) -> None:
        """Evaluate, log, move the learning rate, save."""
        recipe, last = self.recipe, self.epoch + 1 == self.recipe.epochs
        line = {"epoch": self.epoch + 1, "update": self.update, "lr": self.lr}
        if recipe.evaluate_every and ((self.epoch + 1) % recipe.evaluate_every == 0 or last):
            found = self.evaluate()
            line |= {"test_loss": found.loss, "test_accuracy": found.top1, "test_top5": found.top5}
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        self.log.write("epoch", **line, seconds=round(self.seconds, 2))
        if "test_accuracy" in line:
            self.say(
                f"epoch {line['epoch']:3d} of {recipe.epochs}: test accuracy {100 * line['test_accuracy']:.2f} %, "
                f"test loss {line['test_loss']:.3f}, {self.seconds:.0f} s"
            )
        self.epoch, self.start = self.epoch + 1, 0
        if not recipe.lr_per_update:
            self.scheduler.step()
        if recipe.save_every and self.epoch % recipe.save_every == 0 and not last:
            self.save()

    def evaluate(self) -> Evaluation:
        """The test set, by the average of the weights if there is one.

        Raises:  NotFinite if the answers are no numbers
        """
        options = dict(batch_size=self.recipe.batch_size, workers=self.recipe.workers, accelerator=self.accelerator)
        try:
            with self.accelerator.autocast():
                model, classes = self.average or self.model, self.data.num_classes
                return evaluate(model, self.data.test, self.augment.normalise, classes, **options)
        except ValueError as error:
            raise NotFinite(f"evaluation after epoch {self.epoch + 1}: {error}; {self.way_on()}") from error

    # ---- stopping

    def check_finite(self, measured: dict, seen: list) -> None:
        """Stop before NaN or infinite numbers reach the weights. float16's scaler may skip a few updates, not many.

        Raises:  NotFinite, with the update, the rate, and the modules with the largest outputs
        """
        finite = torch.tensor([measured["loss"], measured["grad_norm"]]).isfinite().tolist()
        scaled = self.accelerator.scaler is not None
        self.skipped = 0 if all(finite) else self.skipped + 1
        if all(finite) or (scaled and finite[0] and self.skipped <= SKIPPED_IN_A_ROW):
            return
        name = "grad_norm" if finite[0] else "loss"
        rates = sorted({f"{group['lr']:.3e}" for group in self.optimizer.param_groups})
        where = f"{name} is {measured[name]} at update {self.update + 1}, epoch {self.epoch + 1}"
        again = f", skipped {self.skipped} times in a row" if scaled else ""
        outputs = largest_outputs(self.model, lambda: self.run_again(seen))
        if not all(images.isfinite().all() for _, images in seen):
            outputs += "\nthe images themselves are not finite"
        message = f"{where}{again}, learning rate {', '.join(rates)}\n{outputs}\n{self.way_on()}"
        self.log.write("end", reason="not finite", update=self.update, message=message)
        raise NotFinite(message)

    def run_again(self, seen: list) -> None:
        """The forward passes of an update once more, with the same dropout."""
        for key, images in seen:
            sampling.seed_all(sampling.FORWARD, *key)
            with self.accelerator.autocast():
                self.model(images)

    def interrupt(self) -> None:
        """Save, write what there is, and leave.

        Raises:  Interrupted
        """
        self.save()
        self.write_results()
        self.log.write("end", reason="interrupted", update=self.update)
        self.accelerator.wait_for_everyone()  # torchrun ends all processes when one has left
        number = self.signals.number or signal.SIGTERM  # it came to another process
        raise Interrupted(f"{signal.Signals(number).name} after update {self.update}: {self.way_on()}", number)

    # ---- results

    def write_results(self) -> None:
        """Weights and curve, into the folder."""
        if self.folder:
            save_checkpoint(self.model, self.folder / WEIGHTS)
            if self.average:
                save_checkpoint(self.average.module, self.folder / AVERAGED)
            draw_curve(self.log.lines, self.folder / CURVE)

    def result(self) -> Result:
        """What the run gives back, with its model in eval mode."""
        self.model.eval()
        return Result(self.recipe, self.model, self.average.module if self.average else None, self.log.lines)

    def close(self) -> None:
        """Leave nothing behind: no open log, no marks on the model."""
        LOGGER.removeHandler(self.handler)
        self.log.close()
        # accelerate leaves marks on a model, by which it would not prepare it again, and its own unwrapping leaves some
        for name in vars(self.model).keys() - self.attributes if self.attributes else ():
            delattr(self.model, name)

    def say(self, text: str) -> None:
        """A line for people, from the main process alone."""
        if not self.quiet and self.main:
            tqdm.write(text)


def leave_group() -> None:
    """Leave the group of processes, or torch complains at the end."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def empty_window() -> dict:
    """The running sums between two lines of the log."""
    return {"updates": 0, "loss": 0.0, "correct": 0.0, "grad_norm": 0.0, "seconds": 0.0}


def plain(value: object) -> object:
    """A field for comparison: tuples and lists are one."""
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def versions() -> dict[str, str]:
    """Of the packages that the numbers of a run depend on."""
    return {"t2t_ref": t2t_ref.__version__, "torch": str(torch.__version__), "accelerate": accelerate.__version__}


def device_name(device: torch.device) -> str:
    """The name of the GPU, or the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
