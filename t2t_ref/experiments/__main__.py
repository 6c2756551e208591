"""The experiments of chapters 11 to 16: small models, from scratch, on handwritten digits.

    python -m t2t_ref.experiments                    lists them
    python -m t2t_ref.experiments tokenisers         runs one and writes results/tokenisers.json

A file is written after every run; the same command goes on where it was interrupted.
"""

import argparse
import sys
from pathlib import Path

from t2t_ref.arguments import check_known
from t2t_ref.experiments import EXPERIMENTS, MEASUREMENTS
from t2t_ref.experiments.runs import run_experiment
from t2t_ref.train.stopping import NotFinite


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 2 for what cannot be run."""
    known = [*EXPERIMENTS, *MEASUREMENTS]
    parser = argparse.ArgumentParser("python -m t2t_ref.experiments", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(known)}; none lists them")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder of the results files")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of those of the experiment")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with one thread")
    options = parser.parse_args(arguments)
    if not options.names:
        for name, experiment in EXPERIMENTS.items():
            print(f"{name}: {'; '.join(experiment.arms)}")
        for name, measure in MEASUREMENTS.items():
            print(f"{name}: trains nothing. {measure.__doc__.partition(chr(10))[0]}")
    try:
        if options.jobs < 1:
            raise ValueError(f"jobs is {options.jobs}, expected at least 1")
        for name in options.names:
            check_known("experiment", name, known)
        seeds = tuple(options.seeds) if options.seeds else None
        for name in options.names:
            if name in MEASUREMENTS:
                MEASUREMENTS[name](options.output)
                continue
            run_experiment(name, EXPERIMENTS[name], options.output, seeds, jobs=options.jobs)
    except (ValueError, OSError, ImportError, NotFinite) as error:
        print(f"t2t_ref.experiments: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("t2t_ref.experiments: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
