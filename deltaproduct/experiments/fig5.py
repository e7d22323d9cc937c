"""Who tracks S3, S4, A5 and S5 past the training length: n_h 1 … 4 in one layer, 1 … 10 layers with n_h = 1, and the
range [0,1] (arXiv 2502.10297, Fig. 5 and 12).

In under half an hour on two cores: S3 and S4, one layer, n_h 1 and 2, both ranges, trained at 128.
"""

from collections.abc import Sequence
from functools import partial

from deltaproduct.experiments.experiment import Experiment, Scale
from deltaproduct.experiments.groups import BOTH, group_job, small_group_job
from deltaproduct.experiments.job import Job
from deltaproduct.experiments.s3 import CONFIGURATIONS
from deltaproduct.experiments.tables import accuracy_table
from deltaproduct.plots.figures import accuracy_by_length

GROUPS = ("S3", "S4", "A5", "S5")
HOUSEHOLDERS = (1, 2, 3, 4)
LAYERS = (2, 3, 4, 6, 8, 10)  # with n_h = 1, besides one layer


def fig5(scale: Scale, seeds: Sequence[int]) -> list[Job]:
    """The runs of `deltaproduct reproduce fig5`, those of one seed together."""
    jobs = []
    for seed in seeds:
        if scale == "cpu":
            for group in ("S3", "S4"):
                for n, neg in CONFIGURATIONS:
                    jobs.append(small_group_job(group, seed, num_householder=n, allow_neg_eigval=neg))
            continue
        for group in GROUPS:
            for neg in (True, False):
                for n in HOUSEHOLDERS:
                    jobs.append(group_job(group, seed, scale=scale, num_householder=n, allow_neg_eigval=neg))
            for layers in LAYERS if scale == "cpu-long" else range(2, 11):
                jobs.append(group_job(group, seed, scale=scale, num_householder=1, num_hidden_layers=layers))
    return jobs


FIG5 = Experiment(
    name="fig5",
    summary="S3, S4, A5, S5: n_h 1 to 4, 1 to 10 layers, both ranges (arXiv 2502.10297, Fig. 5)",
    jobs=fig5,
    table=accuracy_table,
    draw=partial(accuracy_by_length, title="Who tracks state beyond the training length?", metrics=BOTH),
    scales=("cpu", "cpu-long", "paper"),
)
