"""Calls as jobs of a SLURM cluster, by submitit."""

import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, UncompletedJobError
from submitit.helpers import DelayedSubmission

from deltaproduct.errors import UsageError
from deltaproduct.files import make_folder
from deltaproduct.launchers.launcher import KILLED, PAUSE, Call, Settle, carry_out, last_line, opened

TIMEOUT_MINUTES = 240  # submitit's own 5 would be over before most runs have learnt anything
MAX_TIMEOUTS = 20
# Not SLURM's alone, as submitit sees it.
GENERIC = ("timeout_min", "cpus_per_task", "gpus_per_node", "mem_gb", "nodes", "tasks_per_node")
PATIENCE = 5.0  # seconds for cancelled processes to go


class Submitted:
    """What jobs of a launcher are submitted with; `UsageError` if SLURM cannot be used here."""

    def __init__(self, folder: Path, options: Mapping[str, Any], **defaults: Any):
        """
        Args:
            folder: scripts, logs and results; made when needed, on a file system that every machine shares.
            options: SLURM_OPTIONS, or SLURM_RANK_OPTIONS.
            defaults: for options that are not given.
        """
        self.folder, self.cluster = folder.absolute(), usable_cluster(options)
        given = {name: value for name, value in options.items() if name != "cluster"}
        self.options = {"timeout_min": TIMEOUT_MINUTES, **defaults} | given

    @property
    def is_here(self) -> bool:
        """Whether jobs are processes of this machine."""
        return self.cluster == "local"

    def executor(self, **parameters: Any) -> Any:
        """submitit's, with the options and these parameters of its own."""
        make_folder(self.folder)
        executor = submitit.AutoExecutor(self.folder, self.cluster, slurm_max_num_timeout=MAX_TIMEOUTS)
        executor.update_parameters(name="deltaproduct", **parameters, **for_submitit(self.options))
        return executor

    def threads(self, processes: int) -> int | None:
        """Of each process: what is asked for, or this machine's cores shared among so many; None: what SLURM gives."""
        share = max(1, (os.cpu_count() or 1) // processes) if self.is_here else None
        return self.options.get("cpus_per_task", share)


class Slurm(Submitted):
    """One SLURM job per call, all in one array, of which `workers` run at once.

    The array outlives this process if that is killed, and is cancelled if it is interrupted.
    """

    def __init__(self, workers: int, folder: Path, options: Mapping[str, Any]):
        super().__init__(folder, options)
        self.workers = workers

    def run(self, calls: Mapping[str, Call], settle: Settle, tick: Callable[[], None]) -> None:
        executor = self.executor(slurm_array_parallelism=self.workers)
        # SLURM keeps its own queue; submitit's processes of this machine have none.
        room = self.workers if self.is_here else len(calls)
        waiting = deque(calls.items())
        running: dict[str, Any] = {}
        try:
            while waiting or running:
                some = [waiting.popleft() for _ in range(min(len(waiting), room - len(running)))]
                running |= zip([name for name, _ in some], self._submitted(executor, [call for _, call in some]))
                for name in [name for name, job in running.items() if job.done()]:
                    settle(name, partial(self._outcome, running.pop(name)))
                tick()
                if running:
                    time.sleep(PAUSE)
        finally:
            cancel(running.values(), wait=self.is_here)

    def _submitted(self, executor: Any, calls: list[Call]) -> list[Any]:
        if not calls:
            return []
        jobs = []
        try:
            with executor.batch():
                for call in calls:
                    jobs.append(executor.submit(Resumable(call, self.threads(self.workers))))
        except (FailedJobError, OSError) as e:
            raise not_taken(e) from e
        return jobs

    def _outcome(self, job: Any) -> dict[str, Any]:
        log = job.paths.stderr
        if self.is_here and not job.paths.result_pickle.exists():  # submitit would wait for a slow disk
            raise UsageError(f"{KILLED}; its log is {log}")
        try:
            end = job.result()
        except FailedJobError as e:  # not by the call itself, whose errors are in its end
            _, trace, _ = str(e).split("-" * 22, 2)
            raise UsageError(f"{last_line(trace)}; its log is {log}") from e
        except UncompletedJobError as e:
            raise UsageError(f"SLURM ended it ({job.state}); its log is {log}") from e
        return opened(end)


class Resumable:
    """A call as submitit takes it: one that may be put back into the queue when its time is over, since a run continues
    where it was."""

    def __init__(self, call: Call, threads: int | None):
        self.call, self.threads = call, threads

    def __call__(self) -> bytes:
        return carry_out(self.call, self.threads)

    def checkpoint(self) -> Any:
        return DelayedSubmission(self)


def usable_cluster(options: Mapping[str, Any]) -> str:
    """The option cluster, "slurm" or "local"; `UsageError` if that cannot be used here."""
    cluster = options.get("cluster", "slurm")
    if cluster not in ("slurm", "local"):
        raise UsageError(f"The option cluster must be slurm or local, not {cluster!r}.")
    missing = [program for program in ("sbatch", "srun") if shutil.which(program) is None]
    if cluster == "slurm" and missing:
        raise UsageError(
            f"The launcher slurm needs {' and '.join(missing)}, and this machine has none: call it on a login node "
            "of the cluster, or try it here with the option cluster=local."
        )
    return cluster


def for_submitit(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options by the names that submitit's executor for any cluster has for them."""
    return {key if key in GENERIC else f"slurm_{key}": value for key, value in options.items()}


def not_taken(error: Exception) -> UsageError:
    """What to say of a job that cannot be submitted."""
    return UsageError(f"sbatch took no job: {last_line(str(error))}")


def cancel(jobs: Iterable[Any], *, wait: bool) -> None:
    """Stop jobs; `wait` until they have gone."""
    jobs = list(jobs)
    for job in jobs:
        job.cancel(check=False)
    until = time.monotonic() + PATIENCE
    while wait and time.monotonic() < until and not all(job.done() for job in jobs):
        time.sleep(PAUSE / 10)
