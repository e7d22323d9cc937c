"""The papers' central claim at its smallest: who tracks S3 past the training length? (arXiv 2502.10297, Fig. 5.)

One layer, trained at length 128, in four configurations: n_h ∈ {1, 2} × eigenvalue range {[0,1], [−1,1]}. All four have
the same budget and the same schedule, the curriculum's first stage included: it ends after a fixed number of steps.
"""

from collections.abc import Sequence
from functools import partial

from deltaproduct.experiments.experiment import Experiment, Scale
from deltaproduct.experiments.job import Asked, Job
from deltaproduct.experiments.recipes import (
    PAPER_ASKED,
    PAPER_MODEL,
    label,
    paper_training,
    sized,
    state_tracking_model,
)
from deltaproduct.experiments.tables import accuracy_table
from deltaproduct.plots.figures import accuracy_by_length
from deltaproduct.tasks import get_task
from deltaproduct.training import RunConfig, TrainConfig

LENGTHS = (128, 512, 2048, 8192)
CONFIGURATIONS = ((2, True), (2, False), (1, True), (1, False))  # (num_householder, allow_neg_eigval)
FIRST_STAGE = 45  # steps at length 8


def s3(scale: Scale, seeds: Sequence[int]) -> list[Job]:
    """The runs of `deltaproduct reproduce s3`."""
    task = get_task("S3")
    jobs = []
    for seed in seeds:
        for num_householder, allow_neg_eigval in CONFIGURATIONS:
            changes = {"num_householder": num_householder, "allow_neg_eigval": allow_neg_eigval}
            if scale == "paper":
                model = sized(task, PAPER_MODEL, **changes)
                training, asked = paper_training(task, seed), PAPER_ASKED
            else:
                model, asked = state_tracking_model(task, **changes), Asked(LENGTHS)
                training = TrainConfig(
                    task=task.name,
                    steps=350,
                    seed=seed,
                    lengths=(8, 128),
                    batch_sizes=(256, 64),
                    stage_steps=(FIRST_STAGE,),
                    stage_loss=None,
                )
            name = f"n{num_householder}-{'neg' if allow_neg_eigval else 'pos'}-seed{seed}"
            jobs.append(Job(name, label(model), RunConfig(training, model), asked))
    return jobs


S3 = Experiment(
    name="s3",
    summary="S3 in one layer, n_h 1 and 2, both ranges: the claim at its smallest",
    jobs=s3,
    table=accuracy_table,
    draw=partial(accuracy_by_length, title="Who tracks S3 beyond the training length? One layer"),
)
