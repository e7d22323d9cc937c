"""One run of an experiment: what is trained, what is measured on it, and the doing of both in a folder of its own."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deltaproduct.errors import UsageError
from deltaproduct.evaluation import LengthResult, evaluate_lengths, evaluate_range, scores
from deltaproduct.files import read_json, write_json
from deltaproduct.models import SequenceModel
from deltaproduct.tasks import get_task
from deltaproduct.training import RunConfig, train
from deltaproduct.training.loop import CHECKPOINT, RUN, is_finished

RESULT = "result.json"
RUNS = "runs"
CURVE_POINTS = 200


@dataclass(frozen=True)
class Asked:
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
class Job:
    """One run of an experiment: the name of its folder, what tables call it, and all that decides its numbers."""

    name: str
    label: str
    config: RunConfig
    asked: Asked


def run_job(job: Job, out: Path, *, threads: int | None = None) -> dict[str, Any]:
    """Train and measure one job in out/runs/NAME; what was already finished there is read and not computed again.

    Returns:
        What result.json holds: the job's name and settings, "wall_seconds" of the training, "accuracy" and
        "sequence_accuracy" by length with a "curve" over the longest, or single numbers with a "scaled_accuracy" for a
        range of lengths, and "asked".
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if (result := finished_result(job, out)) is not None:
        return result
    folder = out / RUNS / job.name
    if not is_finished(folder, job.config):
        train(job.config, folder, resume=True, show=False)
    model = SequenceModel.from_pretrained(folder / CHECKPOINT)
    result = described(job, model) | {"wall_seconds": read_json(folder / RUN)["wall_seconds"]}
    result |= measure(model, job) | {"asked": plain(job.asked)}
    write_json(folder / RESULT, result)
    return result


def finished_result(job: Job, out: Path) -> dict[str, Any] | None:
    """The result of this very job, asked for the very same, if it is there."""
    folder = out / RUNS / job.name
    if not (folder / RESULT).exists() or not is_finished(folder, job.config):
        return None
    result: dict[str, Any] = read_json(folder / RESULT)
    return result if result.get("asked") == plain(job.asked) else None


def plain(asked: Asked) -> dict[str, Any]:
    """As JSON gives it back."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(asked).items()}


def described(job: Job, model: SequenceModel) -> dict[str, Any]:
    """What a reader of a table wants to know of a run, in plain values."""
    training, config = job.config.training, job.config.model
    longest = training.lengths[-1]
    return {
        "name": job.name,
        "label": job.label,
        "task": training.task,
        "chance": get_task(training.task).chance,
        "mixer": config.mixer,
        "num_hidden_layers": config.num_hidden_layers,
        "num_householder": config.num_householder,
        "allow_neg_eigval": config.allow_neg_eigval,
        "parameters": model.num_parameters,
        "state_size": model.state_size_after(1 + longest),
        "seed": training.seed,
        "steps": training.steps,
        "training_length": longest,
        "checkpoint": str(Path(RUNS) / job.name / CHECKPOINT),
    }


def measure(model: SequenceModel, job: Job) -> dict[str, Any]:
    """The figures of merit that the job asks for."""
    task, asked = get_task(job.config.training.task), job.asked
    if asked.length_range is not None:
        found = evaluate_range(model, task, asked.length_range, sequences=asked.sequences)
        return {
            "accuracy": found.accuracy,
            "scaled_accuracy": found.scaled_accuracy,
            "sequence_accuracy": found.sequence_accuracy,
        }
    results = evaluate_lengths(model, task, asked.lengths, sequences=asked.sequences)
    return {**scores(results), "curve": accuracy_curve(results[max(results)])}


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
