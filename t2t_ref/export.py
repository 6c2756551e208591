"""The door ``python -m t2t_ref.export``; the rest is in :mod:`t2t_ref.train.export`."""

import sys

from t2t_ref.train.export import main

if __name__ == "__main__":
    sys.exit(main())
