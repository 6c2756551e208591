"""The experiments of chapters 11 to 16: small models, from scratch, on handwritten digits.

    python -m t2t_ref.experiments                    lists them
    python -m t2t_ref.experiments tokenisers         runs one and writes results/tokenisers.json
    python -m t2t_ref.experiments --gpu-plan         the same questions at 224 pixels, and what they would cost

A file is written after every run; the same command goes on where it was interrupted.
"""

import argparse
import sys
from pathlib import Path

import torch

from t2t_ref.arguments import check_known
from t2t_ref.experiments import EXPERIMENTS, MEASUREMENTS, gpu_plan
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
    parser.add_argument("--gpu-plan", nargs="?", const="cifar10", metavar="DATA", help=(
        "the questions on cifar10 or cifar100 at 224 pixels (DATA:FOLDER for a local copy): "
        "prints what they cost, and runs them where a GPU is"
    ))  # fmt: skip
    parser.add_argument(
        "--sustained", type=float, default=gpu_plan.SUSTAINED, help="TFLOP/s, for the hours of the plan"
    )
    options = parser.parse_args(arguments)
    if options.gpu_plan and options.gpu_plan in EXPERIMENTS:  # --gpu-plan positions
        options.names.insert(0, options.gpu_plan)
        options.gpu_plan = "cifar10"
    if not options.names and not options.gpu_plan:
        for name, experiment in EXPERIMENTS.items():
            print(f"{name}: {'; '.join(experiment.arms)}")
        for name, measure in MEASUREMENTS.items():
            print(f"{name}: trains nothing. {measure.__doc__.partition(chr(10))[0]}")
    try:
        if options.jobs < 1:
            raise ValueError(f"jobs is {options.jobs}, expected at least 1")
        chosen = EXPERIMENTS
        if options.gpu_plan:
            chosen = gpu_plan.plan(options.gpu_plan, tuple(options.names))
            options.names = list(chosen)
            print(gpu_plan.costs(chosen, options.sustained), flush=True)
            if not torch.cuda.is_available():
                print("no GPU is here; where one is, the same command runs them")
                return 0
        for name in options.names:
            check_known("experiment", name, [*chosen, *MEASUREMENTS])
        seeds = tuple(options.seeds) if options.seeds else None
        for name in options.names:
            if name in MEASUREMENTS:
                MEASUREMENTS[name](options.output)
                continue
            run_experiment(name, chosen[name], options.output, seeds, jobs=options.jobs)
    except (ValueError, OSError, ImportError, NotFinite) as error:
        print(f"t2t_ref.experiments: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("t2t_ref.experiments: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
