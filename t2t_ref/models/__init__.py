"""The model, one idea a file, in the order of the chapters; and the variants of all files in one table."""

from dataclasses import asdict

from t2t_ref.models import cnn_designs, t2t_vit, vit
from t2t_ref.models.classifier import Classifier
from t2t_ref.models.relatives import deit, patch_convnet, pvt, pvt_v2, swin, tnt

VARIANTS = {  # by name; a file of models adds its own table here
    **t2t_vit.VARIANTS,
    **vit.VARIANTS,
    **cnn_designs.VARIANTS,
    **deit.VARIANTS,
    **tnt.VARIANTS,
    **pvt.VARIANTS,
    **pvt_v2.VARIANTS,
    **swin.VARIANTS,
    **patch_convnet.VARIANTS,
}
CLASSES = {variant.model.__name__: variant.model for variant in VARIANTS.values()}  # of all models, by name


def list_models() -> list[str]:
    """The names that :func:`t2t_ref.create_model` knows, family by family.

    Note:
        T2T-ViT, ViT, both with designs of CNNs, DeiT, TNT, PVT, PVT v2, Swin, PatchConvNet
    """
    return list(VARIANTS)


def build(name: str, **arguments) -> Classifier:
    """A variant with fresh weights; ``arguments`` are those of its class, and go before the variant's own sizes."""
    sizes = asdict(VARIANTS[name])
    model = sizes.pop("model")(**(sizes | arguments))
    model.pretrained_cfg["architecture"] = name
    return model
