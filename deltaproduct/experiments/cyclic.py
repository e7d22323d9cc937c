"""Counting modulo m: Z5 and Z60 (arXiv 2411.12537, section 5.2, has Z60).

Theorem 2 there: modulo m, not a power of two, needs a transition with an eigenvalue that is not real. A product of two
reflections has one; one reflection per token needs a second layer (Theorem 6), and a diagonal transition never has.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from deltaproduct.experiments.experiment import Experiment, Scale
from deltaproduct.experiments.groups import BOTH, group_job, small_group_job
from deltaproduct.experiments.job import Job
from deltaproduct.experiments.tables import accuracy_table
from deltaproduct.plots.figures import accuracy_by_length

TASKS = ("Z5", "Z60")
MODELS: dict[str, dict[str, Any]] = {
    "": {"num_householder": 2},
    "range": {"num_householder": 2, "allow_neg_eigval": False},
    "one": {"num_householder": 1},
    "layers": {"num_householder": 1, "num_hidden_layers": 2},
    "mamba": {"mixer": "mamba", "num_hidden_layers": 2},
}


def cyclic(scale: Scale, seeds: Sequence[int]) -> list[Job]:
    """The runs of `deltaproduct reproduce cyclic`."""
    quick = scale == "cpu"
    job = small_group_job if quick else partial(group_job, scale=scale)
    return [
        job(task, seed, prefix=f"{task}-{name}".rstrip("-"), **changes)
        for seed in seeds
        for task in (TASKS[:1] if quick else TASKS)
        for name, changes in MODELS.items()
    ]


CYCLIC = Experiment(
    name="cyclic",
    summary="Z5 and Z60: complex eigenvalues or a second layer (arXiv 2411.12537, 5.2)",
    jobs=cyclic,
    table=accuracy_table,
    draw=partial(accuracy_by_length, title="Who counts modulo m?", metrics=BOTH),
    scales=("cpu", "cpu-long", "paper"),
)
