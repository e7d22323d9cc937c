"""How far long work is: bars on a terminal, plain lines elsewhere, all of it on standard error."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from deltaproduct.errors import shown

PLAIN_SECONDS = 15.0  # between lines where there is no terminal


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
