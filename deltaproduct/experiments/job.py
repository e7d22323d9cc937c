"""One run of an experiment: what is trained, what is measured on it, and the doing of both in a folder of its own.

A kind of job has two hooks, `train` and `measure` (task_job.py, language_job.py). What is common to all stands here.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch

from deltaproduct.errors import UsageError
from deltaproduct.files import read_json, seal_folder, write_json
from deltaproduct.models import ModelConfig, SequenceModel
from deltaproduct.renamed import renamed_names
from deltaproduct.training.config import Run
from deltaproduct.training.run_folder import CHECKPOINT, CONFIG, METRICS, RUN, is_finished, open_run

RESULT = "result.json"
RUNS = "runs"

Result = dict[str, Any]  # what result.json holds


class Figures(NamedTuple):
    """What a kind of job measures: the entries of its result beside those that every result has."""

    numbers: Sequence[str] = ()
    tables: Mapping[str, Collection[str]] = {}  # those that hold a number under each of some names
    curve: Sequence[str] = ()  # the lists of numbers, of one length, that the entry "curve" consists of


@dataclass(frozen=True)
class Job(ABC):
    """One run of an experiment: a record of all that decides its numbers.

    Attributes:
        name: of its folder in out/runs.
        label: what tables and figures call it.
        entries: what its result says of the run, in this order.
    """

    name: str
    label: str
    entries: ClassVar[tuple[str, ...]]

    @abstractmethod
    def train(self, folder: Path) -> None:
        """Train it in its folder, going on where it was cut off."""

    @abstractmethod
    def measure(self, model: SequenceModel, folder: Path) -> Result:
        """What is asked of the trained model, which lies in its folder: the entries of `figures`."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """Of its training, for a progress bar."""

    @abstractmethod
    def run_config(self, folder: Path) -> Run[Any]:
        """What is trained in its folder."""

    @abstractmethod
    def asked(self) -> dict[str, Any]:
        """What its model is measured by, in plain values: a result that was asked for something else is none of its."""

    @abstractmethod
    def figures(self) -> Figures:
        """What `measure` gives."""

    @abstractmethod
    def details(self, config: Run[Any], model: SequenceModel) -> dict[str, Any]:
        """Those of `entries` that only this kind of job has, with "task" and "training_length"."""

    @abstractmethod
    def changed(
        self, *, steps: int | None = None, lengths: tuple[int, ...] | None = None, sequences: int | None = None
    ) -> Self:
        """The job with other training steps, lengths to evaluate at, or evaluation sequences."""

    @abstractmethod
    def format_progress(self, metrics: Mapping[str, Any]) -> str:
        """A line of its metrics.jsonl, for a line of progress."""

    @abstractmethod
    def format_figures(self, result: Result) -> str:
        """What was measured, for `format_result`."""

    def format_result(self, result: Result) -> str:
        """Its result, in a line."""
        return f"{self.label} seed {result['seed']}  {self.format_figures(result)}  ({result['wall_seconds']:.0f} s)"

    def prepare(self, out: Path) -> None:
        """Make what it needs in `out`, before any job runs; `UsageError` if its folder holds another run."""
        folder = out / RUNS / self.name
        if folder.exists():
            open_run(self.run_config(folder), folder, resume=True)

    def finished(self, out: Path) -> Result | None:
        """The result of this very job, asked for the very same, if it is there; `UsageError` if it is damaged."""
        folder = out / RUNS / self.name
        if not (folder / RESULT).exists() or not is_finished(folder, self.run_config(folder)):
            return None
        result = read_json(folder / RESULT, finite=False)
        if isinstance(result, dict) and "asked" in result and result["asked"] != self.asked():
            return None
        if why := what_is_wrong(result, self.name, self.figures()):
            raise UsageError(f"{folder / RESULT} is damaged: {why}. Remove it, and the run is measured again.")
        return result

    def run(self, out: Path, *, threads: int | None = None) -> Result:
        """Train and measure it in out/runs/NAME, going on where it was cut off; what was finished there is read.

        Returns:
            What result.json holds: `run_metadata`, what was measured, and "asked".
        """
        if threads is not None:
            torch.set_num_threads(threads)
        if (result := self.finished(out)) is not None:
            return result
        folder = out / RUNS / self.name
        config = self.run_config(folder)
        if not is_finished(folder, config):
            self.train(folder)
        model = SequenceModel.from_pretrained(folder / CHECKPOINT)
        result = self.run_metadata(config, model) | {"wall_seconds": wall_seconds(folder)}
        result |= self.measure(model, folder) | {"asked": self.asked()}
        write_json(folder / RESULT, result)
        seal_folder(folder, [CONFIG, RUN, METRICS, RESULT])
        return result

    def run_metadata(self, config: Run[Any], model: SequenceModel) -> dict[str, Any]:
        """What a reader of a table wants to know of a run, in plain values: its `entries`."""
        found = {
            "name": self.name,
            "label": self.label,
            **mixer_facts(config.model),
            "num_hidden_layers": config.model.num_hidden_layers,
            "parameters": model.num_parameters,
            "seed": config.training.seed,
            "steps": config.training.steps,
            "checkpoint": str(Path(RUNS) / self.name / CHECKPOINT),
        } | self.details(config, model)
        return {entry: found[entry] for entry in self.entries}


def wall_seconds(folder: Path) -> float:
    """How long the finished run in a folder was trained; `UsageError` if its run.json does not say so."""
    values = read_json(folder / RUN)
    found = values.get("wall_seconds") if isinstance(values, dict) else None
    if found is None or not _is_number(found):
        raise UsageError(f"{folder / RUN} is damaged: it does not say how long the run was trained.")
    return found


def what_is_wrong(result: Any, name: str, figures: Figures) -> str | None:
    """Why a value is no result of the run of that name, with these figures; None if it is one."""
    if not isinstance(result, dict) or "asked" not in result:
        return "it does not say what was asked for"
    if result.get("name") != name:
        return f"it is of the run {result.get('name')!r:.80}"
    for entry in ("label", "task", "mixer"):
        if not isinstance(result.get(entry), str):
            return f"{entry} is no text"
    for entry in ("parameters", "seed", "steps", "training_length", "wall_seconds", *figures.numbers):
        if not _is_number(result.get(entry)):
            return f"{entry} is no number"
    for entry, names in figures.tables.items():
        table = result.get(entry)
        if not isinstance(table, dict) or set(table) != set(names) or not all(map(_is_number, table.values())):
            return f"{entry} is no table of numbers for {', '.join(names)}"
    lists = result.get("curve") if figures.curve else {}
    lists = [lists.get(entry) for entry in figures.curve] if isinstance(lists, dict) else [None]
    if not all(isinstance(x, list) and len(x) == len(lists[0]) and all(map(_is_number, x)) for x in lists):
        return f"its curve has no numbers for {', '.join(figures.curve)}"
    return None


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


__getattr__ = renamed_names(__name__, {"AnyJob": "Job", "Asked": "deltaproduct.experiments.task_job.EvaluationSpec"})


def mixer_facts(model: ModelConfig) -> dict[str, Any]:
    """What results say of a model's mixer, under the same keys for all; where a mixer has no such option, the value
    that DeltaProduct has by default, as in all earlier results."""
    options = model.mixers[0]
    return {
        "mixer": model.mixer_names,
        "num_householder": getattr(options, "num_householder", 2),
        "allow_neg_eigval": getattr(options, "allow_neg_eigval", True),
    }
