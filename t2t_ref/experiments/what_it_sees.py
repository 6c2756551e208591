"""The three small models of chapter 15, and what their features look like in numbers.

    python -m t2t_ref.experiments what_it_sees        writes results/what_it_sees.json and results/weights/

Each model is trained from scratch on scattered digits, once for each seed. Of every seed the statistics are kept,
before and after training. The weights of the first seed go to results/weights/, with recipe and accuracy beside them.
"""

import json
import os
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from t2t_ref.create import create_model
from t2t_ref.data.digits import ScatteredDigits
from t2t_ref.experiments.arms import DATA, MEAN, PERFORMER, STD, VIT_SINUSOID, Experiment, build_model, silent_shares
from t2t_ref.experiments.resnet import ResNet
from t2t_ref.inspection import eval_without_gradients, tap, token_maps
from t2t_ref.inspection.statistics import (
    channel_health,
    channel_similarity,
    high_frequency_share,
    layer_similarity,
    shift_response,
)
from t2t_ref.models.t2t_vit import T2TViT
from t2t_ref.models.vit import ViT
from t2t_ref.train import Recipe
from t2t_ref.weights import load_checkpoint, load_model, save_checkpoint

DIGITS = {name: value for name, value in DATA.items() if name != "size"}
NAMES = {"t2t": "T2T-ViT", "vit": "ViT", "resnet": "ResNet"}
ARMS = {  # of about equal size
    "t2t": PERFORMER,
    "vit": VIT_SINUSOID,
    "resnet": dict(kind="resnet"),
}
TESTED, QUICKLY_TESTED = 2000, 400  # images that the accuracy is measured on
LOOKED_AT = 256  # images that the statistics are taken over
SHIFTS = (0, 1, 2, 4, 6, 8, 12, 16)  # pixels
# timm's ViT-L/16, trained on ImageNet-21k and then on ImageNet at 384 pixels; the names of its weights are ours
VIT_LARGE = "https://huggingface.co/timm/vit_large_patch16_384.augreg_in21k_ft_in1k/resolve/main/model.safetensors"


def build(kind: str) -> nn.Module:
    """One of the three models with fresh weights."""
    return build_model(ARMS[kind])


# looking


def shown_digits(count: int, size: int = 64) -> tuple[Float[Tensor, "b c h w"], Int[Tensor, " b"]]:
    """Normalised test images, the same ones every time, and their labels.

    Shapes:
        return: ``(b c h w, b)``, b = count, h = w = size
    """
    images, labels = ScatteredDigits("test", seed=0, size=size, **DIGITS).draw(range(count))
    return (images - MEAN) / STD, labels


def accuracy(model: nn.Module, count: int = TESTED) -> float:
    """The share of ``count`` test images that the model names rightly, in percent."""
    images, labels = shown_digits(count)
    with eval_without_gradients(model):
        found = torch.cat([model(part).argmax(dim=-1) for part in images.split(250)])
    return round(100 * (found == labels).double().mean().item(), 2)


def feature_maps(model: nn.Module, image: Float[Tensor, "b c h w"]) -> dict[str, Float[Tensor, "b _ _ _"]]:
    """The features of a model as maps, layer by layer, class token left out, under short names.

    T2TViT: after each T2T layer, the tokens that enter the backbone (with positions), after each block. ViT: the same
    without T2T layers. A residual network, ours or torchvision's: after the stem, after each block.

    Shapes:
        image: ``b c h w``
        return: by name: b channels rows columns

    Raises:
        ValueError: for another kind of model
    """
    h, w = image.shape[-2:]
    if isinstance(model, T2TViT | ViT):
        grids = {"into blocks.0": model.grid_of((h, w))}
        grids |= {f"blocks.{i}": grids["into blocks.0"] for i in range(len(model.blocks))}
        if isinstance(model, T2TViT):
            module, grid, early = model.tokens_to_token, (h, w), {}
            for number in (1, 2):
                grid = getattr(module, f"soft_split{number - 1}").grid_size(grid)
                early[f"tokens_to_token.attention{number}"] = grid
            grids = early | grids
        with eval_without_gradients(model), tap(model, list(grids)) as seen:
            model(image)
        return {short_name(name): token_maps(seen[name], grid) for name, grid in grids.items()}
    names = {name for name, _ in model.named_children()}
    patterns = ["stem", "stages.*.*"] if "stages" in names else ["maxpool", "layer[1-4].*"]
    if not names.issuperset({pattern.split(".")[0].replace("[1-4]", "1") for pattern in patterns}):
        raise ValueError(f"do not know where the features of a {type(model).__name__} are: use tap")
    with eval_without_gradients(model), tap(model, patterns) as seen:
        model(image)
    return {short_name(name): maps for name, maps in seen.items()}


def short_name(name: str) -> str:
    """A name for a figure: "T2T layer 1", "tokens", "block 3", "stage 2, block 1", all counted from 1."""
    first, *numbers = name.split(".")
    if first == "tokens_to_token":
        return f"T2T layer {numbers[0][-1]}"
    if first == "blocks":
        return f"block {int(numbers[0]) + 1}"
    if first == "stages" or first.startswith("layer"):
        stage = int(numbers[0]) + 1 if first == "stages" else int(first[-1])
        return f"stage {stage}, block {int(numbers[-1]) + 1}"
    return {"into blocks": "tokens", "maxpool": "stem"}.get(first, first)


def last_maps(model: nn.Module, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d rows columns"]:
    """The maps at stride 16 that come before the backbone, or for a residual network the last ones.

    Shapes:
        image: ``b c h w``
        return: ``b d rows columns``
    """
    maps = feature_maps(model, image)
    return maps["tokens"] if "tokens" in maps else list(maps.values())[-1]


def statistics(model: nn.Module) -> dict:
    """What chapter 15 measures, for one model, on test digits."""
    images, _ = shown_digits(LOOKED_AT)
    seen, layers = feature_maps(model, images), {}
    for name, maps in seen.items():
        dead, saturated = channel_health(maps)
        blind, _ = channel_health(maps, count_places=False)
        layers[name] = dict(
            channels=maps.shape[1], dead=dead, saturated=saturated, blind=blind, similarity=channel_similarity(maps),
            fine=high_frequency_share(maps).nanmean().item(),
        )  # fmt: skip
    wide, _ = shown_digits(LOOKED_AT, size=64 + max(SHIFTS))
    rows = slice(max(SHIFTS) // 2, max(SHIFTS) // 2 + 64)
    response = shift_response(lambda image: last_maps(model, image), wide[:, :, rows], 64, SHIFTS)
    alike = layer_similarity(list(seen.values()))
    found = dict(layers=layers, shift_response=response.tolist(), cka=alike.tolist())
    if isinstance(model, T2TViT):
        found["silent"] = silent_shares(model, images[:64])
        found["accuracy_without_token_attention"] = accuracy(without_token_attention(model))
    return rounded(found)


def without_token_attention(model: T2TViT) -> T2TViT:
    """A copy whose T2T layers attend to nothing: values and MLPs are left, as if all weights of attention were 0."""
    copy = deepcopy(model)
    with torch.no_grad():
        for layer in (copy.tokens_to_token.attention1, copy.tokens_to_token.attention2):
            layer.proj.weight.zero_()
    return copy


def rounded(value):
    """Floats to four digits behind the point, inside lists and dicts."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return round(value, 4) if isinstance(value, float) else value


# the weights


def save(model: nn.Module, path: Path) -> None:
    """Write a model's weights as safetensors. :func:`load` reads them."""
    if not isinstance(model, ResNet):
        return save_checkpoint(model, path)
    from safetensors.torch import save_file

    save_file(model.state_dict(), path, {"format": "pt", "class": "ResNet", "arguments": json.dumps(model.arguments)})


def load(path: str | os.PathLike) -> nn.Module:
    """A model from a file that :func:`save` wrote, in eval mode. The transformers may also come from a URL."""
    from safetensors import safe_open

    if os.path.isfile(path):
        with safe_open(path, "pt") as file:
            recorded = file.metadata()
            if recorded.get("class") == "ResNet":
                model = ResNet(**json.loads(recorded["arguments"]))
                model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
                return model.eval()
    return load_model(path).eval()


def released_models(
    t2t: str | os.PathLike | bool = True, vit: str | os.PathLike = VIT_LARGE, resnet: nn.Module | None = None, **sizes
) -> dict[str, nn.Module]:
    """The models of the paper's Fig. 2, in eval mode: T2T-ViT-24, ViT-L/16, ResNet-50. For any image size.

    Args:
        t2t: the authors' file, True downloads it (256 MB)
        vit: a file with timm's names, a path or a URL (1.2 GB)
        resnet: a model, None takes torchvision's (100 MB)
        **sizes: arguments of both transformers

    Note:
        what load_checkpoint raises is raised here, too

    Raises:
        ImportError: without torchvision if no resnet is given
    """
    if resnet is None:
        from torchvision.models import resnet50

        resnet = resnet50(weights="IMAGENET1K_V1")
    models = {"t2t": create_model("t2t_vit_24", pretrained=t2t is True, dynamic_img_size=True, **sizes)}
    if t2t is not True:
        load_checkpoint(models["t2t"], t2t)
    models["vit"] = create_model(
        "vit_large_patch16", img_size=sizes.pop("img_size", 384), dynamic_img_size=True, **sizes
    )
    load_checkpoint(models["vit"], vit)
    models["resnet"] = resnet
    return {name: model.eval() for name, model in models.items()}


# the experiment


def keep(kind: str, model: nn.Module, recipe: Recipe, run: dict, folder: Path) -> None:
    """Write the weights of a run, and beside them where they come from."""
    weights = folder / "weights"
    weights.mkdir(parents=True, exist_ok=True)
    draft = weights / f"{kind}.safetensors.part"
    save(model, draft)
    beside = dict(command="python -m t2t_ref.experiments what_it_sees", seed=run["seed"], accuracy=run["accuracy"])
    beside |= dict(tested=TESTED, quick_accuracy=accuracy(model, QUICKLY_TESTED), quickly_tested=QUICKLY_TESTED)
    content = json.dumps(beside | dict(recipe=asdict(recipe)), indent=1) + "\n"
    (weights / f"{kind}.json").write_text(content, encoding="utf-8")
    os.replace(draft, weights / f"{kind}.safetensors")


EXPERIMENT = Experiment(
    ARMS,
    tested=TESTED,
    look=statistics,
    keep=keep,
    about=dict(looked_at=LOOKED_AT, shifts=list(SHIFTS)),
)
