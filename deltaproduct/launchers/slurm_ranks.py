"""One call on many ranks as one job of a SLURM cluster, by submitit: every task of the job is a rank."""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, UncompletedJobError, pickle_load
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

from deltaproduct.errors import UsageError
from deltaproduct.launchers.launcher import KILLED, PAUSE, Call, last_line, opened
from deltaproduct.launchers.ranks import LostRank, RankCall, Tick, at_least_one, cause, mistaken
from deltaproduct.launchers.slurm import Submitted, cancel, not_taken

SLOW_DISK = 15.0  # seconds until what a machine of the cluster has written is seen on another
# A rank that has failed leaves the others waiting for it, on some networks for ever.
TOGETHER = ("--kill-on-bad-exit=1", "--wait=60")  # of srun; seconds that a rank may outlive another


class SlurmRanks(Submitted):
    """One SLURM job of nodes × tasks_per_node ranks, which goes back into the queue when its time is over.

    The job outlives this process if that is killed, and is cancelled if it is interrupted.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any]):
        super().__init__(folder, options, nodes=1, tasks_per_node=max(1, options.get("gpus_per_node", 1)))
        at_least_one(options, "nodes", "tasks_per_node", "timeout_min")
        if self.is_here and self.options["nodes"] > 1:
            raise UsageError("With cluster=local there is one machine, so nodes cannot be more than 1.")

    def run(self, call: Call, tick: Tick) -> None:
        job = self._submitted(call)
        over = False
        try:
            while not over:
                over = job.done() or self._mistaken(job)
                tick()
                time.sleep(0 if over else PAUSE)
        finally:
            if not job.done():
                cancel([job], wait=self.is_here)
        self._settle(job)

    def _submitted(self, call: Call) -> Any:
        executor = self.executor(slurm_srun_args=list(TOGETHER))
        threads = self.threads(self.options["tasks_per_node"])
        try:
            return executor.submit(Task(RankCall(call, sys.argv, threads)))
        except (FailedJobError, OSError) as e:
            raise not_taken(e) from e

    def _mistaken(self, job: Any) -> bool:
        """Whether a rank has ended by a mistake of the user's: nothing that the others do can help that.

        Of another error only the job's own end tells whether it is one: where a job goes back into the queue, a rank
        that lost its neighbours has one as well.
        """
        return any(mistaken(_error(task)) for task in _ended(job).values())

    def _settle(self, job: Any) -> None:
        """Raise what explains why a rank of a job that is over has failed, if one has."""
        until = time.monotonic() + (0 if self.is_here else SLOW_DISK)
        while len(ended := _ended(job)) < job.num_tasks and time.monotonic() < until:
            time.sleep(PAUSE)
        errors = {rank: error for rank, task in ended.items() if (error := _error(task)) is not None}
        for rank in range(job.num_tasks):
            if rank not in ended:
                why = KILLED if self.is_here else f"SLURM ended it ({job.state})"
                errors[rank] = LostRank(f"Rank {rank}: {why}; its log is {job.task(rank).paths.stderr}.")
        if errors:
            raise cause(errors)


@dataclass(frozen=True)
class Task:
    """A rank's call as submitit takes it: one that is made again when the job comes out of the queue again."""

    call: RankCall

    def __call__(self) -> bytes:
        environment = submitit.JobEnvironment()
        environment.paths.result_pickle.unlink(missing_ok=True)  # of an earlier time of this very job
        # Every rank sees its machine's GPUs, and takes the one of its number there.
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        return self.call()

    def checkpoint(self) -> Any:
        return DelayedSubmission(self)


def _ended(job: Any) -> dict[int, Any]:
    """The tasks of the job that have left an end, by rank."""
    tasks = {rank: job.task(rank) for rank in range(job.num_tasks)}
    return {rank: task for rank, task in tasks.items() if task.paths.result_pickle.exists()}


def _error(task: Any) -> Exception | None:
    """What the call of a task that has ended raised."""
    log = task.paths.stderr
    try:
        kind, end = pickle_load(task.paths.result_pickle)
    except FileNotFoundError:  # the task has been started again just now
        return None
    if kind == "error":  # not by the call itself, whose errors are in its end
        return UsageError(f"{last_line(end)}; its log is {log}")
    try:
        opened(end)
    except UncompletedJobError as e:  # by submitit's own handler of signals, in the middle of the call
        return UsageError(f"SLURM ended it ({last_line(str(e))}); its log is {log}")
    except Exception as e:
        return e
    return None
