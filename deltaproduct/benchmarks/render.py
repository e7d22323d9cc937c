"""Reports as tables for a terminal."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deltaproduct.benchmarks.report import (
    GenerateBenchmark,
    MixerRow,
    MixersBenchmark,
    OpsBenchmark,
    OpStepBenchmark,
    Report,
    Row,
    ScalingBenchmark,
    ShapeResult,
    TrainBenchmark,
    TrainRow,
    main_timing,
)
from deltaproduct.benchmarks.timing import Timing
from deltaproduct.ops import BACKENDS

PARTS = ("forward", "backward", "optimizer", "operator")  # of a training step


def render(report: Report, console: Console) -> None:
    """Print a report's tables and, beneath them, what is needed to judge them."""
    page = _Page(console)
    match report:
        case OpsBenchmark():
            _ops(report, page)
        case ScalingBenchmark():
            _scaling(report, page)
        case GenerateBenchmark():
            _generate(report, page)
        case OpStepBenchmark():
            _op_step(report, page)
        case TrainBenchmark():
            _train(report, page)
        case MixersBenchmark():
            _mixers(report, page)
    m = report.machine
    where = m["cpu"] if report.device == "cpu" else ", ".join(m["gpus"])
    page.note(f"{where}, cores: {m['cores']}, threads: {m['threads']}, torch {m['torch']}, {report.dtype}.")


class _Page:
    """A console, and how its tables and notes look."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def note(self, text: str) -> None:
        self.console.print(escape(text), highlight=False, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        made = Table(title=escape(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False)
        made.padding = (0, 1, 0, 0)  # eight columns in 80 characters
        for i, column in enumerate(columns):
            made.add_column(column, justify="right" if i else "left", no_wrap=True)
        for row in rows:
            made.add_row(*map(escape, row))
        self.console.print(made)

    def findings(self, rows: Sequence[Row | TrainRow]) -> None:
        """What kept a row from being timed, and how our own backends compare with all others."""
        for row in rows:
            self.untimed(row.backend, row)
        for row in rows:
            if row.speedup and row.backend in BACKENDS and row.backend != "reference":
                self.note(f"{row.backend}, speed-up over: {_ratios(row.speedup)}.")

    def untimed(self, name: str, row: Row | TrainRow | MixerRow) -> None:
        """What kept the row from being timed, if anything did."""
        if row.status != "timed":
            self.note(f"{name} is {row.status} and was not timed: {row.reason}.")


def _ops(report: OpsBenchmark, page: _Page) -> None:
    both = "fwd+bwd" if report.backward else "forward"
    for result in report.shapes:
        _shape(result, report, page)
        page.note("")
    for other in report.unavailable:
        page.note(f"{other.backend} cannot serve: {other.reason}.")
    page.note(f"ms: median of {report.repeats}, and below it the range. GFLOP/s to MiB: of {both}.")
    page.note("roofline: share of it, at medians of both. × ref.: how many times as fast as the reference.")
    if any(result.copy_gb_per_second for result in report.shapes):
        page.note("bandwidth: the fewest bytes that must be moved, over the time, as a share of a copy's rate.")
    page.note("Flops are the recurrence's own, B·T·H·2K²·(2N+1) forward and 4 × that forward and backward.")
    page.note(f"error: max|x − x64| / max|x64| over the output{' and all gradients' if report.backward else ''}.")
    page.note("MiB: most memory in tensors beyond the inputs, results included; native code's own scratch is not seen.")
    if report.versions:
        versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
        page.note(f"Other implementations: {versions}.")


def _shape(result: ShapeResult, report: OpsBenchmark, page: _Page) -> None:
    rows = []
    copy = result.copy_gb_per_second
    for row in result.rows:
        first = _ms(row.forward) if row.status == "timed" else row.status.upper()
        share = row.bandwidth_share if row.forward_backward else row.forward_bandwidth_share
        rows.append((
            row.backend,
            "–" if row.error is None else f"{row.error:.0e}",
            *([first, _ms(row.forward_backward)] if report.backward else [first]),
            _number(row.gflops if report.backward else row.forward_gflops),
            _percent(row.roofline_share),
            _percent(share) if copy else _number(row.speedup.get("reference")),
            _mib(row.peak_extra_bytes),
        ))  # fmt: skip
    times = ("forward ms", "fwd+bwd ms") if report.backward else ("forward ms",)
    if rows:
        last = "bandwidth" if copy else "× ref."
        page.table(result.label, ("backend", "error", *times, "GFLOP/s", "roofline", last, "MiB"), rows)
    else:
        page.note(f"{result.label}: no row")
    if rows and result.checked_length < result.shape.length:
        page.note(f"Correctness was checked on the first {result.checked_length} tokens.")
    r = result.roofline
    on = f"threads: {r.threads}" if report.device == "cpu" else f"precision {r.precision!r}"
    rate = f"{r.gflops:.0f} GFLOP/s (best run {r.best_gflops:.0f})"
    page.note(f"Roofline: {rate}, a {r.size}×{r.size} {r.dtype} matrix product in turn with the rows, {on}.")
    for row in result.rows:
        if copy and row.forward_backward and row.forward_speedup and row.backend in BACKENDS:
            page.note(f"{row.backend}, speed-up of the forward alone over: {_ratios(row.forward_speedup)}.")
    if copy:
        page.note(f"Copy: {copy:.0f} GB/s read and written, in turn with the rows.")
    page.findings(result.rows)
    for row in result.rows:
        if row.no_backward:
            page.note(
                f"{row.backend} has no backward here, and was checked and timed forwards only: {row.no_backward}."
            )
        if (timing := main_timing(row)) and timing.runs < report.repeats:
            page.note(f"{row.backend} is slow and had {timing.runs} runs.")
    for other in result.left_out:
        page.note(f"{other.backend} is left out: {other.reason}.")


def _scaling(report: ScalingBenchmark, page: _Page) -> None:
    title = f"{report.backend}, {re.sub('T[0-9]+ ', '', report.label)}, {'fwd+bwd' if report.backward else 'forward'}"
    if report.points:
        rows = [
            (str(p.length), _ms(p.time), _number(p.us_per_token), f"{p.ratio:.2f}", _mib(p.peak_extra_bytes))
            for p in report.points
        ]
        page.table(title, ("T", "ms", "µs/token", "ratio", "MiB"), rows)
        page.note(f"ms: median of {report.repeats}, and below it the range.")
        page.note("ratio: µs/token over that of the shortest T; 1 is linear in T.")
    if report.reason:
        page.note(f"{report.backend}: {report.reason}.")
    page.note(f"{report.backend}: {report.why_backend}.")
    if report.error is not None:
        page.note(f"Error against the float64 reference, first {report.checked_length} tokens: {report.error:.1e}.")


def _generate(report: GenerateBenchmark, page: _Page) -> None:
    t = report.times
    sizes = f"L{report.model['num_hidden_layers']} {_sizes(report.model)}"
    if t is None:
        page.note(f"{sizes}: not timed, {report.reason}.")
    else:
        moved, states = report.moved_bytes, 2 * report.state_bytes
        page.table(
            f"One token, B{report.batch_size} {sizes}",
            ("", "ms", "MB", "GB/s"),
            [
                *(
                    (f"token, by the {way}", _ms(timing), _number(moved / 1e6), _rate(moved, timing))
                    for way, timing in t.token_by.items()
                ),
                ("recurrent steps alone", _ms(t.recurrent), _number(states / 1e6), _rate(states, t.recurrent)),
                ("floor: reading weights", _ms(t.weights), _number((moved - states) / 1e6),
                 _rate(moved - states, t.weights)),
                ("floor: copying states", _ms(t.states), _number(states / 1e6), _rate(states, t.states)),
                ("floor", _number(t.floor_ms), _number(moved / 1e6), _number(t.floor_gb_per_s)),
            ],
        )  # fmt: skip
        millions = _number(report.num_parameters / 1e6)
        page.note(f"{_number(t.tokens_per_second)} tokens/s; {millions} million parameters.")
        page.note(f"The faster way takes {_number(t.ratio)} × the floor.")
        page.note(f"ms: median of {report.repeats}, and below it the range. MB and GB: 10⁶ and 10⁹ bytes.")
        page.note("The floor is memory alone, in this run: as many bytes as weights read once, and as states copied.")
        ways = ", ".join(f"{way} {_number(timing.median_ms)}" for way, timing in t.weights_by.items())
        page.note(f"Ways to read the weights, ms; the fastest counts: {ways}.")
    if report.error is not None:
        page.note(
            f"Logits of {report.checked_length} tokens, one by one against all at once: {report.error:.1e} apart, "
            f"at most {report.error_limit:.1e}."
        )


def _op_step(report: OpStepBenchmark, page: _Page) -> None:
    shape = report.shape
    title = f"One token, {re.sub('^B[0-9]+ T[0-9]+ ', '', shape.label)}, {report.backend}, µs"
    launches = any(row.launch for row in report.rows)
    rows = [
        (
            f"B{row.batch_size}",
            "–" if row.error is None else f"{row.error:.0e}",
            _us(row.step) if row.status == "timed" else row.status.upper(),
            _us(row.copy),
            _number(row.ratio),
            *((_us(row.launch), _number(row.launch_ratio)) if launches else ()),
        )
        for row in report.rows
    ]
    last = ("empty kernel", "× empty") if launches else ()
    page.table(title, ("", "error", "step", "copy of states", "× copy", *last), rows)
    for row in report.rows:
        if row.status != "timed":
            page.note(f"B{row.batch_size} is {row.status} and was not timed: {row.reason}.")
    page.note(f"A layer's step, its state overwritten; {report.layers} layers in turn, each with its own state.")
    page.note(f"µs: median of {report.repeats}, and below it the range{', in CUDA graphs' if launches else ''}.")
    page.note("copy: the state read once and written once, into another.")
    page.note("error: max|x − x64| / max|x64| over output and state.")


def _train(report: TrainBenchmark, page: _Page) -> None:
    rows = []
    for row in report.rows:
        error = "–" if row.error is None else f"{row.error:.0e}"
        first = _ms(row.step) if row.status == "timed" else row.status.upper()
        rows.append((row.backend, error, first, *(_ms(getattr(row, p)) for p in PARTS), _percent(row.operator_share)))
    task = report.config["training"]["task"]
    title = f"A training step of {task}, {report.operator_shape}, ms"
    page.table(title, ("backend", "error", "step", "fwd", "bwd", "update", "operator", "share"), rows)
    page.findings(report.rows)
    for other in report.unavailable:
        page.note(f"{other.backend} cannot serve: {other.reason}.")
    page.note(f"Median of {report.repeats}, and below it the range.")
    page.note(f"Drawing the batch, part of every step: {_number(report.sampling.median_ms)} ms.")
    page.note("step: the training loop's own, whole. The parts were measured by themselves and need not add up to it.")
    page.note("fwd: with the loss. update: clipping and AdamW. operator: its forward and backward alone, on random")
    page.note("inputs of one layer's shape; share: of the step, all layers.")
    page.note("error: max|x − x64| / max|x64| over the loss and all gradients.")


def _sizes(model: Mapping[str, Any]) -> str:
    """D, H, K and N of a model whose layers are alike, as `ModelConfig.to_dict` has them; those that its mixer has."""
    letters = {"num_heads": "H", "head_dim": "K", "num_householder": "N"}
    own = [f"{letter}{model['mixer'][name]}" for name, letter in letters.items() if name in model["mixer"]]
    return " ".join([f"D{model['hidden_size']}", *own])


def _mixers(report: MixersBenchmark, page: _Page) -> None:
    sizes = _sizes(report.config["model"])
    title = f"A training step of {report.config['training']['task']}, B{report.batch_size} T{report.tokens} {sizes}"
    rows = [
        (
            row.mixer,
            "–" if row.error is None else f"{row.error:.0e}",
            _ms(row.step) if row.status == "timed" else row.status.upper(),
            _number(row.ratio),
            _count(row.num_parameters),
            _count(row.state_size),
            _mib(row.peak_extra_bytes),
        )
        for row in report.rows
    ]
    page.table(title, ("mixer", "error", "step ms", f"× {report.yardstick}", "parameters", "state", "MiB"), rows)
    for row in report.rows:
        page.untimed(row.mixer, row)
    for row in report.rows:
        if row.why_slow:
            page.note(f"{row.mixer} takes {_number(row.ratio)} × {report.yardstick}'s time: {row.why_slow}.")
    for row in report.rows:
        if row.step and row.step.runs < report.repeats:
            page.note(f"{row.mixer} is slow and had {row.step.runs} runs.")
    page.note(f"step: the training loop's own, whole; median of {report.repeats}, and below it the range.")
    page.note(f"× {report.yardstick}: ratio of medians. N: of deltaproduct alone. state: floats a sequence carries.")
    page.note("MiB: most memory in tensors beyond the weights, in a first step; native code's own scratch is not seen.")
    page.note("error: max|x − x64| / max|x64| over the loss and all gradients, x64 the same model's in float64;")
    page.note(f"sequences checked: {report.checked_batch}.")


def _ms(t: Timing | None, factor: float = 1) -> str:
    """Milliseconds, or what `factor` makes of them: the median, and below it the range."""
    if t is None:
        return "–"
    return f"{_number(factor * t.median_ms)}\n{_number(factor * t.min_ms)}–{_number(factor * t.max_ms)}"


def _us(t: Timing | None) -> str:
    return _ms(t, 1e3)


def _number(x: float | None) -> str:
    """Three figures or so."""
    if x is None:
        return "–"
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}" if x >= 0.1 else f"{x:.2g}"


def _ratios(speedup: dict[str, float]) -> str:
    return ", ".join(f"{other} {_number(ratio)}" for other, ratio in speedup.items())


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}%"


def _rate(size: int, t: Timing) -> str:
    """GB/s."""
    return _number(size / t.median_ms / 1e6)


def _count(n: int | None) -> str:
    return "–" if n is None else f"{n:,}"


def _mib(n: int | None) -> str:
    return "–" if n is None else _number(n / 2**20)
