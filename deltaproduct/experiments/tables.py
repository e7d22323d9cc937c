"""Tables for a terminal, from the results of runs."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from deltaproduct.plots.figures import at_longest


def accuracy_table(runs: Sequence[dict[str, Any]]) -> Table:
    """Token accuracy by length: for each label, and task, the median over its runs, and the smallest and largest
    beside it."""
    kinds = list(dict.fromkeys((run["task"], run["label"]) for run in runs))
    tasks = list(dict.fromkeys(task for task, _ in kinds))
    lengths = sorted({int(length) for run in runs for length in run["accuracy"]})
    counts = {kind: sum((run["task"], run["label"]) == kind for run in runs) for kind in kinds}
    alike = len(set(counts.values())) == 1
    title = "Token accuracy by length"
    if len(runs) > len(kinds):
        title += f": median over {f'{counts[kinds[0]]} ' if alike else ''}seeds, and the range"
    table = _table(title)
    table.add_column("model", no_wrap=True)
    for length in lengths:
        table.add_column(f"{length:,}", justify="right", no_wrap=True)
    if not alike:
        table.add_column("runs", justify="right")
    table.add_column("s", justify="right")
    for task in tasks:
        if len(tasks) > 1:
            table.add_row(f"on {task}", style="bold")
        for label in (label for of, label in kinds if of == task):
            mine = [run for run in runs if run["label"] == label and run["task"] == task]
            cells = []
            for length in lengths:
                values = [run["accuracy"][str(length)] for run in mine if str(length) in run["accuracy"]]
                spread = f"\n{_short(min(values))}–{_short(max(values))}" if len(values) > 1 else ""
                cells.append(_short(statistics.median(values)) + spread if values else "")
            count = [] if alike else [str(len(mine))]
            table.add_row(escape(label), *cells, *count, f"{statistics.median(r['wall_seconds'] for r in mine):.0f}")
    return table


def loss_table(runs: Sequence[dict[str, Any]], *, title: str) -> Table:
    """Loss by position: for each label and corpus the median over its runs, and below it the smallest and largest."""
    kinds = list(dict.fromkeys((run["task"], run["label"]) for run in runs))
    ends = list(runs[0]["loss"])
    several = len({run["seed"] for run in runs}) > 1
    table = _table(title + (": median, smallest and largest of each model's runs" if several else ""))
    table.add_column("model", no_wrap=True)
    for end in ends:
        table.add_column(f"{int(end):,}", justify="right", no_wrap=True)
    table.add_column("s", justify="right")
    for task in dict.fromkeys(task for task, _ in kinds):
        table.add_row(task, style="bold")
        for label in (label for of, label in kinds if of == task):
            mine = [run for run in runs if run["label"] == label and run["task"] == task]
            cells = []
            for end in ends:
                values = [run["loss"][end] for run in mine]
                spread = f"\n{min(values):.3f}\n{max(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{statistics.median(values):.3f}{spread}")
            table.add_row(escape(label), *cells, f"{statistics.median(r['wall_seconds'] for r in mine):.0f}")
    return table


def scaled_table(runs: Sequence[dict[str, Any]], papers: Mapping[tuple[str, str], float]) -> Table:
    """Scaled accuracy over a range of lengths: for each label and task the best run, all runs, and the papers' figure.

    papers: (label, task) → what the papers report.
    """
    kinds = list(dict.fromkeys((run["task"], run["label"]) for run in runs))
    lo, hi = runs[0]["asked"]["length_range"]
    table = _table(f"Scaled accuracy at lengths {lo} to {hi}")
    for column in ("model", "task"):
        table.add_column(column, no_wrap=True)
    for column in ("best", "each seed", "papers", "s"):
        table.add_column(column, justify="right", no_wrap=True)
    for task, label in kinds:
        mine = [run for run in runs if run["label"] == label and run["task"] == task]
        values = [run["scaled_accuracy"] for run in mine]
        reported = f"{papers[label, task]:.3f}" if (label, task) in papers else ""
        seconds = statistics.median(run["wall_seconds"] for run in mine)
        each = "  ".join(map(_short, values))
        table.add_row(escape(label), task, _short(max(values)), each, reported, f"{seconds:.0f}")
    return table


def state_size_table(runs: Sequence[dict[str, Any]]) -> Table:
    """Accuracy at the longest length against the floats of state: for each label and task, the median over its runs."""
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    kinds = sorted({(run["label"], run["state_size"]) for run in runs})
    table = _table("Accuracy at the longest length: median over seeds, and the range")
    table.add_column("model", no_wrap=True)
    table.add_column("state", justify="right")
    for task in tasks:
        table.add_column(task, justify="right", no_wrap=True)
    for label, size in kinds:
        cells = []
        for task in tasks:
            mine = [r for r in runs if (r["label"], r["state_size"], r["task"]) == (label, size, task)]
            values = list(map(at_longest, mine))
            spread = f"\n{_short(min(values))}–{_short(max(values))}" if len(values) > 1 else ""
            cells.append(_short(statistics.median(values)) + spread if values else "")
        table.add_row(escape(label), f"{size:,}", *cells)
    return table


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False)
    table.padding = 0  # so that five lengths fit in 80 columns
    return table


def _short(share: float) -> str:
    """A share to three places, rounded down, so that only what is perfect reads 1."""
    if share == 1:
        return "1"
    text = f"{math.floor(abs(share) * 1000) / 1000:.3f}".lstrip("0")
    return f"-{text}" if share < 0 and float(text) else text
