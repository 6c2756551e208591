"""The bound set by the matrix products of a model: written down, counted, and run alone (chapter 16)."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from t2t_ref.bench.cases import Case, build, images_of


class ProductRecorder(TorchDispatchMode):
    """Writes down every matrix product that runs under it: (rows, inner, columns), and whether a factor is transposed.

    A factor is (batch, rows, columns, transposed in memory); batch is 1 for a plain product. A convolution counts as
    the product of its windows with its weights.
    """

    def __init__(self):
        super().__init__()
        self.products: Counter[tuple] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        output = function(*arguments, **(options or {}))
        name = function.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self.products[factor(arguments[0]), factor(arguments[1])] += 1
        elif name in ("addmm", "baddbmm"):
            self.products[factor(arguments[1]), factor(arguments[2])] += 1
        elif name == "convolution":
            self.record_convolution(output, arguments[1], 1)
        elif name == "convolution_backward":  # one product for the image, one for the weights
            self.record_convolution(arguments[0], arguments[2], sum(arguments[-1][:2]))
        return output

    def record_convolution(self, output: Tensor, weight: Tensor, count: int) -> None:
        """Write a convolution down as the product that it is, ``count`` times."""
        if count:
            rows, inner = output[:, 0].numel(), weight[0].numel()
            self.products[(1, rows, inner, False), (1, inner, len(weight), False)] += count


def factor(tensor: Tensor) -> tuple[int, int, int, bool]:
    """A matrix as (batch, rows, columns, whether it is transposed in memory)."""
    batch = len(tensor) if tensor.ndim == 3 else 1
    rows, columns = tensor.shape[-2:]
    return batch, rows, columns, tensor.stride(-2) == 1 and tensor.stride(-1) != 1


def products_of(case: Case) -> Counter[tuple]:
    """Every matrix product of the readable model in this case, by shape, from a run without data (meta device)."""
    meta = replace(case, device="meta", precision="float32")
    model = build("readable", meta)
    recorder = ProductRecorder()
    with sdpa_kernel(SDPBackend.MATH), recorder:  # attention as the two products that it is
        if case.mode == "train":
            model(images_of(meta)).sum().backward()
        else:
            with torch.no_grad():
                model(images_of(meta))
    return recorder.products


def macs_of(products: Counter[tuple]) -> int:
    """Multiply-accumulates of all products together."""
    return sum(count * a[0] * a[1] * a[2] * b[2] for (a, b), count in products.items())


def run_of(products: Counter[tuple], device: str = "cpu", dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    """Something that computes these products and nothing else, into memory that is already there."""

    def operand(batch, rows, columns, transposed):
        pattern = "b columns rows -> b rows columns" if transposed else "b rows columns -> b rows columns"
        shape = (batch, columns, rows) if transposed else (batch, rows, columns)
        return rearrange(torch.randn(shape, device=device, dtype=dtype), pattern)

    work = []
    for (a, b), count in products.items():
        left, right = operand(*a), operand(*b)
        if a[0] == 1:
            left, right = left[0], right[0]
        out = torch.empty(*left.shape[:-1], right.shape[-1], device=device, dtype=dtype)
        work.append((torch.mm if a[0] == 1 else torch.bmm, left, right, out, count))

    def run() -> None:
        with torch.inference_mode():
            for multiply, left, right, out, count in work:
                for _ in range(count):
                    multiply(left, right, out=out)

    return run
