"""The door ``python -m t2t_ref.train.compare``, an older name of ``python -m t2t_ref.experiments digits``."""

import sys

from t2t_ref.experiments.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["digits", *sys.argv[1:]]))
