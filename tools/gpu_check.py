"""What only a GPU can show: python tools/gpu_check.py [--device cuda] [--quick] [--output results]

Compares the device with the CPU, half precision with float32, the compiled and the fused model with the plain one, and
a run that was cut and resumed with one that was not. Then measures images a second and memory: T2T-ViT in all its
forms, compiled ones included, and its relatives, each beside timm's own model of that size. Writes gpu_checks.json and,
for both precisions, gpu_models_*.json and gpu_relatives_*.json. Exits with 1 if a check has failed or a measurement
broke off. ``--device cpu --quick`` tries the script itself, where there is no GPU.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
import traceback
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from t2t_ref import bench, create_model
from t2t_ref.models.fused import fuse
from t2t_ref.train import Recipe, fit


@dataclass(frozen=True)
class Setting:
    """Where the checks run, and how large they are."""

    device: str
    img_size: int = 224
    depth: int = 14
    batch: int = 16
    updates: int = 10
    sizes: str = "--batch 64 --img-size 224 --rounds 7"
    models: str = "t2t_vit_14"
    forms: str = "plain readable fused recompute readable+compile fused+compile timm"
    relatives: str = (
        "deit_small_patch16_224 tnt_s_patch16_224 pvt_small pvt_v2_b2 swin_tiny_patch4_window7_224 patchconvnet_s60"
    )
    relatives_forms: str = "readable timm"  # compiling them all would take longer than all the rest

    @property
    def kind(self) -> str:
        return torch.device(self.device).type

    def model(self, name="t2t_vit_14"):
        torch.manual_seed(0)
        sizes = dict(img_size=self.img_size, depth=self.depth, num_classes=10)
        return create_model(name, performer_drop_rate=0.0, **sizes)

    def images(self):
        return torch.randn(self.batch, 3, self.img_size, self.img_size, generator=torch.Generator().manual_seed(0))

    def labels(self):
        return torch.arange(self.batch) % 10


def close(found, expected, limit):
    """The difference in units of the expected norm.

    Raises:  AssertionError if it is not below the limit, or no number
    """
    found, expected = (torch.as_tensor(x).detach().cpu().double() for x in (found, expected))
    error = ((found - expected).norm() / expected.norm()).item()
    assert error < limit, f"{error:.3g} from what was expected, at most {limit:g} allowed"
    return float(f"{error:.3g}")


# Each check returns numbers worth keeping, or raises. Limits are many times what rounding does.


def same_as_the_cpu(setting):
    """Logits and gradients in float32, against the CPU's in float64."""
    found = {}
    for name in ("t2t_vit_14", "t2t_vit_t_14", "t2t_vit_14_se"):
        model = setting.model(name).eval()
        images = setting.images()[:2]
        expected = model.double()(images.double())
        expected.square().sum().backward()
        gradient = model.blocks[0].mlp.fc1.weight.grad.clone()
        model.zero_grad()
        logits = model.float().to(setting.device)(images.to(setting.device))
        logits.square().sum().backward()
        found[name] = close(logits, expected, 1e-3), close(model.blocks[0].mlp.fc1.weight.grad, gradient, 1e-3)
    return found


def losses_of(setting, precision=None, compiled=False, form=lambda model: model):
    """The loss of each update, on one batch that the model learns by heart."""
    model = form(setting.model()).to(setting.device).train()
    run = torch.compile(model) if compiled else model
    images, labels = setting.images().to(setting.device), setting.labels().to(setting.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    scaler = torch.amp.GradScaler(setting.kind, enabled=precision == torch.float16)
    losses = []
    for _ in range(setting.updates):
        with torch.autocast(setting.kind, dtype=precision) if precision else nullcontext():
            loss = F.cross_entropy(run(images), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert all(parameter.isfinite().all() for parameter in model.parameters()), "weights are not finite"
    return losses


def half_precision(setting):
    """Updates in bfloat16 and float16: finite, the first loss near float32's, and learning like it."""
    whole, found = losses_of(setting), {}
    assert whole[-1] < whole[0], f"float32 learns nothing: {whole}"
    for precision in (torch.bfloat16, torch.float16):
        half = losses_of(setting, precision)
        assert min(half) < half[0], f"{precision} learns nothing: {half}"  # float16 may skip updates at first
        found[str(precision)[6:]] = close(half[0], whole[0], 0.02), half[-1]
    return found | {"float32": whole[-1]}


def compiled(setting):
    """torch.compile: the same logits, and a training that begins in the same way."""
    model, images = setting.model().eval().to(setting.device), setting.images().to(setting.device)
    begin = time.perf_counter()
    with torch.no_grad():
        logits = close(torch.compile(model)(images), model(images), 1e-3)
    seconds = round(time.perf_counter() - begin, 1)
    training = close(losses_of(setting, compiled=True)[:3], losses_of(setting)[:3], 1e-2)
    return {"logits": logits, "losses": training, "seconds": seconds}


def fused(setting):
    """The fused form, with and without recomputing: logits, gradients of all weights."""
    found = {}
    for name in ("t2t_vit_14", "t2t_vit_t_14"):
        results = []
        for form in (lambda m: m, fuse, lambda m: fuse(m, recompute=True)):
            model = form(setting.model(name)).to(setting.device).train()
            logits = model(setting.images().to(setting.device))
            logits.square().sum().backward()
            gradients = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
            results.append((logits, torch.cat(gradients)))
        found[name] = [close(a, b, 1e-3) for form in results[1:] for a, b in zip(form, results[0], strict=True)]
    return found


def resumed(setting):
    """``fit`` cut in its second epoch and resumed, against one that was not cut. A GPU may add in another order."""
    data = TensorDataset(setting.images()[:, :, :64, :64].sigmoid(), setting.labels())
    data = SimpleNamespace(train=data, test=data, num_classes=10, class_names=tuple("abcdefghij"))
    found = {}
    for precision in ("no", "bf16"):
        recipe = Recipe(
            model="t2t_vit_7", model_options=(("depth", 2),), img_size=data.train[0][0].shape[-1], epochs=3,
            warmup_epochs=1, cooldown_epochs=1, batch_size=4, save_every_updates=2, precision=precision, ema_decay=0.9,
        )  # fmt: skip

        def cut(model, update):
            if update == 6:
                raise KeyboardInterrupt

        with tempfile.TemporaryDirectory() as folder:
            options = dict(data=data, cpu=setting.kind == "cpu")
            whole = fit(recipe, Path(folder, "whole"), **options).model
            try:
                fit(recipe, Path(folder, "cut"), after_update=cut, **options)
            except KeyboardInterrupt:
                pass
            rest = fit(recipe, Path(folder, "cut"), resume=True, **options).model
        weights = [torch.cat([p.flatten() for p in deepcopy(model).cpu().parameters()]) for model in (rest, whole)]
        found[precision] = {"apart": close(*weights, 1e-3), "equal": torch.equal(*weights)}
    return found


def measure(setting, options):
    """Files of ``python -m t2t_ref.bench models``, for each family and precision; the names of those that broke off."""
    families = {"models": (setting.models, setting.forms), "relatives": (setting.relatives, setting.relatives_forms)}
    missing = []
    for family, (models, forms) in families.items():
        for precision in ("float32", "bfloat16") if not options.only or family in options.only else ():
            path = options.output / f"gpu_{family}_{precision}.json"
            words = f"models --models {models} --implementations {forms} {setting.sizes} --device {options.device}"
            words = [*words.split(), "--precision", precision, "--json", str(path)]
            missing += [path.name] * bool(bench.main(words))
    return missing


CHECKS = (same_as_the_cpu, half_precision, compiled, fused, resumed)


def name_of(device):
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else platform.machine()


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the script itself")
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--only", nargs="+", choices=[*(c.__name__ for c in CHECKS), "models", "relatives"])
    options = parser.parse_args(arguments)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        print("no GPU that torch can use; --device cpu --quick tries the script itself", file=sys.stderr)
        return 2
    quick = dict(img_size=64, depth=1, batch=16, updates=4)
    quick |= dict(sizes="--batch 2 --img-size 64 --rounds 3 --no-memory", models="t2t_vit_10")
    quick |= dict(relatives="deit_tiny_patch16_224 pvt_tiny", forms="plain readable fused recompute fused+compile timm")
    setting = Setting(options.device, **quick if options.quick else {})
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # float32 shall be float32
    options.output.mkdir(parents=True, exist_ok=True)
    found, failed = {}, []
    for check in CHECKS:
        name = check.__name__
        if options.only and name not in options.only:
            continue
        begin = time.perf_counter()
        try:
            found[name] = check(setting)
        except Exception as error:
            traceback.print_exc()
            failed.append(name)
            found[name] = f"FAILED: {error}"
        print(f"{name} ({time.perf_counter() - begin:.0f} s): {found[name]}", flush=True)
    content = dict(
        command=" ".join(["python tools/gpu_check.py", *arguments]), device=name_of(options.device),
        versions=dict(python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda), found=found,
    )  # fmt: skip
    (options.output / "gpu_checks.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    failed += measure(setting, options)
    print(f"{name_of(options.device)}: {'failed ' + ', '.join(failed) if failed else 'all well'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
