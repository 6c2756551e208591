#!/usr/bin/env bash
# Everything that needs a GPU, in some minutes on a modern one, most of them for compiling: tools/gpu.sh
#
# Runs the checks of tools/gpu_check.py, which leaves what it measures in results/gpu_*.json: T2T-ViT plain, fused and
# compiled, its relatives, and timm's own models of their size. Then every chapter as it is: nothing in them may fail
# because a GPU is there. Outputs are not compared, since some name the device.
# Exit status 0 if all went well.
#
#   PYTHON=python3     an environment with requirements.txt and a torch for the GPU (.venv/bin/python)
#   JOBS=4             chapters at a time (as many as there are cores, at most 8)
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
cores=$("$python" -c 'import os; print(min(8, os.cpu_count()))') || exit 2
status=0
"$python" tools/gpu_check.py "$@" || status=1
OMP_NUM_THREADS=1 "$python" -m pytest --nbval-lax notebooks -q -n "${JOBS:-$cores}" || status=1
exit $status
