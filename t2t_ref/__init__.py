"""T2T-ViT, piece by piece: the reference package of the book.

Modules come in the order of the chapters: soft_split, token_transformer, token_performer, tokens_to_token, position,
backbone, classifier, t2t_vit, vit, cnn_designs, zoo, released, checkpoints, inspection, features, fused. Beside the
model, and not imported with it: data, train, evaluate, experiments, results, bench, what_it_sees, figures, widgets.
"""

from t2t_ref._version import __version__
from t2t_ref.backbone import Attention, Block, DropPath, Mlp
from t2t_ref.checkpoints import load_checkpoint, load_model, save_checkpoint
from t2t_ref.images import imagenet_class_names, preprocess
from t2t_ref.inspection import attention_maps, count_macs, count_parameters, shape_table
from t2t_ref.position import resize_position_table, sinusoid_table
from t2t_ref.released import released_weights
from t2t_ref.soft_split import SoftSplit, grid_size, soft_split
from t2t_ref.t2t_vit import T2TViT
from t2t_ref.token_performer import TokenPerformer, performer_attention, plain_performer_attention
from t2t_ref.token_transformer import TokenTransformer
from t2t_ref.tokens_to_token import TokensToToken, restructure, token_grid
from t2t_ref.vit import ViT
from t2t_ref.zoo import create_model, list_models

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
