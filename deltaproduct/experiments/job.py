"""One run of an experiment: what is trained, what is measured on it, and the doing of both in a folder of its own."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from deltaproduct.errors import UsageError
from deltaproduct.evaluation import LengthResult, evaluate_lengths, evaluate_range, scores
from deltaproduct.files import read_json, seal_folder, write_json
from deltaproduct.models import ModelConfig, SequenceModel
from deltaproduct.tasks import get_task
from deltaproduct.training import RunConfig, train
from deltaproduct.training.run_folder import CHECKPOINT, CONFIG, METRICS, RUN, is_finished, open_run

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


class AnyJob(Protocol):
    """One run of an experiment, whatever is trained and measured in it.

    Attributes:
        name: of its folder in out/runs.
        label: what tables and figures call it.
        steps: of its training, for a progress bar.
    """

    @property
    def name(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def steps(self) -> int: ...

    def changed(
        self, *, steps: int | None = None, lengths: tuple[int, ...] | None = None, sequences: int | None = None
    ) -> "AnyJob":
        """The job with other training steps, lengths to evaluate at, or evaluation sequences."""

    def prepare(self, out: Path) -> None:
        """Make what it needs in `out`, before any job runs; `UsageError` if its folder holds another run."""

    def finished(self, out: Path) -> dict[str, Any] | None:
        """Its result, if it is there."""

    def run(self, out: Path, *, threads: int | None = None) -> dict[str, Any]:
        """Train and measure it, going on where it was cut off; the result, which result.json in its folder holds."""

    def in_training(self, metrics: Mapping[str, Any]) -> str:
        """A line of its metrics.jsonl, for a line of progress."""

    def in_short(self, result: Mapping[str, Any]) -> str:
        """Its result, in a line."""


@dataclass(frozen=True)
class Job:
    """Training on a task: the name of the run's folder, what tables call it, and all that decides its numbers."""

    name: str
    label: str
    config: RunConfig
    asked: Asked

    @property
    def steps(self) -> int:
        return self.config.training.steps

    def changed(
        self, *, steps: int | None = None, lengths: tuple[int, ...] | None = None, sequences: int | None = None
    ) -> "Job":
        training, asked = self.config.training, self.asked
        if steps is not None:
            training = replace(training, steps=steps)
        if sequences is not None:
            asked = replace(asked, sequences=sequences)
        if lengths is not None:
            if asked.length_range is not None:
                raise UsageError(f"{self.name} is measured over a range of lengths, which --lengths cannot change.")
            asked = Asked(lengths, sequences=asked.sequences)
        return replace(self, config=replace(self.config, training=training), asked=asked)

    def prepare(self, out: Path) -> None:
        if (out / RUNS / self.name).exists():
            open_run(self.config, out / RUNS / self.name, resume=True)

    def finished(self, out: Path) -> dict[str, Any] | None:
        return finished_result(self, out)

    def run(self, out: Path, *, threads: int | None = None) -> dict[str, Any]:
        return run_job(self, out, threads=threads)

    @staticmethod
    def in_training(metrics: Mapping[str, Any]) -> str:
        return f"length {metrics['length']}  loss {metrics['loss']:.4f}  accuracy {metrics['accuracy']:.3f}"

    @staticmethod
    def in_short(result: Mapping[str, Any]) -> str:
        if isinstance(result["accuracy"], dict):
            figures = "  ".join(f"{n}: {a:.3f}" for n, a in result["accuracy"].items())
        else:
            figures = f"accuracy {result['accuracy']:.3f}, scaled {result['scaled_accuracy']:.3f}"
        return f"{result['label']} seed {result['seed']}  {figures}  ({result['wall_seconds']:.0f} s)"


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
    result = described(job, model) | {"wall_seconds": wall_seconds(folder)}
    result |= measure(model, job) | {"asked": plain(job.asked)}
    write_json(folder / RESULT, result)
    seal_folder(folder, [CONFIG, RUN, METRICS, RESULT])
    return result


def wall_seconds(folder: Path) -> float:
    """How long the finished run in a folder was trained; `UsageError` if its run.json does not say so."""
    values = read_json(folder / RUN)
    found = values.get("wall_seconds") if isinstance(values, dict) else None
    if not isinstance(found, int | float) or isinstance(found, bool):
        raise UsageError(f"{folder / RUN} is damaged: it does not say how long the run was trained.")
    return found


def finished_result(job: Job, out: Path) -> dict[str, Any] | None:
    """The result of this very job, asked for the very same, if it is there."""
    folder = out / RUNS / job.name
    if not (folder / RESULT).exists() or not is_finished(folder, job.config):
        return None
    one = ("accuracy", "scaled_accuracy", "sequence_accuracy") if job.asked.length_range is not None else ()
    by_length = () if one else ("accuracy", "sequence_accuracy")
    lists = () if one else ("length", "accuracy", "sequence_accuracy")
    lengths = [str(n) for n in job.asked.lengths]
    return read_result(folder / RESULT, job.name, plain(job.asked), one, dict.fromkeys(by_length, lengths), lists)


def read_result(
    path: Path,
    name: str,
    asked: dict[str, Any],
    figures: Sequence[str],
    tables: Mapping[str, Collection[str]],
    curve: Sequence[str],
) -> dict[str, Any] | None:
    """What a run's result.json holds; None if it was asked for something else.

    Args:
        name, asked: of the run.
        figures: entries that are numbers, beside those that every result has.
        tables: entries that hold a number under each of some names.
        curve: the lists of numbers, of one length, that its curve consists of.

    Raises:
        UsageError: it is no result of this run.
    """
    result = read_json(path, finite=False)
    if isinstance(result, dict) and "asked" in result and result["asked"] != asked:
        return None

    def number(x: Any) -> bool:
        return isinstance(x, int | float) and not isinstance(x, bool)

    def wrong() -> str | None:
        if not isinstance(result, dict) or "asked" not in result:
            return "it does not say what was asked for"
        if result.get("name") != name:
            return f"it is of the run {result.get('name')!r:.80}"
        for entry in ("label", "task", "mixer"):
            if not isinstance(result.get(entry), str):
                return f"{entry} is no text"
        for entry in ("parameters", "seed", "steps", "training_length", "wall_seconds", *figures):
            if not number(result.get(entry)):
                return f"{entry} is no number"
        for entry, names in tables.items():
            table = result.get(entry)
            if not isinstance(table, dict) or set(table) != set(names) or not all(map(number, table.values())):
                return f"{entry} is no table of numbers for {', '.join(names)}"
        lists = result.get("curve") if curve else {}
        lists = [lists.get(entry) for entry in curve] if isinstance(lists, dict) else [None]
        if not all(isinstance(x, list) and len(x) == len(lists[0]) and all(map(number, x)) for x in lists):
            return f"its curve has no numbers for {', '.join(curve)}"
        return None

    if why := wrong():
        raise UsageError(f"{path} is damaged: {why}. Remove it, and the run is measured again.")
    return result


def plain(asked: Asked) -> dict[str, Any]:
    """As JSON gives it back."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(asked).items()}


def mixer_facts(model: ModelConfig) -> dict[str, Any]:
    """What results say of a model's mixer, under the same keys for all; where a mixer has no such option, the value
    that DeltaProduct has by default, as in all earlier results."""
    options = model.mixers[0]
    return {
        "mixer": model.mixer_names,
        "num_householder": getattr(options, "num_householder", 2),
        "allow_neg_eigval": getattr(options, "allow_neg_eigval", True),
    }


def described(job: Job, model: SequenceModel) -> dict[str, Any]:
    """What a reader of a table wants to know of a run, in plain values."""
    training, config = job.config.training, job.config.model
    longest = training.lengths[-1]
    return {
        "name": job.name,
        "label": job.label,
        "task": training.task,
        "chance": get_task(training.task).chance,
        **mixer_facts(config),
        "num_hidden_layers": config.num_hidden_layers,
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
