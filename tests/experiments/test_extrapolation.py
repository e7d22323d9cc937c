"""The experiment on language: jobs that prepare their corpus, train, and measure far beyond the training context."""

import random
from dataclasses import replace

import pytest
import torch
from commands import run

from deltaproduct.corpus import Corpus
from deltaproduct.errors import UsageError
from deltaproduct.evaluation.perplexity import loss_by_position
from deltaproduct.experiments.extrapolation import draw, extrapolation
from deltaproduct.experiments.language_job import LanguageJob, octaves
from deltaproduct.experiments.registry import get_experiment
from deltaproduct.experiments.runner import run_jobs
from deltaproduct.models import ModelConfig, SequenceModel
from deltaproduct.training.config import LanguageConfig


@pytest.fixture
def job(tmp_path) -> LanguageJob:
    words = random.Random(0)
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(" ".join(words.choices(["one", "two", "three"], k=80)))
    training = LanguageConfig(steps=3, context=32, batch_size=2)
    model = {"hidden_size": 16, "num_heads": 1, "head_dim": 8, "intermediate_size": 0}
    return LanguageJob("job-seed0", "a model", f"text:{tmp_path}/*.txt", "bytes", model, training, 128, 3)


def test_the_models_are_equally_large_and_are_trained_alike():
    for scale in ("cpu", "cpu-long"):
        jobs = extrapolation(scale, [0, 1, 2])
        with torch.device("meta"):
            sizes = [SequenceModel(ModelConfig.build(257, 257, **job.model)).num_parameters for job in jobs]
        assert max(sizes) / min(sizes) < 1.01
        assert len({replace(job.training, seed=0) for job in jobs}) == 1
        assert len({job.name for job in jobs}) == len(jobs) == (4 if scale == "cpu" else 24)
        assert all(job.length == 8 * job.training.context for job in jobs)


def test_octaves():
    curve = torch.arange(1.0, 513, dtype=torch.float64)
    assert octaves(curve) == {"128": 96.5, "256": 192.5, "512": 384.5}  # means of 65…128, 129…256, 257…512
    assert list(octaves(curve[:300])) == ["150", "300"]


@pytest.mark.slow("processes")
@pytest.mark.ci
def test_a_job_prepares_trains_measures_and_is_not_done_twice(job, tmp_path):
    out = tmp_path / "out"
    summary = run_jobs([job], out, experiment="extrapolation", workers=1, show=False)
    (result,) = summary["runs"]
    (folder,) = (out / "corpora").iterdir()
    model = SequenceModel.from_pretrained(out / result["checkpoint"])
    curve = loss_by_position(model, Corpus.open(folder).split("validation"), length=128, sequences=3)
    assert result["loss"] == {"128": pytest.approx(float(curve[64:].mean()))}
    assert result["tokens"] == 3 * 2 * 32 and result["parameters"] == model.num_parameters
    (out / "runs" / job.name / "checkpoint" / "model.safetensors").unlink()  # which would be missed
    assert run_jobs([job], out, experiment="extrapolation", workers=1, show=False)["runs"] == [result]
    with pytest.raises(UsageError, match="context: 16 and 32"):
        run_jobs([replace(job, training=replace(job.training, context=16))], out, experiment="x", show=False)


@pytest.mark.slow("processes")
def test_a_table_and_a_figure_for_each_corpus(job, tmp_path):
    result = run_jobs([job], tmp_path / "out", experiment="extrapolation", workers=1, show=False)["runs"][0]
    runs = [result | {"task": task, "seed": seed} for task in ("plays, bytes", "code, bytes") for seed in (0, 1)]
    draw(runs, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000 and (tmp_path / "accuracy-code.png").exists()
    table = get_experiment("extrapolation").table(runs)
    assert table.row_count == 4 and [column.header for column in table.columns] == ["model", "128", "s"]


def test_lengths_and_the_listing(job, capsys, tmp_path):
    assert job.changed(lengths=(64,), steps=1, sequences=2).length == 64
    with pytest.raises(UsageError, match="a single number"):
        job.changed(lengths=(64, 128))
    status, out, _ = run(capsys, "reproduce", "extrapolation", "--list", "--out", tmp_path / "x")
    assert status == 0 and out.split()[0] == "shakespeare-n1-seed0" and not (tmp_path / "x").exists()
