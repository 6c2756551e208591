from t2t_ref.create import DESIGNS, VARIANTS
from t2t_ref.models.classifier import TokenClassifier
from t2t_ref.models.position import resize_position_table
from t2t_ref.models.t2t_vit import T2TViT
from t2t_ref.models.vit import ViT

CLASSES = {model.__name__: model for model in (T2TViT, ViT, *DESIGNS.values())}


def class_of(name):
    return DESIGNS.get(name, ViT if "ViTVariant" == type(VARIANTS[name]).__name__ else T2TViT)


TokenClassifier.head_names = ("head",)
TokenClassifier.position_tables = lambda self: {"pos_embed": self.grid}
TokenClassifier.resize_table = lambda self, name, table, grid, new: resize_position_table(table, grid, new)
