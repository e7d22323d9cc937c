"""What `deltaproduct bench` runs: peers side by side in one process, correct before they are timed."""

from deltaproduct.benchmarks.ops import (
    DEFAULT_SHAPES,
    QUICK_SHAPES,
    SCALING_LENGTHS,
    OpsBenchmark,
    OpShape,
    ScalingBenchmark,
    bench_ops,
    bench_scaling,
    render,
    row_names,
    textbook_loop,
)

__all__ = [
    "DEFAULT_SHAPES",
    "QUICK_SHAPES",
    "SCALING_LENGTHS",
    "OpShape",
    "OpsBenchmark",
    "ScalingBenchmark",
    "bench_ops",
    "bench_scaling",
    "render",
    "row_names",
    "textbook_loop",
]
