"""Compare ways to compute the same model: time, memory, and how near each is to its own matrix products (chapter 16).

    python -m t2t_ref.bench models    whole models: forward, training step
    python -m t2t_ref.bench pieces    each improvement by itself, before and after
    python -m t2t_ref.bench tokens    exact attention and random features, by number of tokens
    python -m t2t_ref.bench kinds     where the time of a forward pass goes, by torch's profiler
    python -m t2t_ref.bench memory    peak memory of one step against image size, model after model (chapter 24)
    python -m t2t_ref.bench roof      what the machine can do: products and copies a second
    python -m t2t_ref.bench start     import t2t_ref, create a model: each in fresh processes

Times are taken as :mod:`t2t_ref.bench.timing` says. Peak memory is taken in a process of its own for each candidate.

Options of all commands: --rounds, --threads, --clock, --json FILE. Each command explains its own with --help.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange

from t2t_ref.bench.cases import PRECISIONS, Case, build, check, forms_of, peak_in_this_process, peak_memory, step_of
from t2t_ref.bench.pieces import pieces, with_gradients, without_gradients
from t2t_ref.bench.products import macs_of, products_of, run_of
from t2t_ref.bench.timing import CLOCKS, check_rounds, compare, compare_with_first, interleave
from t2t_ref.models.fused import FusedTokenPerformer, scaled_performer_attention
from t2t_ref.models.token_performer import TokenPerformer
from t2t_ref.models.token_transformer import TokenTransformer


def machine() -> dict[str, str | int]:
    """What the numbers depend on, apart from the code."""
    name = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        models = [
            line.split(":")[1].strip()
            for line in cpu_info.read_text(encoding="utf-8").splitlines()
            if "model name" in line
        ]
        name = models[0] if models else name
    found: dict[str, str | int] = {"cpu": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    found |= {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}  # glibc's allocator
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def cases_of(options: argparse.Namespace, implementations: Sequence[str], modes: Sequence[str]) -> list[Case]:
    """Every model, mode and size that the options name, each looked at before anything is measured.

    Raises:
        ValueError: as :func:`t2t_ref.bench.cases.check`, and if there is not one batch for each size
    """
    if len(options.img_size) != len(options.batch):
        raise ValueError(
            f"found {len(options.batch)} --batch for {len(options.img_size)} --img-size, expected one for each"
        )
    device, precision = getattr(options, "device", "cpu"), getattr(options, "precision", "float32")
    cases = [
        Case(model, mode, batch, size, device, precision)
        for model in options.models
        for mode in modes
        for size, batch in zip(options.img_size, options.batch, strict=True)
    ]
    for case in cases:
        check(case, implementations)
    return cases


def bench_models(options: argparse.Namespace) -> Iterator[dict]:
    """The command ``models``: every model, mode and size that the options name."""
    for case in cases_of(options, options.implementations, options.modes):
        found = bench_case(case, options)
        print(table_of(found), "\n", flush=True)
        yield found


def bench_case(case: Case, options: argparse.Namespace) -> dict:
    """All implementations in one case. The first one named is the one that the others are compared with.

    Raises:
        ImportError: if none of them is installed
    """
    steps, notes = {}, []
    for implementation in forms_of(case, options.implementations):
        try:
            steps[implementation] = step_of(build(implementation, case), case)
        except ImportError as error:
            notes.append(str(error))
    if not steps:
        raise ImportError("; ".join(notes))
    finite = {name: bool(step().isfinite().all()) for name, step in steps.items()}
    products = products_of(case)
    dtype = PRECISIONS[case.precision] or torch.float32
    products_alone = run_of(products, case.device, dtype)
    seconds = interleave(
        steps | {"products": products_alone}, options.rounds, device=case.device, clock=CLOCKS[options.clock]
    )
    bound = seconds.pop("products")
    rows = []
    for name, timing in compare_with_first(seconds).items():
        row = {"implementation": name} | asdict(timing) | {"finite": finite[name]}
        row["images_per_second"] = case.batch / timing.seconds
        share = compare(bound, seconds[name])
        row |= {"of_bound": share.speed, "of_bound_low": share.speed_low, "of_bound_high": share.speed_high}
        if options.memory:
            try:
                row["peak_mb"] = peak_memory(name, case)["peak"]
            except RuntimeError as error:  # the times stand
                notes.append(f"peak memory of {error}")
        rows.append(row)
    return {
        "case": asdict(case),
        "rounds": options.rounds,
        "products": {"seconds": statistics.median(bound), "macs": macs_of(products)},
        "rows": rows,
        "notes": notes,
    }


def table_of(found: dict) -> str:
    """A case as text."""
    case, products = found["case"], found["products"]
    lines = [
        "{model}, {mode}, {batch} images of {img_size} px, {device}, {precision}".format(**case)
        + f", {found['rounds']} rounds",
        f"matrix products alone: {1e3 * products['seconds']:.0f} ms for {products['macs'] / 1e9:.1f} billion MACs",
        "                         ms   images/s   of bound   speed   middle half   peak MB",
    ]
    for row in found["rows"]:
        memory = f"{row['peak_mb']:9.0f}" if "peak_mb" in row else ""
        settled = row is found["rows"][0] or row["verdict"] in ("faster", "slower")
        remark = "" if settled else f"   {row['verdict']}"
        remark += "" if row["finite"] else "   NOT FINITE"
        lines.append(
            f"{row['implementation']:20}{1e3 * row['seconds']:7.0f}{row['images_per_second']:11.1f}"
            f"{row['of_bound']:11.2f}{row['speed']:8.2f}   {row['speed_low']:.2f} to {row['speed_high']:.2f}"
            f"{memory}{remark}"
        )
    return "\n".join(lines + found["notes"])


def bench_pieces(options: argparse.Namespace) -> Iterator[dict]:
    """The command ``pieces``: each group of :func:`pieces`, forward, then forward and backward."""
    for group, runs in pieces().items():
        for mode in ("forward", "forward and backward"):
            step = without_gradients if mode == "forward" else with_gradients
            steps = {name: step(run) for name, run in runs.items()}
            timings = compare_with_first(interleave(steps, options.rounds, clock=CLOCKS[options.clock]))
            print(f"{group}, {mode}")
            for name, t in timings.items():
                print(
                    f"  {name:20}{1e3 * t.seconds:8.1f} ms   speed {t.speed:.2f} "
                    f"({t.speed_low:.2f} to {t.speed_high:.2f})   {t.verdict}",
                    flush=True,
                )
            yield {"group": group, "mode": mode, "rows": {name: asdict(t) for name, t in timings.items()}}


def bench_tokens(options: argparse.Namespace) -> Iterator[dict]:
    """Both T2T layers, and their attention alone, for ever more tokens; the batch shrinks as the tokens grow.

    Raises:
        ValueError: for fewer than one token
    """
    if min(options.tokens) < 1:
        raise ValueError(f"tokens is {min(options.tokens)}, expected at least 1")
    torch.manual_seed(0)
    transformer, performer = TokenTransformer(147).eval(), TokenPerformer(147).eval()
    fused = FusedTokenPerformer(147).eval()
    fused.load_state_dict(performer.state_dict())
    for n in options.tokens:
        batch = max(1, 25088 // n)
        tokens = torch.randn(batch, n, 147)
        queries, keys, values = 0.25 * torch.randn(3, batch, n, 64)
        heads = [rearrange(x, "b n e -> b 1 n e") for x in (queries, keys, values)]

        def fused_attention(heads=heads):
            return F.scaled_dot_product_attention(*heads, scale=147**-0.5)

        def scaled(queries=queries, keys=keys, values=values):
            return scaled_performer_attention(queries, keys, values, performer.w)

        layers = {
            "exact": lambda tokens=tokens: transformer(tokens),
            "performer": lambda tokens=tokens: performer(tokens),
            "fused performer": lambda tokens=tokens: fused(tokens),
        }
        groups = {"attention": {"exact": fused_attention, "scaled performer": scaled}, "layer": layers}
        for group, runs in groups.items():
            steps = {name: without_gradients(run) for name, run in runs.items()}
            timings = compare_with_first(interleave(steps, options.rounds, clock=CLOCKS[options.clock]))
            rows = {name: asdict(t) | {"us_per_image": 1e6 * t.seconds / batch} for name, t in timings.items()}
            line = ", ".join(f"{name} {row['us_per_image']:.0f} us" for name, row in rows.items())
            print(f"{n} tokens, {group}: {line} an image; {rows[list(rows)[-1]]['verdict']}", flush=True)
            yield {"group": group, "tokens": n, "batch": batch, "rows": rows}


KINDS = {  # torch's operations, by what they are for
    "matrix products": ("addmm", "mm", "bmm", "baddbmm"),
    "attention": ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention"),
    "layer norms": ("native_layer_norm",),
    "GELU": ("gelu",),
    "soft split and copies": ("im2col", "copy_", "cat", "fill_", "constant_pad_nd"),
    "sums, differences, products": ("add", "add_", "mul", "sub", "div", "pow", "sum", "neg"),
    "softmax, exp, log, maxima": (
        "_softmax",
        "exp",
        "exp_",
        "log",
        "logsumexp",
        "amax",
        "sigmoid",
        "linalg_vector_norm",
    ),
}


def bench_kinds(options: argparse.Namespace) -> Iterator[dict]:
    """The command ``kinds``: milliseconds of a forward pass, by what torch's operations are for."""
    implementations = ("plain", "readable", "fused")
    for case in cases_of(options, implementations, ["forward"]):
        for implementation in implementations:
            step = step_of(build(implementation, case), case)
            step(), step()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                for _ in range(options.rounds):
                    step()
            milliseconds = Counter()
            for event in profile.key_averages():
                kinds = [kind for kind, names in KINDS.items() if event.key.removeprefix("aten::") in names]
                milliseconds[kinds[0] if kinds else "everything else"] += (
                    event.self_cpu_time_total / 1e3 / options.rounds
                )
            shown = {kind: round(ms, 1) for kind, ms in milliseconds.most_common()}
            print(case.model, implementation, shown, flush=True)
            yield {"case": asdict(case), "implementation": implementation, "milliseconds": dict(milliseconds)}


def bench_memory(options: argparse.Namespace) -> Iterator[dict]:
    """The command ``memory``: the peak of one step of the readable form, each in a process of its own."""
    for case in cases_of(options, ["readable"], options.modes):
        peak = round(peak_memory("readable", case)["peak"], 1)
        print(f"{case.model}, {case.mode}, {case.batch} images of {case.img_size} px: {peak:.0f} MB", flush=True)
        yield {"case": asdict(case), "peak_mb": peak}


def bench_roof(options: argparse.Namespace) -> Iterator[dict]:
    """The two limits of a machine: products of matrices that fit its caches, and copies that do not."""
    side, length = 1536, 2**24
    a, b, c = torch.randn(3, side, side)
    source, target = torch.randn(2, length)
    runs = {"product": lambda: torch.mm(a, b, out=c), "copy": lambda: target.copy_(source)}
    amounts = {"product": ("FLOP", 2 * side**3), "copy": ("bytes", 2 * 4 * length)}  # a copy reads and writes
    for name, seconds in interleave(runs, options.rounds, clock=CLOCKS[options.clock]).items():
        unit, amount = amounts[name]
        low, middle, high = statistics.quantiles([amount / s for s in seconds], n=4, method="inclusive")
        print(f"{name}: {middle / 1e9:.1f} billion {unit} a second ({low / 1e9:.1f} to {high / 1e9:.1f})", flush=True)
        yield {"what": name, "unit": unit, "per_second": middle, "low": low, "high": high}


STARTS = {  # what is done before the clock starts, and after
    "import t2t_ref, after torch": ("import torch", "import t2t_ref"),
    "create t2t_vit_14": ("import t2t_ref", "t2t_ref.create_model('t2t_vit_14')"),
}


def bench_start(options: argparse.Namespace) -> Iterator[dict]:
    """The command ``start``: seconds to import the package, and to create a model, each in fresh processes."""
    clock = CLOCKS[options.clock].__name__
    for what, (before, timed) in STARTS.items():
        before = f"import torch; torch.set_num_threads({options.threads}); {before}"
        code = f"import time; {before}; t = time.{clock}(); {timed}; print(time.{clock}() - t)"
        seconds = []
        for _ in range(options.rounds):
            child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            seconds.append(float(child.stdout))
        low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
        print(f"{what}: {middle:.3f} s ({low:.3f} to {high:.3f})", flush=True)
        yield {"what": what, "seconds": middle, "low": low, "high": high}


def picture(found: list[dict], path: str) -> None:
    """Bars of every case of ``models``: time of each implementation, and a line where the products alone would be."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heights = [len(case["rows"]) for case in found]
    fig, axes = plt.subplots(
        len(found), 1, figsize=(6.4, 0.9 + 0.35 * sum(heights) + 0.6 * len(found)), squeeze=False,
        constrained_layout=True, height_ratios=heights,
    )  # fmt: skip
    for ax, case in zip(axes[:, 0], found, strict=True):
        rows = case["rows"]
        ax.barh([row["implementation"] for row in rows], [1e3 * row["seconds"] for row in rows], color="#767676")
        ax.axvline(1e3 * case["products"]["seconds"], color="#D55E00")
        ax.invert_yaxis()
        ax.set_xlabel("{model}, {mode}, {batch} x {img_size} px: milliseconds".format(**case["case"]))
    fig.savefig(path, dpi=150)


COMMANDS = {
    "models": bench_models,
    "pieces": bench_pieces,
    "tokens": bench_tokens,
    "kinds": bench_kinds,
    "memory": bench_memory,
    "roof": bench_roof,
    "start": bench_start,
}


def parser() -> argparse.ArgumentParser:
    """The command line, with one subcommand for each of ``COMMANDS``."""
    described = argparse.ArgumentParser(prog="python -m t2t_ref.bench", description=__doc__.partition("\n")[0])
    commands = described.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        command = commands.add_parser(name)
        if name != "memory":  # which takes no times
            command.add_argument("--rounds", type=int, default=15, help="repetitions of each candidate, at least 3")
            command.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: on one thread of a busy machine")
        command.add_argument("--threads", type=int, default=torch.get_num_threads())
        command.add_argument("--json", help="file to write the numbers to")
        if name in ("models", "kinds", "memory"):
            command.add_argument("--models", nargs="+", default=["t2t_vit_14", "t2t_vit_t_14"])
            command.add_argument("--img-size", type=int, nargs="+", default=[224])
            command.add_argument("--batch", type=int, nargs="+", default=[8], help="one for each --img-size")
        if name in ("models", "memory"):
            command.add_argument("--modes", nargs="+", choices=("forward", "train"), default=["forward", "train"])
        if name == "models":
            command.add_argument("--implementations", nargs="+", default=["plain", "readable", "fused", "recompute"])
            command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
            command.add_argument("--precision", choices=PRECISIONS, default="float32", help="of autocast")
            command.add_argument("--no-memory", dest="memory", action="store_false")
            command.add_argument("--picture", help="PNG file to draw")
        if name == "tokens":
            command.add_argument("--tokens", type=int, nargs="+", default=[49, 98, 196, 392, 784, 1568, 3136, 9216])
    return described


def check_options(options: argparse.Namespace) -> None:
    """Find out now, not after an hour, what cannot be measured or written.

    Raises:
        ValueError
        ImportError: without matplotlib, if a picture is asked for
    """
    if "rounds" in options:
        check_rounds(options.rounds)
    if options.threads < 1:
        raise ValueError(f"threads is {options.threads}, expected at least 1")
    for path in filter(None, (options.json, getattr(options, "picture", None))):
        if Path(path).is_dir() or not os.access(Path(path).parent, os.W_OK):
            raise ValueError(f"{path} cannot be written: expected a file in a folder that is there")
    if getattr(options, "picture", None):
        import matplotlib  # noqa: F401


def write(path: str, content: dict) -> None:
    """Replace the file in one step."""
    draft = Path(f"{path}.part")
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)


def main(arguments: list[str]) -> int:
    """Run the command line. Returns the exit status: 2 for what cannot be measured. What was measured is written."""
    if arguments[:1] == ["peak"] and len(arguments) == 2:  # the child of peak_memory
        peak_in_this_process(arguments[1])
        return 0
    options, found, failed, status = parser().parse_args(arguments), [], None, 0
    try:
        check_options(options)
        torch.set_num_threads(options.threads)
        torch.backends.cudnn.allow_tf32 = False  # else a convolution would round where a linear layer does not
        for entry in COMMANDS[options.command](options):
            found.append(entry)
    except (ValueError, RuntimeError, OSError, ImportError, MemoryError, subprocess.CalledProcessError) as error:
        failed, status = (str(error).strip().splitlines() or [type(error).__name__])[0], 2
    except KeyboardInterrupt:
        failed, status = "interrupted", 130
    if options.json and (found or not failed):
        threads = [] if "--threads" in arguments else ["--threads", str(options.threads)]
        clock = {"clock": options.clock} if "clock" in options else {}
        command = " ".join(["python -m t2t_ref.bench", *arguments, *threads])
        content = {"command": command, "machine": machine() | clock, "found": found}
        write(options.json, content | ({"failed": failed} if failed else {}))
    if getattr(options, "picture", None) and found:
        picture(found, options.picture)
    if failed:
        print(f"t2t_ref.bench: {failed}", file=sys.stderr)
    return status
