"""Counting parameters and multiply-accumulates (chapter 9)."""

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from t2t_ref.inspection.taps import eval_without_gradients

PRODUCTS_OF_ACTIVATIONS = ("bmm", "baddbmm")  # a linear layer runs as mm or addmm, a convolution as itself


def count_parameters(model: nn.Module, *, trainable_only: bool = False) -> int:
    """How many numbers the parameters hold. Frozen ones (position table, random features) count unless told not to."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


def count_macs(model: nn.Module, image: Tensor | tuple, *, products_of_activations: bool = True) -> int:
    """Multiply-accumulates of one forward pass, for one image of the batch, by torch's own FLOP counter.

    Some tools count linear layers and convolutions only. ``products_of_activations=False`` gives their number: it
    leaves out queries x keys and weights x values of attention, and the feature products of the performer.

    Shapes:  image   b c h w; a tuple for a module that takes more than one input, tensors b first
    Units:   multiply-accumulates, half the FLOPs of matrix products; element-wise work is not counted
    """
    inputs = image if isinstance(image, tuple) else (image,)
    counter = FlopCounterMode(display=False)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:  # the counter stumbles over a view of one, such as a class token for each image
            parameter.requires_grad_(False)
        # the plain backend writes attention as two matrix products, which every version of torch counts
        with eval_without_gradients(model), sdpa_kernel(SDPBackend.MATH), counter:
            model(*inputs)
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
    flops = counter.get_flop_counts()["Global"]
    counted = sum(
        count
        for operation, count in flops.items()
        if products_of_activations or operation.__name__ not in PRODUCTS_OF_ACTIVATIONS
    )
    return counted // 2 // len(inputs[0])
