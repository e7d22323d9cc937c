"""What the training loop asks of an objective: what is trained on, and what its loss is.

The loop does the rest: rate, clipping, the optimiser's step, metrics, checkpoints, and the end.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from deltaproduct.models import ModelConfig, SequenceModel
from deltaproduct.training.checkpoint import Progress
from deltaproduct.training.config import OptimizerConfig
from deltaproduct.training.loop import OneProcess


@dataclass(frozen=True)
class StepReport:
    """What a step came to.

    Attributes:
        figures: for a line of metrics, in its order; "loss" is among them.
        info: for the bar of progress.
        divergence: why training cannot go on, as a clause; None where it can.
        safe_to_save: whether a checkpoint is a good one now.
    """

    figures: Mapping[str, float]
    info: str
    divergence: str | None = None
    safe_to_save: bool = True


class Objective(Protocol):
    """What a model is trained for.

    Attributes:
        settings: how it is trained.
        name: of what is trained on, for a bar's title; empty: the run's folder says it.
        kept: the class of what is kept of a run from step to step, in `Progress.kept`; a new one is a run's beginning.
        validates: whether `validate` has something to say at a checkpoint.
    """

    name: str
    kept: type[Any]
    validates: bool

    @property
    def settings(self) -> OptimizerConfig: ...

    def check(self, model: ModelConfig, ranks: OneProcess) -> None:
        """`UsageError` unless model, data and processes fit together. Nothing has been written yet."""

    def write_files(self, out: Path) -> None:
        """Write what a run's folder has beside what every run has."""

    def module(self, model: SequenceModel, ranks: OneProcess) -> nn.Module:
        """What `backward` calls: the model, or a module around it whose `model` it is."""

    def backward(self, module: nn.Module, progress: Progress[Any], ranks: OneProcess) -> Tensor:
        """Leave the gradient of the step after `progress` in the parameters, as the mean over processes of what each of
        them leaves there.

        Args:
            module: what `module` gave, or what `ranks.wrap` made of it.

        Returns:
            What `after_step` needs, float32 [n]: this process's summand of each number; the first one tells of a loss
            that is not finite.
        """

    def after_step(self, progress: Progress[Any], sums: list[float]) -> StepReport:
        """Bring `progress.kept` on; `progress.step` counts the step already.

        Args:
            sums: over all processes, of what `backward` gave.
        """

    def speed(self) -> Mapping[str, float]:
        """How fast the steps were since this was called last, for a line of metrics."""

    def validate(self, module: nn.Module, ranks: OneProcess) -> Mapping[str, float]:
        """Figures from data that is not trained on, for the line of metrics of a checkpoint."""
