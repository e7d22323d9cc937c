"""Formal languages of the Chomsky hierarchy: all models of arXiv 2502.10297, Table 2, and arXiv 2411.12537, Table 3."""

from collections.abc import Sequence
from functools import partial

from deltaproduct.experiments.experiment import Experiment, Scale
from deltaproduct.experiments.formal import MODELS, PAPERS, formal_job
from deltaproduct.experiments.job import Job
from deltaproduct.experiments.tables import scaled_table
from deltaproduct.plots.figures import accuracy_by_model

TASKS = ("parity", "mod_arithmetic", "mod_arithmetic_brackets")
QUICK_TASK = "mod_arithmetic_no_star"


def table_chomsky(scale: Scale, seeds: Sequence[int]) -> list[Job]:
    """The runs of `deltaproduct reproduce table-chomsky`. On a laptop in half an hour: sums and differences modulo 5
    alone (parity has an experiment of its own, and products take more steps than there is time for), one seed, and
    neither GLA nor n_h = 3 and 4."""
    if scale == "cpu":
        names = [name for name in MODELS if not name.startswith(("n3", "n4", "gla"))]
        return [formal_job(QUICK_TASK, name, scale, seed) for seed in seeds[:1] for name in names]
    return [formal_job(task, name, scale, seed) for seed in seeds for task in TASKS for name in MODELS]


TABLE_CHOMSKY = Experiment(
    name="table-chomsky",
    summary="parity and arithmetic modulo 5, all models (arXiv 2502.10297, Table 2)",
    jobs=table_chomsky,
    table=partial(scaled_table, papers=PAPERS),
    draw=partial(accuracy_by_model, title="Trained up to length 40, asked at 40 to 256", papers=PAPERS),
    scales=("cpu", "cpu-long", "paper"),
)
