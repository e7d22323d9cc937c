"""Ctrl-C and `kill` while training: the step that is being computed is finished and saved, then the program ends."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

TERMINATED = 128 + signal.SIGTERM  # what a shell reports for a program that was ended by that signal
AGAIN = 2.0  # seconds after which another signal is a second one: a terminal and a launcher may both send the first


class Interruption:
    """Whether a signal has asked for the end; falsy until then."""

    def __init__(self) -> None:
        self._signal: int | None = None
        self._since = 0.0

    def __bool__(self) -> bool:
        return self._signal is not None

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler of signals. A second one, seconds later, ends the program at once."""
        if self._signal is None:
            self._signal, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > AGAIN:
            raise KeyboardInterrupt

    def error(self, message: str) -> BaseException:
        """What to raise when all is saved, with what is to be said."""
        if self._signal == signal.SIGTERM:
            return Terminated(message)
        return KeyboardInterrupt(message)


class Terminated(SystemExit):
    """The end of a program that SIGTERM has asked to end; `code` is its exit status, `message` says what was saved."""

    def __init__(self, message: str):
        super().__init__(TERMINATED)
        self.message = message


@contextmanager
def interruptible(*, terminable: bool = True) -> Iterator[Interruption]:
    """Note Ctrl-C, and with `terminable` SIGTERM too, for the time of a `with`.

    Signals that someone else listens to are left to them. Only the main thread hears any.
    """
    found = Interruption()
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number, plain in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            if signal.getsignal(number) is plain and (terminable or number == signal.SIGINT):
                before[number] = signal.signal(number, found.note)
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
