"""The door to timm: ``import t2t_ref.timm``, and ``timm.create_model("t2t_vit_14")`` works.

The rest is in :mod:`t2t_ref.weights.timm_registry`. timm comes with ``pip install "t2t-ref[timm]"``.
"""

import sys

from t2t_ref.weights.timm_registry import register

register(sys.modules[__name__])
