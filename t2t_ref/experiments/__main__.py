"""The door ``python -m t2t_ref.experiments``."""

import sys

from t2t_ref.experiments.runs import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
