"""Parity: the smallest language that needs a negative eigenvalue (arXiv 2411.12537, Theorem 1 and Table 3).

Transformers, gates and eigenvalues in [0,1] do not get past the lengths that they were trained at.
"""

from collections.abc import Sequence
from functools import partial

from deltaproduct.experiments.experiment import Experiment, Scale
from deltaproduct.experiments.formal import PAPERS, formal_job
from deltaproduct.experiments.job import Job
from deltaproduct.experiments.tables import scaled_table
from deltaproduct.plots.figures import accuracy_by_model

NAMES = ("transformer", "gla", "mlstm", "mamba-pos", "deltanet-pos", "slstm", "mamba-neg", "deltanet-neg", "n2-neg")


def parity(scale: Scale, seeds: Sequence[int]) -> list[Job]:
    """The runs of `deltaproduct reproduce parity`, those of one seed together."""
    return [formal_job("parity", name, scale, seed) for seed in seeds for name in NAMES]


PARITY = Experiment(
    name="parity",
    summary="parity at lengths 40 to 256, nine models (arXiv 2411.12537, Table 3)",
    jobs=parity,
    table=partial(scaled_table, papers=PAPERS),
    draw=partial(accuracy_by_model, title="Parity, trained up to length 40, asked at 40 to 256", papers=PAPERS),
)
