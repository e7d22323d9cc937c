"""What comes out of a benchmark: rows and reports, as plain data."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from deltaproduct.benchmarks.roofline import Roofline
from deltaproduct.benchmarks.shapes import OpShape
from deltaproduct.benchmarks.timing import Timing
from deltaproduct.renamed import renamed_names


@dataclass(frozen=True)
class NotRun:
    """A backend or another implementation that has no row, and why."""

    backend: str
    reason: str


@dataclass
class Row:
    """One backend or another implementation on one shape. What was not measured is None.

    `status` is "timed"; "wrong": its error is above the limit or no finite number, so it was not timed; or "failed": it
    raised. `reason` says more in the last two cases. Where only its backward raises it is timed, forward alone, and
    `no_backward` says why.
    """

    backend: str
    status: str = "timed"
    reason: str | None = None
    no_backward: str | None = None
    error: float | None = None  # largest of output's and gradients' max|x − x64| / max|x64|
    worst: str | None = None  # the tensor that has it: "o" or "d_" and an input's name
    forward: Timing | None = None  # forward alone, without recording for a backward
    forward_backward: Timing | None = None
    forward_gflops: float | None = None  # GFLOP/s by `OpShape.forward_flops`
    gflops: float | None = None  # GFLOP/s of forward and backward by `OpShape.training_flops`
    roofline_share: float | None = None  # of `gflops`, or of `forward_gflops` without a backward; medians of both
    best_roofline_share: float | None = None  # the same rate over the fastest product seen
    forward_bandwidth_share: float | None = None  # `OpShape.fewest_bytes` in the forward's time, of a copy's rate
    bandwidth_share: float | None = None  # the same of forward and backward
    speedup: dict[str, float] = field(default_factory=dict)  # {other row: its time over this one's}, same work
    forward_speedup: dict[str, float] = field(default_factory=dict)  # the same of the forward alone
    peak_extra_bytes: int | None = None  # of one forward and backward (or forward), beyond the inputs


@dataclass
class ShapeResult:
    shape: OpShape
    label: str
    forward_flops: int
    checked_length: int  # tokens of the prefix on which correctness was checked; all of them where it equals T
    roofline: Roofline
    rows: list[Row]
    left_out: list[NotRun]
    copy_gb_per_second: float | None = None  # read and written by a large copy in turn with the rows, on a GPU


@dataclass
class Report:
    """What every report carries, so that its numbers can be placed."""

    machine: dict[str, Any]
    command: str
    device: str
    dtype: str
    repeats: int
    seed: int
    error_limit: float  # the largest error at which something is still timed

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold: no NaN, no tuple."""
        return dataclasses.asdict(self)


@dataclass
class OpsBenchmark(Report):
    """What `bench_ops` found."""

    backward: bool
    hard: bool  # inputs of state tracking
    shapes: list[ShapeResult]
    unavailable: list[NotRun]  # backends and other implementations that cannot serve here
    versions: dict[str, str]  # of the other implementations' packages
    benchmark: str = field(default="ops", init=False)


@dataclass(frozen=True)
class ScalingPoint:
    length: int  # T
    time: Timing  # forward and backward, or forward alone
    us_per_token: float  # microseconds of the median, per token: B·T of them
    ratio: float  # us_per_token over that of the shortest T: 1 where cost is linear in T
    peak_extra_bytes: int | None


@dataclass
class ScalingBenchmark(Report):
    """What `bench_scaling` found. `reason` is None, or why points are missing: the backend is wrong, or a T failed."""

    backward: bool
    backend: str
    why_backend: str
    shape: OpShape  # of the shortest T
    label: str
    error: float | None
    checked_length: int
    reason: str | None
    points: list[ScalingPoint]
    benchmark: str = field(default="scaling", init=False)


@dataclass(frozen=True)
class GenerateTimes:
    """Decoding, and what it cannot be faster than. All of it was measured in turn in one run."""

    token: Timing  # the next token of each sequence, in the fastest of the ways
    token_by: dict[str, Timing]  # by a call of the model and, where there is one, by the native decoder
    recurrent: Timing  # `delta_product_step` alone, on every layer's state
    weights: Timing  # reading as many bytes as a call reads of the weights, in the fastest of the ways tried
    weights_by: dict[str, Timing]  # all of those ways
    states: Timing  # copying as many bytes as the states have
    floor_ms: float  # medians of weights + states
    floor_gb_per_s: float  # 1e9 bytes a second: `GenerateBenchmark.moved_bytes` in that time
    ratio: float  # token over floor; 1 is as fast as memory allows
    tokens_per_second: float


@dataclass
class GenerateBenchmark(Report):
    """What `bench_generate` found. `times` is None if the model's steps are wrong or failed, and `reason` says how."""

    model: dict[str, Any]  # its ModelConfig
    batch_size: int
    num_parameters: int
    weight_bytes: int  # that a step reads: all parameters, but of the embedding only the tokens' own rows
    state_bytes: int  # of all sequences and layers, convolutions' histories included
    moved_bytes: int  # weights read once, states read and written once
    checked_length: int
    error: float | None  # max|stepwise − whole| / max|whole| of the logits
    reason: str | None
    times: GenerateTimes | None
    benchmark: str = field(default="generate", init=False)


@dataclass
class OpStepRow:
    """One batch size; `status` and `reason` as in `Row`. Times are those of one layer's step. What was not measured is
    None."""

    batch_size: int
    state_bytes: int  # of one layer
    status: str = "timed"
    reason: str | None = None
    error: float | None = None  # largest of the output's and the state's max|x − x64| / max|x64|
    step: Timing | None = None  # `delta_product_step(inplace=True)`
    copy: Timing | None = None  # of the state into another: read once, written once
    launch: Timing | None = None  # of an empty kernel; on a GPU
    ratio: float | None = None  # step over copy
    launch_ratio: float | None = None  # step over launch


@dataclass
class OpStepBenchmark(Report):
    """What `bench_op_step` found."""

    shape: OpShape  # B and T do not count
    layers: int  # whose states were stepped in turn
    backend: str
    why_backend: str
    rows: list[OpStepRow]
    benchmark: str = field(default="ops-step", init=False)


@dataclass
class TrainRow:
    """Training with one backend; `status`, `reason` and `worst` as in `Row`. What was not measured is None.

    `step` is the training loop's own step, whole. Its parts were measured beside it by themselves and need not add up
    to it: each runs with other neighbours, and what is small (moving data, counting hits) is in no part.
    """

    backend: str
    status: str = "timed"
    reason: str | None = None
    error: float | None = None  # largest of the loss's and gradients' max|x − x64| / max|x64|
    worst: str | None = None  # "loss" or a parameter's name
    step: Timing | None = None
    forward: Timing | None = None  # model and loss, recording for a backward
    backward: Timing | None = None
    optimizer: Timing | None = None  # clipping and AdamW
    operator: Timing | None = None  # forward and backward of `delta_product` alone, one layer, random inputs
    operator_share: float | None = None  # layers × operator over step
    speedup: dict[str, float] = field(default_factory=dict)  # {other row: its step's time over this one's}


@dataclass
class TrainBenchmark(Report):
    """What `bench_train` found."""

    config: dict[str, Any]  # the Run
    batch_size: int
    tokens: int  # T of a sequence, BOS included
    operator_shape: str  # an OpShape's label
    sampling: Timing  # drawing one batch; part of every step, whatever the backend
    rows: list[TrainRow]
    unavailable: list[NotRun]
    benchmark: str = field(default="train", init=False)


@dataclass
class MixerRow:
    """Training with one mixer; `status`, `reason` and `worst` as in `TrainRow`. What was not measured is None."""

    mixer: str
    status: str = "timed"
    reason: str | None = None
    error: float | None = None  # largest of the loss's and gradients' max|x − x64| / max|x64|, x64 its own in float64
    worst: str | None = None
    num_parameters: int | None = None  # of the whole model
    state_size: int | None = None  # floats that a sequence carries after all its tokens
    step: Timing | None = None  # the training loop's own, whole
    ratio: float | None = None  # its median over the yardstick's
    why_slow: str | None = None  # where that is above `MixersBenchmark.slow`
    peak_extra_bytes: int | None = None  # of a first step, beyond the weights: gradients and AdamW's moments included


@dataclass
class MixersBenchmark(Report):
    """What `bench_mixers` found."""

    config: dict[str, Any]  # the Run, from which a row differs in its mixer alone
    batch_size: int
    tokens: int  # T of a sequence, BOS included
    checked_batch: int  # sequences on which correctness was checked
    yardstick: str  # the mixer whose time is 1
    slow: float  # times as long as the yardstick: rows above say why
    rows: list[MixerRow]
    benchmark: str = field(default="mixers", init=False)


def main_timing(row: Row) -> Timing | None:
    return row.forward_backward or row.forward


__getattr__ = renamed_names(
    __name__,
    {
        "DecodeBenchmark": "OpStepBenchmark",
        "DecodeRow": "OpStepRow",
        "StepBenchmark": "GenerateBenchmark",
        "StepTimes": "GenerateTimes",
    },
)
