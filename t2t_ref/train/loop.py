"""The training loop: :func:`fit` runs a recipe, in memory or with everything in a folder (chapters 11 and 17)."""

import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from t2t_ref.create import create_model
from t2t_ref.data.sources import open_data
from t2t_ref.inspection import count_parameters
from t2t_ref.train import sampling
from t2t_ref.train.log import Log, logging_to, printable
from t2t_ref.train.recipes import Recipe, find_recipe
from t2t_ref.train.run import AVERAGED, CURVE, WEIGHTS, Run, empty_window, versions
from t2t_ref.train.state import load_state, states_of
from t2t_ref.train.stopping import CannotStart, Interrupted, NotFinite, Signals, interruptible
from t2t_ref.train.update import Measured, update
from t2t_ref.weights import load_checkpoint

try:
    import accelerate
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list
    from tqdm.auto import tqdm
except ImportError as error:
    raise ImportError(f'training needs the package {error.name}: pip install "t2t-ref[train]"') from error


@dataclass
class Result:
    """What a run gives back."""

    recipe: Recipe
    model: nn.Module  # with the weights that the last update left, in eval mode
    average: nn.Module | None  # its moving average, if the recipe asks for one
    log: list[dict]

    @property
    def best(self) -> nn.Module:
        """The weights to use, the average if there is one."""
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
    ``resume`` goes on from the last state there, and starts afresh if there is none. Images that have moved are named
    anew in ``recipe.data``, and known again by their names. ``quiet`` prints nothing. Run under torchrun or
    ``accelerate launch``, the processes share the work. The global generators of Python, numpy and torch are left as
    they were. The test accuracy at the end is ``fit("digits").epochs[-1]["test_accuracy"]``.

    Args:
        data: what :func:`t2t_ref.data.sources.open_data` returns, if it is not that of the recipe
        model: a model to train in place, if it is not that of the recipe
        cpu: True keeps off any accelerator
        after_update: called with the model and the number of updates so far

    Note:
        CannotStart, NotFinite and Interrupted are to be had from t2t_ref.train

    Raises:
        CannotStart: for whatever goes wrong before the first update: a folder that holds another run or has no room,
            data that is not there
        NotFinite: for a loss or a gradient that is infinite or NaN
        Interrupted: if a signal asked the run to stop
        OSError: if the disk takes no more
    """
    recipe = find_recipe(recipe) if isinstance(recipe, str) else recipe
    signals = Signals()
    with sampling.generators_kept(), ExitStack() as contexts:
        with starting():
            accelerator = make_accelerator(recipe, cpu)
            main = accelerator.is_main_process

            def say(text: str) -> None:
                if main and not quiet:
                    tqdm.write(printable(text))

            log = contexts.enter_context(logging_to(Log(), say))
            folder = Path(output) if output is not None and main else None
            found = find_state(folder, resume, say)
            with named("data_options"):
                data = open_data(recipe) if data is None else data
            if recipe.compile:
                try_compiler(accelerator.device)
            if model is None:
                model = build_model(recipe, data.num_classes, fresh=found is None)
            contexts.enter_context(left_unmarked(model))
            run = Run(recipe, data, model, accelerator, folder, log, say)
            run.try_folder()
            if found:
                run.restore(*found)
            begin_log(run, resumed=found)
        # in memory there is nothing to save, so nothing to finish first
        contexts.enter_context(nullcontext() if output is None else signals.noted())
        contexts.enter_context(warnings.catch_warnings())
        contexts.enter_context(denormals_flushed())
        # a run may go on between the last update of an epoch and the step of the rate
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        train(run, signals, after_update, quiet)
        model.eval()
        return Result(recipe, model, run.average.module if run.average else None, log.lines)


# ---- before the first update


@contextmanager
def starting():
    """A context in which whatever goes wrong means that the run cannot start.

    Raises:
        CannotStart
    """
    try:
        yield
    except CannotStart:
        raise
    except (ValueError, OSError) as error:
        raise CannotStart(str(error)) from error
    except ImportError as error:
        raise CannotStart(f'{error}: pip install "t2t-ref[train]"') from error


@contextmanager
def named(field: str):
    """A context in which arguments that a class does not take are blamed on the field of the recipe they came from.

    Raises:
        CannotStart
    """
    try:
        yield
    except (TypeError, RuntimeError, ArithmeticError) as error:
        raise CannotStart(f"{field}: {str(error).splitlines()[0]}") from error


@contextmanager
def left_unmarked(model: nn.Module):
    """A context that takes from a model what accelerate leaves on it, by which it would not prepare it again."""
    attributes = set(vars(model))
    try:
        yield
    finally:
        for name in vars(model).keys() - attributes:
            delattr(model, name)


@contextmanager
def denormals_flushed():
    """A context in which numbers below 1e-38 count as 0 on the processor.

    The silent tokens of a trained performer make many of them, and processors are slow with these.
    """
    before = not (torch.tensor([1e-38]) / 10).any()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def make_accelerator(recipe: Recipe, cpu: bool):
    """What moves things to the device, and lets processes work together."""
    AcceleratorState._reset_state()  # a notebook trains more than once, and not always at one precision
    return accelerate.Accelerator(
        mixed_precision=recipe.precision,
        cpu=cpu,
        # as a plugin, since an environment variable of accelerate overrides the plain number
        gradient_accumulation_plugin=GradientAccumulationPlugin(recipe.accumulate, sync_with_dataloader=False),
    )


def find_state(folder: Path | None, resume: bool, say: Callable[[str], object]) -> tuple[Path, dict] | None:
    """The state to go on from, read by the main process for all: the folder need not be seen by the other nodes.

    Raises:
        CannotStart: for a folder that holds a run which is not to be resumed
    """
    if folder and not resume and ((folder / "log.jsonl").exists() or states_of(folder)):
        raise CannotStart(
            f"{folder} holds an earlier run: --resume goes on with it, --output names another folder; or remove it"
        )
    return broadcast_object_list([load_state(folder, say) if folder and resume else None])[0]


def try_compiler(device: torch.device) -> None:
    """See now, not at the first update, whether torch.compile works here.

    Raises:
        CannotStart
    """
    try:
        torch.compile(lambda numbers: numbers + 1)(torch.zeros(8, device=device))
    except Exception as error:
        while error.__cause__:
            error = error.__cause__
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise CannotStart(
            f"torch.compile does not work here ({type(error).__name__}: {(lines or [''])[0]}): install what it needs, "
            "on a CPU a C++ compiler, or leave compile out"
        ) from error


def build_model(recipe: Recipe, num_classes: int, fresh: bool = True) -> nn.Module:
    """The model of a recipe, with the weights it starts from.

    Args:
        fresh: False leaves out the weights of ``recipe.model_weights``, for a run that goes on
    """
    torch.manual_seed(sampling.mixed(recipe.seed))
    with named("model_options"):
        model = create_model(
            recipe.model,
            num_classes=num_classes,
            img_size=recipe.img_size,
            drop_path_rate=recipe.drop_path,
            pretrained=fresh and recipe.model_weights == "released",
            **dict(recipe.model_options),
        )
    if fresh and recipe.model_weights not in (None, "released"):
        load_checkpoint(model, recipe.model_weights, progress=False)
    return model


def begin_log(run: Run, resumed: tuple[Path, dict] | None) -> None:
    """The first line of a run, or of its continuation. A finished run is left alone."""
    early = run.log.lines  # warnings while the data was opened
    if run.folder:
        run.log.open(run.folder, resumed[1]["position"]["log_size"] if resumed else 0)
    place = run.progress
    if place.finished:
        return
    run.log.lines = run.log.lines if resumed else []
    recipe = run.recipe
    run.note(
        "resume" if resumed else "run",
        **({"update": place.update, "epoch": place.epoch} if resumed else {"recipe": asdict(recipe)}),
        versions=versions(),
        device=device_name(run.accelerator.device),
        processes=run.world,
        images_per_update=run.global_batch,
        updates_per_epoch=place.updates_per_epoch,
        command=" ".join(sys.argv),
    )
    for line in early:
        if line not in run.log.lines:  # a log that goes on may have them
            run.note(**line)
    if not resumed:
        run.say(
            f"{recipe.model} ({count_parameters(run.model) / 1e6:.2f} M parameters) on {recipe.data}: "
            f"{recipe.epochs} epochs of {place.updates_per_epoch} updates, {run.global_batch} images each, "
            f"on {run.world} x {device_name(run.accelerator.device)}"
        )


# ---- the loop


def train(run: Run, signals: Signals, after_update: Callable | None = None, quiet: bool = True) -> None:
    """All epochs of a run that are not done yet, then the results."""
    place = run.progress
    if place.finished:
        run.say(f"this run is finished: {place.update} updates; for another one choose another --output")
        return
    hidden = quiet or not run.accelerator.is_main_process or not sys.stderr.isatty()
    with tqdm(total=place.updates, initial=place.update, disable=hidden, unit="update", dynamic_ncols=True) as bar:
        clock = time.perf_counter()
        while place.epoch < run.recipe.epochs:
            for measured in updates(run, signals):
                now = time.perf_counter()
                after(run, measured, now - clock, after_update)
                clock = now
                bar.update()
                bar.set_postfix(loss=f"{measured.loss:.3f}", refresh=False)
                if measured.stop:
                    interrupt(run, signals)
                if place.is_time_to_save():
                    run.save()
            clock = end_epoch(run, clock)
    place.finished = True
    run.write_results()
    run.note("end", reason="finished", update=place.update, seconds=round(run.seconds, 1))
    run.save()
    run.accelerator.wait_for_everyone()
    if run.folder:
        run.say(f"written to {run.folder}: {WEIGHTS}{f', {AVERAGED}' * bool(run.average)}, {CURVE}, log.jsonl")


def updates(run: Run, signals: Signals) -> Iterator[Measured]:
    """Make the updates of the present epoch that are not done yet, one after the other.

    Raises:
        NotFinite
        Interrupted
        ValueError: if the data ended too early
    """
    recipe, place = run.recipe, run.progress
    run.parts.prepared.train()
    run.augment.train()
    first = place.start * recipe.accumulate
    batches = sampling.training_batches(
        run.data.train, recipe.seed, place.epoch, recipe.batch_size, run.rank, run.world,
        first=first, workers=recipe.workers,
    )  # fmt: skip
    keys = (
        (recipe.seed, place.epoch, index, run.rank)
        for index in range(first, place.updates_per_epoch * recipe.accumulate)
    )
    keyed = zip(keys, interruptible(batches, signals), strict=False)
    while place.start < place.updates_per_epoch:
        where = f"update {place.update + 1}, epoch {place.epoch + 1}"
        try:
            measured = update(run.parts, islice(keyed, recipe.accumulate), where, run.skipped, signals.number)
        except NotFinite as error:
            message = f"{error}\n{run.way_on()}"
            run.note("end", reason="not finite", update=place.update, message=message)
            raise NotFinite(message) from None
        except Interrupted:  # while waiting for images: the other processes may be elsewhere
            interrupt(run, signals, together=False)
        if measured is None:
            raise ValueError(f"the data ended at update {place.start} of {place.updates_per_epoch} of an epoch")
        run.skipped = measured.skipped
        if run.average:
            run.average.update_parameters(run.model)
        place.next_update()
        yield measured


def after(run: Run, measured: Measured, seconds: float, after_update: Callable | None) -> None:
    """What follows an update: the rate moves, others may look, and the log gets a line when it is time."""
    place, window = run.progress, run.window
    run.lr = run.optimizer.param_groups[-1]["lr"]  # that of the head
    if run.recipe.lr_per_update:
        run.scheduler.step()
    if after_update:
        after_update(run.model, place.update)
    run.seconds += seconds
    window["updates"] += 1
    window["seconds"] += seconds
    window["loss"] += measured.loss
    window["correct"] += measured.correct
    window["grad_norm"] += 0.0 if measured.skipped else measured.grad_norm
    if place.is_time_to_log():
        images = window["updates"] * run.global_batch
        # the larger part of two mixed images is not what a model is asked for: then there is no accuracy
        hits = {} if run.recipe.mixup or run.recipe.cutmix else {"accuracy": window["correct"] / images}
        run.note(
            "step",
            epoch=place.share,
            update=place.update,
            samples=place.update * run.global_batch,
            lr=run.lr,
            loss=window["loss"] / window["updates"],
            **hits,
            grad_norm=window["grad_norm"] / window["updates"],
            seconds=round(run.seconds, 2),
            images_per_second=round(images / max(window["seconds"], 1e-9), 1),
        )
        run.window = empty_window()


def end_epoch(run: Run, clock: float) -> float:
    """Evaluate, log, move the learning rate, save. Returns the time at which it was done."""
    recipe, place = run.recipe, run.progress
    line = {"epoch": place.epoch + 1, "update": place.update, "lr": run.lr}
    if place.is_time_to_evaluate():
        found = run.evaluate()
        line |= {"test_loss": found.loss, "test_accuracy": found.top1, "test_top5": found.top5}
    now = time.perf_counter()
    run.seconds += now - clock
    run.note("epoch", **line, seconds=round(run.seconds, 2))
    if "test_accuracy" in line:
        run.say(
            f"epoch {line['epoch']:3d} of {recipe.epochs}: test accuracy {100 * line['test_accuracy']:.2f} %, "
            f"test loss {line['test_loss']:.3f}, {run.seconds:.0f} s"
        )
    place.next_epoch()
    if not recipe.lr_per_update:
        run.scheduler.step()
    if place.is_time_to_save_epoch():
        run.save()
    return now


def interrupt(run: Run, signals: Signals, together: bool = True) -> None:
    """Save, write what there is, and leave.

    Raises:
        Interrupted
    """
    run.save()
    run.write_results()
    run.note("end", reason="interrupted", update=run.progress.update)
    if together:
        run.accelerator.wait_for_everyone()  # torchrun ends all processes when one has left
    number = signals.number or signal.SIGTERM  # it came to another process
    raise Interrupted(f"{signal.Signals(number).name} after update {run.progress.update}: {run.way_on()}", number)


def leave_group() -> None:
    """Leave the group of processes, or torch complains at the end."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def device_name(device: torch.device) -> str:
    """The name of the GPU, or the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
