"""The training loop: :func:`fit` runs a recipe, in memory or with everything in a folder."""

import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import t2t_ref
from t2t_ref.checkpoints import load_checkpoint, save_checkpoint
from t2t_ref.train import sampling
from t2t_ref.train.log import Log, draw_curve
from t2t_ref.train.optimizer import WeightAverage, make_optimizer, make_scheduler
from t2t_ref.train.recipes import Recipe, find_recipe
from t2t_ref.train.state import CannotStart, check_room, load_state, save_state, states_of
from t2t_ref.zoo import create_model

try:
    import accelerate
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list
    from tqdm.auto import tqdm
except ImportError as error:
    raise ImportError(f'training needs the package {error.name}: pip install "t2t-ref[train]"') from error

# these may differ between a run and its continuation: they do not change what is computed
FREE_TO_CHANGE = ("workers", "evaluate_every", "save_every", "save_every_updates", "log_every", "compile")
SKIPPED_IN_A_ROW = 30  # updates that float16's scaler may skip: from 65536 down to 1 are 16
WEIGHTS, AVERAGED, CURVE = "weights.safetensors", "weights-ema.safetensors", "curve.png"


class NotFinite(Exception):
    """The loss or a gradient is infinite or not a number; the message says where it came from."""


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


@dataclass
class Result:
    """What a run gives back."""

    recipe: Recipe
    model: nn.Module  # as the last update left it
    average: nn.Module | None  # its moving average, if the recipe asks for one
    log: list[dict]

    @property
    def best(self) -> nn.Module:
        """The weights to use: the average if there is one."""
        return self.model if self.average is None else self.average

    @property
    def steps(self) -> list[dict]:
        return [line for line in self.log if line["kind"] == "step"]

    @property
    def epochs(self) -> list[dict]:
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

    Without ``output`` nothing is written. With it the folder gets the log, the states to resume from, and at the end
    the weights and the curve. Run under torchrun or ``accelerate launch``, the processes share the work. The global
    generators of Python, numpy and torch are left as they were.

    Units:   data is what ``t2t_ref.train.sources.open_data`` returns (train, test, num_classes), and model a model to
             train in place, if they are not those of the recipe; cpu=True keeps off any accelerator; after_update is
             called with the model and the number of updates so far
    Raises:  CannotStart for a folder that holds another run or has no room; NotFinite; Interrupted
    """
    recipe = find_recipe(recipe) if isinstance(recipe, str) else recipe
    with sampling.generators_kept():
        run = Run(recipe, output, data, model, resume, quiet, cpu, after_update)
        try:
            with run.signals_noted():
                return run.train()
        finally:
            run.log.close()


def build_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """The model of a recipe, with the weights it starts from."""
    torch.manual_seed(sampling.mixed(recipe.seed))
    model = create_model(
        recipe.model,
        num_classes=num_classes,
        img_size=recipe.img_size,
        drop_path_rate=recipe.drop_path,
        **dict(recipe.model_options),
    )
    if recipe.model_weights:
        load_checkpoint(model, recipe.model_weights, progress=False)
    return model


def check_folder(folder: Path, resume: bool) -> None:
    """CannotStart if the folder holds a run that is not to be resumed."""
    if not resume and ((folder / "log.jsonl").exists() or states_of(folder)):
        raise CannotStart(
            f"{folder} holds an earlier run: --resume goes on with it, --output names another folder; or remove it"
        )


class Run:
    """One run: what it trains, where it is, what it writes."""

    def __init__(self, recipe, output, data, model, resume, quiet, cpu, after_update):
        from t2t_ref.train.augment import Augment
        from t2t_ref.train.sources import open_data

        self.recipe, self.quiet, self.after_update = recipe, quiet, after_update
        AcceleratorState._reset_state()  # a notebook trains more than once, and not always at one precision
        self.accelerator = accelerate.Accelerator(
            mixed_precision=recipe.precision,
            cpu=cpu,
            # as a plugin, since an environment variable of accelerate overrides the plain number
            gradient_accumulation_plugin=GradientAccumulationPlugin(recipe.accumulate, sync_with_dataloader=False),
        )
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.folder = Path(output) if output is not None and self.main else None
        self.in_memory = output is None
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
        compiled = torch.compile(self.model) if recipe.compile else self.model
        self.prepared, self.stepper = self.accelerator.prepare(compiled, self.optimizer)
        if self.average:
            self.average.to(self.device)

        self.epoch = self.update = self.start = 0  # start: the updates of this epoch that are done
        self.seconds, self.window = 0.0, empty_window()
        self.finished, self.skipped, self.signal = False, 0, 0
        self.last_state: Path | None = None
        self.open_folder(resume)

    # ---- before the first step

    def count_updates(self) -> int:
        """Updates in an epoch."""
        if self.recipe.updates_per_epoch:
            return self.recipe.updates_per_epoch
        if sampling.is_stream(self.data.train):
            raise ValueError("a stream has no length: set updates_per_epoch, how many updates make an epoch")
        images = len(self.data.train)
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
            kept = state["position"]["log_lines"]
        self.log = Log(self.folder, kept)
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

    def state_size(self) -> int:
        """Bytes that a state will take: weights, what the optimizer keeps of each, their average, and a margin."""
        all_bytes = sum(p.nbytes for p in self.model.parameters())
        trained = sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        kept = {"adamw": 2, "sgd": 1}[self.recipe.optimizer]
        return all_bytes + kept * trained + (all_bytes if self.average else 0) + 2**20

    # ---- state

    def save(self) -> None:
        """Write the state. Once it is there, everything before it is done for good."""
        if not self.folder:
            return
        self.log.sync()
        state = {
            "position": {
                "epoch": self.epoch,
                "start": self.start,
                "update": self.update,
                "seconds": self.seconds,
                "log_lines": len(self.log.lines),
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
        if self.average:
            self.average.module.load_state_dict(state["state_dict_ema"])
            self.average.n_averaged.fill_(state["averaged"])
        if self.accelerator.scaler and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for name in ("epoch", "start", "update", "seconds", "finished", "skipped"):
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
        return self.result()

    def train_epoch(self) -> None:
        """The updates of one epoch that are not done yet."""
        recipe = self.recipe
        self.prepared.train()
        batches = sampling.training_batches(
            self.data.train, recipe.seed, self.epoch, recipe.batch_size, self.rank, self.world,
            first=self.start * recipe.accumulate, workers=recipe.workers,
        )  # fmt: skip
        while self.start < self.updates_per_epoch:
            measured = self.train_update(list(islice(batches, recipe.accumulate)))
            self.start += 1
            self.update += 1
            if recipe.lr_per_update:
                self.scheduler.step()
            if self.after_update:
                self.after_update(self.model, self.update)
            self.note(measured)
            if self.stop_asked(measured):
                self.interrupt()
            if recipe.save_every_updates and self.update % recipe.save_every_updates == 0:
                self.save()

    def train_update(self, batches: list) -> dict:
        """One update of the weights, from the gradients of ``accumulate`` batches. Returns what was measured."""
        losses, correct, seen = [], 0, []
        for index, (images, labels) in enumerate(batches, start=self.start * self.recipe.accumulate):
            key = (self.recipe.seed, self.epoch, index, self.rank)
            sampling.seed_all(sampling.AUGMENT, *key)
            images, targets = self.augment(as_float(images.to(self.device, non_blocking=True)), labels.to(self.device))
            seen.append((key, images))
            sampling.seed_all(sampling.FORWARD, *key)  # dropout, drop path: a second time the same, if need be
            with self.accelerator.accumulate(self.prepared):
                logits = self.prepared(images)
                loss = F.cross_entropy(logits, targets)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    limit = self.recipe.clip_grad or float("inf")
                    norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
                    measured = self.measure([*losses, loss.detach()], correct + hits(logits, targets), norm)
                    self.check_finite(measured, seen)
                self.stepper.step()  # both do nothing until the last of the batches
                self.stepper.zero_grad()
            losses.append(loss.detach())
            correct = correct + hits(logits, targets)
        if self.average:
            self.average.update_parameters(self.model)
        return measured

    def measure(self, losses: list[Tensor], correct: Tensor, norm: Tensor) -> dict:
        """Mean loss, hits and a request to stop, over all processes: each then decides the same."""
        loss = torch.stack(losses).mean().float()
        values = torch.stack([loss, correct.float(), torch.tensor(float(self.signal), device=self.device)])
        loss_sum, correct, stop = self.accelerator.reduce(values, "sum").tolist()
        return {"loss": loss_sum / self.world, "correct": correct, "stop": stop, "grad_norm": float(norm)}

    def note(self, measured: dict) -> None:
        """Add one update to the running means, and log them when it is time."""
        now = time.perf_counter()
        window, self.clock, passed = self.window, now, now - self.clock
        self.seconds += passed
        window["updates"] += 1
        window["seconds"] += passed
        for name in ("loss", "correct", "grad_norm"):
            window[name] += measured[name]
        self.bar.update()
        self.bar.set_postfix(loss=f"{measured['loss']:.3f}", refresh=False)
        if self.recipe.log_every and self.update % self.recipe.log_every == 0:
            images = window["updates"] * self.global_batch
            self.log.write(
                "step",
                epoch=round(self.update / self.updates_per_epoch, 4),
                update=self.update,
                samples=self.update * self.global_batch,
                lr=self.optimizer.param_groups[-1]["lr"],
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
        line = {"epoch": self.epoch + 1, "update": self.update, "lr": self.optimizer.param_groups[-1]["lr"]}
        if recipe.evaluate_every and ((self.epoch + 1) % recipe.evaluate_every == 0 or last):
            measured = evaluate(self.average or self.model, self.data.test, self.augment, recipe, self.accelerator)
            line |= {f"test_{name}": value for name, value in measured.items()}
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

    # ---- stopping

    def check_finite(self, measured: dict, seen: list) -> None:
        """Stop before numbers that are none reach the weights. float16's scaler may skip an update, not many in a row.

        Raises:  NotFinite, with the update, the rate, and the modules with the largest outputs
        """
        finite = torch.tensor([measured["loss"], measured["grad_norm"]]).isfinite().tolist()
        scaled = self.accelerator.scaler is not None
        self.skipped = 0 if all(finite) else self.skipped + 1
        if all(finite) or (scaled and finite[0] and self.skipped <= SKIPPED_IN_A_ROW):
            return
        what = "loss" if not finite[0] else "norm of the gradients"
        rates = sorted({f"{group['lr']:.3e}" for group in self.optimizer.param_groups})
        message = (
            f"the {what} is {measured['loss' if not finite[0] else 'grad_norm']} at update {self.update + 1} "
            f"(epoch {self.epoch}), learning rate {', '.join(rates)}"
            f"{f', {self.skipped} updates in a row' if scaled else ''}\n{self.report(seen)}\n{self.way_on()}"
        )
        self.log.write("end", reason="not finite", update=self.update, message=message)
        raise NotFinite(message)

    def report(self, seen: list) -> str:
        """The modules with the largest outputs, when the batches of this update run once more."""
        largest: dict[str, float] = {}

        def hook(name: str):
            def note(module, inputs, output):
                if isinstance(output, Tensor):
                    size = output.detach().abs().max()
                    largest[name] = float("inf") if not size.isfinite() else max(largest.get(name, 0.0), float(size))

            return note

        broken = [name for name, p in self.model.named_parameters() if not p.isfinite().all()]
        leaves = [(name, module) for name, module in self.model.named_modules() if not list(module.children())]
        handles = [module.register_forward_hook(hook(name)) for name, module in leaves]
        try:
            for key, images in seen:
                sampling.seed_all(sampling.FORWARD, *key)
                with torch.no_grad(), self.accelerator.autocast():
                    self.model(images)
        finally:
            for handle in handles:
                handle.remove()
        first = next((name for name, size in largest.items() if size == float("inf")), None)
        top = sorted((item for item in largest.items() if item[1] < float("inf")), key=lambda item: -item[1])[:5]
        lines = ["largest outputs: " + ", ".join(f"{name} {size:.3g}" for name, size in top)]
        if first:
            lines.append(f"first output that is not finite: {first}")
        if broken:
            lines.append(f"weights that are not finite already: {', '.join(broken[:5])}")
        if not all(images.isfinite().all() for _, images in seen):
            lines.append("the images themselves are not finite")
        return "\n".join(lines)

    @contextmanager
    def signals_noted(self):
        """SIGINT and SIGTERM end the run after the update at hand; a second one ends it at once."""
        if self.in_memory or threading.current_thread() is not threading.main_thread():
            yield  # nothing to save, so nothing to wait for
            return

        def note(number: int, frame) -> None:
            self.signal = number
            signal.signal(number, before[number])

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop_asked(self, measured: dict) -> bool:
        return measured["stop"] > 0

    def interrupt(self) -> None:
        """Save, write what there is, and leave."""
        self.save()
        self.write_results()
        self.log.write("end", reason="interrupted", update=self.update)
        name = signal.Signals(self.signal).name if self.signal else "another process"
        raise Interrupted(f"stopped by {name} after update {self.update}: {self.way_on()}", self.signal)

    # ---- results

    def write_results(self) -> None:
        """Weights and curve, into the folder."""
        if self.folder:
            save_checkpoint(self.model, self.folder / WEIGHTS)
            if self.average:
                save_checkpoint(self.average.module, self.folder / AVERAGED)
            draw_curve(self.log.lines, self.folder / CURVE)

    def result(self) -> Result:
        self.accelerator.unwrap_model(self.prepared, keep_fp32_wrapper=False, keep_torch_compile=False)
        self.model.eval()
        return Result(self.recipe, self.model, self.average.module if self.average else None, self.log.lines)

    def say(self, text: str) -> None:
        if not self.quiet and self.main:
            tqdm.write(text)


def evaluate(model, data, augment, recipe: Recipe, accelerator) -> dict[str, float]:
    """Loss, accuracy and top-5 accuracy on a data set, over all processes; every image counts once."""
    device = accelerator.device
    totals = torch.zeros(4, device=device)
    training = model.training
    model.eval()
    share = accelerator.process_index, accelerator.num_processes
    with torch.no_grad(), accelerator.autocast():
        for images, labels in sampling.evaluation_batches(data, recipe.batch_size, *share, recipe.workers):
            labels = labels.to(device)
            logits = model(augment.normalise(as_float(images.to(device)))).float()
            best = logits.topk(min(5, logits.shape[1])).indices
            found = best == rearrange(labels, "b -> b 1")
            loss = F.cross_entropy(logits, labels, reduction="sum")
            totals += torch.stack([loss, found[:, 0].sum(), found.sum(), torch.tensor(len(labels), device=device)])
    model.train(training)
    loss, first, five, count = accelerator.reduce(totals, "sum").tolist()
    return {"loss": loss / count, "accuracy": first / count, "top5": five / count}


def as_float(images: Tensor) -> Tensor:
    """Bytes to numbers from 0 to 1; what is a float already stays."""
    return images if images.is_floating_point() else images.float() / 255


def hits(logits: Tensor, targets: Tensor) -> Tensor:
    """How many predictions name the class with the largest share in the target."""
    return (logits.detach().argmax(1) == targets.argmax(1)).sum()


def empty_window() -> dict:
    """The running sums between two lines of the log."""
    return {"updates": 0, "loss": 0.0, "correct": 0.0, "grad_norm": 0.0, "seconds": 0.0}


def plain(value: object) -> object:
    """A field for comparison: tuples and lists are one."""
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def versions() -> dict[str, str]:
    return {"t2t_ref": t2t_ref.__version__, "torch": torch.__version__, "accelerate": accelerate.__version__}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
