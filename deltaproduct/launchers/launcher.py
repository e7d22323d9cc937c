"""What a launcher is, and how the end of a call, good or bad, gets from one process to another."""

import pickle
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from deltaproduct.machine import keep_freed_memory

Call = Callable[[], dict[str, Any]]
Settle = Callable[[str, Call], None]  # (name, outcome); `outcome()` is what the call returned, or raises what it raised
PAUSE = 1.0  # seconds between two looks at what is running
KILLED = "its process was killed, perhaps for want of memory"


class Launcher(Protocol):
    """Carries out named calls, each in a process of its own, several at once."""

    def run(self, calls: Mapping[str, Call], settle: Settle, tick: Callable[[], None]) -> None:
        """Carry out all calls; settle each when it has ended, however it ended, and tick about once a second.

        If it is left by an exception, such as KeyboardInterrupt from `tick`, what was running is stopped.
        """
        ...


def carry_out(call: Call, threads: int | None = None) -> bytes:
    """Make the call, in the process that is there for it, on so many threads; its end, for `opened`."""
    keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        return pickle.dumps((call(), None))
    except Exception as e:
        e.add_note(f"There:\n{traceback.format_exc()}")  # a traceback does not travel by itself
        return pickle.dumps((None, portable(e)))


def opened(end: bytes) -> dict[str, Any]:
    """What the call returned; raises what it raised."""
    result, error = pickle.loads(end)
    if error is not None:
        raise error
    return result


def portable(error: Exception) -> Exception:
    """The error, or one that says the same if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        plain = RuntimeError(f"{type(error).__name__}: {error}")
        plain.__notes__ = error.__notes__
        return plain
    return error


def last_line(text: str) -> str:
    """Of a traceback, or of what a program complains: the line that says what is wrong."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it does not say why")
