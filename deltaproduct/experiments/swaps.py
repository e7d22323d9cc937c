"""How much each token may move, and S5 with single reflections (arXiv 2411.12537, section 5.2, and its Theorem 3).

A swap is one reflection, so DeltaNet[-1,1] follows S5 where the inputs are swaps alone; elements that move up to three
points need n_h = 2; all of S5 needs 4, unless each symbol is given over several tokens, which gives one reflection per
token time to act (multi-token).
"""

from collections.abc import Sequence
from functools import partial

from deltaproduct.experiments.experiment import Experiment, Scale
from deltaproduct.experiments.groups import BOTH, group_job
from deltaproduct.experiments.job import Job
from deltaproduct.experiments.tables import accuracy_table
from deltaproduct.plots.figures import accuracy_by_length

TASKS = ("S5_only_swaps", "S5_limit_to_3", "S5_4_tokens", "S5")
MODELS = ((1, True), (1, False), (2, True))  # (num_householder, allow_neg_eigval)


def swaps(scale: Scale, seeds: Sequence[int]) -> list[Job]:
    """The runs of `deltaproduct reproduce swaps`."""
    longest = 16 if scale == "cpu" else 128
    return [
        group_job(task, seed, scale=scale, longest=longest, num_householder=num_householder, allow_neg_eigval=neg)
        for seed in seeds
        for task in TASKS
        for num_householder, neg in MODELS
    ]


SWAPS = Experiment(
    name="swaps",
    summary="S5 by swaps alone, up to three points, several tokens a symbol (arXiv 2411.12537, 5.2)",
    jobs=swaps,
    table=accuracy_table,
    draw=partial(accuracy_by_length, title="How much may each token move?", metrics=BOTH),
    scales=("cpu", "cpu-long", "paper"),
)
