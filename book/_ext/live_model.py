"""The weights of the live page: scripts beside its own, written into the built site from results/, in half precision.

Nothing is stored twice in the repository. They are classic scripts that hand their content over, since a page that was
opened as a file may fetch nothing else.
"""

import base64
import json
from pathlib import Path

MODELS = ("t2t", "vit")


def in_half_precision(path: Path) -> bytes:
    """A file of save_checkpoint with its weights as float16; the model's class and arguments stay beside them."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save

    with safe_open(path, "pt") as file:
        about = file.metadata()
    return save({name: weight.half() for name, weight in load_file(path).items()}, about)


def scripts(root: Path) -> dict[str, str]:
    """By name: what each script of the built site says."""
    from t2t_ref.data.images import imagenet_class_names

    found = {}
    for name in MODELS:
        text = base64.b64encode(in_half_precision(root / "results" / "weights" / f"{name}.safetensors")).decode()
        found[name] = f"live.take('{name}', '{text}');\n"
    digits = json.loads((root / "book" / "live_digits.json").read_text(encoding="utf-8"))["digits"]
    brief = [{key: digit[key] for key in ("label", "pixels")} for digit in digits]
    found["digits"] = f"live.takeDigits({json.dumps(brief)});\n"
    found["classes"] = f"live.takeClasses({json.dumps(imagenet_class_names())});\n"
    return found


def reads(text: str, root: Path) -> str:
    """How well a model of the page reads: the mean accuracy of its seeds on test digits, with its interval."""
    from t2t_ref.experiments import accuracies, mean_interval

    stored = json.loads((root / "results" / "what_it_sees.json").read_text(encoding="utf-8"))
    mean, half = mean_interval(list(accuracies(stored["arms"][text]).values()))
    beside = json.loads((root / "results" / "weights" / f"{text}.json").read_text(encoding="utf-8"))
    seeds = len(stored["arms"][text]["runs"])
    return f"{mean:.0f} ± {half:.0f} % over {seeds} seeds, {beside['accuracy']:.0f} % this one"


def write_scripts(app, exception):
    if exception or app.builder.name != "html":
        return
    folder = Path(app.outdir) / "_static" / "live"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in scripts(Path(app.srcdir)).items():
        (folder / f"{name}.js").write_text(text, encoding="utf-8")


def setup(app):
    from docutils import nodes

    root = Path(app.srcdir)
    app.add_role("reads", lambda name, raw, text, *_, **__: ([nodes.Text(reads(text, root))], []))
    app.connect("build-finished", write_scripts)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
