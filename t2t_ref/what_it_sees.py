"""The door ``python -m t2t_ref.what_it_sees``, an older name of ``python -m t2t_ref.experiments what_it_sees``."""

import sys

from t2t_ref.experiments.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["what_it_sees", *sys.argv[1:]]))
