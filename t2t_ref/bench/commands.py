"""Compare ways to compute the same model: time, memory, and how near each is to its own matrix products (chapter 16).

    python -m t2t_ref.bench models    whole models: forward, training step
    python -m t2t_ref.bench pieces    each improvement by itself, before and after
    python -m t2t_ref.bench tokens    exact attention and random features, by number of tokens
    python -m t2t_ref.bench kinds     where the time of a forward pass goes, by torch's profiler
    python -m t2t_ref.bench roof      what the machine can do: products and copies a second
    python -m t2t_ref.bench start     import t2t_ref, create a model: each in fresh processes

All candidates of one comparison run in turn, round after round, so that a neighbour who takes the machine for a second
slows all of them. A ratio is the median of the ratios within the rounds; its spread is their middle half. Where the
spread is wide, the verdict says so. Peak memory is taken in a process of its own for each candidate.

Options of all commands: --rounds, --threads, --clock, --json FILE. Each command explains its own with --help.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from t2t_ref.bench import plain_forms
from t2t_ref.create import create_model
from t2t_ref.models.fused import (
    FusedTokenPerformer,
    fuse,
    pixel_major_split,
    pixel_major_weights,
    scaled_performer_attention,
)
from t2t_ref.models.token_performer import TokenPerformer, performer_attention, plain_performer_attention
from t2t_ref.models.token_transformer import TokenTransformer

# of the wall, or what this process got of its core: on one thread that leaves out what neighbours took
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
WIDE = 0.25  # a middle half wider than this share of the median ratio says more about the machine than about the code
PRECISIONS = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}  # of autocast; weights are float32


# ---------------------------------------------------------------- timing


@dataclass(frozen=True)
class Timing:
    """One candidate against a reference. ``speed`` is time of the reference / own time: above 1 is faster."""

    seconds: float  # median
    speed: float
    speed_low: float  # a quarter of the rounds was below
    speed_high: float  # a quarter was above
    verdict: str


def interleave(
    runs: dict[str, Callable[[], object]],
    rounds: int = 15,
    warm_up: int = 2,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time candidates in turn, each round in another order: the seconds of each candidate, round by round.

    Raises:  ValueError for fewer than 3 rounds, from which no spread can be read
    """
    if rounds < 3:
        raise ValueError(f"rounds is {rounds}, expected at least 3: a spread needs several")
    names, seconds = list(runs), {name: [] for name in runs}
    for name in names:
        for _ in range(warm_up):
            runs[name]()
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            wait(device)
            begin = clock()
            runs[name]()
            wait(device)
            seconds[name].append(clock() - begin)
    return seconds


def compare(reference: list[float], seconds: list[float]) -> Timing:
    """The timing of a candidate, given the seconds of each round for the reference and for itself."""
    ratios = [a / b for a, b in zip(reference, seconds, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    if (high - low) / middle > WIDE:
        verdict = "too noisy to tell"
    elif low <= 1 <= high:
        verdict = "no difference seen"
    else:
        verdict = "faster" if middle > 1 else "slower"
    return Timing(statistics.median(seconds), middle, low, high, verdict)


def compare_with_first(seconds: dict[str, list[float]]) -> dict[str, Timing]:
    """The timings of all candidates, each against the first one."""
    first = next(iter(seconds.values()))
    return {name: compare(first, own) for name, own in seconds.items()}


def wait(device: str) -> None:
    """Let a GPU finish: its work is only queued when a call returns."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


# ---------------------------------------------------------------- models


@dataclass(frozen=True)
class Case:
    """One comparison: this model, in this mode, on this input."""

    model: str = "t2t_vit_14"
    mode: str = "forward"
    batch: int = 8
    img_size: int = 224
    device: str = "cpu"
    precision: str = "float32"


def vit_pytorch_model(case: Case) -> nn.Module:
    """The T2TViT of the package vit-pytorch in its nearest configuration. It is *another function*, and a larger one.

    Its T2T layers keep the full width, 147 and 1323, where the authors' reduce it to 64.

    Raises:  ImportError, with the remedy, if it is not installed
    """
    try:
        from vit_pytorch.t2t import T2TViT as Peer
    except ImportError as error:
        raise ImportError(f"vit-pytorch is not measured ({error}): pip install vit-pytorch torchvision") from error
    sizes = create_model_on_meta(case)
    width, depth = sizes.embed_dim, len(sizes.blocks)
    heads, hidden = sizes.blocks[0].attn.num_heads, sizes.blocks[0].mlp.fc1.out_features
    splits = ((7, 4), (3, 2), (3, 2))
    return Peer(
        image_size=case.img_size,
        num_classes=1000,
        dim=width,
        depth=depth,
        heads=heads,
        mlp_dim=hidden,
        dim_head=width // heads,
        t2t_layers=splits,
    )


BUILDERS: dict[str, Callable[[Case], nn.Module]] = {
    "plain": lambda case: plain_forms.plain(create_model(case.model, img_size=case.img_size)),
    "readable": lambda case: create_model(case.model, img_size=case.img_size),
    "fused": lambda case: fuse(create_model(case.model, img_size=case.img_size)),
    "recompute": lambda case: fuse(create_model(case.model, img_size=case.img_size), recompute=True),
    "vit-pytorch": vit_pytorch_model,
}
COMPILED = "+compile"  # after the name of an implementation


def create_model_on_meta(case: Case) -> nn.Module:
    """The model of a case without memory for its weights: for its sizes alone."""
    with torch.device("meta"):
        return create_model(case.model, img_size=case.img_size)


def build(implementation: str, case: Case) -> nn.Module:
    """A model by the name of its implementation, with the same seeded weights for all of them.

    Raises:  ValueError for an unknown implementation, ImportError if vit-pytorch is asked for and absent
    """
    name = implementation.removesuffix(COMPILED)
    if name not in BUILDERS:
        raise ValueError(
            f"unknown implementation {implementation!r}: known are {', '.join(BUILDERS)}, each + {COMPILED}"
        )
    torch.manual_seed(0)
    model = BUILDERS[name](case).to(case.device)
    model.train(case.mode == "train")
    return torch.compile(model) if implementation.endswith(COMPILED) else model


def images_of(case: Case) -> Tensor:
    """The same random images for every implementation.

    Shapes:  return  b c h w     c = 3, h = w = img_size of the case
    """
    generator = torch.Generator().manual_seed(0)
    return torch.randn(case.batch, 3, case.img_size, case.img_size, generator=generator).to(case.device)


def step_of(model: nn.Module, case: Case) -> Callable[[], Tensor]:
    """What is timed: a forward pass without gradients, or a training step with AdamW. It returns logits or loss."""
    images, dtype = images_of(case), PRECISIONS[case.precision]
    kind = torch.device(case.device).type
    autocast = (lambda: torch.autocast(kind, dtype=dtype)) if dtype else nullcontext

    def forward() -> Tensor:
        with torch.inference_mode(), autocast():
            return model(images)

    if case.mode == "forward":
        return forward
    targets = torch.arange(case.batch, device=case.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    scaler = torch.amp.GradScaler(kind, enabled=dtype == torch.float16)

    def train() -> Tensor:
        optimizer.zero_grad()
        with autocast():
            loss = F.cross_entropy(model(images), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return train


# ---------------------------------------------------------------- the bound set by the matrix products


class ProductRecorder(TorchDispatchMode):
    """Writes down every matrix product that runs under it: (rows, inner, columns), and whether a factor is transposed.

    A factor is (batch, rows, columns, transposed in memory); batch is 1 for a plain product. A convolution counts as
    the product of its windows with its weights.
    """

    def __init__(self):
        super().__init__()
        self.products: Counter[tuple] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        output = function(*arguments, **(options or {}))
        name = function.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self.products[factor(arguments[0]), factor(arguments[1])] += 1
        elif name in ("addmm", "baddbmm"):
            self.products[factor(arguments[1]), factor(arguments[2])] += 1
        elif name == "convolution":
            self.record_convolution(output, arguments[1], 1)
        elif name == "convolution_backward":  # one product for the image, one for the weights
            self.record_convolution(arguments[0], arguments[2], sum(arguments[-1][:2]))
        return output

    def record_convolution(self, output: Tensor, weight: Tensor, count: int) -> None:
        """Write a convolution down as the product that it is, ``count`` times."""
        if count:
            rows, inner = output[:, 0].numel(), weight[0].numel()
            self.products[(1, rows, inner, False), (1, inner, len(weight), False)] += count


def factor(tensor: Tensor) -> tuple[int, int, int, bool]:
    """A matrix as (batch, rows, columns, whether it is transposed in memory)."""
    batch = len(tensor) if tensor.ndim == 3 else 1
    rows, columns = tensor.shape[-2:]
    return batch, rows, columns, tensor.stride(-2) == 1 and tensor.stride(-1) != 1


def products_of(case: Case) -> Counter[tuple]:
    """Every matrix product of the readable model in this case, by shape, from a run without data (meta device)."""
    meta = replace(case, device="meta", precision="float32")
    model = build("readable", meta)
    recorder = ProductRecorder()
    with sdpa_kernel(SDPBackend.MATH), recorder:  # attention as the two products that it is
        if case.mode == "train":
            model(images_of(meta)).sum().backward()
        else:
            with torch.no_grad():
                model(images_of(meta))
    return recorder.products


def macs_of(products: Counter[tuple]) -> int:
    """Multiply-accumulates of all products together."""
    return sum(count * a[0] * a[1] * a[2] * b[2] for (a, b), count in products.items())


def run_of(products: Counter[tuple], device: str = "cpu", dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    """Something that computes these products and nothing else, into memory that is already there."""

    def operand(batch, rows, columns, transposed):
        pattern = "b columns rows -> b rows columns" if transposed else "b rows columns -> b rows columns"
        shape = (batch, columns, rows) if transposed else (batch, rows, columns)
        return rearrange(torch.randn(shape, device=device, dtype=dtype), pattern)

    work = []
    for (a, b), count in products.items():
        left, right = operand(*a), operand(*b)
        if a[0] == 1:
            left, right = left[0], right[0]
        out = torch.empty(*left.shape[:-1], right.shape[-1], device=device, dtype=dtype)
        work.append((torch.mm if a[0] == 1 else torch.bmm, left, right, out, count))

    def run() -> None:
        with torch.inference_mode():
            for multiply, left, right, out, count in work:
                for _ in range(count):
                    multiply(left, right, out=out)

    return run


# ---------------------------------------------------------------- memory


def peak_memory(implementation: str, case: Case) -> dict[str, float]:
    """Peak memory of one step beyond the model and its input, in a process of its own.

    Units:   megabytes (10^6 bytes); on a GPU what its allocator held at most, else the resident memory of the process
    Raises:  RuntimeError with the child's last line if it fails
    """
    request = json.dumps([implementation, asdict(case), torch.get_num_threads()])
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "t2t_ref.bench", "peak", request], capture_output=True, text=True
    )
    if child.returncode:
        raise RuntimeError(f"{implementation}, {case}: {(child.stderr.strip().splitlines() or ['died'])[-1]}")
    return json.loads(child.stdout)


def peak_in_this_process(request: str) -> None:
    """The child of :func:`peak_memory`: prints one line of JSON."""
    implementation, case, threads = json.loads(request)
    case = Case(**case)
    torch.set_num_threads(threads)
    step = step_of(build(implementation, case), case)
    before = highest_memory(case.device)
    step()
    wait(case.device)
    print(json.dumps({"before": before / 1e6, "peak": (highest_memory(case.device) - before) / 1e6}))


def highest_memory(device: str) -> int:
    """The most memory held so far, in bytes.

    On Linux VmHWM is read, which begins anew with each program. The ru_maxrss of the resource module would begin with
    the size of the parent, and hide a child that is smaller.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---------------------------------------------------------------- commands


def machine() -> dict[str, str | int]:
    """What the numbers depend on, apart from the code."""
    name = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        models = [line.split(":")[1].strip() for line in cpu_info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    found: dict[str, str | int] = {"cpu": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    found |= {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}  # glibc's allocator
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def bench_models(options: argparse.Namespace) -> list[dict]:
    """The command ``models``: every model, mode and size that the options name."""
    found = []
    for model in options.models:
        for mode in options.modes:
            for size, batch in zip(options.img_size, options.batch, strict=True):
                case = Case(model, mode, batch, size, options.device, options.precision)
                found.append(bench_case(case, options))
                print(table_of(found[-1]), "\n", flush=True)
    return found


def bench_case(case: Case, options: argparse.Namespace) -> dict:
    """All implementations in one case. The first one named is the one that the others are compared with."""
    steps, notes = {}, []
    for implementation in options.implementations:
        if implementation == "recompute" and case.mode == "forward":
            continue
        try:
            steps[implementation] = step_of(build(implementation, case), case)
        except ImportError as error:
            notes.append(str(error))
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
            row["peak_mb"] = peak_memory(name, case)["peak"]
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


def pieces(batch: int = 8) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """Each improvement by itself: before, after. All of one group compute the same from the same tensors.

    Sizes are those of t2t_vit_14 and t2t_vit_t_14 at 224 x 224.
    """
    torch.manual_seed(0)
    model = create_model("t2t_vit_14", performer_drop_rate=0.0)
    module = model.tokens_to_token
    images = torch.randn(batch, 3, 224, 224)  # in training no gradient is asked of them
    queries, keys, values = torch.randn(3, batch, 1, 3136, 64).requires_grad_()
    head_queries, head_keys, head_values = torch.randn(3, batch, 6, 197, 64).requires_grad_()
    keys_queries_values = (0.25 * torch.randn(batch, 3136, 192)).requires_grad_()
    inner = torch.randn(batch, 784, 64, requires_grad=True)  # what leaves the second T2T layer
    middle = torch.randn(batch, 3136, 64, requires_grad=True)  # and the first
    layer, split, last, project = module.attention1, module.soft_split0, module.soft_split2, module.project

    def performer(function):
        k, q, v = rearrange(keys_queries_values, "b n (three e) -> three b n e", three=3)
        return function(q, k, v, layer.w)

    def pixel_major(images, split, layer):
        tokens = pixel_major_split(rearrange(images, "b c h w -> b h w c"), split)
        weights = pixel_major_weights(layer, split.kernel)
        normed = F.layer_norm(tokens, layer.norm1.normalized_shape, weights["norm1.weight"], weights["norm1.bias"])
        return F.linear(normed, weights["kqv.weight"], layer.kqv.bias)

    def channel_major(images, split, layer):
        return layer.kqv(layer.norm1(split(images)))

    def folded(images, split, layer):
        return plain_forms.fold_norm_into_split(images, split, layer.norm1, layer.kqv)

    def restructured(tokens, rows):
        return rearrange(tokens, "b (h w) e -> b e h w", h=rows)

    def convolution():
        weight = rearrange(project.weight, "d (c kh kw) -> d c kh kw", kh=3, kw=3)
        image = F.conv2d(restructured(inner, 28), weight, project.bias, last.stride, last.padding)
        return rearrange(image, "b d h w -> b (h w) d")

    second = module.soft_split1, module.attention2
    table = plain_forms.attention_by_table
    return {
        "attention of 3136 tokens": {
            "table": lambda: table(queries, keys, values, 147**-0.5),
            "fused attention": lambda: F.scaled_dot_product_attention(queries, keys, values, scale=147**-0.5),
        },
        "attention of a block": {
            "table": lambda: table(head_queries, head_keys, head_values, 1 / 8),
            "fused attention": lambda: F.scaled_dot_product_attention(head_queries, head_keys, head_values),
        },
        "performer": {
            "definition": lambda: performer(plain_performer_attention),
            "log space": lambda: performer(performer_attention),
            "scaled": lambda: performer(scaled_performer_attention),
        },
        "first split, norm, linear": {
            "channel-major": lambda: channel_major(images, split, layer),
            "pixel-major": lambda: pixel_major(images, split, layer),
            "folded": lambda: folded(images, split, layer),
        },
        "second split, norm, linear": {
            "channel-major": lambda: channel_major(restructured(middle, 56), *second),
            "pixel-major": lambda: pixel_major(restructured(middle, 56), *second),
            "folded": lambda: folded(restructured(middle, 56), *second),
        },
        "last split, linear": {
            "split, linear": lambda: project(last(restructured(inner, 28))),
            "convolution": convolution,
        },
    }


def bench_pieces(options: argparse.Namespace) -> list[dict]:
    """The command ``pieces``: each group of :func:`pieces`, forward, then forward and backward."""
    found = []
    for group, runs in pieces().items():
        for mode in ("forward", "forward and backward"):
            step = without_gradients if mode == "forward" else with_gradients
            steps = {name: step(run) for name, run in runs.items()}
            timings = compare_with_first(interleave(steps, options.rounds, clock=CLOCKS[options.clock]))
            found.append({"group": group, "mode": mode, "rows": {name: asdict(t) for name, t in timings.items()}})
            print(f"{group}, {mode}")
            for name, t in timings.items():
                print(
                    f"  {name:20}{1e3 * t.seconds:8.1f} ms   speed {t.speed:.2f} "
                    f"({t.speed_low:.2f} to {t.speed_high:.2f})   {t.verdict}",
                    flush=True,
                )
    return found


def without_gradients(run: Callable[[], Tensor]) -> Callable[[], object]:
    """The same run as a step of inference."""

    def step():
        with torch.no_grad():
            run()

    return step


def with_gradients(run: Callable[[], Tensor]) -> Callable[[], object]:
    """The same run with its backward pass."""

    def step():
        run().sum().backward()

    return step


def bench_tokens(options: argparse.Namespace) -> list[dict]:
    """Both T2T layers, and their attention alone, for ever more tokens; the batch shrinks as the tokens grow."""
    torch.manual_seed(0)
    transformer, performer = TokenTransformer(147).eval(), TokenPerformer(147).eval()
    fused = FusedTokenPerformer(147).eval()
    fused.load_state_dict(performer.state_dict())
    found = []
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
            found.append({"group": group, "tokens": n, "batch": batch, "rows": rows})
            line = ", ".join(f"{name} {row['us_per_image']:.0f} us" for name, row in rows.items())
            print(f"{n} tokens, {group}: {line} an image; {rows[list(rows)[-1]]['verdict']}", flush=True)
    return found


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


def bench_kinds(options: argparse.Namespace) -> list[dict]:
    """The command ``kinds``: milliseconds of a forward pass, by what torch's operations are for."""
    found = []
    for model in options.models:
        for implementation in ("plain", "readable", "fused"):
            case = Case(model, batch=options.batch[0], img_size=options.img_size[0])
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
            found.append({"case": asdict(case), "implementation": implementation, "milliseconds": dict(milliseconds)})
            print(model, implementation, {kind: round(ms, 1) for kind, ms in milliseconds.most_common()}, flush=True)
    return found


def bench_roof(options: argparse.Namespace) -> list[dict]:
    """The two limits of a machine: products of matrices that fit its caches, and copies that do not."""
    side, length = 1536, 2**24
    a, b, c = torch.randn(3, side, side)
    source, target = torch.randn(2, length)
    runs = {"product": lambda: torch.mm(a, b, out=c), "copy": lambda: target.copy_(source)}
    amounts = {"product": ("FLOP", 2 * side**3), "copy": ("bytes", 2 * 4 * length)}  # a copy reads and writes
    found = []
    for name, seconds in interleave(runs, options.rounds, clock=CLOCKS[options.clock]).items():
        unit, amount = amounts[name]
        low, middle, high = statistics.quantiles([amount / s for s in seconds], n=4, method="inclusive")
        found.append({"what": name, "unit": unit, "per_second": middle, "low": low, "high": high})
        print(f"{name}: {middle / 1e9:.1f} billion {unit} a second ({low / 1e9:.1f} to {high / 1e9:.1f})", flush=True)
    return found


STARTS = {  # what is done before the clock starts, and after
    "import t2t_ref, after torch": ("import torch", "import t2t_ref"),
    "create t2t_vit_14": ("import t2t_ref", "t2t_ref.create_model('t2t_vit_14')"),
}


def bench_start(options: argparse.Namespace) -> list[dict]:
    """The command ``start``: seconds to import the package, and to create a model, each in fresh processes."""
    found = []
    clock = CLOCKS[options.clock].__name__
    for what, (before, timed) in STARTS.items():
        before = f"import torch; torch.set_num_threads({options.threads}); {before}"
        code = f"import time; {before}; t = time.{clock}(); {timed}; print(time.{clock}() - t)"
        seconds = []
        for _ in range(options.rounds):
            child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            seconds.append(float(child.stdout))
        low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
        found.append({"what": what, "seconds": middle, "low": low, "high": high})
        print(f"{what}: {middle:.3f} s ({low:.3f} to {high:.3f})", flush=True)
    return found


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
    "roof": bench_roof,
    "start": bench_start,
}


def parser() -> argparse.ArgumentParser:
    """The command line, with one subcommand for each of ``COMMANDS``."""
    described = argparse.ArgumentParser(prog="python -m t2t_ref.bench", description=__doc__.partition("\n")[0])
    commands = described.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        command = commands.add_parser(name)
        command.add_argument("--rounds", type=int, default=15, help="repetitions of each candidate, at least 3")
        command.add_argument("--threads", type=int, default=torch.get_num_threads())
        command.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: on one thread of a busy machine")
        command.add_argument("--json", help="file to write the numbers to")
        if name in ("models", "kinds"):
            command.add_argument("--models", nargs="+", default=["t2t_vit_14", "t2t_vit_t_14"])
            command.add_argument("--img-size", type=int, nargs="+", default=[224])
            command.add_argument("--batch", type=int, nargs="+", default=[8], help="one for each --img-size")
        if name == "models":
            command.add_argument("--implementations", nargs="+", default=["plain", "readable", "fused", "recompute"])
            command.add_argument("--modes", nargs="+", choices=("forward", "train"), default=["forward", "train"])
            command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
            command.add_argument("--precision", choices=PRECISIONS, default="float32", help="of autocast")
            command.add_argument("--no-memory", dest="memory", action="store_false")
            command.add_argument("--picture", help="PNG file to draw")
        if name == "tokens":
            command.add_argument("--tokens", type=int, nargs="+", default=[49, 98, 196, 392, 784, 1568, 3136, 9216])
    return described


def main(arguments: list[str]) -> int:
    """Run the command line. Returns the exit status."""
    if arguments[:1] == ["peak"]:  # the child of peak_memory
        peak_in_this_process(arguments[1])
        return 0
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.allow_tf32 = False  # else a convolution would round where a linear layer does not
    found = COMMANDS[options.command](options)
    if options.json:
        threads = [] if "--threads" in arguments else ["--threads", str(options.threads)]
        command = " ".join(["python -m t2t_ref.bench", *arguments, *threads])
        content = {"command": command, "machine": machine() | {"clock": options.clock}, "found": found}
        Path(options.json).write_text(json.dumps(content, indent=1) + "\n")
    if getattr(options, "picture", None):
        picture(found, options.picture)
    return 0
