"""What a run says while it goes: JSON lines on disk, a progress bar on a terminal, plain lines elsewhere."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deltaproduct.files import write_text

PLAIN_SECONDS = 15.0  # between lines where there is no terminal


def last_step(path: Path) -> int:
    """The last step that metrics.jsonl tells of; 0 if it is not there or ends within a line."""
    try:
        return int(json.loads(path.read_text(encoding="utf-8").splitlines()[-1])["step"])
    except (OSError, ValueError, IndexError, KeyError):
        return 0


class Metrics:
    """metrics.jsonl: one JSON object a line, appended as training goes; the source of truth for curves."""

    def __init__(self, path: Path, *, after_step: int):
        """Open for appending, keeping only the lines up to `after_step`: later ones will be computed again."""
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= after_step:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError):
                    break  # a line cut off by a kill: nothing good comes after it
        write_text(path, "".join(kept))
        self._file: TextIO = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)

    def write(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Bar:
    """One line of progress, whichever way it is shown."""

    def __init__(self, title: str, total: int, console: Console | None, bar: Progress | None):
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
            self._console.print(line, soft_wrap=True, highlight=False, markup=False)


@contextmanager
def progress_bar(title: str, total: int, *, show: bool = True) -> Iterator[Bar]:
    """A `Bar` for long work, on standard error; with `show` false it says nothing."""
    console = Console(stderr=True) if show else None
    if console is None or not console.is_terminal:
        yield Bar(title, total, console, None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[info]}"))  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        yield Bar(title, total, console, bar)
