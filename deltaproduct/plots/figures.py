"""Figures, each a function from the results of runs (`experiments.job.Job.run`) to a file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deltaproduct.plots.style import COLORS, MARKERS, RC, cycle, drawing, legend, subscript, with_thousands

PANEL = (4.6, 3.2)  # inches, of one of several
COLUMNS = 3  # of panels that need not lie in one row
AXES = {"accuracy": "token accuracy", "sequence_accuracy": "sequences right so far"}


def accuracy_by_length(
    runs: Sequence[dict[str, Any]], path: Path, *, title: str, metrics: Sequence[str] = ("accuracy",)
) -> None:
    """Accuracy against sequence length, one color per label: the median over seeds, and each seed thinly.

    A column for each task and a row for each of `metrics`; those of one task lie side by side, and many tasks with one
    metric in several rows.

    metrics: "accuracy" of tokens, or "sequence_accuracy": sequences of which every token so far is right.
    """
    labels, tasks = _in_order(runs, "label"), _in_order(runs, "task")
    alone = len(tasks) == 1
    panels = [[(task, metric) for task in tasks] for metric in metrics]
    if alone or len(metrics) == 1:
        flat = [panel for row in panels for panel in row]
        panels = [flat[i : i + COLUMNS] for i in range(0, len(flat), COLUMNS)]
    rows, columns = len(panels), len(panels[0])
    several = rows * columns > 1
    size = (PANEL[0] * columns, PANEL[1] * rows) if several else RC["figure.figsize"]
    with drawing(path, rows, columns, figsize=size, sharey=True) as (figure, grid):
        for row in range(rows):
            for column in range(len(panels[row]), columns):
                grid[row][column].set_axis_off()
            for column, (task, metric) in enumerate(panels[row]):
                axes = grid[row][column]
                _curves(axes, [run for run in runs if run["task"] == task], labels, metric, named=alone or not column)
                if not alone and (not row or len(metrics) == 1):
                    axes.set_title(task, pad=16, fontsize=10.5)
                if alone or not column:
                    axes.set_ylabel(AXES[metric])
                if row == rows - 1 or column >= len(panels[row + 1]):
                    axes.set_xlabel("sequence length (tokens)")
        if several:
            figure.suptitle(f"{title} {tasks[0]}" if alone else title, x=0.01, ha="left")
        else:
            grid[0][0].set_title(title, loc="left", pad=14)
        seeds = len({run["seed"] for run in runs})
        where = f"median of {seeds} seeds" if seeds > 1 else "one seed"
        legend(grid, title=where, alignment="left")


def _curves(axes: Any, runs: Sequence[dict[str, Any]], labels: Sequence[str], metric: str, *, named: bool) -> None:
    """One panel of `accuracy_by_length`; the lines across it are named in one of several."""
    for label, color, marker in zip(labels, cycle(COLORS, labels), cycle(MARKERS, labels), strict=True):
        mine = [run for run in runs if run["label"] == label]
        if not mine:
            continue
        for run in mine:
            axes.plot(run["curve"]["length"], run["curve"][metric], color=color, alpha=0.3, linewidth=0.8)
        curves = np.array([run["curve"][metric] for run in mine])
        axes.plot(mine[0]["curve"]["length"], np.median(curves, axis=0), color=color, linewidth=2)
        lengths = [int(n) for n in mine[0][metric]]
        medians = np.median([[run[metric][str(n)] for n in lengths] for run in mine], axis=0)
        axes.plot(lengths, medians, marker, color=color, label=subscript(label), markersize=6)
    for length in sorted({run["training_length"] for run in runs}):
        axes.axvline(length, color="black", linestyle="--", linewidth=1)
        offset = {"xytext": (-4, 4), "textcoords": "offset points"}
        if named:
            axes.annotate(f"trained at {length}", (length, 1.0), **offset, fontsize=9, ha="right")
    if metric == "accuracy":
        chance = runs[0]["chance"]
        axes.axhline(chance, color="grey", linestyle=":", linewidth=1)
        if named:
            place = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
            axes.annotate("chance", (0.01, chance), (2, 3), **place, fontsize=9, color="grey")
    axes.set_xscale("log", base=2)
    ends = [run["curve"]["length"][end] for run in runs for end in (0, -1)]
    trained = max(run["training_length"] for run in runs)
    axes.set_xticks([x for i in range(-10, 11) if 0.9 * min(ends) <= (x := trained * 4.0**i) <= 1.1 * max(ends)])
    axes.xaxis.set_major_formatter(with_thousands)
    axes.set_ylim(0, 1.06)


def accuracy_by_model(
    runs: Sequence[dict[str, Any]], path: Path, *, title: str, papers: Mapping[tuple[str, str], float]
) -> None:
    """Scaled accuracy of each model, a column for each task: the best seed large, the others small, the papers' figure
    as a ring. papers: (label, task) → what the papers report."""
    labels, tasks = _in_order(runs, "label"), _in_order(runs, "task")
    several = len(_in_order(runs, "seed")) > 1
    size = (2.2 + 3.6 * len(tasks), 1.2 + 0.3 * len(labels))
    with drawing(path, 1, len(tasks), figsize=size, sharey=True) as (figure, grid):
        for axes, task in zip(grid[0], tasks, strict=True):
            for place, label in enumerate(labels):
                values = [r["scaled_accuracy"] for r in runs if r["label"] == label and r["task"] == task]
                if values:
                    named = {} if place or not several else {"label": "each seed"}
                    axes.plot(values, [place] * len(values), "o", color=COLORS[0], markersize=3.5, alpha=0.5, **named)
                    named = {} if place else {"label": "the best" if several else "the only run"}
                    axes.plot(max(values), place, "o", color=COLORS[0], markersize=8, **named)
                if (label, task) in papers:
                    axes.plot(papers[label, task], place, "o", color=COLORS[1], markersize=11, fillstyle="none")
            if task not in title.lower():
                axes.set_title(task, loc="left", fontsize=10.5)
            axes.set_xlabel("scaled accuracy")
            axes.set_xlim(-0.05, 1.05)
            axes.set_yticks(range(len(labels)), [subscript(label) for label in labels])
        grid[0][0].set_ylim(len(labels) - 0.5, -0.5)
        if any((label, task) in papers for label in labels for task in tasks):
            grid[0][-1].plot([], [], "o", color=COLORS[1], markersize=11, fillstyle="none", label="papers")
        legend(grid)
        figure.suptitle(title, x=0.01, ha="left")


def accuracy_by_state_size(runs: Sequence[dict[str, Any]], path: Path, *, title: str) -> None:
    """Accuracy at the longest length against the floats of state per sequence, a column for each task."""
    labels, tasks = _in_order(runs, "label"), _in_order(runs, "task")
    size = (PANEL[0] * len(tasks), PANEL[1])
    with drawing(path, 1, len(tasks), figsize=size, sharey=True) as (figure, grid):
        for axes, task in zip(grid[0], tasks, strict=True):
            for label, color, marker in zip(labels, cycle(COLORS, labels), cycle(MARKERS, labels), strict=True):
                mine = [run for run in runs if run["label"] == label and run["task"] == task]
                sizes = sorted({run["state_size"] for run in mine})
                at = [[at_longest(run) for run in mine if run["state_size"] == size] for size in sizes]
                axes.plot(sizes, list(map(np.median, at)), marker + "-", color=color, label=subscript(label))
                for size, values in zip(sizes, at, strict=True):
                    axes.plot([size] * len(values), values, marker, color=color, markersize=3, alpha=0.5)
            axes.set_title(task, loc="left", fontsize=10.5)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(with_thousands)
            axes.set_xlabel("state (floats per sequence)")
            axes.set_ylim(0, 1.06)
        grid[0][0].set_ylabel("accuracy")
        legend(grid)
        figure.suptitle(title, x=0.01, ha="left")


def at_longest(run: Mapping[str, Any]) -> float:
    """The run's accuracy at the longest of its lengths."""
    return float(run["accuracy"][max(run["accuracy"], key=int)])


def _in_order(runs: Sequence[dict[str, Any]], key: str) -> list[Any]:
    """The different values of a field, in the order of their first runs."""
    return list(dict.fromkeys(run[key] for run in runs))
