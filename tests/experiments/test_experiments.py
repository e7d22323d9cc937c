"""Experiments as lists of jobs, and what carries a job out."""

import io
import json
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from commands import run
from rich.console import Console

from deltaproduct import progress
from deltaproduct.errors import UsageError
from deltaproduct.evaluation import LengthResult
from deltaproduct.experiments.formal_languages import formal_job
from deltaproduct.experiments.recipes import label
from deltaproduct.experiments.registry import EXPERIMENTS, get_experiment
from deltaproduct.experiments.runner import run_jobs
from deltaproduct.experiments.task_job import EvaluationSpec, accuracy_curve
from deltaproduct.experiments.word_problems import s3
from deltaproduct.models import SequenceModel
from deltaproduct.progress import board
from deltaproduct.tasks import get_task
from deltaproduct.tasks.task import check_fits
from deltaproduct.training.objectives.task import sample_batch

OWN_RATES = ("parity", "table-chomsky")  # experiments in which each model has the learning rate that is best for it
ON_LANGUAGE = ("extrapolation",)
SCALES = [(name, scale) for name, e in EXPERIMENTS.items() if name not in ON_LANGUAGE for scale in e.scales]


def tiny(job, **changes):
    """The job with a model of hidden 8, two steps, and little asked."""
    model = job.config.model.changed(hidden_size=8, num_heads=1, head_dim=8, intermediate_size=0)
    training = replace(
        job.config.training, **({"steps": 2, "lengths": (6,), "batch_sizes": (2,), "stage_steps": ()} | changes)
    )
    spec = job.evaluation
    spec = replace(spec, sequences=3) if spec.length_range else EvaluationSpec((4, 9), sequences=3)
    return replace(job, config=replace(job.config, model=model, training=training), evaluation=spec)


@pytest.mark.parametrize(("name", "scale"), SCALES)
def test_every_experiment_is_a_list_of_runs_that_could_begin(name, scale):
    jobs = get_experiment(name).at(scale, [0, 1])
    assert {job.config.training.seed for job in jobs} <= {0, 1}
    budgets = defaultdict(set)
    for job in jobs:
        training, task = job.config.training, get_task(job.config.training.task)
        check_fits(job.config.model, task)
        assert job.name.endswith(f"-seed{training.seed}") and "/" not in job.name
        assert label(job.config.model) in job.label
        shortest = training.min_length or min(training.lengths)
        assert shortest >= task.min_length and (job.evaluation.length_range or job.evaluation.lengths)
        assert training.lengths[-1] <= min(job.evaluation.length_range or job.evaluation.lengths)
        rate = 1.0 if name in OWN_RATES else training.lr
        budgets[task.name].add(replace(training, seed=0, lr=rate))
    # All models of one task have one schedule and one number of sequences.
    assert all(len(schedules) == 1 for schedules in budgets.values())


def test_an_unknown_experiment_or_scale_is_named(capsys, tmp_path):
    with pytest.raises(UsageError, match=r"fig9.*fig5"):
        get_experiment("fig9")
    with pytest.raises(UsageError, match=r"s3 has no scale 'cpu-long'"):
        get_experiment("s3").at("cpu-long", [0])
    status, _, err = run(capsys, "reproduce", "s3", "--scale", "cpu-long", "--out", tmp_path / "x")
    assert status == 2 and "cpu-long" in err and not (tmp_path / "x").exists()


def test_only_and_list(capsys, tmp_path):
    arguments = ["reproduce", "fig5", "--seeds", "2", "--only", "S3-n2-*, S4-n1-neg-seed1", "--out", tmp_path / "x"]
    status, out, _ = run(capsys, *arguments, "--list")
    assert status == 0 and not (tmp_path / "x").exists()
    assert sorted(out.split()) == [
        "S3-n2-neg-seed0", "S3-n2-neg-seed1", "S3-n2-pos-seed0", "S3-n2-pos-seed1", "S4-n1-neg-seed1"
    ]  # fmt: skip
    status, _, err = run(capsys, "reproduce", "fig5", "--only", "S9-*", "--out", tmp_path / "x")
    assert status == 2 and "S9-*" in err
    status, _, err = run(capsys, "reproduce", "parity", "--lengths", "40", "--out", tmp_path / "x")
    assert status == 2 and "--lengths" in err and "parity" in err


def test_a_range_of_lengths_is_measured_and_scaled(tmp_path):
    job = tiny(formal_job("parity", "deltanet-neg", "cpu", 3))
    result = job.run(tmp_path)
    assert result["scaled_accuracy"] == pytest.approx(2 * result["accuracy"] - 1)
    assert result["asked"] == {"lengths": [], "length_range": [40, 256], "sequences": 3}
    assert result["label"] == "DeltaNet[-1,1]" and result["task"] == "parity" and result["seed"] == 3
    model = SequenceModel.from_pretrained(tmp_path / result["checkpoint"])
    assert result["parameters"] == sum(p.numel() for p in model.parameters())


def test_what_is_asked_anew_is_measured_anew_and_not_trained_again(tmp_path):
    job = tiny(s3("cpu", [0])[0])
    job.run(tmp_path)
    checkpoint = tmp_path / "runs" / job.name / "checkpoint" / "model.safetensors"
    before = checkpoint.stat().st_mtime_ns
    again = replace(job, evaluation=EvaluationSpec((5,), sequences=2)).run(tmp_path)
    assert set(again["accuracy"]) == {"5"} and checkpoint.stat().st_mtime_ns == before
    with pytest.raises(UsageError, match="lengths"):
        EvaluationSpec((5,), length_range=(3, 9))


@pytest.mark.slow("processes")
def test_a_failed_run_is_reported_and_stops_no_other(tmp_path):
    good, bad = (tiny(job) for job in s3("cpu", [0])[:2])
    bad = replace(bad, config=replace(bad.config, training=replace(bad.config.training, lr=1e30, warmup_steps=0)))
    summary = run_jobs([bad, good], tmp_path, experiment="s3", workers=2, show=False)
    assert [entry["name"] for entry in summary["runs"]] == [good.name]
    assert list(summary["failed"]) == [bad.name] and "loss" in summary["failed"][bad.name]
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    with pytest.raises(UsageError, match="Every job failed"):
        run_jobs([bad], tmp_path, experiment="s3", workers=1, show=False)


def test_a_curve_has_the_scored_positions_alone():
    nan = float("nan")
    by_position = torch.tensor([nan, 1.0, nan, nan, 0.5, nan, nan, nan, 0.0, nan])
    prefix = torch.tensor([nan, 1.0, nan, nan, 0.4, nan, nan, nan, 0.0, nan])
    scored = torch.tensor([0, 10, 0, 0, 5, 0, 0, 0, 5, 0])
    curve = accuracy_curve(LengthResult(9, 10, 0.625, 0.0, scored, by_position, prefix))
    # Of the tokens so far: 10 of 10, 12.5 of 15, 12.5 of 20.
    assert curve == {"length": [1, 4, 8], "accuracy": [1.0, 0.833333, 0.625], "sequence_accuracy": [1.0, 0.4, 0.0]}


def test_a_batchs_length_is_drawn_from_the_range():
    job = formal_job("parity", "n2-neg", "cpu", 0)
    settings, task = replace(job.config.training, batch_sizes=(2,)), get_task("parity")
    last = len(settings.lengths) - 1
    lengths = [sample_batch(task, settings, step, last)[0].shape[1] - 1 for step in range(400)]
    assert (min(lengths), max(lengths)) == (3, 40) and len(set(lengths)) == 38
    once, again = sample_batch(task, settings, 7, last), sample_batch(task, settings, 7, last)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert all(sample_batch(task, settings, step, 0)[0].shape[1] - 1 <= settings.lengths[0] for step in range(50))


@pytest.mark.parametrize("terminal", [True, False])
def test_each_run_under_way_has_a_line(monkeypatch, terminal):
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    written = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=written, force_terminal=terminal, width=100))
    with board("fig", {"one": 10, "two": 20}) as shown:
        shown.update("one", 4, "loss 0.5")
        shown.update("two", 7, "loss 0.7")
        shown.end("one", "[1/2] one: done")
        shown.update("two", 8, "loss 0.6")
    text = written.getvalue()
    assert "[1/2] one: done" in text and "loss 0.6" in text
    after = text[text.index("[1/2] one: done") :]
    if terminal:
        assert "18/30" in after and "1 of 2 runs done" in after and "two" in after
    else:
        assert "  one: 4/10  loss 0.5" in text and after.count("one:") == 1 and "  two: 8/20  loss 0.6" in after
