"""A model by its name, with fresh weights or the released ones (chapter 9).

The names come from the files of ``t2t_ref.models``: a new one is a row in the ``VARIANTS`` of its file.
"""

import inspect

from t2t_ref.arguments import check_known
from t2t_ref.models import VARIANTS, build, list_models
from t2t_ref.models.classifier import Classifier
from t2t_ref.weights import load_checkpoint
from t2t_ref.weights.released import released_file

__all__ = ["create_model", "list_models"]


def create_model(name: str, *, pretrained: bool = False, **arguments) -> Classifier:
    """Build a variant by name, with fresh weights or with the released ones.

    With ``pretrained=True`` the file of :func:`released_weights` is downloaded once, into torch.hub's cache, and read
    by :func:`load_checkpoint`: with another number of classes the head stays fresh, for another image size the
    position table is resized. For t2t_vit_14 at 384 pixels it is the file trained at 384.

    Args:
        **arguments: those of the model's class. All models have img_size=224, in_chans=3, num_classes=1000,
            drop_rate=0.0, attn_drop_rate=0.0 and drop_path_rate=0.0; T2T-ViTs and ViTs have qk_scale=None and
            dynamic_img_size=False; further ones, such as depth, are in :class:`T2TViT` and :class:`ViT`

    Raises:
        ValueError: for an unknown name, with the nearest ones; with pretrained=True for a variant without released
            weights and for arguments that they do not fit
        TypeError: for an argument that the model does not have, with the nearest ones
        ConnectionError: with pretrained=True without a network, which says where to put the file

    Source:
        names are the authors'
    """
    check_known("model", name, list_models())
    known = inspect.signature(VARIANTS[name].model).parameters
    for argument in arguments:
        check_known(f"argument of {name}", argument, known, TypeError)
    if not pretrained:
        return build(name, **arguments)

    released = released_file(name, arguments.get("img_size", 224))
    # these two change the function and no shape, so that load_checkpoint could not notice
    heads, needed = arguments.get("num_heads", VARIANTS[name].num_heads), VARIANTS[name].num_heads
    if arguments.get("qk_scale") is not None or heads != needed:
        raise ValueError(
            f"the released weights of {name!r} need qk_scale=None, which is head_dim ** -0.5, and num_heads={needed}; "
            f"found qk_scale={arguments.get('qk_scale')}, num_heads={heads}"
        )
    model = build(name, **arguments)
    load_checkpoint(model, released.url)
    model.pretrained_cfg |= released.cfg
    return model
