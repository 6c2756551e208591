"""The experiments behind results/*.json (chapters 11 to 16)."""

from t2t_ref.experiments import arms, precisions, what_it_sees
from t2t_ref.experiments.arms import (
    DATA,
    PERFORMER,
    VIT_ARM,
    Experiment,
    build_model,
    performers,
    recipe_of,
)
from t2t_ref.experiments.intervals import accuracies, mean_interval, paired_interval, show_runs, summary
from t2t_ref.experiments.runs import held_out, normalise, run, run_experiment, train_arm

EXPERIMENTS = arms.EXPERIMENTS | {"what_it_sees": what_it_sees.EXPERIMENT}
MEASUREMENTS = {"precisions": precisions.measure}  # which train nothing

__all__ = [
    "DATA",
    "EXPERIMENTS",
    "MEASUREMENTS",
    "PERFORMER",
    "VIT_ARM",
    "Experiment",
    "accuracies",
    "build_model",
    "held_out",
    "mean_interval",
    "normalise",
    "paired_interval",
    "performers",
    "recipe_of",
    "run",
    "run_experiment",
    "show_runs",
    "summary",
    "train_arm",
]
