"""What `deltaproduct bench` runs: peers side by side in one process, correct before they are timed."""

from deltaproduct.benchmarks.ops import DEFAULT_SHAPES, QUICK_SHAPES, bench_ops, row_names
from deltaproduct.benchmarks.peers import textbook_loop
from deltaproduct.benchmarks.report import OpsBenchmark, OpShape, ScalingBenchmark
from deltaproduct.benchmarks.scaling import SCALING_LENGTHS, bench_scaling

__all__ = [
    "DEFAULT_SHAPES",
    "QUICK_SHAPES",
    "SCALING_LENGTHS",
    "OpShape",
    "OpsBenchmark",
    "ScalingBenchmark",
    "bench_ops",
    "bench_scaling",
    "row_names",
    "textbook_loop",
]
