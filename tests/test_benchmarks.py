"""Benchmarks: nothing wrong is timed, counts are those done by hand, and reports are plain values."""

import dataclasses
import functools
import importlib.util
import io
import json
import time

import pytest
import torch
import tyro
from rich.console import Console

from deltaproduct.benchmarks import (
    DEFAULT_SHAPES,
    PEERS,
    QUICK_STEP_MODEL,
    STEP_MODEL,
    OpShape,
    bench_ops,
    bench_scaling,
    bench_step,
    bench_train,
    ops,
    problem,
    roofline,
    row_names,
    step,
    textbook_loop,
    train,
)
from deltaproduct.benchmarks.peers import Peer, as_gated_delta_rule
from deltaproduct.benchmarks.render import _number, render
from deltaproduct.benchmarks.settings import Settings
from deltaproduct.benchmarks.timing import MIN_RUNS, Timing, interleaved, peak_extra_bytes
from deltaproduct.cli import bench as cli
from deltaproduct.errors import UsageError
from deltaproduct.experiments.s3 import s3
from deltaproduct.models import Decoder, SequenceModel
from deltaproduct.ops import BACKENDS, delta_product
from deltaproduct.ops.reference import reference
from deltaproduct.training.loop import sample_batch

NATIVE = BACKENDS["cpu"].obstacle(torch.device("cpu"), torch.float32) is None
CPU = torch.device("cpu")
TINY = OpShape(2, 8, 1, 4, 2)
S3 = s3(seeds=1)[0].config


def shown(report) -> str:
    console = Console(file=io.StringIO(), width=80)
    render(report, console)
    return console.file.getvalue()


def rows_of(report, shape=0):
    return {row.backend: row for row in report.shapes[shape].rows}


@pytest.fixture
def add_backend(monkeypatch):
    """Put a backend with this `run` into the operator's table for one test."""

    def add(name, run):
        monkeypatch.setitem(BACKENDS, name, dataclasses.replace(BACKENDS["reference"], name=name, run=run))

    return add


@pytest.fixture
def add_peer(monkeypatch):
    """The same among the peers."""

    def add(name, run, **fields):
        monkeypatch.setitem(PEERS, name, Peer(name, "for a test", lambda: run, **fields))

    return add


@pytest.fixture(scope="module")
def quick():
    return bench_ops(quick=True, device="cpu", repeats=2)


@pytest.fixture(scope="module")
def quick_step():
    return bench_step(quick=True, device="cpu", repeats=3)


@pytest.fixture(scope="module")
def quick_train():
    return bench_train(S3, quick=True, device="cpu", repeats=2)


@pytest.fixture(autouse=True)
def small_roofline(monkeypatch):
    """Tests of something else need not wait for a large product."""
    monkeypatch.setitem(roofline.SIZES, "cpu", (64,))


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


def test_reports_are_plain_json(quick, quick_step, quick_train):
    """They survive JSON unchanged, without NaN and without tuples."""
    scaling = bench_scaling([16, 32], backend="chunkwise", shape=TINY, device="cpu", repeats=1)
    for report in (quick, scaling, quick_step, quick_train):
        value = report.to_dict()
        assert json.loads(json.dumps(value, allow_nan=False)) == value
    assert quick.to_dict()["shapes"][0]["rows"][0]["forward"]["median_ms"] > 0
    assert [r.benchmark for r in (quick, scaling, quick_step, quick_train)] == ["ops", "scaling", "step", "train"]


def test_tables_fit_a_terminal_of_80_columns(quick, quick_step, quick_train):
    text = shown(quick)
    for report in (quick, quick_step, quick_train):
        assert "…" not in shown(report)  # how rich marks what it cut
    assert all(name in text for name in row_names()) and "Roofline" in text and "B4 T64 H2 K16 N2" in text
    assert all(other.reason in text for other in quick.unavailable)


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


# --- Correctness comes first ------------------------------------------------------------------------------------------


def off_in_the_output(*args):
    o, state = reference(*args)
    return o * 1.01, state


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, d):
        return 2 * d


def off_in_one_gradient(q, k, v, beta, *rest):
    return reference(q, k, v, _Doubled.apply(beta), *rest)


def not_a_number(*args):
    o, state = reference(*args)
    return o / 0 * 0, state


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
    monkeypatch.setattr(problem, "CHECK_BYTES", 3 * 8 * 2 * 2 * 1 * 4 * 4)  # float64 states of three tokens of TINY
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


# --- Peers ------------------------------------------------------------------------------------------------------------


def inputs(n, gate, length=40, dtype=torch.float32):
    """With grouped heads and V ≠ K; T·N is no multiple of the peers' chunks of 64."""
    generator = torch.Generator().manual_seed(0)
    b, h, hv, k, v = 2, 2, 4, 8, 6

    def normal(*size):
        return torch.randn(b, length, *size, generator=generator, dtype=dtype)

    x = {
        "q": torch.nn.functional.normalize(normal(h, k), dim=-1),
        "k": torch.nn.functional.normalize(normal(n, h, k), dim=-1),
        "v": normal(n, hv, v),
        "beta": 2 * torch.sigmoid(normal(n, hv)),
    }
    if gate:
        x["g"] = torch.nn.functional.logsigmoid(normal(hv))
    return {name: y.requires_grad_() for name, y in x.items()}


def output_and_gradients(run, x):
    o = run(**x)
    weights = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape)
    return o, *torch.autograd.grad((o * weights).sum(), list(x.values()))


@pytest.mark.parametrize("gate", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", PEERS)
def test_peers_are_the_operator(name, n, gate):
    pytest.importorskip({"transformers": "transformers", "fla-core": "fla"}.get(PEERS[name].distribution, "torch"))
    assert PEERS[name].obstacle(CPU, torch.float32) is None
    x = inputs(n, gate)
    wide = {name: y.detach().double().requires_grad_() for name, y in x.items()}
    want = output_and_gradients(lambda **y: delta_product(**y, backend="reference")[0], wide)
    # T·N steps, each with a rounding of 2⁻²⁴ of max|·|; 8 for the backward and for the largest of many entries.
    limit = 8 * 40 * n * 2.0**-24
    for have, wanted in zip(output_and_gradients(PEERS[name].load(), x), want, strict=True):
        assert have.dtype == torch.float32
        torch.testing.assert_close(have.double(), wanted, rtol=0, atol=limit * wanted.abs().max().item())


def test_textbook_loop_is_the_operator_in_float64():
    """And differentiable, by finite differences."""
    x = inputs(2, True, length=5, dtype=torch.float64)
    want, _ = delta_product(**x, backend="reference")
    torch.testing.assert_close(textbook_loop(**x), want, rtol=1e-12, atol=1e-12)  # a few hundred roundings of 1e-16
    assert torch.autograd.gradcheck(lambda *y: textbook_loop(*y), tuple(x.values()), fast_mode=True)


@pytest.mark.parametrize("gate", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_delta_product_is_the_gated_delta_rule_on_a_longer_sequence(n, gate):
    x = inputs(n, gate, dtype=torch.float64)
    q, k, v, beta, g = as_gated_delta_rule(**({"g": None} | x))
    one = {"k": k.unsqueeze(2), "v": v.unsqueeze(2), "beta": beta.unsqueeze(2), "backend": "reference"}
    o, _ = delta_product(q, g=g, **one)
    want, _ = delta_product(**x, backend="reference")
    torch.testing.assert_close(o[:, n - 1 :: n], want, rtol=1e-12, atol=1e-12)
    assert k._base is x["k"] and v._base is x["v"] and beta._base is x["beta"]  # no copies on the peer's account


FAKE_FLA = """
from deltaproduct.ops import delta_product

def naive_chunk_gated_delta_rule(q, k, v, g, beta):
    x = {"k": k.unsqueeze(2), "v": v.unsqueeze(2), "beta": beta.unsqueeze(2)}
    assert q.shape[2] == v.shape[2]
    return delta_product(q, g=g, **x, backend="reference")

def naive_recurrent_gated_delta_product(q, k, v, g, beta, scale, num_householder):
    n = num_householder
    x = {"k": k.unflatten(1, (-1, n)), "v": v.unflatten(1, (-1, n)), "beta": beta.unflatten(1, (-1, n))}
    assert q.shape[2] == v.shape[2]
    return delta_product(q, g=g, **x, scale=scale, backend="reference")
"""


@pytest.fixture
def fresh_loaders(monkeypatch):
    """Peers that look anew for what they need."""
    for name, peer in PEERS.items():
        if hasattr(peer.load, "__wrapped__"):
            monkeypatch.setitem(PEERS, name, dataclasses.replace(peer, load=peer.load.__wrapped__))


def test_fla_is_used_although_its_package_cannot_be_imported(fresh_loaders, monkeypatch, tmp_path):
    """Its __init__ needs Triton; the two files do not. Here they are ours, with its conventions."""
    for op in ("gated_delta_rule", "gated_delta_product"):
        (tmp_path / "fla" / "ops" / op).mkdir(parents=True)
        (tmp_path / "fla" / "ops" / op / "naive.py").write_text(FAKE_FLA)
    (tmp_path / "fla" / "__init__.py").write_text("import no_such_triton")
    spec = importlib.util.spec_from_file_location(
        "fla", tmp_path / "fla" / "__init__.py", submodule_search_locations=[str(tmp_path / "fla")]
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    x = inputs(3, True)
    want, _ = delta_product(**x, backend="reference")
    for name in ("fla_chunkwise", "fla_loop"):
        assert PEERS[name].obstacle(CPU, torch.float32) is None
        torch.testing.assert_close(PEERS[name].load()(**x), want, rtol=1e-5, atol=1e-5)
    (tmp_path / "fla" / "ops" / "gated_delta_rule" / "naive.py").unlink()
    assert "has no ops/gated_delta_rule/naive.py" in PEERS["fla_chunkwise"].obstacle(CPU, torch.float32)


def test_peers_that_are_not_installed_are_reported(fresh_loaders, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    report = bench_ops([TINY], device="cpu", repeats=1)
    reasons = {other.backend: other.reason for other in report.unavailable}
    assert reasons["transformers"] == "transformers is not installed"
    assert reasons["fla_loop"] == reasons["fla_chunkwise"] == "flash-linear-attention is not installed"
    assert "fla_loop cannot serve: flash-linear-attention is not installed." in shown(report)
    with pytest.raises(UsageError, match="transformers is not installed"):
        bench_ops([TINY], backends=["transformers"], device="cpu")


def test_transformers_own_code_is_timed_and_no_kernel_in_its_place(fresh_loaders, monkeypatch):
    """Where flash-linear-attention is installed, transformers' name leads to its GPU kernel."""
    module = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")

    @functools.wraps(module.torch_chunk_gated_delta_rule)
    def kernel(*args, **kw):
        raise AssertionError("a kernel")

    monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", kernel)
    assert PEERS["transformers"].load()(**inputs(2, True)).shape == (2, 40, 4, 6)


def test_peers_that_compute_in_float32_are_not_run_in_float64():
    for name in ("transformers", "fla_chunkwise", "fla_loop"):
        assert "float32" in PEERS[name].obstacle(CPU, torch.float64)
    assert PEERS["textbook_loop"].obstacle(CPU, torch.float64) is None


def test_a_peer_that_fails_or_is_wrong_is_a_finding(add_peer):
    def broken(**x):
        raise RuntimeError("shapes\nand more")

    add_peer("broken", broken)
    add_peer("off", lambda **x: 1.01 * textbook_loop(**x))
    report = bench_ops([TINY], backends=["broken", "off", "textbook_loop"], device="cpu", repeats=1)
    rows = rows_of(report)
    assert rows["broken"].status == "failed" and rows["broken"].reason == "RuntimeError: shapes"
    assert rows["off"].status == "wrong" and "above" in rows["off"].reason
    assert rows["textbook_loop"].status == "timed"
    assert "broken is failed and was not timed" in shown(report)


def test_versions_of_peers_are_in_the_report(add_peer):
    add_peer("installed", textbook_loop, distribution="torch")
    add_peer("elsewhere", textbook_loop, distribution="no-such-distribution")
    report = bench_ops([TINY], backends=["installed", "elsewhere", "chunkwise"], device="cpu", repeats=1)
    assert set(report.versions) == {"installed"} and report.versions["installed"] in torch.__version__
    assert "Peers: installed" in shown(report)


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
    case = problem.Problem(OpShape(2, 64, 2, 16, 2), Settings.of(device="cpu"))
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


# --- Decoding ---------------------------------------------------------------------------------------------------------


def test_step_report_is_consistent(quick_step):
    r, t = quick_step, quick_step.times
    assert r.reason is None and 0 <= r.error < r.error_limit < 1e-3 and r.repeats == 3 and r.batch_size == 1
    for timing in (t.token, t.recurrent, t.weights, t.states, *t.token_by.values(), *t.weights_by.values()):
        assert 0 < timing.min_ms <= timing.median_ms <= timing.max_ms and timing.runs == 3
    assert t.weights.median_ms == min(way.median_ms for way in t.weights_by.values()) and len(t.weights_by) >= 2
    assert set(t.token_by) == ({"model", "decoder"} if NATIVE else {"model"})
    assert t.token.median_ms == min(way.median_ms for way in t.token_by.values())
    assert t.floor_ms == pytest.approx(t.weights.median_ms + t.states.median_ms)
    assert t.ratio == pytest.approx(t.token.median_ms / t.floor_ms)
    assert t.tokens_per_second == pytest.approx(1e3 / t.token.median_ms)
    assert t.floor_gb_per_s == pytest.approx(r.moved_bytes / 1e9 / (t.floor_ms / 1e3))
    text = shown(r)
    assert "One token, B1 L2 D64 H2 K16 N2" in text and "tokens/s" in text and "recurrent steps alone" in text


def test_bytes_of_a_step_by_hand():
    """QUICK_STEP_MODEL: D = 64, 2 layers of 2 heads × 16, N = 2, an MLP of 256, 256 symbols; three sequences."""
    report = bench_step(batch_size=3, quick=True, device="cpu", repeats=1)
    assert report.model["hidden_size"] == QUICK_STEP_MODEL.hidden_size == 64
    projections = 64 * (32 + 64 + 64 + 4) + 32 * 64  # q, k, v, β and back
    layer = 2 * 64 + projections + 4 * (32 + 64 + 64) + 16 + 3 * 64 * 256  # norms, convolutions, a head's norm, MLP
    assert report.num_parameters == 2 * layer + 256 * 64 + 64 + 64 * 256
    assert report.weight_bytes == 4 * (2 * layer + 3 * 64 + 64 + 64 * 256)  # three rows of the embedding
    assert report.state_bytes == 4 * 3 * 2 * (2 * 16 * 16 + 3 * (32 + 64 + 64))
    assert report.moved_bytes == report.weight_bytes + 2 * report.state_bytes
    assert report.times.tokens_per_second == pytest.approx(3e3 / report.times.token.median_ms)
    tied = bench_step(dataclasses.replace(QUICK_STEP_MODEL, tie_word_embeddings=True), device="cpu", repeats=1)
    assert tied.weight_bytes == 4 * (2 * layer + 64 + 64 * 256)
    assert STEP_MODEL.num_hidden_layers == 24 and STEP_MODEL.hidden_size == 1024


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_a_model_whose_steps_are_wrong_is_not_timed(monkeypatch, fault):
    forward = SequenceModel.forward

    def off(self, tokens, state=None, **kw):
        if tokens.shape[1] == 1 and fault == "raises":
            raise RuntimeError("no step")
        logits, state = forward(self, tokens, state, **kw)
        return (logits * 1.001 if tokens.shape[1] == 1 else logits), state

    monkeypatch.setattr(SequenceModel, "forward", off)
    report = bench_step(quick=True, device="cpu", repeats=1)
    assert report.times is None and ("no step" if fault == "raises" else "above") in report.reason
    assert report.reason in shown(report)
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.skipif(not NATIVE, reason="without the native engine there is one way only")
def test_a_decoder_that_is_wrong_is_not_timed(monkeypatch):
    right = Decoder.__call__
    monkeypatch.setattr(Decoder, "__call__", lambda self, tokens: right(self, tokens) * 1.001)
    report = bench_step(quick=True, device="cpu", repeats=1)
    assert report.times is None and "the error of decoder" in report.reason


def test_decoding_carries_the_state():
    model = SequenceModel(QUICK_STEP_MODEL).eval()
    tokens = torch.randint(256, (2, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, _ = model(torch.cat((tokens, tokens), dim=1))
    limit = step.error_limit(QUICK_STEP_MODEL) * want.abs().max().item()
    for decode in step._decoders(model, 2).values():
        run = step._rounds(decode, tokens)
        got = torch.stack([run() for _ in range(8)], dim=1)
        torch.testing.assert_close(got, want, rtol=0, atol=limit)


@pytest.mark.parametrize("changes", [{}, {"use_forget_gate": True, "num_v_heads": 4, "expand_v": 2.0}])
def test_recurrent_steps_are_of_every_layer_and_carry_states(monkeypatch, changes):
    seen = []

    def watched(*args, state, **x):
        o, after = real(*args, state=state, **x)
        seen.append((state, after, x.get("g")))
        return o, after

    real = step.delta_product_step
    monkeypatch.setattr(step, "delta_product_step", watched)
    model = SequenceModel(dataclasses.replace(QUICK_STEP_MODEL, **changes))
    run = step._recurrences(model, 3, Settings.of(device="cpu"))
    run(), run()
    assert len(seen) == 4 and seen[2][0] is seen[0][1] and seen[3][0] is seen[1][1]
    mixer = model.mixers()[0]
    assert seen[0][0].shape == mixer.init_state(3).recurrent.shape
    assert all((g is not None) == bool(changes) for _, _, g in seen)


def test_weights_are_read_once_each_way():
    reads = step._reads(4 * 4096 * 3 - 8, CPU)  # two floats short of three rows
    assert reads["sum"]() == reads["dot"]() == reads["matrix-vector"]().sum() == 4096 * 3


# --- Training ---------------------------------------------------------------------------------------------------------


def test_train_report_is_consistent(quick_train):
    rows = {row.backend: row for row in quick_train.rows}
    assert set(rows) | {other.backend for other in quick_train.unavailable} == set(BACKENDS)
    assert {"reference", "chunkwise"} <= set(rows)
    for row in rows.values():
        assert row.status == "timed" and 0 <= row.error < quick_train.error_limit and row.worst
        for part in ("step", "forward", "backward", "optimiser", "operator"):
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

    def watched(model, optimizer, task, settings, progress, device):
        seen.append((progress.step, progress.stage, settings.lengths[progress.stage]))
        return real(model, optimizer, task, settings, progress, device)

    real = train.train_step
    monkeypatch.setattr(train, "train_step", watched)
    monkeypatch.setattr(train, "sample_batch", lambda *a: sampled.append(a[2:]) or sample_batch(*a))
    training = dataclasses.replace(S3.training, lengths=(4, 8), batch_sizes=(6, 5))
    report = bench_train(dataclasses.replace(S3, training=training), backends=["chunkwise"], device="cpu", repeats=2)
    assert seen == [(0, 1, 8), (1, 1, 8), (2, 1, 8)]  # one to warm up
    assert sampled == [(0, 1), (0, 1), (0, 1), (1, 1), (2, 1)]  # two models' parts, then sampling itself
    assert (report.batch_size, report.tokens) == (5, 9)


def test_every_backward_is_of_a_fresh_loss():
    trained = train._Training(S3, "chunkwise", CPU)
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


# --- The commands -----------------------------------------------------------------------------------------------------


def command(kind, *arguments):
    return tyro.cli(kind, args=list(arguments)).run()


def test_bench_train_runs_what_reproduce_runs(monkeypatch):
    configs = []
    monkeypatch.setattr(cli, "bench_train", lambda config, **kw: configs.append(config) or S3)
    monkeypatch.setattr(cli, "render", lambda *a: None)
    command(cli.BenchTrain)
    command(cli.BenchTrain, "--task", "S5", "--num-householder", "4")
    assert configs[0] == S3 and S3.model.num_householder == 2 and S3.model.allow_neg_eigval
    assert configs[1].training.task == "S5" and configs[1].model.num_householder == 4
    assert configs[1].model.num_labels == 120 and configs[1].training.lengths == S3.training.lengths


def test_commands_print_and_write_json(capsys, tmp_path):
    sizes = ["--num-hidden-layers", "1", "--hidden-size", "32", "--num-heads", "1", "--head-dim", "8"]
    sizes += ["--num-householder", "3", "--batch-size", "2"]
    common = ["--quick", "--repeats", "1", "--device", "cpu", "--json", "--out"]
    command(cli.BenchStep, *sizes, *common, str(tmp_path / "a" / "step.json"))
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "a" / "step.json").read_text())
    model = printed["model"]
    assert [model[n] for n in ("num_hidden_layers", "hidden_size", "num_heads", "head_dim")] == [1, 32, 1, 8]
    assert model["num_householder"] == 3 and printed["batch_size"] == 2 and printed["repeats"] == 1
    command(cli.BenchTrain, "--backends", "chunkwise", *common, str(tmp_path / "train.json"))
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "train.json").read_text())
    assert [row["backend"] for row in printed["rows"]] == ["chunkwise"]
    ops = ["--shapes", TINY.label, "--backends", "textbook_loop", "chunkwise"]
    command(cli.BenchOps, *ops, *common, str(tmp_path / "ops.json"))
    printed = json.loads(capsys.readouterr().out)
    assert [row["backend"] for row in printed["shapes"][0]["rows"]] == ["textbook_loop", "chunkwise"]
    assert list(printed["shapes"][0]["rows"][0]["speedup"]) == ["chunkwise"]


# --- Mistakes ---------------------------------------------------------------------------------------------------------


def changed(config, **parts):
    return dataclasses.replace(config, **{n: dataclasses.replace(getattr(config, n), **c) for n, c in parts.items()})


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: bench_ops([TINY], backends=["nonesuch"]),
        lambda: bench_ops([TINY], backends=[]),
        lambda: bench_ops([]),
        lambda: bench_ops([TINY], repeats=0),
        lambda: bench_ops([TINY], repeats=1.5),
        lambda: bench_ops([TINY], dtype="int8"),
        lambda: bench_ops([TINY], dtype=torch.int64),
        lambda: bench_ops([TINY], device="abacus"),
        lambda: bench_ops([TINY], device="meta"),
        lambda: bench_scaling([16, 32], backend="nonesuch"),
        lambda: bench_scaling([16, 32], backend="reference"),
        lambda: bench_scaling([16, 32], backend="textbook_loop"),
        lambda: bench_scaling([16, 16]),
        lambda: bench_scaling([0, 16]),
        lambda: bench_scaling([16, 32], repeats=0),
        lambda: bench_step(quick=True, batch_size=0),
        lambda: bench_step(quick=True, repeats=0),
        lambda: bench_step(quick=True, device="abacus"),
        lambda: command(cli.BenchStep, "--quick", "--head-dim", "0"),
        lambda: bench_train(S3, backends=["nonesuch"]),
        lambda: bench_train(S3, backends=["textbook_loop"]),
        lambda: bench_train(S3, backends=[]),
        lambda: bench_train(S3, repeats=0),
        lambda: bench_train(changed(S3, training={"precision": "bfloat16"})),
        lambda: bench_train(changed(S3, training={"task": "S4"})),
        lambda: bench_train(changed(S3, model={"num_v_heads": 8})),
        lambda: bench_train(changed(S3, model={"mixer": "deltanet"})),
        lambda: command(cli.BenchTrain, "--num-householder", "0"),
        lambda: OpShape(0, 128, 4, 32, 2),
        lambda: OpShape(64, 128, 4, 32, 0),
        lambda: OpShape(64, -1, 4, 32, 2),
        lambda: OpShape(64, 128, 4, 32.0, 2),
        lambda: OpShape.parse("64 128 4 32 2"),
        lambda: OpShape.parse("B64 T0 H4 K32 N2"),
    ],
)
def test_mistakes_are_one_clear_line(mistake):
    with pytest.raises(UsageError) as e:
        mistake()
    assert str(e.value) and "\n" not in str(e.value) and str(e.value).endswith(".")


def test_other_rooms_mistakes_are_passed_on(monkeypatch):
    with pytest.raises(UsageError, match="S99x"):
        command(cli.BenchTrain, "--task", "S99x")
    monkeypatch.setattr(step, "DeltaProduct", type("Another", (), {}))
    with pytest.raises(UsageError, match="DeltaProduct"):
        bench_step(quick=True, device="cpu")


def test_naming_a_backend_that_cannot_serve_is_an_error(monkeypatch):
    away = dataclasses.replace(BACKENDS["reference"], name="away", obstacle=lambda device, dtype: "it is away")
    monkeypatch.setitem(BACKENDS, "away", away)
    with pytest.raises(UsageError, match="it is away"):
        bench_ops([TINY], backends=["away"], device="cpu")
    report = bench_ops([TINY], device="cpu", repeats=1)
    assert [n.reason for n in report.unavailable if n.backend == "away"] == ["it is away"]
    assert "away cannot serve: it is away." in shown(report)
