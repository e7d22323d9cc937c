"""`bench train`: the training loop's own step, and its parts."""

import dataclasses
import json

import pytest
import torch
from cases import CPU, S3, off_in_one_gradient, shown

from deltaproduct.benchmarks import bench_train, train
from deltaproduct.ops import BACKENDS
from deltaproduct.training.objectives.task import sample_batch


def test_train_report_is_consistent(quick_train):
    rows = {row.backend: row for row in quick_train.rows}
    assert set(rows) | {other.backend for other in quick_train.unavailable} == set(BACKENDS)
    assert {"reference", "chunkwise"} <= set(rows)
    for row in rows.values():
        assert row.status == "timed" and 0 <= row.error < quick_train.error_limit and row.worst
        for part in ("step", "forward", "backward", "optimizer", "operator"):
            timing = getattr(row, part)
            assert 0 < timing.min_ms <= timing.median_ms <= timing.max_ms and timing.runs == 2, part
        assert row.operator_share == pytest.approx(row.operator.median_ms / row.step.median_ms)  # one layer
        assert set(row.speedup) == set(rows) - {row.backend}
    ratio = rows["reference"].step.median_ms / rows["chunkwise"].step.median_ms
    assert rows["chunkwise"].speedup["reference"] == pytest.approx(ratio)
    assert quick_train.sampling.median_ms > 0
    assert (quick_train.batch_size, quick_train.tokens, quick_train.operator_shape) == (8, 17, "B8 T17 H4 K16 N2")
    assert quick_train.config["training"]["task"] == "S3" and "A training step of S3" in shown(quick_train)


def test_the_whole_step_is_the_loops_own(monkeypatch):
    """On batch after batch of the last stage; the parts work on a batch of the same size."""
    seen, sampled = [], []

    def watched(objective, module, optimizer, progress, ranks):
        stage = progress.kept.stage
        seen.append((progress.step, stage, objective.settings.lengths[stage]))
        return real(objective, module, optimizer, progress, ranks)

    real = train.train_step
    monkeypatch.setattr(train, "train_step", watched)
    monkeypatch.setattr(train, "sample_batch", lambda *a: sampled.append(a[2:]) or sample_batch(*a))
    training = dataclasses.replace(S3.training, lengths=(4, 8), batch_sizes=(6, 5))
    report = bench_train(dataclasses.replace(S3, training=training), backends=["chunkwise"], device="cpu", repeats=2)
    assert seen == [(0, 1, 8), (1, 1, 8), (2, 1, 8)]  # one to warm up
    assert sampled == [(0, 1), (0, 1), (0, 1), (1, 1), (2, 1)]  # two models' parts, then sampling itself
    assert (report.batch_size, report.tokens) == (5, 9)


def test_every_backward_is_of_a_fresh_loss():
    trained = train.Training(S3, "chunkwise", CPU)
    want = {name: g.clone() for name, g in trained.loss_and_gradients().items() if name != "loss"}
    for _ in range(2):
        trained.prepare_backward()
        trained.backward()
        for name, p in trained.model.named_parameters():
            torch.testing.assert_close(p.grad, want[name], rtol=0, atol=0)  # the same sums, and no second one on top
    before = [p.detach().clone() for p in trained.model.parameters()]
    trained.update()
    assert any(not torch.equal(a, b) for a, b in zip(before, trained.model.parameters(), strict=True))


def test_wrong_and_failing_backends_are_not_trained_with(add_backend):
    def broken(*args):
        raise RuntimeError("no such kernel")

    add_backend("off", off_in_one_gradient)
    add_backend("broken", broken)
    names = ["off", "broken", "chunkwise"]
    report = bench_train(S3, backends=names, quick=True, device="cpu", repeats=1)
    off, failed, good = report.rows
    assert off.status == "wrong" and off.worst.startswith("blocks.0.mixer.b_proj") and off.step is None
    assert failed.status == "failed" and failed.reason == "RuntimeError: no such kernel" and failed.error is None
    assert good.status == "timed" and good.speedup == {}
    assert "off is wrong and was not timed" in shown(report)
    json.dumps(report.to_dict(), allow_nan=False)
