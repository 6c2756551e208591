"""The card of a saved model: what it is, what it was trained on, how well it does, and where that is known from.

A card says what the model, a folder of :mod:`t2t_ref.train` and the caller say, and where all are silent, that nobody
has said it (chapter 14).
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from t2t_ref.inspection import count_parameters
from t2t_ref.models.classifier import Classifier
from t2t_ref.weights._version import __version__

UNKNOWN = "Whoever saved this model did not say."


def model_card(
    model: Classifier,
    *,
    run: str | os.PathLike | None = None,
    trained: str | None = None,
    measured: str | None = None,
    command: str | None = None,
    license: str | None = None,
) -> str:
    """The text of README.md: YAML for the hub, then Markdown.

    Args:
        run: a folder that t2t_ref.train wrote: its log says recipe and accuracy, its evaluation.json, if there is one,
            what t2t_ref.evaluate found
        trained: what on, in words
        measured: how well, in words
        command: the line that trained it
        license: as the hub spells it, mit or cc-by-4.0 say

    Raises:
        FileNotFoundError: if there is no log in ``run``
        ValueError: if the log in ``run`` is none of t2t_ref.train's
    """
    cfg, facts = model.pretrained_cfg, read_run(run) if run is not None else {}
    recipe, name = facts.get("recipe", {}), cfg.get("architecture", type(model).__name__)
    license = license or (cfg.get("license") if cfg.get("url") else None)
    channels, height, width = (model.in_chans, *model.img_size)
    trained = trained or (f"{recipe['data']}, {recipe.get('epochs')} epochs." if "data" in recipe else None)
    started = f"\n\nIt began as the file {cfg['url']}, {cfg['description']}." if cfg.get("url") else ""
    measured = [measured] * bool(measured) + [facts[key] for key in ("accuracy", "evaluation") if key in facts]
    prepared = (
        f"resized so that the crop is {cfg['crop_pct']:.0%} of the shorter side ({cfg['interpolation']}), cut out of "
        f"the centre, less {plain(cfg['mean'])}, divided by {plain(cfg['std'])}"
    )
    front = ["---", "library_name: t2t_ref", "pipeline_tag: image-classification", "tags:", "- image-classification"]
    front += [f"license: {license}"] * bool(license) + ["---"]
    text = f"""
# {name}

A {type(model).__name__} of [t2t_ref](https://pypi.org/project/t2t-ref/), the reference package of the book "T2T-ViT,
piece by piece": {count_parameters(model):,} parameters, images of {height} x {width} pixels and {channels} channels,
{model.num_classes} classes. Written by version {__version__}.

## Trained on

{trained or UNKNOWN}{started}

## How well it does

{chr(10).join(measured) or UNKNOWN}

## How it was trained

{f"    {command}" if command else UNKNOWN}
"""
    if recipe:
        lines = "\n".join(f"    {key} = {json.dumps(value)}" for key, value in recipe.items())
        text += f"\nThe recipe, as the log of the run has it:\n\n{lines}\n"
    text += f"""
## Licence

{license or UNKNOWN}

## Use

    import t2t_ref
    model = t2t_ref.{public(model)}.from_pretrained("THIS REPOSITORY OR FOLDER").eval()

An image is {prepared}.
"""
    return "\n".join(front) + "\n" + text


def plain(numbers) -> str:
    """A few numbers for people."""
    return ", ".join(f"{number:g}" for number in numbers)


def public(model: Classifier) -> str:
    """The class that ``from_pretrained`` may be asked of: the model's own, or the one above it of the public names."""
    above = [cls.__name__ for cls in type(model).__mro__ if cls.__name__ in ("T2TViT", "ViT")]
    return (above or ["models.classifier.Classifier"])[0]


def read_run(folder: str | os.PathLike) -> Mapping:
    """What a folder of t2t_ref.train says: "recipe", and in words "accuracy" and "evaluation" where they are there.

    Raises:
        FileNotFoundError: if there is no log
        ValueError: if it is none of t2t_ref.train's
    """
    folder, facts = Path(folder), {}
    try:
        text = (folder / "log.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        facts["recipe"] = next(line["recipe"] for line in lines if "recipe" in line)
    except (ValueError, StopIteration, TypeError) as error:
        raise ValueError(f"{folder / 'log.jsonl'} is no log of t2t_ref.train") from error
    last = next((line for line in reversed(lines) if "test_accuracy" in line), None)
    if last:
        facts["accuracy"] = (
            f"Top-1 on the test images of that data, at the end of the run: {last['test_accuracy']:.2%}."
        )
    if (folder / "evaluation.json").is_file():
        found = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        numbers = {key: value for key, value in found.items() if isinstance(value, int | float)}
        facts["evaluation"] = f"By t2t_ref.evaluate on {found.get('data')}: " + json.dumps(numbers) + "."
    return facts
