"""Training: configuration, loop, checkpoints and logs of a run."""

from deltaproduct.training.config import RunConfig, TrainConfig
from deltaproduct.training.loop import train

__all__ = ["RunConfig", "TrainConfig", "train"]
