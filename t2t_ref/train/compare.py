"""The door ``python -m t2t_ref.train.compare``; the rest is in :mod:`t2t_ref.experiments.compare`."""

import sys

from t2t_ref.experiments.compare import main

if __name__ == "__main__":
    sys.exit(main())
