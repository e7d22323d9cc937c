"""The operator's backends against one another, against other people's code, and against the machine.

No row is timed before its output and all its gradients have been held against the float64 reference on the same
inputs. Then every row runs in turn, again and again, in one process; medians and ranges are reported.
"""

from collections.abc import Callable, Sequence

import torch

from deltaproduct.benchmarks.correctness import error_limit
from deltaproduct.benchmarks.implementations import IMPLEMENTATIONS
from deltaproduct.benchmarks.report import NotRun, OpsBenchmark, Row, ShapeResult, main_timing
from deltaproduct.benchmarks.roofline import MatrixProduct, MemoryCopy
from deltaproduct.benchmarks.settings import BenchmarkSettings, Candidate, serving
from deltaproduct.benchmarks.shapes import DEFAULT_SHAPES, GPU_SHAPES, QUICK_SHAPES, OpShape
from deltaproduct.benchmarks.timing import Timing, interleaved, peak_extra_bytes
from deltaproduct.benchmarks.workload import GIB, Workload
from deltaproduct.errors import UsageError, did_you_mean, first_line
from deltaproduct.ops import BACKENDS, resolve_backend

OURS = ("triton", "triton_precise")  # what other implementations are held against on a GPU
PRODUCT, COPY = ("roofline", "product"), ("roofline", "copy")  # keys among what is timed
LOOPS = ("reference", *(name for name, other in IMPLEMENTATIONS.items() if other.loop))
LOOP_BYTES = 4 * GIB  # states that a loop may keep for its backward
LOOP_STEPS = 1 << 14  # Householder steps that a loop may take: beyond them it is launch overhead that is timed
ZERO_BYTES = 16 * GIB  # zeros that the backward of a loop which indexes its inputs may write


def row_names() -> list[str]:
    """What `backends` may name: every backend of the operator, and every other implementation."""
    return [*BACKENDS, *IMPLEMENTATIONS]


def bench_ops(
    shapes: Sequence[OpShape] | None = None,
    *,
    backends: Sequence[str] | None = None,
    against: str | None = None,
    device: str = "auto",
    dtype: torch.dtype | str | None = None,
    repeats: int | None = None,
    backward: bool = True,
    quick: bool = False,
    hard: bool = False,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> OpsBenchmark:
    """Check, then time, every backend and every other implementation on every shape.

    Args:
        shapes: None is DEFAULT_SHAPES, or GPU_SHAPES on a GPU, or QUICK_SHAPES when `quick`.
        backends: rows, of `row_names()`; None is all that can serve.
        against: another implementation: its row and those of our own GPU kernels, or, on a CPU, of our fastest backend.
        device: "auto", "cpu" or "cuda".
        dtype: of the inputs: float64, float32, bfloat16 or float16, or its name; None is float32 on a CPU and bfloat16
            on a GPU.
        repeats: timed runs of each row, forward and forward+backward each; None is 7, or 3 when `quick`. A row that
            has taken 20 s stops after three.
        backward: also check and time gradients.
        quick: a few seconds in all.
        hard: inputs of state tracking, where chunked algorithms lose most: keys with a cosine of .99, β in (1.9,2).
        seed: of the inputs: unit keys, β uniform in (0,2), g (where gated) the logarithm of gates near 1.
        progress: called with a line before each stage.

    Raises:
        UsageError: an unknown backend, device or dtype, one that cannot serve and was named, fewer than one repeat.
    """
    say = progress or (lambda line: None)
    settings = BenchmarkSettings.of(
        device=device, dtype=dtype, repeats=repeats, backward=backward, seed=seed, quick=quick, hard=hard
    )
    if shapes is None:
        usual = GPU_SHAPES if settings.device.type == "cuda" else DEFAULT_SHAPES
        shapes = QUICK_SHAPES if quick else usual
    if not shapes:
        raise UsageError("There is no shape to benchmark.")
    candidates: dict[str, Candidate] = {**BACKENDS, **IMPLEMENTATIONS}
    if against is not None:
        backends = _held_against(against, backends, settings)
    names, unavailable = serving(backends, candidates, settings)

    say("roofline")
    on_gpu = settings.device.type == "cuda"
    # On a GPU the tensor cores' rate for what the inputs are, since kernels use them so.
    product = MatrixProduct(settings.device, settings.dtype if on_gpu else settings.compute_dtype)
    copy = MemoryCopy(settings.device) if on_gpu else None
    results = [_bench_shape(shape, names, settings, product, copy, say) for shape in shapes]
    return OpsBenchmark(
        **settings.circumstances(),
        error_limit=error_limit(settings.dtype, settings.device),
        backward=backward,
        hard=hard,
        shapes=results,
        unavailable=unavailable,
        versions={
            name: version for name in names if name in IMPLEMENTATIONS and (version := IMPLEMENTATIONS[name].version)
        },
    )


def _held_against(other: str, backends: Sequence[str] | None, settings: BenchmarkSettings) -> list[str]:
    if backends is not None:
        raise UsageError("--against says which rows there are; leave out --backends.")
    if other not in IMPLEMENTATIONS:
        raise UsageError(
            f"There is no implementation {other!r} to compare with{did_you_mean(other, IMPLEMENTATIONS)}; choose from "
            f"{', '.join(IMPLEMENTATIONS)}."
        )
    ours = OURS if settings.device.type == "cuda" else (resolve_backend(dtype=settings.compute_dtype)[0],)
    return [*ours, other]


def _bench_shape(
    shape: OpShape,
    names: list[str],
    settings: BenchmarkSettings,
    product: MatrixProduct,
    copy: MemoryCopy | None,
    say: Callable[[str], None],
) -> ShapeResult:
    workload = Workload(shape, settings)
    rows, left_out = [], []
    for name in names:
        if reason := _too_large(name, shape, settings.backward, settings.compute_dtype.itemsize):
            left_out.append(NotRun(name, reason))
            continue
        say(f"{shape.label}: checking {name}")
        row = workload.check(name)
        if row.status == "timed":
            say(f"{shape.label}: measuring memory of {name}")
            try:  # the first run at full size is also the warm-up
                work = workload.forward(name) if row.no_backward else workload.work(name)
                row.peak_extra_bytes = peak_extra_bytes(work, settings.device)
                workload.forward(name)()
            except Exception as e:
                row.status, row.reason = "failed", first_line(e, with_kind=True)
        rows.append(row)
    timed = [row for row in rows if row.status == "timed"]
    say(f"{shape.label}: timing {len(timed)} rows, {settings.repeats} runs each")
    runs: dict[tuple[str, str], Callable[[], object]] = {PRODUCT: product}
    if copy is not None:
        runs[COPY] = copy
    for row in timed:
        runs[row.backend, "forward"] = workload.forward(row.backend)
        if settings.backward and not row.no_backward:
            runs[row.backend, "forward_backward"] = workload.work(row.backend)
    times = interleaved(runs, repeats=settings.repeats, device=settings.device)
    result = ShapeResult(
        shape,
        shape.label,
        shape.forward_flops,
        workload.checked_length,
        product.roofline(times.pop(PRODUCT)),
        rows,
        left_out,
        None if copy is None else copy.gb_per_second(times.pop(COPY)),
    )
    for (name, phase), timing in times.items():
        setattr(next(row for row in timed if row.backend == name), phase, timing)
    for row in timed:
        _rate(row, result, settings.dtype.itemsize)
    return result


def _too_large(name: str, shape: OpShape, backward: bool, itemsize: int) -> str | None:
    """Why a loop is not run on this shape; None if it is."""
    if name not in LOOPS:
        return None
    if shape.steps > LOOP_STEPS:
        return f"a loop of T·N = {shape.steps} steps is more than {LOOP_STEPS}"
    states = shape.steps * shape.batch * shape.num_heads * shape.head_dim**2 * itemsize
    if backward and states > LOOP_BYTES:
        return f"a state per step comes to {states / GIB:.1f} GiB, more than {LOOP_BYTES // GIB}"
    one = 2 * shape.steps * shape.batch * shape.num_heads * shape.head_dim * itemsize  # k and v
    if name in IMPLEMENTATIONS and backward and shape.steps * one > ZERO_BYTES:
        zeros, limit = shape.steps * one / GIB, ZERO_BYTES // GIB
        return f"its backward, quadratic in T, would write {zeros:.0f} GiB of zeros, more than {limit}"
    return None


def _rate(row: Row, result: ShapeResult, itemsize: int) -> None:
    """Fill in what follows from the times."""
    shape = result.shape
    if peak := result.copy_gb_per_second:
        if row.forward:
            moved = shape.fewest_bytes(itemsize, backward=False)
            row.forward_bandwidth_share = moved / row.forward.median_ms / 1e6 / peak
        if row.forward_backward:
            moved = shape.fewest_bytes(itemsize, backward=True)
            row.bandwidth_share = moved / row.forward_backward.median_ms / 1e6 / peak
    if row.forward:
        row.forward_gflops = shape.forward_flops / row.forward.median_ms / 1e6
    if row.forward_backward:
        row.gflops = shape.training_flops / row.forward_backward.median_ms / 1e6
    rate = row.gflops or row.forward_gflops
    if rate:
        row.roofline_share = rate / result.roofline.gflops
        row.best_roofline_share = rate / result.roofline.best_gflops
    if mine := main_timing(row):
        row.speedup = _over(mine, "forward_backward" if row.forward_backward else "forward", row, result)
    if row.forward:
        row.forward_speedup = _over(row.forward, "forward", row, result)


def _over(mine: Timing, phase: str, row: Row, result: ShapeResult) -> dict[str, float]:
    others = {other.backend: getattr(other, phase) for other in result.rows if other is not row}
    return {name: theirs.median_ms / mine.median_ms for name, theirs in others.items() if theirs}
