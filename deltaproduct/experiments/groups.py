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
    small_curriculum,
    state_tracking_model,
)
from deltaproduct.experiments.state_tracking import STATE_TRACKING
from deltaproduct.models import ModelConfig
from deltaproduct.tasks import get_task
from deltaproduct.training import RunConfig, TrainConfig

BOTH = ("sequence_accuracy", "accuracy")  # the papers' figure of merit, and the tokens'


def group_job(name: str, seed: int, *, scale: str, longest: int = 128, prefix: str = "", **changes: Any) -> Job:
    """A run on task `name`; `changes` are fields of `ModelConfig`.

    Args:
        longest: length that is trained at, and tested up to sixteen times of.
        prefix: of the run's name, before its layers, n_h, range and seed.
    """
    task = get_task(name)
    if scale == "paper":
        model, training, asked = sized(task, PAPER_MODEL, **changes), paper_training(task, seed), PAPER_ASKED
    else:
        model = sized(task, STATE_TRACKING | LARGER_GROUPS | blocks(changes), **changes)
        training = curriculum(task, seed, longest=longest)
        asked = Asked(tuple(longest << i for i in range(5)), sequences=256)
    return named(prefix or name, model, training, asked)


def small_group_job(name: str, seed: int, *, prefix: str = "", **changes: Any) -> Job:
    """A run of a minute: groups of up to two dozen elements fit hidden 64. Arguments as for `group_job`."""
    task = get_task(name)
    model = state_tracking_model(task, **blocks(changes), **changes)
    training = small_curriculum(task, seed)
    return named(prefix or name, model, training, Asked((128, 512), sequences=256))


def blocks(changes: dict[str, Any]) -> dict[str, Any]:
    """Several layers have MLPs between them, as in the papers; one layer has none (`recipes.STATE_TRACKING`)."""
    return {"intermediate_size": None} if changes.get("num_hidden_layers", 1) > 1 else {}


def named(prefix: str, model: ModelConfig, training: TrainConfig, asked: Asked) -> Job:
    """A job whose name and label say what sets it apart: layers, n_h, range and seed."""
    layers = model.num_hidden_layers
    parts = [
        prefix,
        f"l{layers}" if layers > 1 else "",
        f"n{getattr(model.mixer, 'num_householder', 1)}",
        "neg" if model.mixer.allow_neg_eigval else "pos",
        f"seed{training.seed}",
    ]
    shown = label(model) + (f", {layers} layers" if layers > 1 else "")
    return Job("-".join(filter(None, parts)), shown, RunConfig(training, model), asked)
