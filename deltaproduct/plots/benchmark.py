"""Figures of benchmarks."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deltaproduct.plots.style import COLORS, MARKERS, RC, drawing, legend

PANEL = (3.4, 2.7)  # inches
PHASES = {"forward": "forward", "forward_backward": "forward and backward"}


def speedup_figure(shapes: Sequence[Mapping[str, Any]], ours: str, other: str, path: Path) -> None:
    """How many times as fast as another implementation a backend is, against the Householder steps per token.

    There is a panel for each size.

    Args:
        shapes: the "shapes" of a report of `bench ops`, as plain data.
        ours, other: names of rows. Where one of them was not timed there is no point.
    """
    panels: dict[str, dict[tuple[str, bool], dict[int, float]]] = {}
    for result in shapes:
        rows = {row["backend"]: row for row in result["rows"]}
        shape = result["shape"]
        size = re.sub(r" N\d+.*", "", result["label"])
        for phase in PHASES:
            mine, theirs = (rows.get(name, {}).get(phase) for name in (ours, other))
            if mine and theirs:
                curve = panels.setdefault(size, {}).setdefault((phase, shape["gate"]), {})
                curve[shape["num_householder"]] = theirs["median_ms"] / mine["median_ms"]
    columns = min(2, max(1, len(panels)))
    rows_of_panels = -(-max(1, len(panels)) // columns)
    inches = (PANEL[0] * columns, PANEL[1] * rows_of_panels)
    with drawing(path, rows_of_panels, columns, figsize=inches, sharey=True) as (figure, grid):
        for axes, (size, curves) in zip(grid.flat, panels.items(), strict=False):
            for (phase, gated), curve in sorted(curves.items()):
                i = list(PHASES).index(phase)
                axes.plot(
                    list(curve), list(curve.values()), color=COLORS[i], marker=MARKERS[i],
                    markerfacecolor="white" if gated else None,
                    linestyle="--" if gated else "-", label=PHASES[phase] + (", gated" if gated else ""),
                )  # fmt: skip
            axes.axhline(1, color="black", linewidth=1)
            axes.set_title(size, loc="left", fontsize=9.5)
            axes.set_xticks(sorted({n for curve in curves.values() for n in curve}))
            axes.set_ylim(bottom=0)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        figure.supxlabel("Householder steps per token", fontsize=RC["font.size"])
        for row in grid:
            row[0].set_ylabel(f"× as fast as {other}")
        legend(grid)
