"""The door ``python -m t2t_ref.bench``."""

import sys

from t2t_ref.bench.commands import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
