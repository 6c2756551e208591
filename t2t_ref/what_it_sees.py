"""The door ``python -m t2t_ref.what_it_sees``; the rest is in :mod:`t2t_ref.experiments.what_it_sees`."""

import sys

from t2t_ref.experiments.what_it_sees import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
