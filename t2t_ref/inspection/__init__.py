"""Looking inside: shapes, parameters, products, taps, attention, statistics (chapters 1, 8 and 15)."""

from t2t_ref.inspection.attention import (
    attention_maps,
    attention_rollout,
    class_token_maps,
    performer_weights,
    token_attention_maps,
)
from t2t_ref.inspection.counting import (
    count_macs,
    count_parameters,
    frozen_entries,
)
from t2t_ref.inspection.tables import (
    ShapeRow,
    ShapeTable,
    Table,
    shape_table,
)
from t2t_ref.inspection.taps import (
    eval_without_gradients,
    tap,
    token_maps,
)

__all__ = [
    "ShapeRow",
    "ShapeTable",
    "Table",
    "attention_maps",
    "attention_rollout",
    "class_token_maps",
    "count_macs",
    "count_parameters",
    "eval_without_gradients",
    "frozen_entries",
    "performer_weights",
    "shape_table",
    "tap",
    "token_attention_maps",
    "token_maps",
]
