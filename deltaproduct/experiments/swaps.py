"""How much each token may move, and S5 with single reflections (arXiv 2411.12537, section 5.2, and its Theorem 3).

A swap is one reflection, so DeltaNet[-1,1] follows S5 where the inputs are swaps alone; elements that move up to three
points need n_h = 2, and all of S5 needs 4. With three fillers after each symbol single reflections have time for all of
it, but they have to know how far the symbol lies back, which takes more layers: the paper has 5.
"""

from collections.abc import Sequence
from functools import partial

from deltaproduct.experiments.experiment import Experiment, Scale
from deltaproduct.experiments.groups import BOTH, group_job
from deltaproduct.experiments.job import Job
from deltaproduct.experiments.tables import accuracy_table
from deltaproduct.plots.figures import accuracy_by_length

TASKS = ("S5_only_swaps", "S5_limit_to_3", "S5")
MODELS = ((1, True), (1, False), (2, True))  # (num_householder, allow_neg_eigval)
FILLERS, FILLERS_LAYERS = "S5_4_s_tokens", 5


def swaps(scale: Scale, seeds: Sequence[int]) -> list[Job]:
    """The runs of `deltaproduct reproduce swaps`; half an hour on a laptop does not suffice for five layers."""
    job = partial(group_job, scale=scale, longest=16 if scale == "cpu" else 128)
    jobs = []
    for seed in seeds:
        for task in TASKS:
            jobs += [job(task, seed, num_householder=n, allow_neg_eigval=neg) for n, neg in MODELS]
        if scale != "cpu":
            for neg in (True, False):
                jobs.append(
                    job(FILLERS, seed, num_householder=1, num_hidden_layers=FILLERS_LAYERS, allow_neg_eigval=neg)
                )
    return jobs


SWAPS = Experiment(
    name="swaps",
    summary="S5 by swaps alone, up to three points, symbols with fillers (arXiv 2411.12537, 5.2)",
    jobs=swaps,
    table=accuracy_table,
    draw=partial(accuracy_by_length, title="How much may each token move?", metrics=BOTH),
    scales=("cpu", "cpu-long", "paper"),
)
