"""Training: configuration, loop, checkpoints and metrics of a run."""

from typing import TYPE_CHECKING, Any

from deltaproduct.late import late
from deltaproduct.renamed import renamed_names

if TYPE_CHECKING:
    from deltaproduct.training.config import LanguageConfig, Run, TrainConfig
    from deltaproduct.training.loop import train

    RunConfig = Run[TrainConfig]

__all__ = ["LanguageConfig", "Run", "TrainConfig", "train"]

_late, __dir__ = late(
    __name__,
    {
        "config": ("LanguageConfig", "Run", "TrainConfig"),
        "loop": ("train",),
    },
)
_renamed = renamed_names(__name__, {"RunConfig": "Run"})


def __getattr__(name: str) -> Any:
    return _renamed(name) if name == "RunConfig" else _late(name)
