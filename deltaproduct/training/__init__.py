"""Training: configuration, loop, checkpoints and logs of a run."""

from typing import TYPE_CHECKING

from deltaproduct.late import late

if TYPE_CHECKING:
    from deltaproduct.training.config import RunConfig, TrainConfig
    from deltaproduct.training.loop import train

__all__ = ["RunConfig", "TrainConfig", "train"]

__getattr__, __dir__ = late(
    __name__,
    {
        "config": ("RunConfig", "TrainConfig"),
        "loop": ("train",),
    },
)
