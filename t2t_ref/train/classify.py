"""What is on a photograph: the five likeliest classes, and where the class token looked (chapter 1).

    python -m t2t_ref.classify cat.jpg --model t2t_vit_14 --weights FILE --map cat-map.png

The map is the attention of the class token in the last block, the mean of its heads. With ``--rollout`` it is that of
all blocks, multiplied up (chapter 15).
"""

import os
import signal
import sys
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from t2t_ref.arguments import Parser
from t2t_ref.data.images import IMAGENET_MEAN, IMAGENET_STD, imagenet_class_names, normalise, preprocess
from t2t_ref.inspection import attention_maps, attention_rollout, class_token_maps, eval_without_gradients
from t2t_ref.models.classifier import Classifier
from t2t_ref.train.export import add_model_options, build
from t2t_ref.train.log import escape_unknown_letters
from t2t_ref.weights.writing import path_of, shown, write_whole


def prepare(model: Classifier, image) -> Float[Tensor, "1 3 h w"]:
    """:func:`~t2t_ref.data.images.preprocess` for this model: its size, and its mean and deviation of the colours."""
    mean, std = model.preprocessing["mean"], model.preprocessing["std"]
    images = preprocess(image, model.img_size)
    return images if (mean, std) == (IMAGENET_MEAN, IMAGENET_STD) else normalise(restored(images), mean, std)


def restored(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Values from 0 to 1 again, of what :func:`~t2t_ref.data.images.preprocess` made."""
    mean, std = (rearrange(torch.tensor(numbers), "c -> c 1 1") for numbers in (IMAGENET_MEAN, IMAGENET_STD))
    return (images * std + mean).clamp(0, 1)


def classify(model: Classifier, image, top: int = 5, class_names=None) -> list[tuple[str, float]]:
    """The likeliest classes of a photograph, likeliest first, each with its probability.

    Shapes:
        image: a path, a PIL image or an array: whatever :func:`~t2t_ref.data.images.preprocess` takes
        return: ``top`` names and probabilities

    Args:
        class_names: by default ImageNet's if the model has 1000 classes, else numbers

    Raises:
        ValueError: for something that is no image, a model without a head, and names that are not one for each class
        FileNotFoundError: for a path that is not there
    """
    if model.num_classes == 0:
        raise ValueError("the model has no head, which is what tells classes apart")
    if class_names is None:
        known = model.num_classes == 1000
        class_names = imagenet_class_names() if known else [f"class {number}" for number in range(model.num_classes)]
    if len(class_names) != model.num_classes:
        raise ValueError(f"there are {len(class_names)} names for {model.num_classes} classes")
    with eval_without_gradients(model):
        (probabilities,) = model(prepare(model, image)).softmax(dim=-1)
    best = probabilities.topk(min(top, model.num_classes))
    return [
        (class_names[number], share) for share, number in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def where_it_looked(model: Classifier, image, rollout: bool = False) -> Float[Tensor, "h w"]:
    """What the class token took from each patch in the last block, or by the rollout of all blocks.

    Shapes:
        image: as :func:`classify`
        return: ``h w``, rows and columns of the grid of tokens

    Raises:
        ValueError: for a model in which no class token looks at a grid of patches
    """
    weights = attention_maps(model, prepare(model, image))
    try:
        if rollout:
            (seen,) = class_token_maps(attention_rollout(weights), model.grid, model.num_prefix_tokens)
        else:
            (heads,) = class_token_maps(weights[-1], model.grid, model.num_prefix_tokens)
            seen = heads.mean(dim=0)
    except (AttributeError, IndexError, ValueError, RuntimeError) as error:
        raise ValueError(f"no map: a {type(model).__name__} has no class token that looks at all patches") from error
    return seen


def draw_map(model: Classifier, image, path: str | os.PathLike, rollout: bool = False) -> None:
    """The photograph as the model saw it, and beside it the same under the map. Whole or not at all.

    Raises:
        ValueError: as :func:`where_it_looked`, and for a kind of file that matplotlib does not write
        ImportError: with the remedy, without matplotlib
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing a map needs matplotlib: pip install matplotlib") from error
    (pixels,) = restored(preprocess(image, model.img_size))
    pixels = rearrange(pixels, "c h w -> h w c")
    seen, (h, w) = where_it_looked(model, image, rollout), model.img_size
    figure = Figure(figsize=(6.4, 6.4 * h / w / 2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.imshow(pixels, extent=(0, w, h, 0))
        axes.set_axis_off()
    right.imshow(seen, extent=(0, w, h, 0), cmap="viridis", alpha=0.6, interpolation="bilinear")
    kind = path_of(path).suffix.lstrip(".").lower() or "png"
    write_whole(path, lambda draft: figure.savefig(draft, format=kind, dpi=200))


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status."""
    escape_unknown_letters()
    parser = Parser(
        "python -m t2t_ref.classify", description="Say what is on a photograph, and show where a model looked."
    )
    parser.add_argument("images", metavar="FILE", nargs="+", help="a photograph, of any kind that Pillow reads")
    add_model_options(parser)
    parser.add_argument("--top", type=int, default=5, metavar="N", help="how many classes; default: %(default)s")
    parser.add_argument("--class-names", metavar="FILE", help="one name a line, in the order of the classes")
    parser.add_argument(
        "--map", metavar="OUT", help="draw the photograph, and beside it what the class token looked at"
    )
    parser.add_argument("--rollout", action="store_true", help="of all blocks, not of the last one")
    try:
        options = parser.parse_args(argv)
        if options.top < 1:
            raise ValueError(f"--top is {options.top}, expected 1 or more")
        if options.map and len(options.images) > 1:
            raise ValueError(f"--map draws one photograph, found {len(options.images)}")
        missing = next((path for path in options.images if not Path(path).is_file()), None)
        if missing:
            raise ValueError(f"no file {shown(missing)}")
        names = Path(options.class_names).read_text(encoding="utf-8").splitlines() if options.class_names else None
        if not (options.weights or options.pretrained):
            raise ValueError(
                "a fresh model knows no classes: say --weights FILE, or --pretrained for the released ones"
            )
        model = build(options)
        for path in options.images:
            if len(options.images) > 1:
                print(shown(path))
            for name, share in classify(model, path, options.top, names):
                print(f"{100 * share:5.1f} %  {name}")
        if options.map:
            draw_map(model, options.images[0], options.map, options.rollout)
    except KeyboardInterrupt:
        print("t2t_ref.classify: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except (ValueError, OSError, ImportError) as error:
        print(f"t2t_ref.classify: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
