"""The operator's one-token step by itself, beside what it cannot be faster than: moving its states, or being launched.

A model decodes layer after layer, each with a state of its own, so that what is timed is a step of LAYERS states in
turn: one state alone would stay in the cache. On a GPU all of them are one CUDA graph, as servers decode.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from deltaproduct.benchmarks.correctness import error_limit, judge
from deltaproduct.benchmarks.report import OpStepBenchmark, OpStepRow
from deltaproduct.benchmarks.settings import BenchmarkSettings
from deltaproduct.benchmarks.shapes import OP_STEP_SHAPE, QUICK_OP_STEP_SHAPE, OpShape
from deltaproduct.benchmarks.timing import Timing, interleaved
from deltaproduct.benchmarks.workload import token_inputs
from deltaproduct.errors import UsageError, first_line
from deltaproduct.ops import delta_product_step, resolve_backend
from deltaproduct.ops.reference import token_step
from deltaproduct.renamed import renamed_names

LAYERS = 24
BATCHES, QUICK_BATCHES = (1, 64, 256), (1, 4)
STATE = torch.float32


def bench_op_step(
    shape: OpShape | None = None,
    *,
    batches: Sequence[int] | None = None,
    device: str = "auto",
    dtype: torch.dtype | str | None = None,
    repeats: int | None = None,
    quick: bool = False,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> OpStepBenchmark:
    """Check, then time, `delta_product_step(inplace=True)` on states of float32.

    Args:
        shape: H, K, V, N and whether gated; its B and T do not count. None is OP_STEP_SHAPE, or
            QUICK_OP_STEP_SHAPE when `quick`.
        batches: sequences decoded at once, one row for each; None is BATCHES, or QUICK_BATCHES when `quick`.
        device: "auto", "cpu" or "cuda".
        dtype: of queries, keys and values: float32, bfloat16 or float16, or its name; None is float32 on a CPU and
            bfloat16 on a GPU.
        repeats: timed runs of each row; None is 7, or 3 when `quick`.
        seed: of the inputs.
        progress: called with a line before each stage.

    Raises:
        UsageError: an unknown device or dtype, or fewer than one sequence or repeat.
    """
    say = progress or (lambda line: None)
    settings = BenchmarkSettings.of(device=device, dtype=dtype, repeats=repeats, backward=False, seed=seed, quick=quick)
    if settings.dtype == torch.float64:
        raise UsageError("States are float32 here: choose float32, bfloat16 or float16.")
    shape = shape or (QUICK_OP_STEP_SHAPE if quick else OP_STEP_SHAPE)
    rows = []
    for batch in batches if batches is not None else QUICK_BATCHES if quick else BATCHES:
        if batch < 1:
            raise UsageError(f"A batch must have at least 1 sequence, not {batch}.")
        say(f"B{batch}")
        rows.append(_row(shape, batch, settings))
    name, why = resolve_backend(device=settings.device, size=(shape.num_householder, shape.head_dim))
    return OpStepBenchmark(
        **settings.circumstances(),
        error_limit=error_limit(settings.dtype, settings.device),
        shape=shape,
        layers=LAYERS,
        backend=name,
        why_backend=why,
        rows=rows,
    )


def _row(shape: OpShape, batch: int, settings: BenchmarkSettings) -> OpStepRow:
    row = OpStepRow(batch, STATE.itemsize * batch * shape.num_heads * shape.head_dim * shape.values)
    try:  # a batch may be too large for the memory
        inputs = [_inputs(shape, batch, settings, layer) for layer in range(LAYERS)]
        found = _check(inputs[0], settings)
        row.status, row.reason, row.error = found["status"], found["reason"], found.get("error")
        if row.status == "timed":
            _measure(row, inputs, settings)
    except Exception as e:
        row.status, row.reason = "failed", first_line(e, with_kind=True)
    return row


def _inputs(shape: OpShape, batch: int, settings: BenchmarkSettings, layer: int) -> dict[str, Any]:
    """A token's inputs and a state."""
    x = token_inputs(shape, batch, torch.Generator().manual_seed(settings.seed + layer))
    return {name: y.to(settings.device, settings.dtype if name in ("q", "k", "v") else STATE) for name, y in x.items()}


def _check(x: dict[str, Any], settings: BenchmarkSettings) -> dict[str, Any]:
    """Whether one step gives what the specification gives in float64."""
    wide = {name: y.double() for name, y in x.items()}
    scale = x["k"].shape[-1] ** -0.5
    o, state = token_step(wide["state"], wide["q"], wide["k"], wide["v"], wide["beta"], wide.get("g"), scale)
    got_o, got_state = delta_product_step(**x | {"state": x["state"].clone()}, inplace=True)
    return judge(
        {"o": got_o, "state": got_state}, {"o": o, "state": state}, error_limit(settings.dtype, settings.device)
    )


def _measure(row: OpStepRow, inputs: list[dict[str, Any]], settings: BenchmarkSettings) -> None:
    targets = [torch.ones_like(x["state"]) for x in inputs]

    def steps() -> None:
        for x in inputs:
            delta_product_step(**x, inplace=True)

    def copies() -> None:
        for x, target in zip(inputs, targets, strict=True):
            target.copy_(x["state"])

    runs: dict[str, Callable[[], object]] = {"step": steps, "copy": copies}
    if settings.device.type == "cuda":
        nothing = _empty_kernel()

        def launches() -> None:
            for _ in inputs:
                nothing()

        runs = {name: _recorded(run, settings.device) for name, run in (runs | {"launch": launches}).items()}
    with torch.inference_mode():
        for run in runs.values():
            run()
        times = interleaved(runs, repeats=settings.repeats, device=settings.device)
    each = {name: _each(t) for name, t in times.items()}
    row.step, row.copy, row.launch = each["step"], each["copy"], each.get("launch")
    row.ratio = row.step.median_ms / row.copy.median_ms
    if row.launch is not None:
        row.launch_ratio = row.step.median_ms / row.launch.median_ms


def _each(t: Timing) -> Timing:
    """The time of one of LAYERS."""
    return Timing(t.median_ms / LAYERS, t.min_ms / LAYERS, t.max_ms / LAYERS, t.runs)


def _recorded(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`run` as a CUDA graph."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream), torch.inference_mode():
        run()  # kernels are compiled and chosen here: nothing of that can be recorded
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.inference_mode():
        run()
    return graph.replay


def _empty_kernel() -> Callable[[], object]:
    import triton

    @triton.jit
    def nothing() -> None:
        pass

    return lambda: nothing[(1,)](num_warps=1)


__getattr__ = renamed_names(
    __name__,
    {"DECODE_SHAPE": "OP_STEP_SHAPE", "QUICK_DECODE_SHAPE": "QUICK_OP_STEP_SHAPE", "bench_decode": "bench_op_step"},
)
