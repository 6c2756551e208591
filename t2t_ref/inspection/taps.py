"""Taking tensors out of a model while it runs (chapter 15)."""

import fnmatch
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from t2t_ref.arguments import check_known
from t2t_ref.models.tokens_to_token import restructure


@contextmanager
def eval_without_gradients(model: nn.Module):
    """Run in eval mode without gradients, and leave every module's mode as it was."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in was_training:
            module.training = True


@contextmanager
def tap(model: nn.Module, names: str | Sequence[str]):
    """Write down inner tensors of any model while it runs: ``with tap(model, "blocks.*") as seen: model(image)``.

    A name is that of a module and means what it returns. ``"into NAME"`` means what it is given, ``"blocks.*"`` every
    module of that pattern (a star stands for one part between dots). :func:`shape_table` shows the names.

    Shapes:
        return: a dict from name to a copy of the tensor, in the order of the run; filled by the model's own run. A
            module that runs more than once leaves its last; what is no tensor is kept as it is.

    Raises:
        ValueError: for a name that fits no module
    """
    names = [names] if isinstance(names, str) else list(names)
    modules = {name: module for name, module in model.named_modules() if name}
    seen: dict[str, Tensor] = {}

    def keep(name: str, value: object) -> None:
        seen.pop(name, None)  # so that the last run also stands last
        # a copy: layers that work in place, such as ReLU(inplace=True), would change it under our eyes
        seen[name] = value.clone() if isinstance(value, Tensor) else value

    with ExitStack() as hooks:
        for name in names:
            pattern, into = name.removeprefix("into "), name.startswith("into ")
            found = [known for known in modules if same_parts(known, pattern)]
            if not found:
                check_known("module", pattern, list(modules))
            for known in found:
                if into:
                    hook = lambda module, inputs, known=known: keep(f"into {known}", inputs[0])  # noqa: E731
                    hooks.callback(modules[known].register_forward_pre_hook(hook).remove)
                else:
                    hook = lambda module, inputs, output, known=known: keep(known, output)  # noqa: E731
                    hooks.callback(modules[known].register_forward_hook(hook).remove)
        yield seen


def same_parts(name: str, pattern: str) -> bool:
    """Whether a dotted name fits a pattern, part by part."""
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def token_maps(
    tokens: Float[Tensor, "b n d"], grid: tuple[int, int], num_prefix_tokens: int = 1
) -> Float[Tensor, "b d h w"]:
    """Tokens as maps, one for each channel. A class token in front is left out, or as many as the model has there.

    Shapes:
        tokens: ``b n d``, n = h w, or num_prefix_tokens + h w
        grid: ``(h, w)``, as ``model.grid_of`` gives it
        return: ``b d h w``

    Raises:
        ValueError: if n is neither
    """
    rows, columns = grid
    with_prefix = tokens.shape[1] == num_prefix_tokens + rows * columns
    return restructure(tokens[:, num_prefix_tokens:] if with_prefix else tokens, grid)
