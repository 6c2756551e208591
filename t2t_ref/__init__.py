"""T2T-ViT, piece by piece: the reference package of the book.

The model is in ``models``, one idea a file, in the order of the chapters; ``create`` makes one by name. ``weights``
reads and writes files, ``data`` makes images ready, ``inspection`` looks inside. Not imported with the package:
``train``, ``experiments``, ``bench``, and ``book``, with which the pages are drawn.
"""

from t2t_ref.create import create_model, list_models
from t2t_ref.data.images import imagenet_class_names, preprocess
from t2t_ref.inspection import attention_maps, count_macs, count_parameters, shape_table
from t2t_ref.models.backbone import Attention, Block, DropPath, Mlp
from t2t_ref.models.position import resize_position_table, sinusoid_table
from t2t_ref.models.soft_split import SoftSplit, grid_size, soft_split
from t2t_ref.models.t2t_vit import T2TViT
from t2t_ref.models.token_performer import TokenPerformer, performer_attention, plain_performer_attention
from t2t_ref.models.token_transformer import TokenTransformer
from t2t_ref.models.tokens_to_token import TokensToToken, restructure, token_grid
from t2t_ref.models.vit import ViT
from t2t_ref.weights import load_checkpoint, load_model, released_weights, save_checkpoint
from t2t_ref.weights._version import __version__

__all__ = [
    "__version__",
    "Attention",
    "Block",
    "DropPath",
    "Mlp",
    "SoftSplit",
    "T2TViT",
    "TokenPerformer",
    "TokenTransformer",
    "TokensToToken",
    "ViT",
    "attention_maps",
    "count_macs",
    "count_parameters",
    "create_model",
    "grid_size",
    "imagenet_class_names",
    "list_models",
    "load_checkpoint",
    "load_model",
    "performer_attention",
    "plain_performer_attention",
    "preprocess",
    "released_weights",
    "resize_position_table",
    "restructure",
    "save_checkpoint",
    "shape_table",
    "sinusoid_table",
    "soft_split",
    "token_grid",
]
