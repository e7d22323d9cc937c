"""Which permutation groups one layer learns: S5 with n_h = 1 … 4 (arXiv 2502.10297, Fig. 1, left).

On a laptop the training length is 32, with the first two seeds, and 128 at the longer scale, with one curriculum for
all four.
"""

from collections.abc import Sequence
from functools import partial

from deltaproduct.experiments.experiment import Experiment, Scale
from deltaproduct.experiments.groups import BOTH, group_job
from deltaproduct.experiments.job import Job
from deltaproduct.experiments.tables import accuracy_table
from deltaproduct.plots.figures import accuracy_by_length


def fig1(scale: Scale, seeds: Sequence[int]) -> list[Job]:
    """The runs of `deltaproduct reproduce fig1`."""
    quick = scale == "cpu"
    longest = 32 if quick else 128
    return [
        group_job("S5", seed, scale=scale, longest=longest, num_householder=num_householder)
        for seed in (seeds[:2] if quick else seeds)
        for num_householder in (1, 2, 3, 4)
    ]


FIG1 = Experiment(
    name="fig1",
    summary="S5 in one layer with n_h 1 to 4 (arXiv 2502.10297, Fig. 1)",
    jobs=fig1,
    table=accuracy_table,
    draw=partial(accuracy_by_length, title="Who tracks it in one layer?", metrics=BOTH),
    scales=("cpu", "cpu-long", "paper"),
)
