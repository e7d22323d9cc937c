"""`bench ops --step`: the operator's one-token step, beside moving its states."""

import json

import pytest
import torch
from cases import shown

from deltaproduct.benchmarks import QUICK_OP_STEP_SHAPE, OpShape, bench_op_step, op_step
from deltaproduct.benchmarks.settings import BenchmarkSettings
from deltaproduct.errors import UsageError


def test_op_step_report_is_consistent():
    report = bench_op_step(OpShape(1, 1, 2, 16, 3, gate=True, value_dim=8), batches=[1, 3], device="cpu", repeats=3)
    assert [row.batch_size for row in report.rows] == [1, 3] and report.benchmark == "ops-step"
    for row in report.rows:
        assert row.status == "timed" and row.reason is None and 0 <= row.error < report.error_limit
        assert row.state_bytes == 4 * row.batch_size * 2 * 16 * 8
        for timing in (row.step, row.copy):
            assert 0 < timing.min_ms <= timing.median_ms <= timing.max_ms and timing.runs == 3
        assert row.ratio == pytest.approx(row.step.median_ms / row.copy.median_ms)
        assert row.launch is None and row.launch_ratio is None
    text = shown(report)
    assert f"One token, H2 K16 V8 N3 gated, {report.backend}" in text and "B3" in text
    assert "…" not in text  # nothing was cut at 80 columns
    json.dumps(report.to_dict(), allow_nan=False)


def test_times_are_those_of_one_layer(monkeypatch):
    calls = []
    step = op_step.delta_product_step

    def counted(**x):
        calls.append(x["state"].data_ptr())
        return step(**x)

    monkeypatch.setattr(op_step, "delta_product_step", counted)
    monkeypatch.setattr(
        op_step, "interleaved", lambda runs, **how: {n: run() or op_step.Timing.of([48.0]) for n, run in runs.items()}
    )
    report = bench_op_step(batches=[2], quick=True, device="cpu")
    assert report.rows[0].step.median_ms == 48 / op_step.LAYERS == 2 and report.layers == op_step.LAYERS
    assert len(calls) == 1 + 2 * op_step.LAYERS  # one is checked; each layer once to warm up, and once timed
    assert len(set(calls[1:])) == op_step.LAYERS  # each with a state of its own


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_a_step_that_is_wrong_is_not_timed(monkeypatch, fault):
    step = op_step.delta_product_step

    def off(**x):
        if fault == "raises":
            raise RuntimeError("no step")
        o, state = step(**x)
        return o, state * 1.01

    monkeypatch.setattr(op_step, "delta_product_step", off)
    row = bench_op_step(batches=[1], quick=True, device="cpu").rows[0]
    assert row.step is None and row.status == ("failed" if fault == "raises" else "wrong")
    assert ("no step" if fault == "raises" else "the error of state") in row.reason
    report = bench_op_step(batches=[1], quick=True, device="cpu")
    assert row.reason in shown(report)


def test_the_step_that_is_checked_leaves_the_state_that_is_timed():
    settings = BenchmarkSettings.of(device="cpu", quick=True)
    x = op_step._inputs(QUICK_OP_STEP_SHAPE, 1, settings, layer=0)
    before = x["state"].clone()
    assert op_step._check(x, settings)["status"] == "timed" and torch.equal(x["state"], before)


@pytest.mark.parametrize("wrong", [{"batches": [0]}, {"dtype": "float64"}, {"repeats": 0}, {"device": "abacus"}])
def test_what_cannot_be_measured(wrong):
    with pytest.raises(UsageError):
        bench_op_step(quick=True, **{"device": "cpu"} | wrong)
