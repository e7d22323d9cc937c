"""One run on a group's word problem, at any scale: what the experiments on groups have in common."""

from typing import Any

from deltaproduct.experiments.job import Asked, Job
from deltaproduct.experiments.recipes import (
    LARGER_GROUPS,
    PAPER_ASKED,
    PAPER_MODEL,
    curriculum,
    label,
    paper_training,
    sized,
    state_tracking_model,
)
from deltaproduct.tasks import get_task
from deltaproduct.training import RunConfig

BOTH = ("sequence_accuracy", "accuracy")  # the papers' figure of merit, and the tokens'


def group_job(
    name: str, scale: str, seed: int, *, longest: int = 128, prefix: str = "", **changes: Any
) -> Job:
    """A run on task `name`; `changes` are fields of `ModelConfig`.

    Args:
        longest: length that is trained at, and tested up to sixteen times of.
        prefix: of the run's name, before its layers, n_h, range and seed.

    Several layers have MLPs between them, as in the papers; one layer has none on a laptop (`recipes.STATE_TRACKING`).
    """
    task = get_task(name)
    if scale == "paper":
        model, training, asked = sized(task, PAPER_MODEL | changes), paper_training(task, seed), PAPER_ASKED
    else:
        layers = changes.get("num_hidden_layers", 1)
        blocks = {"intermediate_size": None if layers > 1 else 0}
        model = state_tracking_model(task, **{**LARGER_GROUPS, **blocks, **changes})
        training = curriculum(task, seed, longest=longest)
        asked = Asked(tuple(longest << i for i in range(5)), sequences=256)
    parts = [
        prefix or name,
        f"l{model.num_hidden_layers}" if model.num_hidden_layers > 1 else "",
        f"n{model.num_householder}",
        "neg" if model.allow_neg_eigval else "pos",
        f"seed{seed}",
    ]
    shown = label(model)
    if model.num_hidden_layers > 1:
        shown += f", {model.num_hidden_layers} layers"
    return Job("-".join(filter(None, parts)), shown, RunConfig(training, model), asked)
