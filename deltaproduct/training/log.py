"""What a run says while it goes: JSON lines on disk, a progress bar on a terminal, plain lines elsewhere."""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from deltaproduct.errors import UsageError, shown
from deltaproduct.files import parse_json, write_bytes

PLAIN_SECONDS = 15.0  # between lines where there is no terminal


def last_metrics(path: Path) -> dict[str, Any] | None:
    """The last whole line of metrics.jsonl; None if there is none, or no such file.

    A reader may come while a line is being written, and a kill may have cut one off: such an end is passed over.
    """
    try:
        lines = _lines(path)
    except UsageError:
        return None
    return next((values for line in reversed(lines) if (values := _values(line)) is not None), None)


def _lines(path: Path) -> list[bytes]:
    """The lines of a file, each without its end; none if it is missing; `UsageError` if it cannot be read."""
    if not path.exists():
        if path.is_symlink():
            raise UsageError(f"{path} is a symbolic link to nothing; remove it, and the run goes on without its lines.")
        return []
    if not path.is_file():
        raise UsageError(f"{path} is not a file; remove it, and the run goes on without its lines.")
    try:
        return path.read_bytes().split(b"\n")
    except OSError as e:
        raise UsageError(f"{path} cannot be read: {e.strerror or e}.") from e


def _values(line: bytes) -> dict[str, Any] | None:
    """The values of a line; None if it is no JSON object with a step."""
    try:
        # Losses may be NaN, as Python writes it.
        values = parse_json(line.decode(), "a line", finite=False)
    except ValueError:
        return None
    step = values.get("step") if isinstance(values, dict) else None
    return values if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


class Metrics:
    """metrics.jsonl: one JSON object a line, appended as training goes; the source of truth for curves."""

    def __init__(self, path: Path, *, after_step: int, digest: str | None = None):
        """Open for appending, keeping only the lines up to `after_step`: later ones will be computed again.

        A last line without an end was cut off by a kill, and goes.

        Args:
            digest: what `synced` returned when step `after_step` was saved, if that is known.

        Raises:
            UsageError: the file cannot be read or written, or has a line that no run wrote: one that is no JSON object
                with a step, or whose step is not above the one before, and the message names its number; or its lines
                are others than they were. Nothing changed. A file that is not there is begun anew.
        """
        *lines, cut_off = _lines(path) or [b""]
        if cut_off and (values := _values(cut_off)) is not None and values["step"] <= after_step:
            lines.append(cut_off)  # whole, but for its end
        kept, before = [], -1
        for number, line in enumerate(lines, start=1):
            values = _values(line)
            if values is None or values["step"] <= before:
                why = "is no metrics of a step" if values is None else f"is of step {values['step']} after {before}"
                raise UsageError(
                    f"{path} was changed: line {number} {why}. Put back the file that the run wrote, or remove that "
                    "line."
                )
            before = values["step"]
            if before <= after_step:
                kept.append(line + b"\n")
        self._sum = hashlib.sha256(b"".join(kept))
        if digest not in (None, self._sum.hexdigest()) and path.exists():
            raise UsageError(
                f"{path} was changed: its lines up to step {after_step} are not those that the run wrote before it "
                "saved that step. Put back the file that it wrote, or remove it: the run then goes on without them."
            )
        write_bytes(path, b"".join(kept))
        try:
            self._file: TextIO = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        except OSError as e:
            raise UsageError(f"{path} cannot be written: {e.strerror or e}.") from e

    def synced(self) -> str:
        """Bring all lines to the disk, where a checkpoint is about to count on them; returns their sha256."""
        os.fsync(self._file.fileno())
        return self._sum.hexdigest()

    def write(self, values: dict[str, Any]) -> None:
        line = json.dumps(values) + "\n"
        self._file.write(line)
        self._file.flush()
        self._sum.update(line.encode())

    def close(self) -> None:
        self._file.close()


class Bar:
    """One line of progress, whichever way it is shown."""

    def __init__(self, title: str, total: int, console: Console | None, bar: Progress | None):
        title = shown(title)  # of a task, whose name may be any file's
        self._title, self._total, self._console, self._bar = title, total, console, bar
        self._task = None if bar is None else bar.add_task(title, total=total, info="")
        self._last = time.monotonic()

    def update(self, done: int, info: str) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, info=info)
        elif self._console is not None and time.monotonic() - self._last >= PLAIN_SECONDS:
            self._last = time.monotonic()
            self.say(f"{self._title}: {done}/{self._total}  {info}")

    def say(self, line: str) -> None:
        """Print a line of its own, above the bar where there is one."""
        if self._console is not None:
            self._console.print(shown(line), soft_wrap=True, highlight=False, markup=False)


@contextmanager
def progress_bar(title: str, total: int, *, show: bool = True) -> Iterator[Bar]:
    """A `Bar` for long work, on standard error; with `show` false it says nothing."""
    console = Console(stderr=True) if show else None
    if console is None or not console.is_terminal:
        yield Bar(title, total, console, None)
        return
    with bars(console) as bar:
        yield Bar(title, total, console, bar)


class Board:
    """Progress of several runs at once: a line for each that is under way, and one for all together."""

    def __init__(self, title: str, totals: Mapping[str, int], console: Console | None, bars: Progress | None):
        """`totals`: the steps of each run, by name. A terminal gets bars; elsewhere lines are printed now and then."""
        self._title, self._totals, self._console, self._bars = title, dict(totals), console, bars
        self._done: dict[str, int] = {}
        self._info: dict[str, str] = {}
        self._over: set[str] = set()
        self._tasks: dict[str, TaskID] = {}
        self._all = None if bars is None else bars.add_task(title, total=sum(totals.values()), info="")
        self._last = time.monotonic()

    def update(self, name: str, done: int, info: str) -> None:
        """Say how far a run is."""
        self._done[name], self._info[name] = done, info
        if self._bars is not None:
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(f"  {name}", total=self._totals[name], info="")
            self._bars.update(self._tasks[name], completed=done, info=info)
            self._sum_up()
        elif time.monotonic() - self._last >= PLAIN_SECONDS:
            self._last = time.monotonic()
            for running in [n for n in self._done if n not in self._over]:
                self._say(f"  {running}: {self._done[running]}/{self._totals[running]}  {self._info[running]}")

    def end(self, name: str, line: str) -> None:
        """Say how a run has ended."""
        self._over.add(name)
        self._done[name] = self._totals[name]
        if self._bars is not None:
            if name in self._tasks:
                self._bars.remove_task(self._tasks.pop(name))
            self._sum_up()
        self._say(line)

    def _sum_up(self) -> None:
        if self._bars is not None and self._all is not None:
            info = f"{len(self._over)} of {len(self._totals)} runs done"
            self._bars.update(self._all, completed=sum(self._done.values()), info=info)

    def _say(self, line: str) -> None:
        if self._console is not None:
            self._console.print(shown(line), soft_wrap=True, highlight=False, markup=False)


@contextmanager
def board(title: str, totals: Mapping[str, int], *, show: bool = True) -> Iterator[Board]:
    """A `Board` on standard error; with `show` false it says nothing."""
    console = Console(stderr=True) if show else None
    if console is None or not console.is_terminal:
        yield Board(title, totals, console, None)
        return
    with bars(console) as progress:
        yield Board(title, totals, console, progress)


def bars(console: Console) -> Progress:
    """Bars of steps on a terminal, gone when all is done."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[info]}", markup=False))  # fmt: skip
    return Progress(*columns, console=console, transient=True)
