"""Reports as tables for a terminal."""

import re

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deltaproduct.benchmarks.report import OpsBenchmark, ScalingBenchmark, main_timing
from deltaproduct.benchmarks.timing import Timing


def render(report: OpsBenchmark | ScalingBenchmark, console: Console) -> None:
    """Print a report's tables and, beneath them, what is needed to judge them."""
    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False)
        made.padding = (0, 1, 0, 0)  # eight columns in 80 characters
        for i, column in enumerate(columns):
            made.add_column(column, justify="right" if i else "left", no_wrap=True)
        return made

    def note(text: str) -> None:
        console.print(escape(text), highlight=False, soft_wrap=True)

    both = "fwd+bwd" if report.backward else "forward"
    if isinstance(report, ScalingBenchmark):
        title = f"{report.backend}, {re.sub('T[0-9]+ ', '', report.label)}, {both}"
        shown = table(title, "T", "ms", "µs/token", "ratio", "MiB")
        for p in report.points:
            shown.add_row(
                str(p.length), _ms(p.time), _number(p.us_per_token), f"{p.ratio:.2f}", _mib(p.peak_extra_bytes)
            )
        if report.points:
            console.print(shown)
            note(f"ms: median of {report.repeats}, and below it the range.")
            note("ratio: µs/token over that of the shortest T; 1 is linear in T.")
        if report.reason:
            note(f"{report.backend}: {report.reason}.")
        note(f"{report.backend}: {report.why_backend}.")
        if report.error is not None:
            note(f"Error against the float64 reference, first {report.checked_length} tokens: {report.error:.1e}.")
    else:
        for result in report.shapes:
            times = ["forward ms", "fwd+bwd ms"] if report.backward else ["forward ms"]
            shown = table(result.label, "backend", "error", *times, "GFLOP/s", "roofline", "× ref.", "MiB")
            for row in result.rows:
                first = _ms(row.forward) if row.status == "timed" else row.status.upper()
                shown.add_row(
                    escape(row.backend),
                    "–" if row.error is None else f"{row.error:.0e}",
                    *([first, _ms(row.forward_backward)] if report.backward else [first]),
                    _number(row.gflops if report.backward else row.forward_gflops),
                    "–" if row.roofline_share is None else f"{100 * row.roofline_share:.1f}%",
                    _number(row.speedup),
                    _mib(row.peak_extra_bytes),
                )
            if result.rows:
                console.print(shown)
            else:
                note(f"{result.label}: no row")
            if result.rows and result.checked_length < result.shape.length:
                note(f"Correctness was checked on the first {result.checked_length} tokens.")
            for row in result.rows:
                if row.status != "timed":
                    note(f"{row.backend} is {row.status} and was not timed: {row.reason}.")
                elif (timing := main_timing(row)) and timing.runs < report.repeats:
                    note(f"{row.backend} is slow and had {timing.runs} runs.")
            for other in result.left_out:
                note(f"{other.backend} is left out: {other.reason}.")
            note("")
        for other in report.unavailable:
            note(f"{other.backend} cannot serve: {other.reason}.")
        r = report.roofline
        on = f"threads: {r.threads}" if report.device == "cpu" else f"precision {r.precision!r}"
        note(f"Roofline: {r.gflops:.1f} GFLOP/s, a {r.size}×{r.size} {r.dtype} matrix product in this run, {on}.")
        note(f"ms: median of {report.repeats}, and below it the range. GFLOP/s to MiB: of {both}.")
        note("roofline: share of it. × ref.: how many times as fast as the reference.")
        note("Flops are the recurrence's own, B·T·H·2K²·(2N+1) forward and 4 × that forward and backward.")
        note(f"error: max|x − x64| / max|x64| over the output{' and all gradients' if report.backward else ''}.")
        note("MiB: most memory held beyond the inputs, results included.")
    m = report.machine
    where = m["cpu"] if report.device == "cpu" else ", ".join(m["gpus"])
    note(f"{where}, cores: {m['cores']}, threads: {m['threads']}, torch {m['torch']}, {report.dtype}.")


def _ms(t: Timing | None) -> str:
    return "–" if t is None else f"{_number(t.median_ms)}\n{_number(t.min_ms)}–{_number(t.max_ms)}"


def _number(x: float | None) -> str:
    """Three figures or so."""
    if x is None:
        return "–"
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}" if x >= 0.1 else f"{x:.2g}"


def _mib(n: int | None) -> str:
    return "–" if n is None else _number(n / 2**20)
