"""Symmetries of a regular polygon: two reflections per token in one layer, or one in two layers (arXiv 2502.10297,
Theorem 7). On a laptop D5, and D12 at the longer scale."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from deltaproduct.experiments.experiment import Experiment, Scale
from deltaproduct.experiments.groups import BOTH, group_job, small_group_job
from deltaproduct.experiments.job import Job
from deltaproduct.experiments.tables import accuracy_table
from deltaproduct.plots.figures import accuracy_by_length

TASKS = ("D5", "D12")
MODELS: tuple[dict[str, Any], ...] = (
    {"num_householder": 2},
    {"num_householder": 2, "allow_neg_eigval": False},
    {"num_householder": 1},
    {"num_householder": 1, "num_hidden_layers": 2},
)


def dihedral(scale: Scale, seeds: Sequence[int]) -> list[Job]:
    """The runs of `deltaproduct reproduce dihedral`."""
    quick = scale == "cpu"
    job = small_group_job if quick else partial(group_job, scale=scale)
    return [
        job(task, seed, **changes) for seed in seeds for task in (TASKS[:1] if quick else TASKS) for changes in MODELS
    ]


DIHEDRAL = Experiment(
    name="dihedral",
    summary="D5 and D12: one layer of two reflections, or two of one (arXiv 2502.10297, Theorem 7)",
    jobs=dihedral,
    table=accuracy_table,
    draw=partial(accuracy_by_length, title="Who follows a polygon's symmetries?", metrics=BOTH),
    scales=("cpu", "cpu-long", "paper"),
)
