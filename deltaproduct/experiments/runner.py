"""Runs the jobs of an experiment, several at once, and gathers what came out into one summary.

A job that is done is not run again, one that was cut off continues, one that fails is reported and stops no other.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from deltaproduct.errors import UsageError
from deltaproduct.evaluation import LengthResult, evaluate_lengths, scores
from deltaproduct.files import make_folder, read_json, write_json
from deltaproduct.machine import command_line, describe_machine, keep_freed_memory
from deltaproduct.models import SequenceModel
from deltaproduct.tasks import get_task
from deltaproduct.training import RunConfig, train
from deltaproduct.training.log import Bar, last_step, progress_bar
from deltaproduct.training.loop import CHECKPOINT, METRICS, RUN, is_finished, open_run

RESULT = "result.json"
SUMMARY = "summary.json"
CURVE_POINTS = 200


@dataclass(frozen=True)
class Job:
    """One run of an experiment: the name of its folder, what a figure calls it, and all that decides its numbers."""

    name: str
    label: str
    config: RunConfig


def run_job(
    job: Job, out: Path, *, lengths: Sequence[int], sequences: int, threads: int | None, show: bool
) -> dict[str, Any]:
    """Train and evaluate one job in out/runs/NAME; what was already finished there is read and not computed again."""
    if threads is not None:
        torch.set_num_threads(threads)
    folder = out / "runs" / job.name
    if not is_finished(folder, job.config):
        train(job.config, folder, resume=True, show=show)
    asked = {"lengths": list(lengths), "sequences": sequences}
    if (folder / RESULT).exists():
        result = read_json(folder / RESULT)
        if result.get("asked") == asked:
            return result
    model = SequenceModel.from_pretrained(folder / CHECKPOINT)
    results = evaluate_lengths(model, get_task(job.config.training.task), lengths, sequences=sequences)
    run = read_json(folder / RUN)
    result = {
        "name": job.name,
        "label": job.label,
        "task": job.config.training.task,
        "num_householder": job.config.model.num_householder,
        "allow_neg_eigval": job.config.model.allow_neg_eigval,
        "seed": job.config.training.seed,
        "steps": job.config.training.steps,
        "training_length": job.config.training.lengths[-1],
        "wall_seconds": run["wall_seconds"],
        "checkpoint": str(Path("runs") / job.name / CHECKPOINT),
        **scores(results),
        "curve": accuracy_curve(results[max(results)]),
        "asked": asked,
    }
    write_json(folder / RESULT, result)
    return result


def accuracy_curve(result: LengthResult) -> dict[str, list[float]]:
    """Token accuracy of the prefixes of the longest sequences, at lengths spaced evenly on a logarithmic axis."""
    scored = ~result.by_position.isnan()
    total = result.by_position.nan_to_num().double().cumsum(0) / scored.double().cumsum(0).clamp(min=1)
    points = torch.logspace(0, torch.log10(torch.tensor(float(result.length))).item(), CURVE_POINTS).round().long()
    points = points.clamp(1, result.length).unique()
    points = points[scored.cumsum(0)[points] > 0]
    return {"length": points.tolist(), "accuracy": [round(a, 6) for a in total[points].tolist()]}


def run_jobs(
    jobs: Sequence[Job],
    out: Path,
    *,
    experiment: str,
    lengths: Sequence[int],
    sequences: int,
    workers: int | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """Run all jobs and write out/summary.json.

    Args:
        workers: processes at once; None means one per core. Each has its share of the cores as threads: several runs
            on one thread each finish sooner than one after the other on all.
        show: show progress on standard error, and a line whenever a job ends.

    Returns:
        The summary: experiment, command, machine, "runs" (a list of `run_job` results in the jobs' order) and "failed".

    Raises:
        UsageError: the folder cannot be written or holds other runs of these names, or every job failed.
    """
    make_folder(out)
    for job in jobs:  # before anything is computed
        if (out / "runs" / job.name).exists():
            open_run(job.config, out / "runs" / job.name, resume=True)
    cores = os.cpu_count() or 1
    workers = max(1, min(workers or cores, len(jobs)))
    run = partial(run_job, lengths=tuple(lengths), sequences=sequences)
    done: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}

    def settle(job: Job, outcome: Callable[[], dict[str, Any]], bar: Bar) -> None:
        try:
            done[job.name] = outcome()
        except UsageError as e:
            failed[job.name] = str(e)
        except BrokenProcessPool:
            failed[job.name] = "its process was killed, perhaps for want of memory"
        count = f"[{len(done) + len(failed)}/{len(jobs)}]"
        bar.say(f"{count} {job.name}: {failed.get(job.name) or _in_short(done[job.name])}")

    if workers == 1:
        lines = Bar(experiment, len(jobs), Console(stderr=True) if show else None, None)  # training has its own bar
        for job in jobs:
            settle(job, partial(run, job, out, threads=None, show=show), lines)
    else:
        # spawn, not fork: forking a process whose torch has started threads can deadlock.
        steps = sum(job.config.training.steps for job in jobs)
        with (
            progress_bar(experiment, steps, show=show) as bar,
            ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=keep_freed_memory) as pool,
        ):
            waiting: dict[Future[dict[str, Any]], Job] = {
                pool.submit(run, job, out, threads=max(1, cores // workers), show=False): job for job in jobs
            }
            try:
                while waiting:
                    for future in wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED).done:
                        settle(waiting.pop(future), future.result, bar)
                    done_steps = sum(last_step(out / "runs" / job.name / METRICS) for job in jobs)
                    bar.update(done_steps, f"{len(done) + len(failed)} of {len(jobs)} runs done")
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    if not done:
        raise UsageError(f"Every job failed; the first because: {next(iter(failed.values()))}")
    summary = {
        "experiment": experiment,
        "command": command_line(),
        "machine": describe_machine() | {"threads": max(1, cores // workers), "workers": workers},
        "sequences_per_length": sequences,
        "runs": [{k: v for k, v in done[job.name].items() if k != "asked"} for job in jobs if job.name in done],
        "failed": failed,
    }
    write_json(out / SUMMARY, summary)
    return summary


def _in_short(result: dict[str, Any]) -> str:
    figures = "  ".join(f"{n}: {a:.3f}" for n, a in result["accuracy"].items())
    return f"{result['label']} seed {result['seed']}  {figures}  ({result['wall_seconds']:.0f} s)"
