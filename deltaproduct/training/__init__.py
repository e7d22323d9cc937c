"""Training: configuration, loop, checkpoints and metrics of a run."""

from typing import TYPE_CHECKING

from deltaproduct.late import late

if TYPE_CHECKING:
    from deltaproduct.training.config import LanguageConfig, Run, TrainConfig
    from deltaproduct.training.loop import train
    from deltaproduct.training.objectives.language import LanguageObjective
    from deltaproduct.training.objectives.task import TaskObjective

    RunConfig = Run[TrainConfig]

__all__ = ["LanguageConfig", "LanguageObjective", "Run", "TaskObjective", "TrainConfig", "train"]

__getattr__, __dir__ = late(
    __name__,
    {
        "config": ("LanguageConfig", "Run", "TrainConfig"),
        "loop": ("train",),
        "objectives.language": ("LanguageObjective",),
        "objectives.task": ("TaskObjective",),
    },
    renamed={"RunConfig": "Run"},
)
