"""The operator's backends against one another, against other people's code, and against the machine.

No row is timed before its output and all its gradients have been held against the float64 reference on the same
inputs. Then every row runs in turn, again and again, in one process; medians and ranges are reported.
"""

from collections.abc import Callable, Sequence

import torch

from deltaproduct.benchmarks.peers import PEERS, first_line
from deltaproduct.benchmarks.problem import GIB, Problem, error_limit
from deltaproduct.benchmarks.report import NotRun, OpsBenchmark, OpShape, Row, ShapeResult, main_timing
from deltaproduct.benchmarks.roofline import MatrixProduct
from deltaproduct.benchmarks.settings import Candidate, Settings, serving
from deltaproduct.benchmarks.timing import interleaved, peak_extra_bytes
from deltaproduct.errors import UsageError
from deltaproduct.ops import BACKENDS

DEFAULT_SHAPES = (OpShape(64, 128, 4, 32, 2), OpShape(16, 512, 8, 64, 3), OpShape(1, 4096, 4, 128, 2))
QUICK_SHAPES = (OpShape(4, 64, 2, 16, 2),)
PRODUCT = ("roofline", "product")  # the key of the matrix product among what is timed
LOOPS = ("reference", *(name for name, peer in PEERS.items() if peer.loop))
LOOP_BYTES = 4 * GIB  # states that a loop may keep for its backward
LOOP_STEPS = 1 << 14  # Householder steps that a loop may take: beyond them it is launch overhead that is timed
ZERO_BYTES = 16 * GIB  # zeros that the backward of a loop which indexes its inputs may write


def row_names() -> list[str]:
    """What `backends` may name: every backend of the operator, and every peer."""
    return [*BACKENDS, *PEERS]


def bench_ops(
    shapes: Sequence[OpShape] | None = None,
    *,
    backends: Sequence[str] | None = None,
    device: str = "auto",
    dtype: torch.dtype | str = torch.float32,
    repeats: int | None = None,
    backward: bool = True,
    quick: bool = False,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> OpsBenchmark:
    """Check, then time, every backend and every peer on every shape.

    Args:
        shapes: None is DEFAULT_SHAPES, or QUICK_SHAPES when `quick`.
        backends: rows, of `row_names()`; None is all that can serve.
        device: "auto", "cpu" or "cuda".
        dtype: of the inputs: float64, float32, bfloat16 or float16, or its name.
        repeats: timed runs of each row, forward and forward+backward each; None is 7, or 3 when `quick`. A row that
            has taken 20 s stops after three.
        backward: also check and time gradients.
        quick: a few seconds in all.
        seed: of the inputs: unit keys, β uniform in (0,2), g (where gated) the logarithm of gates near 1.
        progress: called with a line before each stage.

    Raises:
        UsageError: an unknown backend, device or dtype, one that cannot serve and was named, fewer than one repeat.
    """
    say = progress or (lambda line: None)
    settings = Settings.of(device=device, dtype=dtype, repeats=repeats, backward=backward, seed=seed, quick=quick)
    if shapes is None:
        shapes = QUICK_SHAPES if quick else DEFAULT_SHAPES
    if not shapes:
        raise UsageError("There is no shape to benchmark.")
    candidates: dict[str, Candidate] = {**BACKENDS, **PEERS}
    names, unavailable = serving(backends, candidates, settings)

    say("roofline")
    product = MatrixProduct(settings.device, settings.compute_dtype)
    results = [_bench_shape(shape, names, settings, product, say) for shape in shapes]
    return OpsBenchmark(
        **settings.circumstances(),
        error_limit=error_limit(settings.dtype),
        backward=backward,
        shapes=results,
        unavailable=unavailable,
        versions={name: version for name in names if name in PEERS and (version := PEERS[name].version)},
    )


def _bench_shape(
    shape: OpShape, names: list[str], settings: Settings, product: MatrixProduct, say: Callable[[str], None]
) -> ShapeResult:
    problem = Problem(shape, settings)
    rows, left_out = [], []
    for name in names:
        if reason := _too_large(name, shape, settings.backward, settings.compute_dtype.itemsize):
            left_out.append(NotRun(name, reason))
            continue
        say(f"{shape.label}: checking {name}")
        row = problem.check(name)
        if row.status == "timed":
            say(f"{shape.label}: measuring memory of {name}")
            try:  # the first run at full size is also the warm-up
                row.peak_extra_bytes = peak_extra_bytes(problem.work(name), settings.device)
                problem.forward(name)()
            except Exception as e:
                row.status, row.reason = "failed", first_line(e)
        rows.append(row)
    timed = [row for row in rows if row.status == "timed"]
    say(f"{shape.label}: timing {len(timed)} rows, {settings.repeats} runs each")
    runs: dict[tuple[str, str], Callable[[], object]] = {PRODUCT: product}
    for row in timed:
        runs[row.backend, "forward"] = problem.forward(row.backend)
        if settings.backward:
            runs[row.backend, "forward_backward"] = problem.work(row.backend)
    times = interleaved(runs, repeats=settings.repeats, device=settings.device)
    result = ShapeResult(
        shape,
        shape.label,
        shape.forward_flops,
        problem.checked_length,
        product.roofline(times.pop(PRODUCT)),
        rows,
        left_out,
    )
    for (name, phase), timing in times.items():
        setattr(next(row for row in timed if row.backend == name), phase, timing)
    for row in timed:
        _rate(row, result)
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
    if name in PEERS and backward and shape.steps * one > ZERO_BYTES:
        zeros, limit = shape.steps * one / GIB, ZERO_BYTES // GIB
        return f"its backward, quadratic in T, would write {zeros:.0f} GiB of zeros, more than {limit}"
    return None


def _rate(row: Row, result: ShapeResult) -> None:
    """Fill in what follows from the times."""
    shape = result.shape
    if row.forward:
        row.forward_gflops = shape.forward_flops / row.forward.median_ms / 1e6
    if row.forward_backward:
        row.gflops = shape.training_flops / row.forward_backward.median_ms / 1e6
    rate = row.gflops or row.forward_gflops
    if rate:
        row.roofline_share = rate / result.roofline.gflops
        row.best_roofline_share = rate / result.roofline.best_gflops
    if mine := main_timing(row):
        others = {r.backend: main_timing(r) for r in result.rows if r is not row}
        row.speedup = {name: theirs.median_ms / mine.median_ms for name, theirs in others.items() if theirs}
