"""How every figure looks, in colors that print in grey and that most color-blind readers can tell apart; and how it
is saved."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from deltaproduct.errors import UsageError
from deltaproduct.files import write_bytes
from deltaproduct.renamed import renamed_names

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's palette
MARKERS = ("o", "s", "^", "D", "v", "P")

RC: dict[str, Any] = {
    "figure.figsize": (6.4, 3.8),
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files only; `UsageError` where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as e:
        raise UsageError("Figures need matplotlib; install deltaproduct with its [plot] extra.") from e
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: Path) -> None:
    """Render first and write after, so that a failure leaves the old figure; the suffix says the format."""
    buffer = BytesIO()
    figure.savefig(buffer, format=path.suffix.lstrip(".") or "png", bbox_inches="tight")
    write_bytes(path, buffer.getvalue())


@contextmanager
def drawing(path: Path, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[tuple[Any, Any]]:
    """A figure to draw on, and its axes [rows,columns]; it is saved at the end, and closed in any case.

    options: of matplotlib's `subplots`.
    """
    plt = pyplot()
    with plt.rc_context(RC):
        figure, grid = plt.subplots(rows, columns, squeeze=False, layout="constrained", **options)
        try:
            yield figure, grid
            save(figure, path)
        finally:
            plt.close(figure)


def with_thousands(x: float, _: Any = None) -> str:
    """A tick's number, such as 16,384."""
    return f"{x:,.0f}"


def legend(grid: Any, **options: Any) -> None:
    """One legend for all panels, beside the first row."""
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        handles |= {text: handle for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
    grid[0][-1].legend(handles.values(), handles.keys(), **beside, **options)


def cycle(values: Sequence[str], like: Sequence[Any]) -> list[str]:
    """As many of `values` as `like` has members, beginning again after the last."""
    return [values[i % len(values)] for i in range(len(like))]


def subscript(label: str) -> str:
    """DeltaProduct_2[-1,1] with its 2 set as a subscript and a true minus sign."""
    return re.sub(r"_(\d+)", r"$_{\1}$", label).replace("-1", "−1")


__getattr__ = renamed_names(__name__, {"COLOURS": "COLORS"})
