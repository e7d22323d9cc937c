"""Calls in processes of this machine."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from os import getpid, kill
from signal import SIG_IGN, SIGINT, SIGTERM, signal
from threading import Thread
from time import monotonic
from typing import Any

import torch

from deltaproduct.errors import UsageError
from deltaproduct.launchers.launcher import KILLED, PAUSE, Call, Settle, carry_out, opened

PATIENCE = 20.0  # seconds


class Local:
    """Processes of this machine, each with a GPU of its own where there are GPUs."""

    def __init__(self, workers: int):
        self.workers = workers

    def run(self, calls: Mapping[str, Call], settle: Settle, tick: Callable[[], None]) -> None:
        # spawn, not fork: forking a process whose torch has started threads can deadlock.
        context = get_context("spawn")
        waiting = deque(calls.items())
        free = deque(range(self.workers))  # places that no call has taken
        running: dict[Connection, tuple[str, int, SpawnProcess]] = {}  # its name, place and process, by its pipe
        try:
            while waiting or running:
                while waiting and free:
                    (name, call), place = waiting.popleft(), free.popleft()
                    pipe, end = context.Pipe(duplex=False)
                    process = context.Process(target=work, args=(end, place, call))
                    running[pipe] = name, place, process
                    process.start()
                    end.close()  # here, so that the pipe ends when the process does
                ended = wait(list(running), timeout=PAUSE)
                for pipe in [pipe for pipe in running if pipe in ended]:
                    name, place, process = running[pipe]
                    outcome = received(pipe, process)
                    del running[pipe]
                    free.append(place)
                    settle(name, outcome)
                tick()
        finally:
            stop([process for _, _, process in running.values() if process.pid is not None])


def stop(processes: Sequence[SpawnProcess]) -> None:
    """End processes: training saves the step that is done, and what takes too long over it is killed."""
    for process in processes:
        process.terminate()
    deadline = monotonic() + PATIENCE
    try:
        for process in processes:
            process.join(max(0.0, deadline - monotonic()))
    finally:  # also where Ctrl-C comes a second time
        for process in processes:
            process.kill()
            process.join()


def work(end: Connection, place: int, call: Call) -> None:
    """What a process does, from its start to its end."""
    signal(SIGINT, SIG_IGN)  # Ctrl-C reaches every process of a terminal; the one that started this one will end it
    Thread(target=_end_with_parent, daemon=True).start()
    if torch.cuda.is_available():
        torch.cuda.set_device(place % torch.cuda.device_count())
    with suppress(BrokenPipeError):  # nobody is there any more
        end.send_bytes(carry_out(call))


def _end_with_parent() -> None:
    """End this process, as `stop` does, when the one that started it has been killed: nobody else would."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        kill(getpid(), SIGTERM)


def received(pipe: Connection, process: SpawnProcess) -> Call:
    """The outcome of a call whose process has sent it, or has ended without."""
    try:
        end = pipe.recv_bytes()
    except EOFError:
        end = None
    process.join()
    pipe.close()
    return partial(opened, end) if end is not None else partial(unsent, process.exitcode)


def unsent(status: int | None) -> dict[str, Any]:
    killed = status is not None and status < 0
    raise UsageError(KILLED if killed else f"its process ended, with status {status}, before its call did")
