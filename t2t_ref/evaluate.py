"""The door ``python -m t2t_ref.evaluate``; the rest is in :mod:`t2t_ref.train.evaluate`."""

import sys

from t2t_ref.train.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
