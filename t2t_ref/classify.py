"""The door ``python -m t2t_ref.classify``; the rest is in :mod:`t2t_ref.train.classify`."""

import sys

from t2t_ref.train.classify import main

if __name__ == "__main__":
    sys.exit(main())
