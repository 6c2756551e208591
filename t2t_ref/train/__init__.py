"""Training, from one CPU to many GPUs (chapters 11 and 17). Needs the extra: ``pip install "t2t-ref[train]"``.

On a CPU, on one GPU, or on a Mac, whatever there is; handwritten digits in about a minute::

    python -m t2t_ref.train
    python -m t2t_ref.train digits --seed 1 --output runs/another

ImageNet on one machine with 8 GPUs; without ``--data`` the folder is ./imagenet, with train/ and val/ in it::

    torchrun --nproc-per-node 8 -m t2t_ref.train imagenet --data imagefolder:PATH --output runs/t2t_vit_14
    accelerate launch --multi_gpu --num_processes 8 -m t2t_ref.train imagenet --data imagefolder:PATH

On two machines with 8 GPUs each, the same line on both, where HOST is the name of the first. The batch of 512 images is
now spread over 16 processes, 32 each::

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        -m t2t_ref.train imagenet --data imagefolder:PATH --batch-size 32

A run that was killed goes on with the same line and ``--resume``. From Python, and in memory if there is no folder::

    from t2t_ref.train import find_recipe, fit
    result = fit(find_recipe("digits", {"epochs": 2, "cooldown_epochs": 0}))
    result.epochs[-1]["test_accuracy"]
"""

from t2t_ref.train.recipes import RECIPES, Recipe, find_recipe
from t2t_ref.train.stopping import CannotStart, Interrupted, NotFinite

__all__ = ["RECIPES", "CannotStart", "Interrupted", "NotFinite", "Recipe", "Result", "find_recipe", "fit"]


def __getattr__(name: str):
    # only when asked for: accelerate takes a second to import, and reading a recipe does not need it
    if name in __all__:
        from t2t_ref.train import loop

        return getattr(loop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
