"""What is compared: one model in several forms, in one mode, on one input (chapter 16).

Peak memory is taken in a process of its own for each form.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2t_ref.bench import plain_forms
from t2t_ref.bench.timing import wait
from t2t_ref.create import create_model
from t2t_ref.models.fused import fuse

PRECISIONS = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}  # of autocast; weights are float32


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

    Raises:
        ImportError: with the remedy, if it is not installed
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


TIMMS = {  # of the models whose name timm does not have, one of its own of about the same size
    "t2t_vit_10": "deit_tiny_patch16_224",
    "t2t_vit_14": "deit_small_patch16_224",
    "t2t_vit_t_14": "deit_small_patch16_224",
    "deit_small_patch16": "deit_small_patch16_224",
}


def timm_model(case: Case) -> nn.Module:
    """timm's own model of this name, or of about this size: for a T2T-ViT, which timm does not have, a DeiT.

    Raises:
        ImportError: with the remedy, if timm is not there or does not load; and if it has no such model
    """
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # the latter from a torchvision that was built for another torch
        raise ImportError(f"timm is not measured ({str(error).splitlines()[0]}): pip install timm") from error
    name = TIMMS.get(case.model, case.model)
    if not timm.is_model(name) or not timm.models.model_entrypoint(name).__module__.startswith("timm."):
        raise ImportError(f"timm is not measured: it has no {case.model}, and none is named for its size")
    size = {} if name.startswith("pvt") else {"img_size": case.img_size}  # a pyramid of maps takes any size
    return timm.create_model(name, **size)


BUILDERS: dict[str, Callable[[Case], nn.Module]] = {
    "plain": lambda case: plain_forms.plain(create_model(case.model, img_size=case.img_size)),
    "readable": lambda case: create_model(case.model, img_size=case.img_size),
    "fused": lambda case: fuse(create_model(case.model, img_size=case.img_size)),
    "recompute": lambda case: fuse(create_model(case.model, img_size=case.img_size), recompute=True),
    "vit-pytorch": vit_pytorch_model,
    "timm": timm_model,
}
COMPILED = "+compile"  # after the name of an implementation


def create_model_on_meta(case: Case) -> nn.Module:
    """The model of a case without memory for its weights: for its sizes alone."""
    with torch.device("meta"):
        return create_model(case.model, img_size=case.img_size)


def check_implementation(implementation: str) -> None:
    """Refuse an unknown one.

    Raises:
        ValueError
    """
    if implementation.removesuffix(COMPILED) not in BUILDERS:
        raise ValueError(
            f"unknown implementation {implementation!r}: known are {', '.join(BUILDERS)}; "
            f"{COMPILED} behind any of them compiles it"
        )


def check(case: Case, implementations: Sequence[str]) -> None:
    """See that every form of a case can be built, without memory for weights: before anything is measured.

    Raises:
        ValueError: for an unknown model, implementation or device, for sizes that a model refuses, and if no
            implementation is left: recompute is for training alone
    """
    for implementation in implementations:
        check_implementation(implementation)
    if not forms_of(case, implementations):
        raise ValueError(f"nothing is left to measure in mode {case.mode!r}: recompute is for training alone")
    if case.batch < 1:
        raise ValueError(f"batch is {case.batch}, expected at least 1")
    try:
        torch.empty(1, device=case.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {case.device!r} cannot be had: {str(error).splitlines()[0]}") from error
    for implementation in forms_of(case, implementations):
        with torch.device("meta"), suppress(ImportError):  # a peer that is not installed is noted, and left out
            BUILDERS[implementation.removesuffix(COMPILED)](case)


def forms_of(case: Case, implementations: Sequence[str]) -> list[str]:
    """The implementations that say something new in this mode: recompute saves memory in training alone."""
    return [name for name in implementations if case.mode == "train" or name.removesuffix(COMPILED) != "recompute"]


def build(implementation: str, case: Case) -> nn.Module:
    """A model by the name of its implementation, with the same seeded weights for all of them.

    Raises:
        ValueError: for an unknown implementation
        ImportError: if vit-pytorch or timm is asked for and absent
    """
    check_implementation(implementation)
    torch.manual_seed(0)
    model = BUILDERS[implementation.removesuffix(COMPILED)](case).to(case.device)
    model.train(case.mode == "train")
    return torch.compile(model) if implementation.endswith(COMPILED) else model


def images_of(case: Case) -> Tensor:
    """The same random images for every implementation.

    Shapes:
        return: ``b c h w``, c = 3, h = w = img_size of the case
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


def peak_memory(implementation: str, case: Case) -> dict[str, float]:
    """Peak memory of one step beyond the model and its input, in a process of its own.

    Units:
        megabytes (10^6 bytes)

    Note:
        on a GPU what its allocator held at most, else the resident memory of the process

    Raises:
        RuntimeError: with the child's last line if it fails
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

    Raises:
        ValueError: on Windows, which counts otherwise
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # on Windows
        raise ValueError("this system does not say how much memory a process has taken: use Linux or macOS") from None

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
