"""What a state is good for: recall of pairs and tracking of a group, each against the size of the state.

Attention's cache grows and recalls anything, but tracks little; a state of constant size tracks as far as its
transitions reach, and recalls as much as it can hold. Every model is trained on both tasks at several sizes of its
heads.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from deltaproduct.experiments.experiment import Experiment, Scale
from deltaproduct.experiments.recipes import SMALL, label, sized
from deltaproduct.experiments.tables import state_size_table
from deltaproduct.experiments.task_job import EvaluationSpec, TaskJob
from deltaproduct.plots.figures import accuracy_by_state_size
from deltaproduct.tasks import get_task
from deltaproduct.training import Run, TrainConfig

MODELS: dict[str, dict[str, Any]] = {
    "transformer": {"mixer": "attention"},
    "gla": {"mixer": "gla"},
    "deltanet": {"mixer": "deltanet"},
    "n2": {"num_householder": 2},
}
HEAD_DIMS = (4, 8, 16, 32)


# Task → lengths, and the steps at each of them.
SCHEDULES = {"mqar_16_64": ((64,), (800,)), "S3": ((8, 16, 64), (200, 200, 400))}


def recall_vs_tracking(scale: Scale, seeds: Sequence[int]) -> list[TaskJob]:
    """The runs of `deltaproduct reproduce recall-vs-tracking`: on a laptop one seed at three sizes."""
    quick = scale == "cpu"
    jobs = []
    for seed in seeds[:1] if quick else seeds:
        for name, (lengths, stages) in SCHEDULES.items():
            steps = [n if quick else 5 * n for n in stages]
            training = TrainConfig(
                task=name,
                steps=sum(steps),
                seed=seed,
                lengths=lengths,
                batch_sizes=(64,),
                stage_steps=tuple(steps[:-1]),
                stage_loss=None,
                lr=5e-3,
            )
            for head_dim in HEAD_DIMS[:3] if quick else HEAD_DIMS:
                for model_name, changes in MODELS.items():
                    fields = {**SMALL, "num_hidden_layers": 2, "head_dim": head_dim}
                    model = sized(get_task(name), fields, **changes)
                    jobs.append(
                        TaskJob(
                            f"{name}-{model_name}-k{head_dim}-seed{seed}",
                            label(model),
                            Run(training, model),
                            EvaluationSpec(lengths[-1:], sequences=256),
                        )
                    )
    return jobs


RECALL_VS_TRACKING = Experiment(
    name="recall-vs-tracking",
    summary="accuracy on recall and on tracking against the state's size",
    jobs=recall_vs_tracking,
    table=state_size_table,
    draw=partial(accuracy_by_state_size, title="Recall and tracking against the state's size"),
    scales=("cpu", "cpu-long"),
)
