"""The door to :mod:`t2t_ref.data.sources` at its address of earlier versions."""

from t2t_ref.data.sources import Data, crops_at_reading, list_images, open_data  # noqa: F401
