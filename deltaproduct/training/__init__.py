"""Training: configuration, loop, checkpoints and metrics of a run."""

from typing import TYPE_CHECKING

from deltaproduct.late import late

if TYPE_CHECKING:
    from deltaproduct.training.config import LanguageConfig, Run, TrainConfig
    from deltaproduct.training.loop import train

    RunConfig = Run[TrainConfig]

__all__ = ["LanguageConfig", "Run", "TrainConfig", "train"]

__getattr__, __dir__ = late(
    __name__,
    {
        "config": ("LanguageConfig", "Run", "TrainConfig"),
        "loop": ("train",),
    },
    renamed={"RunConfig": "Run"},
)
