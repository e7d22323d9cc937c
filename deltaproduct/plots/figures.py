"""Figures, each a function from a summary's data to a file."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deltaproduct.plots.style import COLOURS, MARKERS, RC, pyplot, save


def accuracy_by_length(runs: Sequence[dict[str, Any]], path: Path, *, title: str, chance: float) -> None:
    """Token accuracy against sequence length, one colour per label: the median over seeds, and each seed thinly.

    runs: results of `experiments.runner.run_job`, with "label", "accuracy" by length, "curve" and "training_length".
    """
    plt = pyplot()
    labels = list(dict.fromkeys(run["label"] for run in runs))
    with plt.rc_context(RC):
        figure, axes = plt.subplots()
        for label, colour, marker in zip(labels, _cycle(COLOURS, labels), _cycle(MARKERS, labels), strict=True):
            mine = [run for run in runs if run["label"] == label]
            for run in mine:
                axes.plot(run["curve"]["length"], run["curve"]["accuracy"], color=colour, alpha=0.3, linewidth=0.8)
            curves = np.array([run["curve"]["accuracy"] for run in mine])
            axes.plot(mine[0]["curve"]["length"], np.median(curves, axis=0), color=colour, linewidth=2)
            lengths = [int(n) for n in mine[0]["accuracy"]]
            medians = np.median([[run["accuracy"][str(n)] for n in lengths] for run in mine], axis=0)
            axes.plot(lengths, medians, marker, color=colour, label=_subscript(label), markersize=6)
        for length in sorted({run["training_length"] for run in runs}):
            axes.axvline(length, color="black", linestyle="--", linewidth=1)
            offset = {"xytext": (-4, 4), "textcoords": "offset points"}
            axes.annotate(f"trained at {length}", (length, 1.0), **offset, fontsize=9, ha="right")
        axes.axhline(chance, color="grey", linestyle=":", linewidth=1)
        axes.annotate("chance", (1, chance), xytext=(2, 3), textcoords="offset points", fontsize=9, color="grey")
        axes.set_xscale("log", base=2)
        longest = max(run["curve"]["length"][-1] for run in runs)
        axes.set_xticks([longest / 4**i for i in range(10) if longest / 4**i >= 1])
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axes.set_ylim(0, 1.06)
        axes.set_xlabel("sequence length (tokens)")
        axes.set_ylabel("token accuracy")
        axes.set_title(title, loc="left", pad=14)
        seeds = len({run["seed"] for run in runs})
        where = f"median of {seeds} seeds" if seeds > 1 else "one seed"
        axes.legend(title=where, loc="center left", bbox_to_anchor=(1.0, 0.5), alignment="left")
        save(figure, path)
        plt.close(figure)


def _cycle(values: Sequence[str], like: Sequence[Any]) -> list[str]:
    return [values[i % len(values)] for i in range(len(like))]


def _subscript(label: str) -> str:
    """DeltaProduct_2[-1,1] with its 2 set as a subscript and a true minus sign."""
    return re.sub(r"_(\d+)", r"$_{\1}$", label).replace("-", "−")
