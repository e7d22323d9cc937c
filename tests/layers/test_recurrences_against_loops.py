"""Attention, LSTM, GRU, sLSTM, the dense linear RNN and RWKV-7 against loops written from their equations, in float64.

What every mixer owes the contract (streaming, packing, padding, gradients) is in test_mixers.py.
"""

import math
from functools import partial

import mixer_oracles
import pytest
import torch
from mixer_oracles import D, H, K, build, noise
from torch.nn import functional as F

from deltaproduct.errors import UsageError
from deltaproduct.layers import GRU, LSTM, RWKV7, SLSTM, Attention, DenseLinearRNN
from deltaproduct.layers.dense_rnn import matrix_scan, norm_bound
from deltaproduct.layers.slstm import EMPTY
from deltaproduct.models import ModelConfig, SequenceModel

pytestmark = pytest.mark.numerical

EXACT = 1e-12  # a few hundred float64 roundings of numbers near 1, times up to 1/√norm_eps where a norm enlarges them
B, T = 2, 21
OTHER_MIXERS = [Attention, LSTM, GRU, SLSTM, DenseLinearRNN, RWKV7]
NAMES = ["attention", "lstm", "gru", "slstm", "dense_linear_rnn", "rwkv7"]
assert_close = partial(mixer_oracles.assert_close, tolerance=EXACT)


def heads(x):
    return x.unflatten(-1, (H, -1))


# Attention


def attention_loop(mixer, x):
    """One query at a time; a pair of channels is a complex number that turns with the position."""
    half = K // 2
    q, k, v = heads(x @ mixer.q_proj.weight.T), x @ mixer.k_proj.weight.T, x @ mixer.v_proj.weight.T
    k, v = k.unflatten(-1, (mixer.num_kv_heads, K)), v.unflatten(-1, (mixer.num_kv_heads, K))

    def turned(a, position):
        if mixer.rope_theta is None:
            return a
        turn = [position * mixer.rope_theta ** (-2 * i / K) for i in range(half)]
        z = torch.complex(a[..., :half], a[..., half:]) * torch.tensor(
            [complex(math.cos(w), math.sin(w)) for w in turn], dtype=torch.complex128
        )
        return torch.cat((z.real, z.imag), -1)

    rows = []
    for t in range(x.shape[1]):
        outputs = []
        for h in range(H):
            g = h * mixer.num_kv_heads // H
            scores = [(turned(q[:, t, h], t) * turned(k[:, s, g], s)).sum(-1) / K**0.5 for s in range(t + 1)]
            weights = torch.softmax(torch.stack(scores, -1), -1)
            outputs.append(sum(weights[:, s, None] * v[:, s, g] for s in range(t + 1)))
        rows.append(torch.cat(outputs, -1) @ mixer.o_proj.weight.T)
    return torch.stack(rows, 1)


@pytest.mark.parametrize("options", [{}, {"rope_theta": 30.0, "num_kv_heads": 1}, {"rope_theta": None}], ids=str)
def test_attention_is_the_loop(options):
    mixer, x = build(Attention, **options), noise(B, T, D)
    assert_close(mixer(x)[0], attention_loop(mixer, x))


def test_attention_is_llamas():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(
        hidden_size=D, num_attention_heads=4, num_key_value_heads=2, head_dim=K, rope_theta=100.0,
        attn_implementation="eager", vocab_size=5, num_hidden_layers=1, intermediate_size=8,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = llama.LlamaAttention(config, 0).double()
    ours = Attention(D, 4, K, num_kv_heads=2, rope_theta=100.0).double()
    ours.load_state_dict(theirs.state_dict())
    x = noise(B, T, D)
    positions = llama.LlamaRotaryEmbedding(config)(x, torch.arange(T)[None])
    causal = torch.zeros(T, T, dtype=torch.float64).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -1e30)
    want, _ = theirs(x, position_embeddings=positions, attention_mask=causal[None, None])
    # Theirs turns by float32 angles: T · 2⁻²⁴ ≈ 1e-6 off at the end.
    assert_close(ours(x)[0], want, tolerance=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 1}, {"rope_theta": None}], ids=str)
def test_a_cache_of_different_lengths_goes_on(options):
    """Rows of 3, 0 and 7 tokens, as a packed or padded run leaves them, and all ways of going on from there."""
    mixer = build(Attention, **options)
    x, starts = noise(3, T, D), (3, 0, 7)
    whole = [mixer(x[b : b + 1, : n + 9]) for b, n in enumerate(starts)]
    _, state = mixer(
        torch.cat([x[b : b + 1, :n] for b, n in enumerate(starts)], 1), cu_seqlens=torch.tensor([0, 3, 3, 10])
    )
    assert state.lengths.tolist() == list(starts) and state.keys.shape[1] == 7
    assert all((cache[b, n:] == 0).all() for cache in (state.keys, state.values) for b, n in enumerate(starts))
    more = torch.stack([x[b, n : n + 9] for b, n in enumerate(starts)])

    def check(got, end):
        for b, (y, cache) in enumerate(whole):
            assert_close(got[b], y[0, -9:])
            n = starts[b] + 9
            assert end.lengths[b] == n and (end.keys[b, n:] == 0).all()
            assert_close(end.keys[b, :n], cache.keys[0])
            assert_close(end.values[b, :n], cache.values[0])

    check(*mixer(more, state))
    steps, end = [], state
    for t in range(9):
        y, end = mixer(more[:, t : t + 1], end)
        steps.append(y)
    check(torch.cat(steps, 1), end)
    y, end = mixer(more.flatten(0, 1)[None], state, cu_seqlens=torch.tensor([0, 9, 18, 27]))
    check(y.view(3, 9, D), end)
    _, end = mixer(more[:2].flatten(0, 1)[None], state, cu_seqlens=torch.tensor([0, 9, 18, 18]))
    assert end.lengths.tolist() == [12, 9, 7] and end.keys.shape[1] == end.values.shape[1] == 12  # no column for nobody


def test_far_positions_are_exact():
    """Rotation depends on the distance alone, in float32 as well: a million tokens later nothing else has changed."""
    mixer, x = build(Attention).float(), noise(1, 5, D).float()
    near = mixer(x)[0]
    q, k, v = (heads(proj(x)) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    state = mixer.init_state(1)
    o, _ = mixer.attend(q, k, v, state._replace(lengths=state.lengths + 1_000_003))
    assert_close(mixer.o_proj(o.flatten(2)), near, tolerance=1e-5)


# LSTM and GRU


def test_lstm_is_the_loop():
    mixer, x = build(LSTM), noise(B, T, D)
    w, u, b = mixer.rnn.weight_ih_l0, mixer.rnn.weight_hh_l0, mixer.rnn.bias_ih_l0 + mixer.rnn.bias_hh_l0
    h, c = noise(2, B, H * K, seed=2)
    want, state = [], mixer.init_state(B)._replace(hidden=h, cell=c)
    for t in range(T):
        i, f, g, o = (x[:, t] @ w.T + h @ u.T + b).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        want.append(h @ mixer.o_proj.weight.T)
    y, end = mixer(x, state)
    for got, wanted in ((y, torch.stack(want, 1)), (end.hidden, h), (end.cell, c)):
        assert_close(got, wanted)


def test_gru_is_the_loop():
    mixer, x = build(GRU), noise(B, T, D)
    rnn, h = mixer.rnn, noise(B, H * K, seed=2)
    want, state = [], mixer.init_state(B)._replace(hidden=h)
    for t in range(T):
        r, z, n = (x[:, t] @ rnn.weight_ih_l0.T + rnn.bias_ih_l0).chunk(3, -1)
        r_h, z_h, n_h = (h @ rnn.weight_hh_l0.T + rnn.bias_hh_l0).chunk(3, -1)
        z = torch.sigmoid(z + z_h)
        h = (1 - z) * torch.tanh(n + torch.sigmoid(r + r_h) * n_h) + z * h
        want.append(h @ mixer.o_proj.weight.T)
    y, end = mixer(x, state)
    assert_close(y, torch.stack(want, 1))
    assert_close(end.hidden, h)


# sLSTM


def slstm_loop(mixer, x):
    """The paper's equations 8–14 as they stand, with no stabiliser: right as long as nothing overflows."""
    fed = x
    if mixer.use_short_conv:
        width, weight = mixer.conv1d.width, mixer.conv1d.weight[:, 0]
        padded = F.pad(x, (0, 0, width - 1, 0))
        fed = F.silu(sum(padded[:, j : j + x.shape[1]] * weight[:, j] for j in range(width)))
    z_w, o_w = mixer.zo_proj.weight.chunk(2)
    i_w, f_w = mixer.if_proj.weight.chunk(2)
    blocks, biases = mixer.recurrent.chunk(4, -1), mixer.bias.chunk(4, -1)
    h = c = n = x.new_zeros(x.shape[0], H, K)
    outputs = []
    for t in range(x.shape[1]):
        z, o, i, f = (
            heads(a[:, t] @ w.T) + torch.einsum("bhk,hkj->bhj", h, r) + b
            for a, w, r, b in zip((x, x, fed, fed), (z_w, o_w, i_w, f_w), blocks, biases, strict=True)
        )
        c = torch.sigmoid(f) * c + i.exp() * torch.tanh(z)
        n = torch.sigmoid(f) * n + i.exp()
        h = torch.sigmoid(o) * c / n
        mean, variance = h.mean(-1, keepdim=True), h.var(-1, unbiased=False, keepdim=True)
        normal = (h - mean) / (variance + mixer.norm_eps).sqrt() * mixer.norm_weight
        outputs.append(normal.flatten(1) @ mixer.o_proj.weight.T)
    return torch.stack(outputs, 1), c, n, h


@pytest.mark.parametrize("conv", [True, False])
def test_slstm_is_the_loop(conv):
    mixer, x = build(SLSTM, use_short_conv=conv), 3 * noise(B, T, D)
    y, state = mixer(x)
    want, c, n, h = slstm_loop(mixer, x)
    assert_close(y, want, tolerance=300 * EXACT)  # a head's cells may be almost alike: the norm enlarges the rest
    assert_close(state.hidden, h)
    scale = state.stabiliser.exp()
    assert_close(state.cell * scale, c)
    assert_close(state.normaliser * scale, n)


def test_slstm_is_stable_where_its_gates_overflow():
    """c and n share every factor: a constant in all input gates changes nothing but their common scale."""
    mixer, x = build(SLSTM), noise(B, T, D)
    want, _ = mixer(x)
    for shift in (2000.0, -2000.0):  # e^2000 is no float64
        mixer.bias.data[:, 2 * K : 3 * K] += shift
        y, state = mixer(x)
        assert_close(y, want, tolerance=1e-9)  # the gates' own rounding: 2000 · 2⁻⁵³, enlarged by the norm
        # The largest weight in a memory is 1, up to what later tokens add.
        assert (state.normaliser >= 1 - 1e-12).all() and (state.normaliser <= T).all()
        mixer.bias.data[:, 2 * K : 3 * K] -= shift
    assert (mixer.init_state(1).stabiliser == EMPTY).all()


# The dense linear RNN


@pytest.mark.parametrize("length", [1, 2, 3, 5, 16, 17, 50])
def test_matrix_scan_is_the_loop(length):
    a, b = noise(B, length, H, K, K) / K**0.5, noise(B, length, H, K, 3, seed=2)
    q, state = noise(B, length, H, K, seed=3), noise(B, H, K, 3, seed=4)
    inputs = [x.requires_grad_() for x in (a, b, q, state)]
    o, end = matrix_scan(*inputs)
    h, want = state, []
    for t in range(length):
        h = a[:, t] @ h + b[:, t]
        want.append(torch.einsum("bhk,bhkv->bhv", q[:, t], h))
    want = torch.stack(want, 1)
    assert_close(o, want)
    assert_close(end, h)
    weight = noise(*o.shape, seed=5)
    got = torch.autograd.grad((o * weight).sum() + end.sum(), inputs)
    for mine, other in zip(got, torch.autograd.grad((want * weight).sum() + h.sum(), inputs), strict=True):
        assert_close(mine, other)


def test_dense_transitions_never_grow_and_permutations_are_kept(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "deltaproduct.layers.dense_rnn.matrix_scan", lambda a, *rest: (seen.append(a), matrix_scan(a, *rest))[1]
    )
    mixer = build(DenseLinearRNN)
    for scale in (0.01, 1.0, 100.0):
        mixer(scale * noise(B, T, D))
        assert torch.linalg.matrix_norm(seen[-1], 2).max() <= 1 + 1e-12
    permutation = torch.eye(K, dtype=torch.float64)[torch.tensor([2, 0, 3, 1])] * torch.tensor([1.0, -1, 1, 1]).double()
    mixer.a_proj.weight.data.zero_()
    mixer.a_proj.bias.data = permutation.repeat(H, 1, 1).flatten()
    mixer(noise(B, T, D))
    assert torch.equal(seen[-1], permutation.expand(B, T, H, K, K))
    mixer.a_proj.bias.data /= 2  # what is small enough stays as it is, too
    mixer(noise(B, T, D))
    assert torch.equal(seen[-1], permutation.expand(B, T, H, K, K) / 2)
    a = noise(100, K, K)
    assert (norm_bound(a)[:, 0, 0] >= torch.linalg.matrix_norm(a, 2)).all()


@pytest.mark.parametrize("conv", [True, False])
def test_dense_linear_rnn_is_the_loop(conv):
    mixer, x = build(DenseLinearRNN, use_short_conv=conv), noise(B, T, D)
    fed = x
    if conv:
        padded = F.pad(x, (0, 0, 3, 0))
        fed = F.silu(sum(padded[:, j : j + T] * mixer.conv1d.weight[:, 0, j] for j in range(4)))
    q, k, v = (heads(proj(fed)) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    q, k = (a / (a.square().sum(-1, keepdim=True) + 1e-6).sqrt() for a in (q, k))
    m = mixer.a_proj(fed).view(B, T, H, K, K)
    h, want = x.new_zeros(B, H, K, K), []
    for t in range(T):
        bound = (m[:, t].abs().sum(-2).amax(-1) * m[:, t].abs().sum(-1).amax(-1)).sqrt()
        h = m[:, t] / bound.clamp(min=1)[..., None, None] @ h + k[:, t, :, :, None] * v[:, t, :, None, :]
        o = torch.einsum("bhk,bhkv->bhv", q[:, t], h)
        o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.o_norm.weight
        want.append(o.flatten(1) @ mixer.o_proj.weight.T)
    y, end = mixer(x)
    assert_close(y, torch.stack(want, 1), tolerance=300 * EXACT)
    assert_close(end.recurrent, h)


# RWKV-7


def test_rwkv7_is_the_loop():
    """In the paper's letters: row vectors, and a state S of values × keys."""
    mixer, x = build(RWKV7), noise(B, T, D)
    before = F.pad(x, (0, 0, 1, -1))
    xr, xw, xk, xv, xa, xg = (x + (before - x) * mu for mu in mixer.mix_weight)

    def low_rank(layer, a, activation):
        bias = 0 if layer.up.bias is None else layer.up.bias
        return activation(a @ layer.down.weight.T) @ layer.up.weight.T + bias

    r, k, v = (heads(a @ p.weight.T) for a, p in ((xr, mixer.r_proj), (xk, mixer.k_proj), (xv, mixer.v_proj)))
    w = heads(torch.exp(-math.exp(-0.5) * torch.sigmoid(low_rank(mixer.w_lora, xw, torch.tanh))))
    a = heads(torch.sigmoid(low_rank(mixer.a_lora, xa, lambda u: u)))
    g = heads(low_rank(mixer.g_lora, xg, torch.sigmoid))
    kappa = k * mixer.removal
    kappa = kappa / (kappa.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    written = k * torch.lerp(torch.ones_like(a), a, mixer.replacement)
    s, want = x.new_zeros(B, H, K, K), []
    for t in range(T):
        kt, vt, rt, at = kappa[:, t], v[:, t], r[:, t], a[:, t]
        transition = torch.diag_embed(w[:, t]) - kt[..., :, None] * (at * kt)[..., None, :]
        s = s @ transition + vt[..., :, None] * written[:, t][..., None, :]
        o = torch.einsum("bhvk,bhk->bhv", s, rt)
        mean, variance = o.mean(-1, keepdim=True), o.var(-1, unbiased=False, keepdim=True)
        p = (o - mean) / (variance + 64e-5).sqrt() * mixer.norm_weight + mixer.norm_bias
        p = p + (rt * mixer.bonus * written[:, t]).sum(-1, keepdim=True) * vt
        want.append((g[:, t] * p).flatten(1) @ mixer.o_proj.weight.T)
    y, end = mixer(x)
    assert_close(y, torch.stack(want, 1), tolerance=40 * EXACT)  # 1/√HEAD_EPS
    assert_close(end.recurrent, s.mT)


# Sizes, dtypes and models


@pytest.mark.parametrize("mixer", OTHER_MIXERS)
def test_bfloat16_inputs_under_autocast(mixer):
    single = build(mixer).float()
    x = noise(B, T, D).bfloat16()
    want, _ = single(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        y, state = single(x)
        again, _ = single(x[:, :3], state)
    assert y.dtype == again.dtype == torch.bfloat16
    assert (y - want).norm() <= 10 * 2**-8 * want.norm()  # ten roundings to 8 bits, as in test_mixers.py


@pytest.mark.parametrize("mixer", OTHER_MIXERS)
@pytest.mark.parametrize("name", ["hidden_size", "num_heads", "head_dim"])
def test_impossible_sizes_are_refused(mixer, name):
    with pytest.raises(UsageError, match=rf"^{name} must be positive, not 0\.$"):
        mixer(**({"hidden_size": D, "num_heads": H, "head_dim": K} | {name: 0}))


@pytest.mark.parametrize(
    ("match", "mixer", "options"),
    [
        ("num_kv_heads=3 must divide num_heads=2", Attention, {"num_kv_heads": 3}),
        ("num_kv_heads must be positive", Attention, {"num_kv_heads": 0}),
        ("rope_theta must be positive or None", Attention, {"rope_theta": 0.0}),
        ("even head_dim, not 3", Attention, {"head_dim": 3}),
        ("conv_size", SLSTM, {"conv_size": 0}),
        ("norm_eps must be positive", SLSTM, {"norm_eps": 0.0}),
        ("conv_size", DenseLinearRNN, {"conv_size": 0}),
        ("norm_eps must be positive", DenseLinearRNN, {"norm_eps": -1.0}),
    ],
)
def test_impossible_options_are_refused(match, mixer, options):
    with pytest.raises(UsageError, match=match) as refusal:
        mixer(**({"hidden_size": D, "num_heads": H, "head_dim": K} | options))
    assert "\n" not in str(refusal.value)
    Attention(D, H, 3, rope_theta=None)  # nothing is rotated


@pytest.mark.parametrize(("name", "value"), [("num_kv_heads", 0), ("rope_theta", 0.0)])
def test_impossible_fields_are_refused(name, value):
    with pytest.raises(UsageError, match=rf"^{name} must be"):
        ModelConfig.build(vocab_size=5, num_labels=5, mixer="attention", **{name: value})


@pytest.mark.parametrize("name", NAMES)
def test_models_of_peers_stream_and_come_back_from_disk(name, tmp_path):
    torch.manual_seed(0)
    model = SequenceModel(ModelConfig.build(5, 4, hidden_size=D, num_heads=H, head_dim=K, mixer=name))
    model.save_pretrained(tmp_path / "model")
    again = SequenceModel.from_pretrained(tmp_path / "model")
    tokens = torch.randint(5, (B, 2 * T), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want, _ = model(tokens)
        first, state = again(tokens[:, :T])
        second, _ = again(tokens[:, T:], state)
    assert_close(torch.cat((first, second), 1), want, tolerance=1e-4)  # float32 through two norms
    assert want.std() > 1e-3
