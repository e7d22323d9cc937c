"""State tracking in text: swaps in code, trades between people, chess moves (arXiv 2404.08819 has the encodings).

The papers publish no training for these; the recipe is the groups' own, at lengths that hold a dozen events or more.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from deltaproduct.experiments.experiment import Experiment, Scale
from deltaproduct.experiments.recipes import label, state_tracking_model
from deltaproduct.experiments.tables import accuracy_table
from deltaproduct.experiments.task_job import EvaluationSpec, TaskJob
from deltaproduct.plots.figures import accuracy_by_length
from deltaproduct.tasks import get_task
from deltaproduct.training import Run, TrainConfig

KINDS = ("code_swaps_5", "code_temp_5", "code_if_5", "entities_5", "chess_5")
MODELS: dict[str, dict[str, Any]] = {
    "transformer": {"mixer": "attention"},
    "n1-neg": {"num_householder": 1},
    "n2-neg": {"num_householder": 2},
    "n2-pos": {"num_householder": 2, "allow_neg_eigval": False},
}
LENGTH = 128


def text(scale: Scale, seeds: Sequence[int]) -> list[TaskJob]:
    """The runs of `deltaproduct reproduce text`: plain text in one layer, and at the longer scale tokens as well, and
    two layers with an MLP."""
    quick = scale == "cpu"
    tasks = [f"{kind}_text" for kind in KINDS] + ([] if quick else list(KINDS))
    blocks = {} if quick else {"num_hidden_layers": 2, "intermediate_size": None}
    jobs = []
    for seed in seeds:
        for name in tasks:
            task = get_task(name)
            training = TrainConfig(
                task=name,
                steps=300 if quick else 3000,
                seed=seed,
                lengths=(LENGTH,),
                batch_sizes=(64,),
                stage_loss=None,
            )
            for model_name, changes in MODELS.items():
                model = state_tracking_model(task, **blocks, **changes)
                evaluation = EvaluationSpec((LENGTH, 4 * LENGTH), sequences=128)
                run = Run(training, model)
                jobs.append(TaskJob(f"{name}-{model_name}-seed{seed}", label(model), run, evaluation))
    return jobs


TEXT = Experiment(
    name="text",
    summary="chess, code and trades in plain text (encodings of arXiv 2404.08819)",
    jobs=text,
    table=accuracy_table,
    draw=partial(accuracy_by_length, title="Who tracks state in text?"),
    scales=("cpu", "cpu-long"),
)
