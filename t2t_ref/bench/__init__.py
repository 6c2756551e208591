"""Measuring: forms of one model in turn, with spread, memory and bounds (chapter 16)."""

from t2t_ref.bench.cases import Case, build, highest_memory, peak_memory, step_of
from t2t_ref.bench.commands import bench_case, main, table_of
from t2t_ref.bench.pieces import pieces
from t2t_ref.bench.products import ProductRecorder, macs_of, products_of, run_of
from t2t_ref.bench.timing import WIDE, Timing, compare, compare_with_first, interleave

__all__ = [
    "WIDE",
    "Case",
    "ProductRecorder",
    "Timing",
    "bench_case",
    "build",
    "compare",
    "compare_with_first",
    "highest_memory",
    "interleave",
    "macs_of",
    "main",
    "peak_memory",
    "pieces",
    "products_of",
    "run_of",
    "step_of",
    "table_of",
]
