"""`bench ops` and `bench scaling`: nothing wrong is timed, and counts are those done by hand."""

import dataclasses
import json
import time

import pytest
import torch
from cases import CPU, TINY, not_a_number, off_in_one_gradient, off_in_the_output, rows_of, shown

from deltaproduct.benchmarks import (
    DEFAULT_SHAPES,
    OpShape,
    bench_ops,
    bench_scaling,
    ops,
    roofline,
    row_names,
    workload,
)
from deltaproduct.benchmarks.render import _number
from deltaproduct.benchmarks.settings import BenchmarkSettings
from deltaproduct.benchmarks.timing import MIN_RUNS, Timing, interleaved, peak_extra_bytes
from deltaproduct.errors import UsageError
from deltaproduct.ops import BACKENDS, resolve_backend
from deltaproduct.ops.reference import reference

# --- The report -------------------------------------------------------------------------------------------------------


def test_quick_times_every_row(quick):
    """Every backend that can serve has a row with positive, ordered numbers, and the others a reason."""
    rows = rows_of(quick)
    away = {other.backend for other in quick.unavailable}
    assert set(rows) | away == set(row_names()) and not set(rows) & away
    assert {"reference", "chunkwise", "textbook_loop"} <= set(rows)
    for row in rows.values():
        assert row.status == "timed" and row.reason is None
        assert 0 <= row.error < 1e-4  # the loop itself is within 1e-6 here; three orders below what is refused
        for timing in (row.forward, row.forward_backward):
            assert 0 < timing.min_ms <= timing.median_ms <= timing.max_ms and timing.runs == quick.repeats
        assert row.gflops > 0 and row.forward_gflops > 0 and row.peak_extra_bytes > 0
        assert row.roofline_share == pytest.approx(row.gflops / quick.shapes[0].roofline.gflops)
        assert 0 < row.best_roofline_share <= row.roofline_share
        assert set(row.speedup) == set(rows) - {row.backend}
    assert all(other.reason for other in quick.unavailable)
    assert quick.machine["torch"] == torch.__version__ and quick.command


def test_rates_are_flops_over_the_median(quick):
    shape, row = quick.shapes[0], rows_of(quick)["chunkwise"]
    assert row.gflops == pytest.approx(4 * shape.forward_flops / (row.forward_backward.median_ms * 1e-3) / 1e9)
    assert row.forward_gflops == pytest.approx(shape.forward_flops / (row.forward.median_ms * 1e-3) / 1e9)
    for name, other in rows_of(quick).items():
        if other is not row:
            ratio = other.forward_backward.median_ms / row.forward_backward.median_ms
            assert row.speedup[name] == pytest.approx(ratio)
            assert f"{name} {_number(ratio)}" in shown(quick).split("chunkwise, speed-up over: ")[1].splitlines()[0]


def test_forward_alone():
    report = bench_ops([TINY], backends=["chunkwise", "reference"], device="cpu", repeats=1, backward=False)
    for row in rows_of(report).values():
        assert row.forward and row.forward_backward is None and row.gflops is None and row.worst == "o"
        assert row.roofline_share == pytest.approx(row.forward_gflops / report.shapes[0].roofline.gflops)
    assert "fwd+bwd" not in shown(report)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_dtypes(dtype):
    shape = dataclasses.replace(TINY, gate=True)
    report = bench_ops([shape], device="cpu", dtype=dtype, repeats=1)
    assert report.dtype == dtype and {r.status for r in report.shapes[0].rows} == {"timed"}
    assert {"chunkwise", "reference", "textbook_loop"} <= set(rows_of(report))
    assert report.shapes[0].roofline.dtype == ("float64" if dtype == "float64" else "float32")


def test_values_of_another_width_than_keys():
    shape = OpShape.parse("B1 T8 H1 K4 V6 N2 gated")
    assert shape == OpShape(1, 8, 1, 4, 2, gate=True, value_dim=6) and OpShape.parse(shape.label) == shape
    assert shape.forward_flops == 8 * 2 * 4 * 6 * 5
    # q and two k of 4, two v of 6, two β and a gate, per token, then o; and twice the former and d_o again.
    assert shape.fewest_bytes(2, backward=False) == 8 * (12 + 12 + 2 + 1 + 6) * 2
    assert shape.fewest_bytes(2, backward=True) == 8 * (3 * (12 + 12 + 2 + 1) + 2 * 6) * 2
    report = bench_ops([shape], backends=["chunkwise", "textbook_loop"], device="cpu", repeats=1)
    assert {row.status for row in report.shapes[0].rows} == {"timed"}


def test_against_another_implementation():
    report = bench_ops([TINY], against="textbook_loop", device="cpu", repeats=1)
    ours, theirs = report.shapes[0].rows
    assert ours.backend == resolve_backend()[0] and theirs.backend == "textbook_loop"
    with pytest.raises(UsageError, match="no implementation 'nonesuch'"):
        bench_ops([TINY], against="nonesuch", device="cpu")
    with pytest.raises(UsageError, match="leave out --backends"):
        bench_ops([TINY], against="textbook_loop", backends=["chunkwise"], device="cpu")
    with pytest.raises(UsageError, match="fla cannot serve: its kernels need a GPU"):
        bench_ops([TINY], against="fla", device="cpu")


def test_hard_inputs_are_almost_parallel():
    settings = BenchmarkSettings.of(device="cpu", hard=True)
    x = workload.Workload(OpShape(1, 64, 1, 64, 2), settings).x
    k = x["k"].detach().flatten(0, -2)
    cosines = (k @ k.mT)[~torch.eye(len(k), dtype=bool)]
    assert cosines.mean() == pytest.approx(0.99, abs=2e-3) and cosines.min() > 0.97
    assert x["beta"].min() >= 1.9 and x["beta"].max() <= 2
    report = bench_ops([TINY], backends=["chunkwise"], device="cpu", repeats=1, hard=True)
    assert report.hard and rows_of(report)["chunkwise"].error < 1e-4


def test_another_implementation_without_a_backward_is_timed_forwards(add_implementation):
    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, beta):
            return reference(q, k, v, beta, None, None, None, q.shape[-1] ** -0.5, False)[0]

        @staticmethod
        def backward(ctx, d):
            raise RuntimeError("not on this GPU")

    add_implementation("fake", lambda q, k, v, beta: NoBackward.apply(q, k, v, beta))
    report = bench_ops([TINY], backends=["chunkwise", "fake"], device="cpu", repeats=1)
    row = rows_of(report)["fake"]
    assert row.status == "timed" and row.no_backward == "RuntimeError: not on this GPU"
    assert row.forward and row.forward_backward is None and row.gflops is None
    ours = rows_of(report)["chunkwise"]
    assert "fake" not in ours.speedup and ours.forward_backward
    assert row.speedup == {"chunkwise": pytest.approx(ours.forward.median_ms / row.forward.median_ms)}
    assert "fake has no backward here, and was checked and timed forwards only: RuntimeError" in shown(report)


def test_on_a_gpu_bytes_are_held_against_a_copy(monkeypatch):
    monkeypatch.setattr(roofline, "COPY_BYTES", 1 << 20)
    copy = roofline.MemoryCopy(CPU)
    assert copy.gb_per_second(Timing(0.5, 0.4, 0.6, 3)) == pytest.approx(2 * 2**20 / 0.5e-3 / 1e9)
    settings = BenchmarkSettings.of(device="cpu", repeats=1)
    product = roofline.MatrixProduct(CPU)
    result = ops._bench_shape(TINY, ["chunkwise"], settings, product, copy, lambda line: None)
    row = result.rows[0]
    moved = TINY.fewest_bytes(4, backward=True) / (row.forward_backward.median_ms * 1e-3) / 1e9
    assert row.bandwidth_share == pytest.approx(moved / result.copy_gb_per_second)


# --- Correctness comes first ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "worst", "says"),
    [
        (off_in_the_output, "o", "1.0e-02, above 1.0e-03"),
        (off_in_one_gradient, "d_beta", "d_beta"),
        (not_a_number, "o", "not finite"),
    ],
)
def test_a_wrong_backend_is_reported_and_not_timed(add_backend, monkeypatch, run, worst, says):
    add_backend("fake", run)
    timed = []
    monkeypatch.setattr(ops, "interleaved", lambda runs, **kw: timed.extend(runs) or interleaved(runs, **kw))
    report = bench_ops([TINY], backends=["fake", "reference"], device="cpu", repeats=1)
    row = rows_of(report)["fake"]
    if run is off_in_the_output:  # scaling o by 1.01 scales the gradients too; any of them may be the worst
        assert row.error == pytest.approx(0.01, rel=1e-2)
    else:
        assert row.worst == worst
    assert row.status == "wrong" and says in row.reason
    assert row.forward is row.forward_backward is row.gflops is row.peak_extra_bytes is None
    assert row.speedup == rows_of(report)["reference"].speedup == {}
    assert {name for name, _ in timed} == {"reference", "roofline"}
    assert rows_of(report)["reference"].status == "timed"
    assert "fake is wrong and was not timed" in shown(report)
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_backend_that_raises_does_not_stop_the_others(add_backend):
    def broken(*args):
        raise RuntimeError("no such kernel\nand more")

    add_backend("fake", broken)
    report = bench_ops([TINY], backends=["fake", "reference"], device="cpu", repeats=1)
    assert rows_of(report)["fake"].status == "failed"
    assert rows_of(report)["fake"].reason == "RuntimeError: no such kernel"
    assert rows_of(report)["reference"].status == "timed"
    scaling = bench_scaling([8, 16], backend="fake", shape=TINY, device="cpu", repeats=1)
    assert scaling.points == [] and "no such kernel" in scaling.reason and "no such kernel" in shown(scaling)


def test_a_wrong_backend_is_not_scaled(add_backend):
    add_backend("fake", off_in_the_output)
    report = bench_scaling([8, 16], backend="fake", shape=TINY, device="cpu", repeats=1)
    assert report.points == [] and "above" in report.reason and report.error == pytest.approx(0.01, rel=1e-2)


def test_large_shapes_are_checked_on_a_prefix(monkeypatch):
    monkeypatch.setitem(
        workload.CHECK_BYTES, "cpu", 3 * 8 * 2 * 2 * 1 * 4 * 4
    )  # float64 states of three tokens of TINY
    report = bench_ops([TINY], backends=["chunkwise"], device="cpu", repeats=1)
    assert report.shapes[0].checked_length == 3 and rows_of(report)["chunkwise"].status == "timed"
    assert rows_of(report)["chunkwise"].speedup == {}  # there is no other row to compare with
    assert "first 3 tokens" in shown(report)


def test_loops_are_left_out_of_large_shapes(monkeypatch):
    """By the number of steps, the states kept, and the textbook loop's own zeros; the reason is shown."""
    assert ops._too_large("reference", OpShape(1, 65536, 2, 32, 2), True, 4)
    assert ops._too_large("reference", OpShape(64, 4096, 8, 128, 2), True, 4)
    for shape in DEFAULT_SHAPES:
        assert ops._too_large("reference", shape, True, 4) is None
        assert ops._too_large("chunkwise", shape, True, 4) is None
    assert [ops._too_large("textbook_loop", s, True, 4) is None for s in DEFAULT_SHAPES] == [True, False, False]
    monkeypatch.setattr(ops, "LOOP_STEPS", 15)
    report = bench_ops([TINY], device="cpu", repeats=1)
    away = {n.backend for n in report.unavailable}
    assert {n.backend for n in report.shapes[0].left_out} == set(ops.LOOPS) - away >= {"reference", "textbook_loop"}
    assert "reference is left out: a loop of T·N = 16 steps is more than 15" in shown(report)


# --- Counting and measuring -------------------------------------------------------------------------------------------


def test_flops_by_hand():
    # One matrix of 2×2, one token, one step: Sᵀk 8, the update 8, the read-out 8.
    assert OpShape(1, 1, 1, 2, 1).forward_flops == 24
    # 64·128·2·4 = 65536 head-steps of 4·32·32 = 4096 flops, and 64·128·4 = 32768 read-outs of 2048.
    assert OpShape(64, 128, 4, 32, 2).forward_flops == 65536 * 4096 + 32768 * 2048 == 335_544_320
    assert OpShape(64, 128, 4, 32, 2).training_flops == 1_342_177_280
    assert OpShape(16, 512, 8, 64, 3).forward_flops == 16 * 512 * 3 * 8 * 4 * 64 * 64 + 16 * 512 * 8 * 2 * 64 * 64


@pytest.mark.parametrize("shape", [*DEFAULT_SHAPES, OpShape(1, 2, 3, 4, 5, gate=True)])
def test_labels_can_be_read_back(shape):
    assert OpShape.parse(shape.label) == shape
    assert DEFAULT_SHAPES[0].label == "B64 T128 H4 K32 N2"


def test_peak_memory_is_that_of_the_allocator():
    """Of 4, 8 and 12 MB held in turn, the peak is 12; what existed before does not count, nor what is left behind."""
    before = torch.zeros(10_000_000)

    def run():
        a = torch.empty(1_000_000)
        b = torch.empty(2_000_000)
        del a
        return b, before[:5]

    assert peak_extra_bytes(run, CPU) == pytest.approx(12e6, rel=1e-3)


def test_peak_memory_sees_inside_custom_operators():
    """The chunked backend is one opaque operator; its temporaries count, as do the reference's kept states."""
    case = workload.Workload(OpShape(2, 64, 2, 16, 2), BenchmarkSettings.of(device="cpu"))
    gradients = sum(y.numel() * 4 for y in case.x.values())
    assert peak_extra_bytes(case.work("chunkwise"), CPU) > gradients
    states = 64 * 2 * 2 * 2 * 16 * 16 * 4  # T·N states of B·H·K·V floats, kept for the loop's backward
    assert peak_extra_bytes(case.work("reference"), CPU) > states


def test_rounds_are_interleaved():
    """One run of each in turn, another first each time; a slow one stops at MIN_RUNS."""
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    assert {t.runs for t in interleaved(runs, repeats=4, device=CPU).values()} == {4}
    assert "".join(calls) == "abcbcacababc"
    calls.clear()
    before = {"b": lambda: (calls.append("-"), time.sleep(0.05))}
    times = interleaved(runs, before=before, repeats=2, device=CPU)
    assert "".join(calls) == "a-bc-bca" and times["b"].max_ms < 50  # what comes before is off the clock
    times = interleaved(runs, repeats=MIN_RUNS + 2, device=CPU, seconds_each=0)
    assert {t.runs for t in times.values()} == {MIN_RUNS}


def test_roofline_is_a_rate():
    product = roofline.MatrixProduct(CPU)
    found = product.roofline(Timing.of([4.0, 1.0, 2.0]))
    assert product.size == found.size == 64 and found.threads == torch.get_num_threads()
    assert found.gflops == pytest.approx(2 * 64**3 / 2e-3 / 1e9) and found.best_gflops == 2 * found.gflops


# --- Scaling ----------------------------------------------------------------------------------------------------------


def test_scaling_gives_time_per_token_and_ratio():
    report = bench_scaling([64, 16, 32], backend="chunkwise", shape=TINY, device="cpu", repeats=2)
    assert [p.length for p in report.points] == [16, 32, 64]
    for p in report.points:
        assert p.us_per_token == pytest.approx(p.time.median_ms * 1e3 / (2 * p.length))  # B = 2
        assert p.ratio == pytest.approx(p.us_per_token / report.points[0].us_per_token)
        assert p.time.runs == 2 and p.peak_extra_bytes > 0
    assert report.points[0].ratio == 1 and report.reason is None and report.error < 1e-4
    assert report.backend == "chunkwise" and report.checked_length == 16
    text = shown(report)
    assert "µs/token" in text and "64" in text and "…" not in text


def test_quick_scaling_resolves_a_backend():
    report = bench_scaling(quick=True, device="cpu", repeats=1)
    assert report.backend in BACKENDS and "fastest" in report.why_backend and len(report.points) == 3
