"""How far one has to walk through the package to follow a task's run, a language run, a compile and an evaluation.

    python tests/helpers/walk.py [--files]

For each of them: how many of the package's files are entered, and how often one comes back to a file that was left
before. Calls are counted where they go from one file to another (`sys.setprofile`); what is imported, and calls that
the same line has made before, are not counted, so that neither loops nor sizes matter.
"""

import contextlib
import io
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import deltaproduct
from deltaproduct.cli.main import main

ROOT = Path(deltaproduct.__file__).parent


class Walk:
    """The files that are entered while it is open, in the order of first calls between them."""

    def __init__(self) -> None:
        self.entered: Counter[str] = Counter()  # how often each file is entered from another
        self._seen: set[tuple[str, int, str, int]] = set()  # who calls whom, by file and line

    def __enter__(self) -> "Walk":
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    @property
    def files(self) -> int:
        return len(self.entered)

    @property
    def returns(self) -> int:
        """How often a file is entered that was entered before."""
        return sum(self.entered.values()) - len(self.entered)

    def _note(self, frame: FrameType, event: str, argument: Any) -> None:
        if event != "call" or frame.f_code.co_name == "<module>":
            return
        if (there := self._own(frame)) is None or (caller := self._nearest(frame.f_back)) is None:
            return
        here = self._own(caller)
        if here is None or here == there:
            return
        call = (here, caller.f_lineno, there, frame.f_code.co_firstlineno)
        if call not in self._seen:
            self._seen.add(call)
            self.entered[there] += 1

    def _nearest(self, frame: FrameType | None) -> FrameType | None:
        """The nearest frame of the package's, so that a call through PyTorch is one from who called PyTorch."""
        while frame is not None and self._own(frame) is None:
            frame = frame.f_back
        return frame

    @staticmethod
    def _own(frame: FrameType) -> str | None:
        path = Path(frame.f_code.co_filename)
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else None


def commands(place: Path) -> dict[str, list[str]]:
    """What is walked through, as the command line takes it; the corpus is made before."""
    small = ["--hidden-size", "16", "--num-heads", "2", "--head-dim", "8"]
    return {
        "a task's run": ["train", "--task", "S3", *small, "--steps", "3", "--lengths", "8", "--batch-sizes", "4",
                         "--out", str(place / "task")],
        "a language run": ["lm", "train", "--data", str(place / "corpus"), *small, "--steps", "3", "--context", "16",
                           "--batch-size", "2", "--out", str(place / "text")],
        "a compile": ["compile", "--group", "S3", "--out", str(place / "exact")],
        "an evaluation": ["evaluate", str(place / "task"), "--lengths", "8", "--sequences", "2"],
    }  # fmt: skip


def quietly(work: Callable[[], None]) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        work()


def walked() -> dict[str, Walk]:
    """The walk of each command, which is run once before, so that what is imported late is there."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("the quick brown fox jumps over the lazy dog\n" * 200, encoding="utf-8")
        quietly(lambda: main(["lm", "prepare", "--source", f"text:{text}", "--out", f"{folder}/warm/corpus"]))
        quietly(lambda: main(["lm", "prepare", "--source", f"text:{text}", "--out", f"{folder}/walk/corpus"]))
        found = {}
        for name, arguments in commands(Path(folder) / "warm").items():
            quietly(partial(main, arguments))
            with Walk() as walk:
                quietly(partial(main, commands(Path(folder) / "walk")[name]))
            found[name] = walk
    return found


if __name__ == "__main__":
    for name, walk in walked().items():
        print(f"{name}: {walk.files} files, {walk.returns} returns")
        if "--files" in sys.argv:
            for file, times in walk.entered.most_common():
                print(f"  {times:4} {file}")
