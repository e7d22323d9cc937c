"""`bench generate`: what a token costs, beside what memory allows."""

import json

import pytest
import torch
from cases import CPU, shown

from deltaproduct.benchmarks import GENERATE_MODEL, QUICK_GENERATE_MODEL, bench_generate, generate
from deltaproduct.benchmarks.settings import BenchmarkSettings
from deltaproduct.models import Decoder, SequenceModel
from deltaproduct.ops import BACKENDS

NATIVE = BACKENDS["cpu"].unsupported_reason(CPU, torch.float32) is None


def test_generate_report_is_consistent(quick_generate):
    r, t = quick_generate, quick_generate.times
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
    """QUICK_GENERATE_MODEL: D = 64, 2 layers of 2 heads × 16, N = 2, an MLP of 256, 256 symbols; three sequences."""
    report = bench_generate(batch_size=3, quick=True, device="cpu", repeats=1)
    assert report.model["hidden_size"] == QUICK_GENERATE_MODEL.hidden_size == 64
    projections = 64 * (32 + 64 + 64 + 4) + 32 * 64  # q, k, v, β and back
    layer = 2 * 64 + projections + 4 * (32 + 64 + 64) + 16 + 3 * 64 * 256  # norms, convolutions, a head's norm, MLP
    assert report.num_parameters == 2 * layer + 256 * 64 + 64 + 64 * 256
    assert report.weight_bytes == 4 * (2 * layer + 3 * 64 + 64 + 64 * 256)  # three rows of the embedding
    assert report.state_bytes == 4 * 3 * 2 * (2 * 16 * 16 + 3 * (32 + 64 + 64))
    assert report.moved_bytes == report.weight_bytes + 2 * report.state_bytes
    assert report.times.tokens_per_second == pytest.approx(3e3 / report.times.token.median_ms)
    tied = bench_generate(QUICK_GENERATE_MODEL.changed(tie_word_embeddings=True), device="cpu", repeats=1)
    assert tied.weight_bytes == 4 * (2 * layer + 64 + 64 * 256)
    assert GENERATE_MODEL.num_hidden_layers == 24 and GENERATE_MODEL.hidden_size == 1024


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_a_model_whose_steps_are_wrong_is_not_timed(monkeypatch, fault):
    forward = SequenceModel.forward

    def off(self, tokens, state=None, **kw):
        if tokens.shape[1] == 1 and fault == "raises":
            raise RuntimeError("no step")
        logits, state = forward(self, tokens, state, **kw)
        return (logits * 1.001 if tokens.shape[1] == 1 else logits), state

    monkeypatch.setattr(SequenceModel, "forward", off)
    report = bench_generate(quick=True, device="cpu", repeats=1)
    assert report.times is None and ("no step" if fault == "raises" else "above") in report.reason
    assert report.reason in shown(report)
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.skipif(not NATIVE, reason="without the native engine there is one way only")
def test_a_decoder_that_is_wrong_is_not_timed(monkeypatch):
    right = Decoder.__call__
    monkeypatch.setattr(Decoder, "__call__", lambda self, tokens: right(self, tokens) * 1.001)
    report = bench_generate(quick=True, device="cpu", repeats=1)
    assert report.times is None and "the error of decoder" in report.reason


def test_decoding_carries_the_state():
    model = SequenceModel(QUICK_GENERATE_MODEL).eval()
    tokens = torch.randint(256, (2, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, _ = model(torch.cat((tokens, tokens), dim=1))
    limit = generate.stepwise_error_limit(QUICK_GENERATE_MODEL) * want.abs().max().item()
    for decode in generate._decoders(model, 2).values():
        run = generate._rounds(decode, tokens)
        got = torch.stack([run() for _ in range(8)], dim=1)
        torch.testing.assert_close(got, want, rtol=0, atol=limit)


@pytest.mark.parametrize("changes", [{}, {"use_forget_gate": True, "num_v_heads": 4, "expand_v": 2.0}])
def test_recurrent_steps_are_of_every_layer_and_carry_states(monkeypatch, changes):
    seen = []

    def watched(*args, state, **x):
        o, after = real(*args, state=state, **x)
        seen.append((state, after, x.get("g")))
        return o, after

    real = generate.delta_product_step
    monkeypatch.setattr(generate, "delta_product_step", watched)
    model = SequenceModel(QUICK_GENERATE_MODEL.changed(**changes))
    run = generate._recurrences(model, 3, BenchmarkSettings.of(device="cpu"))
    run(), run()
    assert len(seen) == 4 and seen[2][0] is seen[0][1] and seen[3][0] is seen[1][1]
    mixer = model.mixers()[0]
    assert seen[0][0].shape == mixer.init_state(3).recurrent.shape
    assert all((g is not None) == bool(changes) for _, _, g in seen)


def test_weights_are_read_once_each_way():
    reads = generate._reads(4 * 4096 * 3 - 8, CPU)  # two floats short of three rows
    assert reads["sum"]() == reads["dot"]() == reads["matrix-vector"]().sum() == 4096 * 3
