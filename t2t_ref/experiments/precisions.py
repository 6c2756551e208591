"""What fewer bits cost: a trained model, exported in each precision and tested on the digits (chapter 16).

    python -m t2t_ref.experiments precisions        writes results/precisions.json

Nothing is trained. The model is the T2T-ViT of chapter 15, from results/weights/t2t.safetensors. Each graph is written
by :func:`t2t_ref.train.export.export`, read back, and asked about the test digits that the model was tested on.
"""

import hashlib
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import t2t_ref
from t2t_ref.experiments import runs, what_it_sees
from t2t_ref.inspection import eval_without_gradients
from t2t_ref.train.export import FORMS, TOLERANCES, export, runner

ASKED = tuple(  # form and precision
    (form, precision) for form in FORMS for precision in TOLERANCES if (form, precision) != ("torch-export", "int8")
)
BATCH = 50  # int8 rounds the images of a batch together


def measure(
    folder: Path, tested: int = what_it_sees.TESTED, say: Callable[[str], object] = print, asked: tuple = ASKED
) -> dict:
    """Export ``folder/weights/t2t.safetensors`` in each precision, and write ``folder/precisions.json``.

    Args:
        tested: the number of test digits

    Units:
        accuracy in percent; ``changed`` counts digits that are named otherwise than by the model; ``difference`` is the
        largest of two logits, as a share of the largest logit

    Raises:
        OSError: without the weights
        ImportError: without onnx, onnxscript and onnxruntime
    """
    torch.set_num_threads(1)
    weights = folder / "weights" / "t2t.safetensors"
    model, rows = what_it_sees.load(weights), []
    images, labels = what_it_sees.shown_digits(tested)
    with tempfile.TemporaryDirectory() as drafts, eval_without_gradients(model):
        expected = torch.cat([model(part) for part in images.split(BATCH)])
        for form, precision in asked:
            path = Path(drafts, f"{form}-{precision}")
            export(model, path, form, precision=precision)
            run = runner(path, form)
            logits = torch.cat([run(part) for part in images.split(BATCH)])
            found, model_found = logits.argmax(dim=-1), expected.argmax(dim=-1)
            row = dict(
                form=form,
                precision=precision,
                accuracy=percent(found == labels),
                changed=int((found != model_found).sum()),
                difference=float(f"{((logits - expected).abs().max() / expected.abs().max()).item():.2g}"),
                bytes=path.stat().st_size,
            )
            rows.append(row)
            say(f"precisions: {form}, {precision}: {row['accuracy']} % of test, {row['changed']} digits changed")
    import onnxruntime  # not earlier: without it, the first export says what to install

    result = dict(
        experiment="precisions",
        command="python -m t2t_ref.experiments precisions",
        versions=dict(
            python=platform.python_version(),
            torch=str(torch.__version__),
            onnxruntime=onnxruntime.__version__,
            t2t_ref=t2t_ref.__version__,
        ),
        device=f"{platform.machine()} processor, 1 thread",
        weights=dict(file=weights.name, sha256=digest(weights)),
        tested=tested,
        accuracy=percent(expected.argmax(dim=-1) == labels),
        rows=rows,
    )
    runs.write(folder / "precisions.json", result)
    return result


def percent(right: torch.Tensor) -> float:
    """The share of what is true, in percent."""
    return round(100 * right.double().mean().item(), 2)


def digest(path: Path) -> str:
    """What tells one file from another."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
