"""Small training runs, and whether two came to the same."""

import torch

from deltaproduct.experiments.recipes import state_tracking_model
from deltaproduct.models import SequenceModel
from deltaproduct.tasks import get_task
from deltaproduct.training import Run, TrainConfig

TINY = {"hidden_size": 16, "num_heads": 2, "head_dim": 4}


def run_config(**changes):
    short = {"steps": 12, "lengths": (4, 8), "batch_sizes": (8, 4), "stage_steps": (5,), "warmup_steps": 3}
    training = TrainConfig(**{**short, **changes})
    return Run(training, state_tracking_model(get_task(training.task), **TINY))


def weights(folder):
    return SequenceModel.from_pretrained(folder / "checkpoint").state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
