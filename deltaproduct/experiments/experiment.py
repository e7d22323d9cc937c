"""What an experiment is: the runs behind one figure or table of the papers, and how their results are shown."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from deltaproduct.errors import UsageError, did_you_mean
from deltaproduct.experiments.job import Job, Result
from deltaproduct.experiments.names import Scale

ALL_SCALES: tuple[Scale, ...] = ("cpu", "cpu-long", "paper")
Runs = Sequence[Result]  # of the jobs that did not fail


@dataclass(frozen=True)
class Experiment:
    """A figure or a table of the papers as a list of runs.

    Attributes:
        name: what `deltaproduct reproduce` knows it by.
        summary: one line for a listing, with the figure or table that it is about.
        jobs: (scale, seeds) → the runs; "cpu" ends within 30 minutes on two cores, "cpu-long" takes hours there, and
            "paper" is the papers' own setting.
        table: the runs' results → what is printed.
        draw: (the runs' results, path) → a figure in that file.
        scales: the scales that there are.
    """

    name: str
    summary: str
    jobs: Callable[[Scale, Sequence[int]], Sequence[Job]]
    table: Callable[[Runs], Table]
    draw: Callable[[Runs, Path], None]
    scales: tuple[Scale, ...] = ("cpu", "paper")

    def at(self, scale: Scale, seeds: Sequence[int]) -> Sequence[Job]:
        """The runs at a scale; `UsageError` if there is none of that name."""
        if scale not in self.scales:
            near = did_you_mean(scale, self.scales)
            raise UsageError(f"{self.name} has no scale {scale!r}{near}; choose from {', '.join(self.scales)}.")
        jobs = self.jobs(scale, seeds)
        names = [job.name for job in jobs]
        assert len(set(names)) == len(names), "two jobs of one name would share a folder"
        return jobs
