"""What all jobs share: two hooks, which are called when they have to be, and a result that is read back."""

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
from runs import run_config

from deltaproduct.errors import UsageError
from deltaproduct.experiments.job import Figures, Job
from deltaproduct.experiments.language_job import LanguageJob
from deltaproduct.experiments.task_job import EvaluationSpec, TaskJob
from deltaproduct.files import seal_folder
from deltaproduct.models import SequenceModel
from deltaproduct.training import train
from deltaproduct.training.config import LanguageConfig

CALLS: list[str] = []  # of the hooks


@dataclass(frozen=True)
class Toy(Job):
    """A kind of job of its own: all that it needs are the hooks, and words for them."""

    asks: str = "how many"
    entries: ClassVar[tuple[str, ...]] = ("name", "label", "task", "mixer", "parameters", "seed", "steps", "checkpoint",
                                          "training_length", "num_householder")  # fmt: skip

    def train(self, folder):
        CALLS.append("train")
        train(self.run_config(folder), folder, resume=True, show=False)

    def measure(self, model, folder):
        CALLS.append("measure")
        assert isinstance(model, SequenceModel) and not model.training and (folder / "checkpoint").is_dir()
        return {"answer": 42, "by_name": {"a": 1, "b": 2}, "curve": {"x": [1, 2], "y": [3, 4]}}

    @property
    def steps(self):
        return 1

    def run_config(self, folder):
        return run_config(steps=1)

    def asked(self):
        return {"asks": self.asks}

    def figures(self):
        return Figures(("answer",), {"by_name": ("a", "b")}, ("x", "y"))

    def details(self, config, model):
        return {"task": config.training.task, "training_length": 8}

    def changed(self, *, steps=None, lengths=None, sequences=None):
        return self

    def format_progress(self, metrics):
        return str(metrics["step"])

    def format_figures(self, result):
        return f"answer {result['answer']}"


@pytest.fixture
def calls():
    CALLS.clear()
    return CALLS


def test_hooks_are_called_when_their_work_is_not_done_yet(calls, tmp_path):
    job = Toy("toy", "a toy")
    result = job.run(tmp_path)
    assert calls == ["train", "measure"]
    saved = json.loads((tmp_path / "runs" / "toy" / "result.json").read_text())
    assert saved == result and list(saved) == [
        *Toy.entries, "wall_seconds", "answer", "by_name", "curve", "asked"
    ]  # fmt: skip
    assert result["answer"] == 42 and result["asked"] == {"asks": "how many"} and result["steps"] == 1
    assert result["checkpoint"] == "runs/toy/checkpoint" and result["mixer"] == "deltaproduct"
    assert job.format_result(result).startswith("a toy seed 0  answer 42  (")
    assert job.run(tmp_path) == job.finished(tmp_path) == result and calls == ["train", "measure"]
    # Asked for something else: measured anew, and not trained again.
    other = replace(job, asks="how long")
    assert other.finished(tmp_path) is None
    assert other.run(tmp_path)["asked"] == {"asks": "how long"} and calls == ["train", "measure", "measure"]


def test_a_result_without_its_figures_is_refused(calls, tmp_path):
    job = Toy("toy", "a toy")
    result = job.run(tmp_path)
    folder = tmp_path / "runs" / "toy"
    for change, why in (
        ({"answer": "42"}, "answer is no number"),
        ({"by_name": {"a": 1}}, "by_name is no table of numbers for a, b"),
        ({"curve": {"x": [1, 2], "y": [3]}}, "its curve has no numbers for x, y"),
        ({"name": "other"}, "it is of the run 'other'"),
    ):
        (folder / "result.json").write_text(json.dumps(result | change))
        seal_folder(folder, ["config.json", "run.json", "metrics.jsonl", "result.json"])
        with pytest.raises(UsageError, match=rf"result\.json is damaged: {why}\. Remove it"):
            job.run(tmp_path)
    assert calls == ["train", "measure"]


def test_another_runs_folder_is_refused_before_anything_runs(calls, tmp_path):
    job = TaskJob("toy", "a task", run_config(steps=2), EvaluationSpec((8,)))
    job.prepare(tmp_path)  # nothing is there, and nothing is made
    assert not (tmp_path / "runs").exists()
    Toy("toy", "a toy").run(tmp_path)
    with pytest.raises(UsageError, match="steps: 2 and 1"):
        job.prepare(tmp_path)


def test_the_command_lines_words_change_every_kind_of_job():
    task = TaskJob("t", "t", run_config(steps=2), EvaluationSpec((8,)))
    found = task.changed(steps=5, lengths=(4, 9), sequences=3)
    assert found.steps == 5 and found.evaluation == EvaluationSpec((4, 9), sequences=3) and task.steps == 2
    ranged = replace(task, evaluation=EvaluationSpec(length_range=(3, 9)))
    assert ranged.changed(sequences=2).evaluation == EvaluationSpec(length_range=(3, 9), sequences=2)
    with pytest.raises(UsageError, match="a range of lengths, which --lengths cannot change"):
        ranged.changed(lengths=(4,))
    language = LanguageJob("l", "l", "stdlib", "bytes", {}, LanguageConfig(steps=2), 128)
    assert language.changed(steps=7).steps == 7 and language.changed(lengths=(64,)).length == 64


def test_old_names_still_work():
    import deltaproduct.experiments.job as module

    with pytest.warns(DeprecationWarning, match="EvaluationSpec"):
        assert module.Asked is EvaluationSpec
    with pytest.warns(DeprecationWarning, match="Job"):
        assert module.AnyJob is Job
