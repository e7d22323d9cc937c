"""`deltaproduct reproduce NAME`: run one of the papers' experiments, from nothing to its figure."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from deltaproduct.cli.flags import IntList, check_lengths
from deltaproduct.errors import UsageError
from deltaproduct.experiments.runner import SUMMARY, run_jobs
from deltaproduct.experiments.s3 import LENGTHS, s3
from deltaproduct.experiments.tables import accuracy_table
from deltaproduct.files import make_folder
from deltaproduct.plots.figures import accuracy_by_length
from deltaproduct.tasks import get_task

FIGURE = "accuracy.png"


@dataclass(kw_only=True)
class Reproduce:
    """Train and evaluate the runs of an experiment; writes summary.json, a table and accuracy.png.

    Running it again on the same folder continues what was cut off and reuses what was finished.
    """

    name: Annotated[tyro.conf.Positional[Literal["s3"]], tyro.conf.arg(help="which experiment")]
    out: Annotated[Path, tyro.conf.arg(help="folder of the experiment; created")]
    seeds: Annotated[int, tyro.conf.arg(help="runs of each configuration")] = 3
    first_seed: Annotated[int, tyro.conf.arg(help="the first of the consecutive seeds")] = 0
    steps: Annotated[int, tyro.conf.arg(help="optimiser steps of each run")] = 350
    lengths: Annotated[IntList, tyro.conf.arg(help="lengths to evaluate at")] = LENGTHS
    sequences: Annotated[int, tyro.conf.arg(help="evaluation sequences per length")] = 64
    jobs: Annotated[int | None, tyro.conf.arg(help="runs at once; None: one per core")] = None

    def run(self) -> None:
        lengths = check_lengths(self.lengths)
        for flag in ("seeds", "sequences", "jobs"):
            value = getattr(self, flag)
            if value is not None and value < 1:
                raise UsageError(f"{flag} must be at least 1, not {value}.")
        make_folder(self.out)
        console = Console(stderr=True, soft_wrap=True)
        jobs = s3(seeds=self.seeds, first_seed=self.first_seed, steps=self.steps)
        console.print(f"{len(jobs)} runs of {self.steps} steps into {self.out}", highlight=False)
        summary = run_jobs(
            jobs,
            self.out,
            experiment=self.name,
            lengths=lengths,
            sequences=self.sequences,
            workers=self.jobs,
        )
        accuracy_by_length(
            summary["runs"],
            self.out / FIGURE,
            title="Who tracks S3 beyond the training length? One layer",
            chance=get_task("S3").chance,
        )
        Console().print(accuracy_table(summary["runs"]))
        print(f"{self.out / SUMMARY} and {self.out / FIGURE} are written.")
        if summary["failed"]:
            raise UsageError(f"{len(summary['failed'])} of {len(jobs)} runs failed: {', '.join(summary['failed'])}.")
