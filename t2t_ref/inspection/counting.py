"""Counting parameters and multiply-accumulates (chapter 9)."""

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from t2t_ref.inspection.taps import eval_without_gradients

PRODUCTS = ("bmm", "baddbmm")  # a linear layer runs as mm or addmm, seldom so; a convolution as itself


FROZEN = ("pos_embed", "w")  # buffers that are parameters in the authors' code, by their last names


def frozen_entries(model: nn.Module) -> dict[str, Tensor]:
    """What belongs to the weights of a model and no training changes, by its name in the state dict.

    These are the fixed tables, which are buffers (the sinusoids, a performer's random directions), and any parameter
    that somebody has frozen.
    """
    return {name: entry for name, entry in numbers_of(model).items() if not entry.requires_grad}


def numbers_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, then the fixed tables, by their names in the state dict."""
    tables = {name: entry for name, entry in model.named_buffers() if name.rpartition(".")[2] in FROZEN}
    return {**dict(model.named_parameters()), **tables}


def count_parameters(model: nn.Module, *, trainable_only: bool = False) -> int:
    """How many numbers the weights hold. Fixed tables and frozen parameters count unless told not to."""
    return sum(entry.numel() for entry in numbers_of(model).values() if entry.requires_grad or not trainable_only)


def count_macs(model: nn.Module, image: Tensor | tuple, *, products_of_activations: bool = True) -> int:
    """Multiply-accumulates of one forward pass, for one image of the batch, by torch's own FLOP counter.

    Some tools count linear layers and convolutions only. ``products_of_activations=False`` gives their number: it
    leaves out queries x keys and weights x values of attention, and the feature products of the performer.

    Shapes:
        image: b c h w; a tuple for a module that takes more than one input, tensors b first

    Units:
        multiply-accumulates, half the FLOPs of matrix products

    Note:
        element-wise work is not counted
    """
    every, without = macs_both_ways(model, image)
    return every if products_of_activations else without


def macs_both_ways(model: nn.Module, image: Tensor | tuple) -> tuple[int, int]:
    """:func:`count_macs` with products of activations and without them, from a single pass."""
    inputs = image if isinstance(image, tuple) else (image,)
    # the counter stumbles over a parameter that one module hands to another
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    counter = FlopCounterMode(display=False)
    # the plain backend writes attention as two matrix products, which every version of torch counts
    with eval_without_gradients(model), sdpa_kernel(SDPBackend.MATH), counter:
        functional_call(model, weights, inputs)
    flops = counter.get_flop_counts()
    counted = sum(flops["Global"].values())
    root = type(model).__name__
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    linear = [flops.get(f"{root}.{name}" if name else root, {}) for name in linear]
    without = counted - products(flops["Global"]) + sum(map(products, linear))
    return counted // 2 // len(inputs[0]), without // 2 // len(inputs[0])


def products(flops: dict) -> int:
    """Those of the counted FLOPs that belong to products of two activations, or to a linear layer that runs as such."""
    return sum(count for operation, count in flops.items() if operation.__name__ in PRODUCTS)
