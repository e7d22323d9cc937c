"""A run of an experiment on a task: a model trained on it, and its accuracy by length or over a range of lengths."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from deltaproduct.errors import UsageError
from deltaproduct.evaluation import LengthResult, evaluate_lengths, evaluate_range, scores
from deltaproduct.experiments.job import Figures, Job, Result
from deltaproduct.models import SequenceModel
from deltaproduct.tasks import get_task
from deltaproduct.training import Run, TrainConfig, train

CURVE_POINTS = 200


@dataclass(frozen=True)
class EvaluationSpec:
    """What a trained model is measured by: its accuracy at each of some lengths, or over a range of them.

    Attributes:
        lengths: sequence lengths, BOS not counted.
        length_range: the shortest and the longest; lengths are drawn from it. One of both is given.
        sequences: sequences of each length, or in all.
    """

    lengths: tuple[int, ...] = ()
    length_range: tuple[int, int] | None = None
    sequences: int = 64

    def __post_init__(self) -> None:
        if bool(self.lengths) == (self.length_range is not None):
            raise UsageError("Ask for accuracy either at lengths or over a range of them.")


@dataclass(frozen=True)
class TaskJob(Job):
    """Training on a task.

    Its result has "accuracy" and "sequence_accuracy" by length with a "curve" over the longest, or single numbers with
    a "scaled_accuracy" for a range of lengths.
    """

    config: Run[TrainConfig]
    evaluation: EvaluationSpec
    entries: ClassVar[tuple[str, ...]] = (
        "name", "label", "task", "chance", "mixer", "num_hidden_layers", "num_householder", "allow_neg_eigval",
        "parameters", "state_size", "seed", "steps", "training_length", "checkpoint",
    )  # fmt: skip

    def train(self, folder: Path) -> None:
        train(self.config, folder, resume=True, show=False)

    def measure(self, model: SequenceModel, folder: Path) -> Result:
        task, spec = get_task(self.config.training.task), self.evaluation
        if spec.length_range is not None:
            found = evaluate_range(model, task, spec.length_range, sequences=spec.sequences)
            return {figure: getattr(found, figure) for figure in self.figures().numbers}
        results = evaluate_lengths(model, task, spec.lengths, sequences=spec.sequences)
        return {**scores(results), "curve": accuracy_curve(results[max(results)])}

    @property
    def steps(self) -> int:
        return self.config.training.steps

    def run_config(self, folder: Path) -> Run[TrainConfig]:
        return self.config

    def asked(self) -> dict[str, Any]:
        values = asdict(self.evaluation)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def figures(self) -> Figures:
        if self.evaluation.length_range is not None:
            return Figures(("accuracy", "scaled_accuracy", "sequence_accuracy"))
        lengths = [str(n) for n in self.evaluation.lengths]
        tables = {"accuracy": lengths, "sequence_accuracy": lengths}
        return Figures(tables=tables, curve=("length", "accuracy", "sequence_accuracy"))

    def details(self, config: Run[Any], model: SequenceModel) -> dict[str, Any]:
        training = self.config.training
        longest = training.lengths[-1]
        return {
            "task": training.task,
            "chance": get_task(training.task).chance,
            "state_size": model.state_size_after(1 + longest),
            "training_length": longest,
        }

    def changed(
        self, *, steps: int | None = None, lengths: tuple[int, ...] | None = None, sequences: int | None = None
    ) -> Self:
        training, spec = self.config.training, self.evaluation
        if steps is not None:
            training = replace(training, steps=steps)
        if sequences is not None:
            spec = replace(spec, sequences=sequences)
        if lengths is not None:
            if spec.length_range is not None:
                raise UsageError(f"{self.name} is measured over a range of lengths, which --lengths cannot change.")
            spec = EvaluationSpec(lengths, sequences=spec.sequences)
        return replace(self, config=replace(self.config, training=training), evaluation=spec)

    def format_progress(self, metrics: Mapping[str, Any]) -> str:
        return f"length {metrics['length']}  loss {metrics['loss']:.4f}  accuracy {metrics['accuracy']:.3f}"

    def format_figures(self, result: Result) -> str:
        if self.evaluation.length_range is not None:
            return f"accuracy {result['accuracy']:.3f}, scaled {result['scaled_accuracy']:.3f}"
        return "  ".join(f"{n}: {a:.3f}" for n, a in result["accuracy"].items())


def accuracy_curve(result: LengthResult) -> dict[str, list[float]]:
    """Accuracy of the prefixes of the longest sequences, at scored positions spaced about evenly on a logarithmic axis:
    of their tokens, and of the prefixes as wholes."""
    scored = result.scored_by_position
    right = (result.by_position.nan_to_num().double() * scored).cumsum(0)
    total = right / scored.cumsum(0).clamp(min=1)
    points = torch.logspace(0, torch.log10(torch.tensor(float(result.length))).item(), CURVE_POINTS).round().long()
    last_scored = torch.arange(1 + result.length).masked_fill(scored == 0, -1).cummax(0).values
    points = last_scored[points.clamp(1, result.length)].unique()
    points = points[points >= 0]
    return {
        "length": points.tolist(),
        "accuracy": _rounded(total[points].tolist()),
        "sequence_accuracy": _rounded(result.prefix_by_position[points].tolist()),
    }


def _rounded(shares: Sequence[float]) -> list[float]:
    return [round(share, 6) for share in shares]
