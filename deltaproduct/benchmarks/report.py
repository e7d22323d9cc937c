"""What is benchmarked and what comes out: problem shapes, rows and reports, as plain data."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from deltaproduct.benchmarks.roofline import Roofline
from deltaproduct.benchmarks.timing import Timing
from deltaproduct.errors import UsageError


@dataclass(frozen=True)
class OpShape:
    """B, T, H (= HV), K, V (None: as K) and N of one problem; `gate` adds a forget gate g."""

    batch: int
    length: int
    num_heads: int
    head_dim: int
    num_householder: int
    gate: bool = False
    value_dim: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "length", "num_heads", "head_dim", "num_householder", "value_dim"):
            value = self.values if name == "value_dim" else getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{name} of a benchmark's shape must be a whole number of at least 1, not {value!r}.")

    @classmethod
    def parse(cls, text: str) -> "OpShape":
        """The inverse of `label`: "B64 T128 H4 K32 N2", with V before N where it is not K, and " gated" for a gate."""
        found = re.fullmatch(r"B(\d+)\s*T(\d+)\s*H(\d+)\s*K(\d+)(?:\s*V(\d+))?\s*N(\d+)(\s+gated)?", text.strip())
        if not found:
            raise UsageError(f"{text!r} is not a shape; write it as 'B64 T128 H4 K32 N2', or '… N2 gated'.")
        b, t, h, k, v, n, gate = found.groups()
        return cls(int(b), int(t), int(h), int(k), int(n), gate is not None, None if v is None else int(v))

    @property
    def values(self) -> int:
        """V."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def label(self) -> str:
        values = "" if self.value_dim is None else f" V{self.value_dim}"
        sizes = f"B{self.batch} T{self.length} H{self.num_heads} K{self.head_dim}{values} N{self.num_householder}"
        return sizes + (" gated" if self.gate else "")

    @property
    def tokens(self) -> int:
        """B·T."""
        return self.batch * self.length

    @property
    def steps(self) -> int:
        """T·N: what a loop has to do one after another."""
        return self.length * self.num_householder

    @property
    def forward_flops(self) -> int:
        """Multiplications and additions of the recurrent form: B·T·N·HV·(4·K·V) + B·T·HV·2·K·V.

        Per Householder step and head Sᵀk is K·V multiply-adds, 2KV flops, and the rank-one update of S another 2KV;
        per token the read-out Sᵀq is 2KV. Vectors (β, v − Sᵀk) and the gate are left out: they are of order K, or
        fused into the update. It is a nominal count, the same for every row, so that rates order as times do; an
        arrangement that does more arithmetic to use the hardware better is not credited for it.
        """
        per_matrix = 2 * self.head_dim * self.values
        return self.tokens * self.num_heads * per_matrix * (2 * self.num_householder + 1)

    @property
    def training_flops(self) -> int:
        """Forward and backward: 4 × `forward_flops` (the forward, its recomputation, and twice it for two operands)."""
        return 4 * self.forward_flops

    def fewest_bytes(self, itemsize: int, backward: bool) -> int:
        """What has to be moved at least: every input read once and every result written once, in each of the passes.

        The forward reads q, k, v, β and g and writes o; the backward reads them and the gradient of o, and writes
        theirs. States stay where they are, and nothing is kept from one pass to the other.
        """
        inputs = self.head_dim * (1 + self.num_householder) + (self.values + 1) * self.num_householder + self.gate
        per_head = inputs + self.values
        if backward:
            per_head += 2 * inputs + self.values
        return self.tokens * self.num_heads * per_head * itemsize


@dataclass(frozen=True)
class NotRun:
    """A backend or peer that has no row, and why."""

    backend: str
    reason: str


@dataclass
class Row:
    """One backend or peer on one shape. What was not measured is None.

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
    unavailable: list[NotRun]  # backends and peers that cannot serve here
    versions: dict[str, str]  # of the peers' packages
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
class StepTimes:
    """Decoding, and what it cannot be faster than. All of it was measured in turn in one run."""

    token: Timing  # the next token of each sequence, in the fastest of the ways
    token_by: dict[str, Timing]  # by a call of the model and, where there is one, by the native decoder
    recurrent: Timing  # `delta_product_step` alone, on every layer's state
    weights: Timing  # reading as many bytes as a call reads of the weights, in the fastest of the ways tried
    weights_by: dict[str, Timing]  # all of those ways
    states: Timing  # copying as many bytes as the states have
    floor_ms: float  # medians of weights + states
    floor_gb_per_s: float  # 1e9 bytes a second: `StepBenchmark.moved_bytes` in that time
    ratio: float  # token over floor; 1 is as fast as memory allows
    tokens_per_second: float


@dataclass
class StepBenchmark(Report):
    """What `bench_step` found. `times` is None if the model's steps are wrong or failed, and `reason` says how."""

    model: dict[str, Any]  # its ModelConfig
    batch_size: int
    num_parameters: int
    weight_bytes: int  # that a step reads: all parameters, but of the embedding only the tokens' own rows
    state_bytes: int  # of all sequences and layers, convolutions' histories included
    moved_bytes: int  # weights read once, states read and written once
    checked_length: int
    error: float | None  # max|stepwise − whole| / max|whole| of the logits
    reason: str | None
    times: StepTimes | None
    benchmark: str = field(default="step", init=False)


@dataclass
class DecodeRow:
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
class DecodeBenchmark(Report):
    """What `bench_decode` found."""

    shape: OpShape  # B and T do not count
    layers: int  # whose states were stepped in turn
    backend: str
    why_backend: str
    rows: list[DecodeRow]
    benchmark: str = field(default="decode", init=False)


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
    optimiser: Timing | None = None  # clipping and AdamW
    operator: Timing | None = None  # forward and backward of `delta_product` alone, one layer, random inputs
    operator_share: float | None = None  # layers × operator over step
    speedup: dict[str, float] = field(default_factory=dict)  # {other row: its step's time over this one's}


@dataclass
class TrainBenchmark(Report):
    """What `bench_train` found."""

    config: dict[str, Any]  # the RunConfig
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

    config: dict[str, Any]  # the RunConfig, from which a row differs in its mixer alone
    batch_size: int
    tokens: int  # T of a sequence, BOS included
    checked_batch: int  # sequences on which correctness was checked
    yardstick: str  # the mixer whose time is 1
    slow: float  # times as long as the yardstick: rows above say why
    rows: list[MixerRow]
    benchmark: str = field(default="mixers", init=False)


def main_timing(row: Row) -> Timing | None:
    return row.forward_backward or row.forward
