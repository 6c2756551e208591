"""A training run that takes a fraction of a second, for the tests of the training code."""

from types import SimpleNamespace

import torch
from torch.utils.data import TensorDataset

from t2t_ref.train import Recipe

RECIPE = Recipe(
    model="t2t_vit_7",
    model_options=(("embed_dim", 16), ("depth", 1), ("num_heads", 2), ("token_dim", 8)),
    img_size=32,
    epochs=3,
    batch_size=8,
    lr=1e-2,
    warmup_epochs=1,
    cooldown_epochs=1,
    log_every=1,
    save_every_updates=2,
    ema_decay=0.9,
)


class Images(TensorDataset):
    """48 images of noise, whose label is their brightest quarter: something that can be learnt."""

    def __init__(self, seed: int, length: int = 48):
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand(length, 3, 32, 32, generator=generator) / 2
        labels = torch.randint(4, (length,), generator=generator)
        for image, label in zip(images, labels, strict=True):
            row, column = divmod(int(label), 2)
            image[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] += 0.5
        super().__init__(images, labels)


DATA = SimpleNamespace(train=Images(0), test=Images(1), num_classes=4, class_names=tuple("abcd"))


def weights(folder) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "weights.safetensors") | {
        f"ema.{name}": tensor for name, tensor in load_file(folder / "weights-ema.safetensors").items()
    }
