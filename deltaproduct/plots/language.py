"""Figures of language models: loss by position, and the effective rank of states."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deltaproduct.plots.style import COLORS, RC, cycle, drawing, legend, pyplot, subscript, with_thousands

PANEL = (4.6, 2.6)  # inches, of a layer's ranks
COLUMNS = 2  # of them
TRAINED_AT: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1}
DOCUMENT_START: dict[str, Any] = {"color": "black", "linewidth": 0.6, "alpha": 0.5}
BINS = 300  # that a layer's tokens are shown in


def loss_by_position_figure(
    curves: Mapping[str, Sequence[Mapping[str, Sequence[float]]]],
    path: Path,
    *,
    trained_at: int | None = None,
    title: str = "Loss by position",
    closer: Sequence[str] = (),
) -> None:
    """Loss against how much of the text has been read, one color per label: the median over runs, and each run thinly.

    Args:
        curves: by label the curves of its runs, each with "position" (tokens read) and "loss" (nats, smoothed), as
            `lm evaluate` writes them; the runs of a label have the same positions.
        trained_at: the training context, which gets a line.
        closer: labels that a second panel shows by themselves, where another label's losses would press them together.
    """
    colors = dict(zip(curves, cycle(COLORS, list(curves)), strict=True))
    panels = [list(curves), *([list(closer)] if closer else [])]
    width, height = RC["figure.figsize"]
    size = (width * (0.4 + 0.6 * len(panels)), height)
    with drawing(path, 1, len(panels), figsize=size) as (_, grid):
        for axes, labels in zip(grid[0], panels, strict=True):
            shown = {label: curves[label] for label in labels}
            for label, runs in shown.items():
                positions = runs[0]["position"]
                if len(runs) > 1:
                    for run in runs:
                        axes.plot(positions, run["loss"], color=colors[label], alpha=0.35, linewidth=0.7)
                median = np.median([run["loss"] for run in runs], axis=0)
                axes.plot(positions, median, color=colors[label], linewidth=1.8, label=subscript(label))
            _limit_to_the_settled_part(axes, shown, trained_at)
            if trained_at is not None:
                axes.axvline(trained_at, **TRAINED_AT)
                offset = {"xytext": (0, 4), "textcoords": "offset points"}
                axes.annotate(f"trained at {trained_at:,}", (trained_at, 1.0), xycoords=("data", "axes fraction"),
                              **offset, fontsize=9)  # fmt: skip
            axes.set_xlabel("tokens read")
            axes.xaxis.set_major_formatter(with_thousands)
        grid[0][0].set_ylabel("cross-entropy (nats per token)")
        grid[0][0].set_title(title, loc="left", pad=18)
        if closer:
            grid[0][1].set_title("closer", loc="left", pad=18)
        most = max(len(runs) for runs in curves.values())
        legend(grid, title=f"median of {most} seeds" if most > 1 else None, alignment="left")


def _limit_to_the_settled_part(axes: Any, curves: Mapping[str, Any], trained_at: int | None) -> None:
    """The first tokens of a window cost so much more than all others that they would press these together: what
    happens before an eighth of the training context (or of the curve) may leave the frame."""
    runs = [run for label in curves.values() for run in label]
    last = max(run["position"][-1] for run in runs)
    begin = (trained_at or last) / 8
    settled = np.concatenate([np.asarray(run["loss"])[np.asarray(run["position"]) >= begin] for run in runs])
    settled = settled[np.isfinite(settled)]
    if len(settled):
        margin = 0.06 * (settled.max() - settled.min()) or 0.05
        axes.set_ylim(settled.min() - margin, settled.max() + margin)
    axes.set_xlim(0, last)


def effective_rank_figure(
    ranks: Mapping[int, np.ndarray],
    path: Path,
    *,
    document_starts: Sequence[int] = (),
    trained_at: int | None = None,
    title: str = "Effective rank of each head's state",
) -> None:
    """The effective rank of states against the token, a panel for each layer and a color for each of its heads; the
    starts of documents are vertical lines. Lines are means over T/300 tokens, bands go from the lowest to the highest.

    Args:
        ranks: by layer, [T,N,HV] after each Householder step (`analysis.effective_rank.EffectiveRanks`).
        document_starts: tokens that begin a document.
        trained_at: the training context, which gets a line.
    """
    columns = min(COLUMNS, len(ranks))
    rows = -(-len(ranks) // columns)
    size = (PANEL[0] * columns, PANEL[1] * rows)
    with drawing(path, rows, columns, figsize=size, sharey=True) as (figure, grid):
        for axes in grid.flat[len(ranks) :]:
            axes.set_axis_off()
        for place, (axes, (layer, of_layer)) in enumerate(zip(grid.flat, ranks.items(), strict=False)):
            tokens = len(of_layer)
            for start in document_starts:
                axes.axvline(start, **DOCUMENT_START)
            _bands(axes, of_layer)
            if trained_at is not None and trained_at < tokens:
                axes.axvline(trained_at, **TRAINED_AT, label=f"trained at {trained_at:,}")
            if document_starts:
                axes.plot([], [], **DOCUMENT_START, label="a document starts")
            axes.set_title(f"layer {layer}", loc="left", fontsize=10.5)
            axes.set_xlim(0, tokens)
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_formatter(with_thousands)
            if place % columns == 0:
                axes.set_ylabel("effective rank")
            if place + columns >= len(ranks):
                axes.set_xlabel("token")
        # Of the figure, not of a panel: a long one beside the first row would push the rows apart.
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right upper")
        figure.get_layout_engine().set(wspace=0.06)
        figure.suptitle(title, x=0.01, ha="left")


def _bands(axes: Any, ranks: np.ndarray) -> None:
    """Of each head's ranks [T,N,HV] the mean over every T/300 tokens, in a band from the lowest to the highest there:
    lines through all of them would hide one another."""
    tokens, _, heads = ranks.shape
    bins = np.array_split(np.arange(tokens), min(BINS, tokens))
    at = [0.5 * (1 + b[0] + b[-1]) for b in bins]
    spread = [pyplot().get_cmap("viridis")(x) for x in np.linspace(0, 0.95, heads)]
    for head, color in enumerate(COLORS[:heads] if heads <= len(COLORS) else spread):
        mean, low, high = (np.array([of(ranks[b, :, head]) for b in bins]) for of in (np.mean, np.min, np.max))
        axes.fill_between(at, low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot(at, mean, color=color, linewidth=1.2, label=f"head {head}")
