"""What `deltaproduct bench` runs: implementations side by side in one process, correct before they are timed."""

from typing import TYPE_CHECKING

from deltaproduct.late import late

if TYPE_CHECKING:
    from deltaproduct.benchmarks.generate import GENERATE_MODEL, QUICK_GENERATE_MODEL, bench_generate
    from deltaproduct.benchmarks.implementations import IMPLEMENTATIONS, textbook_loop
    from deltaproduct.benchmarks.mixers import bench_mixers
    from deltaproduct.benchmarks.op_step import bench_op_step
    from deltaproduct.benchmarks.ops import bench_ops, row_names
    from deltaproduct.benchmarks.report import (
        GenerateBenchmark,
        MixersBenchmark,
        OpsBenchmark,
        OpStepBenchmark,
        ScalingBenchmark,
        TrainBenchmark,
    )
    from deltaproduct.benchmarks.scaling import SCALING_LENGTHS, bench_scaling
    from deltaproduct.benchmarks.shapes import (
        DEFAULT_SHAPES,
        GPU_SHAPES,
        OP_STEP_SHAPE,
        QUICK_OP_STEP_SHAPE,
        QUICK_SHAPES,
        OpShape,
    )
    from deltaproduct.benchmarks.train import bench_train

__all__ = [
    "DEFAULT_SHAPES",
    "GENERATE_MODEL",
    "GPU_SHAPES",
    "IMPLEMENTATIONS",
    "OP_STEP_SHAPE",
    "QUICK_GENERATE_MODEL",
    "QUICK_OP_STEP_SHAPE",
    "QUICK_SHAPES",
    "SCALING_LENGTHS",
    "GenerateBenchmark",
    "MixersBenchmark",
    "OpShape",
    "OpStepBenchmark",
    "OpsBenchmark",
    "ScalingBenchmark",
    "TrainBenchmark",
    "bench_generate",
    "bench_mixers",
    "bench_op_step",
    "bench_ops",
    "bench_scaling",
    "bench_train",
    "row_names",
    "textbook_loop",
]

__getattr__, __dir__ = late(
    __name__,
    {
        "generate": ("GENERATE_MODEL", "QUICK_GENERATE_MODEL", "bench_generate"),
        "implementations": ("IMPLEMENTATIONS", "textbook_loop"),
        "mixers": ("bench_mixers",),
        "op_step": ("bench_op_step",),
        "ops": ("bench_ops", "row_names"),
        "report": (
            "GenerateBenchmark",
            "MixersBenchmark",
            "OpStepBenchmark",
            "OpsBenchmark",
            "ScalingBenchmark",
            "TrainBenchmark",
        ),
        "scaling": ("SCALING_LENGTHS", "bench_scaling"),
        "shapes": (
            "DEFAULT_SHAPES",
            "GPU_SHAPES",
            "OP_STEP_SHAPE",
            "QUICK_OP_STEP_SHAPE",
            "QUICK_SHAPES",
            "OpShape",
        ),
        "train": ("bench_train",),
    },
    renamed={
        "DECODE_SHAPE": "OP_STEP_SHAPE",
        "PEERS": "IMPLEMENTATIONS",
        "QUICK_DECODE_SHAPE": "QUICK_OP_STEP_SHAPE",
        "QUICK_STEP_MODEL": "QUICK_GENERATE_MODEL",
        "STEP_MODEL": "GENERATE_MODEL",
        "DecodeBenchmark": "OpStepBenchmark",
        "StepBenchmark": "GenerateBenchmark",
        "bench_decode": "bench_op_step",
        "bench_step": "bench_generate",
    },
)
