"""Tables for a terminal, from a summary's data."""

import statistics
from collections.abc import Sequence
from typing import Any

from rich.table import Table


def accuracy_table(runs: Sequence[dict[str, Any]]) -> Table:
    """Token accuracy by length: for each label the median over its runs, and the smallest and largest beside it."""
    labels = list(dict.fromkeys(run["label"] for run in runs))
    lengths = list(runs[0]["accuracy"])
    several = len(runs) > len(labels)
    table = Table(title="Token accuracy by length" + (", median (min–max) over seeds" if several else ""))
    table.add_column("model", no_wrap=True)
    for length in lengths:
        table.add_column(f"{int(length):,}", justify="right")
    table.add_column("runs", justify="right")
    table.add_column("seconds", justify="right")
    for label in labels:
        mine = [run for run in runs if run["label"] == label]
        cells = []
        for length in lengths:
            values = [run["accuracy"][length] for run in mine]
            spread = f" ({min(values):.3f}–{max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{statistics.median(values):.3f}{spread}")
        seconds = statistics.median(run["wall_seconds"] for run in mine)
        # A label such as DeltaProduct_2[-1,1] would read as markup.
        table.add_row(label.replace("[", r"\["), *cells, str(len(mine)), f"{seconds:.0f}")
    return table
