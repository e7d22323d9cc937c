"""Carries out the jobs of an experiment, several at once, and gathers what came out into one summary.

A job that is done is not run again, one that was cut off continues, one that fails is reported and stops no other.
"""

import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from deltaproduct.errors import UsageError
from deltaproduct.experiments.job import RUNS, Job, Result
from deltaproduct.files import make_folder, write_json, write_text
from deltaproduct.launchers import default_workers, get_launcher
from deltaproduct.machine import command_line, describe_machine
from deltaproduct.progress import board
from deltaproduct.training.metrics import last_metrics
from deltaproduct.training.run_folder import METRICS

SUMMARY = "summary.json"
ERROR = "error.txt"


def run_jobs(
    jobs: Sequence[Job],
    out: Path,
    *,
    experiment: str,
    workers: int | None = None,
    launcher: str = "local",
    launcher_options: Mapping[str, Any] | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """Run all jobs and write out/summary.json.

    Args:
        workers: jobs at once; None means one per GPU, or one per core, and on a cluster all. Each has its share of this
            machine's cores as threads, and on a cluster what `launcher_options` ask for.
        launcher: local, slurm or ray; a cluster has to see `out`.
        launcher_options: what to ask of a cluster, by the names in launchers/options.py.
        show: show progress on standard error: a line for every job that runs, and one whenever a job ends.

    Returns:
        The summary: experiment, command, machine, "runs" (a list of the jobs' results, in their order) and "failed"
        (why, by name; a failure that is a mistake of the program's leaves its traceback in error.txt of the job's
        folder).

    Raises:
        UsageError: the launcher cannot serve here, the folder cannot be written or holds other runs of these names, or
            every job failed.
    """
    workers = max(1, min(workers, len(jobs))) if workers else default_workers(len(jobs), launcher, launcher_options)
    place = get_launcher(launcher, workers=workers, folder=out, options=launcher_options)
    make_folder(out)
    for job in jobs:  # before anything is computed
        job.prepare(out)
    cores = os.cpu_count() or 1
    threads = max(1, cores // workers) if launcher == "local" else None
    by_name = {job.name: job for job in jobs}
    done: dict[str, Result] = {}
    failed: dict[str, str] = {}

    with board(experiment, {job.name: job.steps for job in jobs}, show=show) as shown:

        def settle(name: str, outcome: Callable[[], Result]) -> None:
            try:
                done[name] = outcome()
            except UsageError as e:
                failed[name] = str(e)
            except Exception as e:
                failed[name] = f"{type(e).__name__}: {e}"
                write_text(make_folder(out / RUNS / name) / ERROR, "".join(traceback.format_exception(e)))
            count = f"[{len(done) + len(failed)}/{len(jobs)}]"
            shown.end(name, f"{count} {name}: {failed.get(name) or by_name[name].format_result(done[name])}")

        def tick() -> None:
            for name in by_name.keys() - done.keys() - failed.keys():
                if metrics := last_metrics(out / RUNS / name / METRICS):
                    shown.update(name, metrics["step"], by_name[name].format_progress(metrics))

        calls = {}
        for job in jobs:
            if (result := job.finished(out)) is not None:
                settle(job.name, partial(dict, result))
            else:
                calls[job.name] = partial(job.run, out.absolute(), threads=threads)
        if calls:
            place.run(calls, settle, tick)
    if not done:
        raise UsageError(f"Every job failed; the first because: {next(iter(failed.values()))}")
    summary = {
        "experiment": experiment,
        "command": command_line(),
        "machine": describe_machine() | {"threads": threads, "workers": workers, "launcher": launcher},
        "runs": [done[name] for name in by_name if name in done],
        "failed": failed,
    }
    write_json(out / SUMMARY, summary)
    return summary
