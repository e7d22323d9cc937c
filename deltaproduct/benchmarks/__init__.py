"""What `deltaproduct bench` runs: peers side by side in one process, correct before they are timed."""

from typing import TYPE_CHECKING

from deltaproduct.late import late

if TYPE_CHECKING:
    from deltaproduct.benchmarks.decode import DECODE_SHAPE, QUICK_DECODE_SHAPE, bench_decode
    from deltaproduct.benchmarks.mixers import bench_mixers
    from deltaproduct.benchmarks.ops import DEFAULT_SHAPES, GPU_SHAPES, QUICK_SHAPES, bench_ops, row_names
    from deltaproduct.benchmarks.peers import PEERS, textbook_loop
    from deltaproduct.benchmarks.report import (
        DecodeBenchmark,
        MixersBenchmark,
        OpsBenchmark,
        OpShape,
        ScalingBenchmark,
        StepBenchmark,
        TrainBenchmark,
    )
    from deltaproduct.benchmarks.scaling import SCALING_LENGTHS, bench_scaling
    from deltaproduct.benchmarks.step import QUICK_STEP_MODEL, STEP_MODEL, bench_step
    from deltaproduct.benchmarks.train import bench_train

__all__ = [
    "DECODE_SHAPE",
    "DEFAULT_SHAPES",
    "GPU_SHAPES",
    "PEERS",
    "QUICK_DECODE_SHAPE",
    "QUICK_SHAPES",
    "QUICK_STEP_MODEL",
    "SCALING_LENGTHS",
    "STEP_MODEL",
    "DecodeBenchmark",
    "MixersBenchmark",
    "OpShape",
    "OpsBenchmark",
    "ScalingBenchmark",
    "StepBenchmark",
    "TrainBenchmark",
    "bench_decode",
    "bench_mixers",
    "bench_ops",
    "bench_scaling",
    "bench_step",
    "bench_train",
    "row_names",
    "textbook_loop",
]

__getattr__, __dir__ = late(
    __name__,
    {
        "decode": ("DECODE_SHAPE", "QUICK_DECODE_SHAPE", "bench_decode"),
        "mixers": ("bench_mixers",),
        "ops": ("DEFAULT_SHAPES", "GPU_SHAPES", "QUICK_SHAPES", "bench_ops", "row_names"),
        "peers": ("PEERS", "textbook_loop"),
        "report": (
            "DecodeBenchmark",
            "MixersBenchmark",
            "OpsBenchmark",
            "OpShape",
            "ScalingBenchmark",
            "StepBenchmark",
            "TrainBenchmark",
        ),
        "scaling": ("SCALING_LENGTHS", "bench_scaling"),
        "step": ("QUICK_STEP_MODEL", "STEP_MODEL", "bench_step"),
        "train": ("bench_train",),
    },
)
