"""Where the runs of an experiment are carried out: in processes of this machine, or on a cluster.

A launcher takes named calls and hands back each outcome as soon as it is there. A call is an argument of another
process, so it has to be picklable, and on a cluster its folder has to be one that every machine sees.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from queue import Queue
from typing import Any, Protocol

import torch

from deltaproduct.errors import UsageError
from deltaproduct.machine import keep_freed_memory

Call = Callable[[], dict[str, Any]]
Settle = Callable[[str, Call], None]  # (name, outcome); `outcome()` is what the call returned, or raises what it raised
LAUNCHERS = ("local", "slurm", "ray")
PAUSE = 1.0  # seconds between two looks at what is running


class Launcher(Protocol):
    """Carries out named calls, each in a process of its own, several at once."""

    def run(self, calls: Mapping[str, Call], settle: Settle, tick: Callable[[], None]) -> None:
        """Carry out all calls; settle each when it has ended, however it ended, and tick about once a second."""
        ...


class Local:
    """Processes of this machine, each with a GPU of its own where there are GPUs."""

    def __init__(self, workers: int):
        self.workers = workers

    def run(self, calls: Mapping[str, Call], settle: Settle, tick: Callable[[], None]) -> None:
        free: Queue[int] = Queue()  # places that no call has taken
        for place in range(self.workers):
            free.put(place)

        def in_a_process(call: Call) -> dict[str, Any]:
            place = free.get()
            try:
                # One process a call, not one pool for all: a process that is killed takes all of its pool with it.
                # spawn, not fork: forking a process whose torch has started threads can deadlock.
                with ProcessPoolExecutor(1, get_context("spawn"), initializer=begin, initargs=(place,)) as pool:
                    return pool.submit(call).result()
            except BrokenProcessPool as e:
                raise UsageError("its process was killed, perhaps for want of memory") from e
            finally:
                free.put(place)

        with ThreadPoolExecutor(self.workers) as threads:
            waiting = {threads.submit(in_a_process, call): name for name, call in calls.items()}
            try:
                while waiting:
                    for future in wait(waiting, timeout=PAUSE, return_when=FIRST_COMPLETED).done:
                        settle(waiting.pop(future), future.result)
                    tick()
            except KeyboardInterrupt:  # which the processes have been told as well
                threads.shutdown(wait=False, cancel_futures=True)
                raise


def begin(place: int) -> None:
    """What a process does before its call."""
    keep_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.set_device(place % torch.cuda.device_count())


def default_workers(jobs: int) -> int:
    """A process per GPU, or per core where there is none: several runs on one thread each finish sooner than one after
    the other on all."""
    return max(1, min(torch.cuda.device_count() or os.cpu_count() or 1, jobs))


def get_launcher(name: str, *, workers: int, folder: Path) -> Launcher:
    """The launcher of that name; `UsageError` if it cannot serve here.

    Args:
        workers: calls at once.
        folder: where a cluster's scripts and logs go.
    """
    if name == "local":
        return Local(workers)
    raise UsageError(f"There is no launcher {name!r}; choose from {', '.join(LAUNCHERS)}.")
