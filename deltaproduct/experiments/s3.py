"""The papers' central claim at its smallest: who tracks S3 past the training length? (arXiv 2502.10297, Fig. 5.)

One layer, trained at length 128, in four configurations: n_h ∈ {1, 2} × eigenvalue range {[0,1], [−1,1]}. All four have
the same budget and the same schedule, the curriculum's first stage included: it ends after a fixed number of steps.
"""

from deltaproduct.experiments.recipes import state_tracking_model
from deltaproduct.experiments.runner import Job
from deltaproduct.tasks import get_task
from deltaproduct.training import RunConfig, TrainConfig

LENGTHS = (128, 512, 2048, 8192)
CONFIGURATIONS = ((2, True), (2, False), (1, True), (1, False))  # (num_householder, allow_neg_eigval)
FIRST_STAGE = 45  # steps at length 8


def label(num_householder: int, allow_neg_eigval: bool) -> str:
    """As the papers write it: DeltaProduct_2[-1,1]."""
    return f"DeltaProduct_{num_householder}{'[-1,1]' if allow_neg_eigval else '[0,1]'}"


def s3(*, seeds: int = 3, first_seed: int = 0, steps: int = 350) -> list[Job]:
    """The runs of `deltaproduct reproduce s3`."""
    task = get_task("S3")
    jobs = []
    for seed in range(first_seed, first_seed + seeds):
        for num_householder, allow_neg_eigval in CONFIGURATIONS:
            model = state_tracking_model(task, num_householder=num_householder, allow_neg_eigval=allow_neg_eigval)
            training = TrainConfig(
                task=task.name,
                steps=steps,
                seed=seed,
                lengths=(8, 128),
                batch_sizes=(256, 64),
                stage_steps=(FIRST_STAGE,),
                stage_loss=None,
            )
            name = f"n{num_householder}-{'neg' if allow_neg_eigval else 'pos'}-seed{seed}"
            jobs.append(Job(name, label(num_householder, allow_neg_eigval), RunConfig(training, model)))
    return jobs
