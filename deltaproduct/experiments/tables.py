"""Tables for a terminal, from a summary's data."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table


def accuracy_table(runs: Sequence[dict[str, Any]]) -> Table:
    """Token accuracy by length: for each label the median over its runs, and the smallest and largest beside it."""
    labels = list(dict.fromkeys(run["label"] for run in runs))
    lengths = list(runs[0]["accuracy"])
    title = "Token accuracy by length" + (": median over seeds, and the range" if len(runs) > len(labels) else "")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False)
    table.padding = (0, 1, 0, 0)  # so that four lengths fit in 80 columns
    table.add_column("model", no_wrap=True)
    for length in lengths:
        table.add_column(f"{int(length):,}", justify="right", no_wrap=True)
    table.add_column("runs", justify="right")
    table.add_column("s", justify="right")
    for label in labels:
        mine = [run for run in runs if run["label"] == label]
        cells = []
        for length in lengths:
            values = [run["accuracy"][length] for run in mine]
            spread = f"\n{_short(min(values))}–{_short(max(values))}" if len(mine) > 1 else ""
            cells.append(_short(statistics.median(values)) + spread)
        seconds = statistics.median(run["wall_seconds"] for run in mine)
        table.add_row(escape(label), *cells, str(len(mine)), f"{seconds:.0f}")
    return table


def _short(share: float) -> str:
    """A share to three places, rounded down, so that only what is perfect reads 1."""
    return "1" if share == 1 else f"{math.floor(share * 1000) / 1000:.3f}".lstrip("0")
