"""`deltaproduct reproduce NAME`: run one of the papers' experiments, from nothing to its figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from deltaproduct.cli.flags import IntList, check_lengths, parts_of
from deltaproduct.cli.outputs import check_file, check_folder, say
from deltaproduct.errors import UsageError, did_you_mean, shown
from deltaproduct.experiments.names import EXPERIMENT_NAMES, Scale
from deltaproduct.files import make_folder
from deltaproduct.launchers.options import RAY_OPTIONS, SLURM_OPTIONS, parse_options

if TYPE_CHECKING:
    from deltaproduct.experiments.job import Job

FIGURE = "accuracy.png"
MOST_SEEDS = 10_000  # far beyond what anybody trains: more is a slip of the finger
FILE_WIDTH = 100  # of a table that goes to a file: five lengths with their ranges


@dataclass(kw_only=True)
class Reproduce:
    """Train and evaluate the runs of an experiment; writes summary.json, a table and accuracy.png.

    Running it again on the same folder continues what was cut off and reuses what was finished.
    """

    interrupted: ClassVar[str] = "Run the same command again to continue."

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(help=f"which experiment: {', '.join(EXPERIMENT_NAMES)}")]
    out: Annotated[Path | None, tyro.conf.arg(help="folder of the experiment; created; --list needs none")] = None
    scale: Annotated[
        Scale,
        tyro.conf.arg(help="cpu: within half an hour on two cores; cpu-long: hours there; paper: the papers' setting"),
    ] = "cpu"
    seeds: Annotated[int, tyro.conf.arg(help="runs of each configuration")] = 3
    first_seed: Annotated[int, tyro.conf.arg(help="the first of the consecutive seeds")] = 0
    only: Annotated[
        str | None, tyro.conf.arg(help="only the runs whose names match, such as 'A5-n2-*,S5-n4-*'; --list shows all")
    ] = None
    list: Annotated[bool, tyro.conf.arg(help="print the names of the runs and do nothing else")] = False
    steps: Annotated[int | None, tyro.conf.arg(help="optimiser steps of each run, in place of the scale's own")] = None
    lengths: Annotated[
        IntList | None, tyro.conf.arg(help="lengths to evaluate at, in place of the experiment's own")
    ] = None
    sequences: Annotated[
        int | None, tyro.conf.arg(help="evaluation sequences, per length or in all, in place of the experiment's own")
    ] = None
    jobs: Annotated[
        int | None, tyro.conf.arg(help="runs at once; None: one per GPU, or one per core; on a cluster all")
    ] = None
    launcher: Annotated[
        Literal["local", "slurm", "ray"],
        tyro.conf.arg(help="where the runs are carried out; a cluster needs --out on a disk that it shares"),
    ] = "local"
    launcher_options: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="NAME=VALUE,…",
            help="what to ask of a cluster, such as partition=gpu,timeout_min=600,gpus_per_node=1 of slurm or "
            f"address=auto,gpu=0.5 of ray. slurm: {', '.join(SLURM_OPTIONS)}; ray: {', '.join(RAY_OPTIONS)}",
        ),
    ] = None

    def run(self) -> None:
        for flag in ("seeds", "sequences", "jobs", "steps"):
            value = getattr(self, flag)
            if value is not None and value < 1:
                raise UsageError(f"{flag} must be at least 1, not {value}.")
        if self.seeds > MOST_SEEDS:
            raise UsageError(f"seeds must be at most {MOST_SEEDS:,}, not {self.seeds:,}.")
        if self.first_seed < 0:
            raise UsageError(f"first_seed must be 0 or more, not {self.first_seed}.")
        options = parse_options(self.launcher_options)
        from rich.console import Console

        from deltaproduct.experiments.registry import get_experiment
        from deltaproduct.experiments.runner import SUMMARY, run_jobs
        from deltaproduct.launchers import get_launcher

        experiment = get_experiment(self.name)
        jobs = self._chosen(experiment.at(self.scale, range(self.first_seed, self.first_seed + self.seeds)))
        if self.list:
            print("\n".join(job.name for job in jobs))
            return
        if self.out is None:
            raise UsageError("reproduce needs --out, the folder of the experiment; only --list goes without.")
        get_launcher(self.launcher, workers=1, folder=self.out, options=options)  # refused before a folder is made
        check_folder(self.out)
        for name in (SUMMARY, FIGURE):
            check_file(self.out / name)
        make_folder(self.out)
        console = Console(stderr=True, soft_wrap=True)
        steps = sum(job.steps for job in jobs)
        line = f"{len(jobs)} runs, {steps:,} steps in all, into {self.out}"
        console.print(shown(line), highlight=False, markup=False)
        summary = run_jobs(
            jobs,
            self.out,
            experiment=self.name,
            workers=self.jobs,
            launcher=self.launcher,
            launcher_options=options,
        )
        experiment.draw(summary["runs"], self.out / FIGURE)
        screen = Console()
        screen.print(experiment.table(summary["runs"]), width=None if screen.is_terminal else FILE_WIDTH)
        say(f"{self.out / SUMMARY}, {self.out / FIGURE}")
        if summary["failed"]:
            raise UsageError(f"{len(summary['failed'])} of {len(jobs)} runs failed; {self.out / SUMMARY} says why.")

    def _chosen(self, jobs: Sequence[Job]) -> Sequence[Job]:
        """The jobs that the flags ask for, changed as they say."""
        if self.only is not None:
            try:
                patterns = parts_of(self.only)
            except ValueError as e:
                raise UsageError(f"--only: {e}.") from e
            names = [job.name for job in jobs]
            for pattern in patterns or [self.only]:
                if not any(fnmatchcase(name, pattern) for name in names):
                    near = did_you_mean(pattern, names)
                    raise UsageError(f"No run of {self.name} is called {pattern!r}{near}; --list shows what there is.")
            jobs = [job for job in jobs if any(fnmatchcase(job.name, pattern) for pattern in patterns)]
        lengths = None if self.lengths is None else check_lengths(self.lengths)
        return [job.changed(steps=self.steps, lengths=lengths, sequences=self.sequences) for job in jobs]
