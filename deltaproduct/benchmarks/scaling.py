"""How one backend's cost grows with the sequence length."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch

from deltaproduct.benchmarks.correctness import error_limit
from deltaproduct.benchmarks.ops import LOOPS
from deltaproduct.benchmarks.report import ScalingBenchmark, ScalingPoint
from deltaproduct.benchmarks.settings import BenchmarkSettings
from deltaproduct.benchmarks.shapes import SCALING_SHAPE, OpShape
from deltaproduct.benchmarks.timing import interleaved, peak_extra_bytes
from deltaproduct.benchmarks.workload import Workload
from deltaproduct.errors import UsageError, first_line
from deltaproduct.ops import resolve_backend

SCALING_LENGTHS = (4096, 8192, 16384, 32768, 65536)
QUICK_SCALING_LENGTHS = (256, 512, 1024)


def bench_scaling(
    lengths: Sequence[int] | None = None,
    *,
    backend: str = "auto",
    shape: OpShape = SCALING_SHAPE,
    device: str = "auto",
    dtype: torch.dtype | str = torch.float32,
    repeats: int | None = None,
    backward: bool = True,
    quick: bool = False,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> ScalingBenchmark:
    """Time per token of one backend at growing T, which is constant where cost is linear in T.

    Args:
        lengths: T, two or more; None is 4096 … 65536, or shorter ones when `quick`.
        backend: "auto" or a name; the loops are left out, since at such T they time Python.
        shape: everything but T.
        device, dtype, repeats, backward, quick, seed, progress: as for `bench_ops`.

    Raises:
        UsageError: as `bench_ops`, a loop was named, or fewer than two different lengths.
    """
    say = progress or (lambda line: None)
    settings = BenchmarkSettings.of(
        device=device, dtype=dtype, repeats=repeats, backward=backward, seed=seed, quick=quick
    )
    if lengths is None:
        lengths = QUICK_SCALING_LENGTHS if quick else SCALING_LENGTHS
    shapes = [dataclasses.replace(shape, length=t) for t in sorted(set(lengths))]
    if len(shapes) < 2:
        raise UsageError("A scaling benchmark needs at least two different lengths.")
    if backend in LOOPS:
        raise UsageError(f"{backend!r} is a plain loop, which the scaling benchmark leaves out; choose another.")
    name, why = resolve_backend(backend, device=settings.device, dtype=settings.compute_dtype)

    shortest = Workload(shapes[0], settings)
    say(f"{shapes[0].label}: checking {name}")
    row = shortest.check(name)
    points: list[ScalingPoint] = []
    if row.status == "timed":
        workloads = {s.length: Workload(s, settings) for s in shapes}
        memory: dict[int, int | None] = {}
        for t, workload in workloads.items():
            say(f"T={t}: measuring memory")
            try:  # the first run at this length is also the warm-up
                memory[t] = peak_extra_bytes(workload.work(name), settings.device)
            except Exception as e:
                row.reason = f"T={t} failed: {first_line(e, with_kind=True)}"
                break
        say(f"timing {len(memory)} lengths, {settings.repeats} runs each")
        runs = {t: workloads[t].work(name) for t in memory}
        times = interleaved(runs, repeats=settings.repeats, device=settings.device)
        per_token = {t: 1e3 * timing.median_ms / workloads[t].shape.tokens for t, timing in times.items()}
        first = per_token.get(shapes[0].length, math.nan)  # there are no points without it
        points = [ScalingPoint(t, times[t], us, us / first, memory[t]) for t, us in per_token.items()]
    return ScalingBenchmark(
        **settings.circumstances(),
        error_limit=error_limit(settings.dtype, settings.device),
        backward=backward,
        backend=name,
        why_backend=why,
        shape=shapes[0],
        label=shapes[0].label,
        error=row.error,
        checked_length=shortest.checked_length,
        reason=row.reason,
        points=points,
    )
