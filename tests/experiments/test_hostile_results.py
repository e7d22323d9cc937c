"""A finished run's result.json that says what no measurement of that run says: one line that names the file."""

import json
import shutil

import pytest

from deltaproduct.errors import UsageError
from deltaproduct.experiments.recipes import state_tracking_model
from deltaproduct.experiments.task_job import EvaluationSpec, TaskJob
from deltaproduct.files import seal_folder
from deltaproduct.tasks import get_task
from deltaproduct.training import Run, TrainConfig

MODEL = state_tracking_model(get_task("S3"), hidden_size=16, num_heads=2, head_dim=4)
CONFIG = Run(TrainConfig(task="S3", steps=1, lengths=(4,), batch_sizes=(4,), warmup_steps=1), MODEL)
JOBS = {
    "lengths": TaskJob("tiny", "tiny", CONFIG, EvaluationSpec((4, 8), sequences=2)),
    "range": TaskJob("range", "range", CONFIG, EvaluationSpec(length_range=(4, 8), sequences=2)),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("measured")
    for job in JOBS.values():
        job.run(out)
    return out


CHANGES = {
    "another run's": ("lengths", {"name": "other"}, "it is of the run 'other'"),
    "no label": ("lengths", {"label": None}, "label is no text"),
    "a seed as text": ("lengths", {"seed": "0"}, "seed is no number"),
    "a time that is true": ("lengths", {"wall_seconds": True}, "wall_seconds is no number"),
    "no table": ("lengths", {"accuracy": 0.5}, "accuracy is no table of numbers for 4, 8"),
    "another length": ("lengths", {"accuracy": {"4": 0.5, "9": 0.5}}, "accuracy is no table"),
    "a length too few": ("lengths", {"sequence_accuracy": {"4": 0.5}}, "sequence_accuracy is no table"),
    "text in a table": ("lengths", {"accuracy": {"4": 0.5, "8": "0.5"}}, "accuracy is no table"),
    "no curve": ("lengths", {"curve": None}, "its curve has no numbers"),
    "a curve of two lengths": (
        "lengths", {"curve": {"length": [1], "accuracy": [1, 2], "sequence_accuracy": [1]}}, "its curve has no numbers",
    ),
    "a table in place of a number": ("range", {"accuracy": {"4": 0.5}}, "accuracy is no number"),
    "a missing figure": ("range", {"scaled_accuracy": None}, "scaled_accuracy is no number"),
}  # fmt: skip


@pytest.mark.parametrize(("which", "change", "match"), CHANGES.values(), ids=CHANGES)
def test_a_result_that_is_none_of_its_run(measured, tmp_path, which, change, match):
    job, out = JOBS[which], shutil.copytree(measured, tmp_path / "out")
    folder = out / "runs" / job.name
    path = folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UsageError, match=r"result\.json") as changed:  # by the run's manifest
        job.finished(out)
    assert "does not match its recorded size and sha256" in str(changed.value)
    seal_folder(folder, ["config.json", "run.json", "metrics.jsonl", "result.json"])
    with pytest.raises(UsageError, match=rf"result\.json is damaged: {match}.* Remove it") as refused:
        job.finished(out)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", "3", "[" * 9000])
def test_a_result_of_another_shape(measured, tmp_path, text):
    job, out = JOBS["lengths"], shutil.copytree(measured, tmp_path / "out")
    (out / "runs" / "tiny" / "result.json").write_text(text)
    seal_folder(out / "runs" / "tiny", ["config.json", "run.json", "metrics.jsonl", "result.json"])
    with pytest.raises(UsageError, match=r"result\.json is (damaged|not valid JSON)"):
        job.finished(out)


@pytest.mark.parametrize("which", JOBS)
def test_what_was_measured_is_read_and_what_was_not_is_measured(measured, which):
    job = JOBS[which]
    assert job.finished(measured)["name"] == job.name
    other = TaskJob(job.name, job.label, job.config, EvaluationSpec((4,), sequences=1))
    assert other.finished(measured) is None
