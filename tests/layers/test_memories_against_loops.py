"""TTT-Linear, Titans and RWKV-7's operator against loops written from the papers' equations, in float64.

The two memories learn by gradient descent: their loops take each gradient from autograd, so that no derivative is
written twice. What every mixer owes the contract (streaming, packing, padding, gradients) is in test_mixers.py.
"""

import importlib
import math
from functools import partial

import mixer_oracles
import pytest
import torch
from mixer_oracles import D, H, K, build, noise
from torch.nn import functional as F

from deltaproduct.errors import UsageError
from deltaproduct.layers import RWKV7, Titans, TTTLinear
from deltaproduct.layers import titans as titans_module
from deltaproduct.layers.titans import memory_scan
from deltaproduct.models import ModelConfig, SequenceModel
from deltaproduct.ops import delta_product
from deltaproduct.ops.generalised_delta import generalised_delta_rule
from deltaproduct.ops.inputs import l2_normalise

pytestmark = pytest.mark.numerical

B, T = 2, 37
EXACT = 1e-10  # float64 roundings, enlarged where a norm divides by almost nothing, over up to 300 tokens
SINGLE = 1e-4  # the same of float32
assert_close = partial(mixer_oracles.assert_close, tolerance=EXACT)


def pick(shape, choices, seed=1):
    return torch.randint(choices, shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens):
    """x [1,tokens,D] of three symbols that are nearly the same."""
    symbols = noise(1, D) + 0.1 * noise(3, D, seed=2)
    return symbols[pick((tokens,), 3)][None]


INPUTS = {"short": lambda: noise(B, T, D), "long": lambda: noise(1, 300, D), "correlated": lambda: correlated(300)}


def convolved(x, conv):
    padded = F.pad(x, (0, 0, conv.width - 1, 0))
    return sum(padded[:, j : j + x.shape[1]] * conv.weight[:, 0, j] for j in range(conv.width))


# TTT-Linear


def ttt_loop(mixer, x):
    """One token after the other; W is [K,K] and multiplies columns, as in the paper → (y, the mini-batch's [Wᵀ; b])."""
    fed = F.silu(convolved(x, mixer.conv1d)) if mixer.use_short_conv else x
    rows, states = [], []
    for b in range(x.shape[0]):
        heads = []
        for h in range(H):
            part = slice(h * K, (h + 1) * K)
            q, k, v = (fed[b] @ p.weight[part].T for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
            eta = mixer.base_lr * torch.sigmoid(fed[b] @ mixer.lr_proj.weight[h] + mixer.lr_proj.bias[h]) / K
            gain, shift = mixer.inner_weight[h, 0], mixer.inner_bias[h, 0]

            def model(weights, view, gain=gain, shift=shift):
                return view + F.layer_norm(weights[0] @ view + weights[1], (K,), gain, shift, mixer.norm_eps)

            begin = (mixer.first_weight[h].T.detach(), mixer.first_bias[h, 0].detach())
            total, outputs = None, []
            for t in range(x.shape[1]):
                i = t % mixer.chunk_size
                if i == 0:
                    total = [torch.zeros_like(a) for a in begin]
                at = [a.clone().requires_grad_() for a in begin]
                loss = 0.5 * (model(at, k[t]) - v[t]).square().sum()
                total = [s + eta[t] * g for s, g in zip(total, torch.autograd.grad(loss, at))]
                c = max(0, 1 / (i + 1) + mixer.offset[i].item())
                now = [a - c * s for a, s in zip(begin, total)]
                outputs.append(model(now, q[t]))
                if i == mixer.chunk_size - 1:
                    begin = now
            heads.append(torch.stack(outputs))
            states.append(torch.cat((begin[0].T, begin[1][None])))
        rows.append(torch.cat(heads, -1))
    o = torch.stack(rows)
    o = F.layer_norm(o, (H * K,), mixer.o_norm.weight, mixer.o_norm.bias, mixer.norm_eps)
    if mixer.use_output_gate:
        o = o * F.gelu(x @ mixer.g_proj.weight.T, approximate="tanh")
    return (o @ mixer.o_proj.weight.T).detach(), torch.stack(states).unflatten(0, (-1, H))


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("inputs", INPUTS)
def test_ttt_linear_is_the_loop(alone, inputs):
    options = {"use_short_conv": False, "ttt_chunk_size": 5, "use_output_gate": True} if alone else {}
    mixer, x = build(TTTLinear, **options), INPUTS[inputs]()
    want, weights = ttt_loop(mixer, x)
    y, state = mixer(x)
    assert_close(y, want)
    assert_close(state.weights, weights)
    assert_close(mixer.float()(x.float())[0].double(), want, tolerance=SINGLE)


def test_ttt_sequences_at_different_places_in_their_mini_batches_go_on_together():
    """What packing leaves behind: states whose positions differ, given to a plain batch."""
    mixer, x = build(TTTLinear, ttt_chunk_size=5), noise(3, 40, D)
    starts, whole = [2, 10, 19], [mixer(row[None]) for row in x]
    packed = torch.cat([row[:n] for row, n in zip(x, starts)])[None]
    _, state = mixer(packed, cu_seqlens=torch.tensor([0, *starts]).cumsum(0))
    assert state.position.tolist() == [2, 0, 4]
    rest = torch.stack([row[n : n + 21] for row, n in zip(x, starts)])
    y, end = mixer(rest, state)
    for b, n in enumerate(starts):
        assert_close(y[b], whole[b][0][0, n : n + 21])
        _, want = mixer(x[b : b + 1, : n + 21])
        assert_close(end.weights[b], want.weights[0])
        assert end.position[b] == want.position[0] == (n + 21) % 5
        assert (end.gradients[b] - want.gradients[0]).abs().max() <= EXACT


def test_ttt_learns_where_to_start():
    """The first W and b are parameters, which the state of a fresh sequence has to lead back to."""
    mixer, x = build(TTTLinear, ttt_chunk_size=3), noise(1, 7, D)
    names = ["first_weight", "first_bias", "offset", "inner_weight", "inner_bias"]
    values = [mixer.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def f(*values):
        return torch.func.functional_call(mixer, dict(zip(names, values)), (x,))[0]

    assert torch.autograd.gradcheck(f, values, fast_mode=True)
    assert all(g.abs().max() > 1e-6 for g in torch.autograd.grad(f(*values).square().sum(), values))


# Titans


def titans_loop(mixer, x):
    """One token after the other; M is values × keys and multiplies columns, as in the paper."""
    qkv = x @ mixer.qkv_proj.weight.T
    if mixer.use_short_conv:
        qkv = convolved(qkv, mixer.conv1d)
    q, k, v = F.silu(qkv).unflatten(-1, (3, H, K)).unbind(2)
    q, k = (a / (a.square().sum(-1, keepdim=True) + 1e-6).sqrt() for a in (q, k))
    gates = torch.sigmoid(x @ mixer.gate_proj.weight.T + mixer.gate_proj.bias)
    alpha, eta, theta = gates.unflatten(-1, (3, H)).unbind(2)
    theta = theta * (1 - alpha / 2)
    memory = surprise = x.new_zeros(x.shape[0], H, K, K)
    outputs = []
    for t in range(x.shape[1]):
        at = memory.detach().requires_grad_()
        loss = (torch.einsum("bhvk,bhk->bhv", at, k[:, t]) - v[:, t]).square().sum()
        (gradient,) = torch.autograd.grad(loss, at)
        a, e, s = (gate[:, t, :, None, None].detach() for gate in (alpha, eta, theta))
        surprise = e * surprise - s * gradient
        memory = (1 - a) * memory + surprise
        outputs.append(torch.einsum("bhvk,bhk->bhv", memory, q[:, t]))
    o = torch.stack(outputs, 1)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.o_norm.weight
    o = o.flatten(2) * F.silu(x @ mixer.g_proj.weight.T)
    return (o @ mixer.o_proj.weight.T).detach(), memory, surprise


@pytest.mark.parametrize("conv", [True, False])
@pytest.mark.parametrize("inputs", INPUTS)
def test_titans_is_the_loop(conv, inputs):
    mixer, x = build(Titans, use_short_conv=conv), INPUTS[inputs]()
    want, memory, surprise = titans_loop(mixer, x)
    y, state = mixer(x)
    assert_close(y, want)
    assert_close(state.recurrent, torch.stack((memory.mT, surprise.mT), 2))
    assert_close(mixer.float()(x.float())[0].double(), want, tolerance=SINGLE)


def test_titans_without_momentum_and_forgetting_is_deltanet():
    q, v = noise(B, T, H, K), noise(B, T, H, K, seed=2)
    k, beta = l2_normalise(noise(B, T, H, K, seed=3)), 2 * torch.sigmoid(noise(B, T, H, seed=4))
    start = noise(B, H, K, K, seed=5)
    want, end = delta_product(
        q, k[:, :, None], v[:, :, None], beta[:, :, None], scale=1.0, initial_state=start, output_final_state=True,
        backend="reference",
    )  # fmt: skip
    keep, momentum = torch.ones_like(beta), torch.zeros_like(beta)
    o, state = memory_scan(q, k, v, keep, momentum, beta, torch.stack((start, noise(B, H, K, K, seed=6)), 2))
    assert_close(o, want)
    assert_close(state[:, :, 0], end)


def test_what_is_not_real_leaves_titans_state_alone():
    """Whatever it holds: rows of 5, 21 and 0 real tokens, filled up with noise."""
    q, k, v = (noise(3, 21, H, K, seed=s) for s in (1, 2, 3))
    keep, momentum, beta = (torch.sigmoid(noise(3, 21, H, seed=s)) for s in (4, 5, 6))
    inputs, start = (q, l2_normalise(k), v, keep, momentum, beta), noise(3, H, 2, K, K, seed=7)
    lengths = [5, 21, 0]
    o, end = memory_scan(*inputs, start, torch.arange(21) < torch.tensor(lengths)[:, None])
    for b, n in enumerate(lengths):
        want, last = memory_scan(*(x[b : b + 1, :n] for x in inputs), start[b : b + 1])
        assert n == 0 or (o[b, :n] - want[0]).abs().max() < EXACT
        assert_close(end[b], last[0])


def spectral_radius(matrices):
    """lim ‖Aⁿ‖^(1/n) of matrices [...,8,8] (Gelfand), at n = 2³⁰. LAPACK's iteration need not converge on eigenvalues
    that are there several times, and whether it does depends on the processor."""
    log, power = 0.0, matrices
    for halvings in range(31):
        norm = torch.linalg.matrix_norm(power)
        log, power = log + norm.log() / 2**halvings, power / norm[..., None, None]
        power = power @ power
    return log.exp()


def test_the_spectral_radius_of_known_matrices():
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    jordan = torch.eye(8, dtype=torch.float64) + torch.ones(7, dtype=torch.float64).diag(1)
    assert spectral_radius(1.001 * turn).item() == pytest.approx(1.001, abs=1e-8)
    assert spectral_radius(jordan).item() == pytest.approx(1, abs=1e-6)
    assert spectral_radius(jordan + 1e-5 * torch.eye(8)).item() == pytest.approx(1 + 1e-5, abs=1e-6)


def test_no_eigenvalue_of_titans_leaves_the_unit_circle(monkeypatch):
    seen = []
    scan = titans_module.memory_scan
    monkeypatch.setattr(titans_module, "memory_scan", lambda *a: (seen.append(a), scan(*a))[1])
    build(Titans)(100 * noise(B, 200, D))  # so large that the gates come near their ends
    _, k, _, keep, momentum, beta, *_ = (x.detach() if torch.is_tensor(x) else x for x in seen[0])
    assert momentum.max() > 0.999 and keep.min() < 0.001 and beta.max() > 1.99
    outer, eye = beta[..., None, None] * k[..., :, None] * k[..., None, :], torch.eye(K, dtype=k.dtype)
    keep, momentum = keep[..., None, None] * eye, momentum[..., None, None] * eye
    step = torch.cat((torch.cat((keep - outer, momentum), -1), torch.cat((-outer, momentum), -1)), -2)
    # The radius is good to 2⁻³⁰·(7·30·ln 2 + roundings): a power's norm grows by at most the 7th power of the exponent.
    assert spectral_radius(step).max() <= 1 + 1e-6


# RWKV-7's operator


def rule_loop(q, k, v, g, u, z, state):
    outputs, decay = [], g.exp()
    for t in range(q.shape[1]):
        transition = torch.diag_embed(decay[:, t]) + u[:, t, :, :, None] * z[:, t, :, None, :]
        state = transition @ state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, 1), state


def rule_inputs(batch, length, heads, size, values, decay=noise):
    q, k, u = (noise(batch, length, heads, size, seed=s) for s in (1, 2, 3))
    z = l2_normalise(noise(batch, length, heads, size, seed=4))
    v, state = noise(batch, length, heads, values, seed=5), noise(batch, heads, size, values, seed=6)
    g = -0.6066 * torch.sigmoid(decay(batch, length, heads, size, seed=7))
    return [q, k, v, g, -torch.sigmoid(u) * z, z, state]


def gradients(outputs, inputs):
    weighted = sum((x * noise(*x.shape, seed=9).to(x.dtype)).sum() for x in outputs)
    return torch.autograd.grad(weighted, inputs)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 40])
def test_generalised_delta_rule_is_the_loop(length):
    inputs = [x.requires_grad_() for x in rule_inputs(B, length, H, K, 3)]
    got, want = generalised_delta_rule(*inputs), rule_loop(*inputs)
    for a, b in zip((*got, *gradients(got, inputs)), (*want, *gradients(want, inputs)), strict=True):
        assert_close(a, b, tolerance=1e-12)


def test_generalised_delta_rule_has_the_right_gradients():
    inputs = [x.requires_grad_() for x in rule_inputs(1, 18, 1, 2, 2)]
    assert torch.autograd.gradcheck(generalised_delta_rule, inputs, fast_mode=True)


def test_generalised_delta_rule_without_decay_is_deltanet():
    q, _, v, g, _, z, state = rule_inputs(B, T, H, K, K)
    beta = 2 * torch.sigmoid(noise(B, T, H, seed=8))
    want, end = delta_product(
        q, z[:, :, None], v[:, :, None], beta[:, :, None], scale=1.0, initial_state=state, output_final_state=True,
        backend="reference",
    )  # fmt: skip
    written = beta[..., None] * z
    o, last = generalised_delta_rule(q, written, v, torch.zeros_like(g), -written, z, state)
    assert_close(o, want, tolerance=1e-12)
    assert_close(last, end, tolerance=1e-12)


@pytest.mark.parametrize("level", ["none", "mixed", "strongest", "limit"])
def test_generalised_delta_rule_in_float32_in_the_hard_regime(level):
    """Four keys that are nearly the same, removed almost whole, over 4096 tokens: what state tracking looks like.

    The float32 loop's own error is 6e-6 without decay and below 1e-6 with it: outputs, state and every gradient.
    """
    length, heads, size = 4096, 2, 16
    keys = l2_normalise(noise(1, size) + 0.1 * noise(4, size, seed=2))
    z = keys[pick((1, length, heads), 4)]
    u = -torch.sigmoid(6 + 0.1 * noise(1, length, heads, size, seed=3)) * z
    strength = {
        "none": torch.full((size,), -6e-5),
        "mixed": -0.6065 * torch.sigmoid(torch.linspace(-6, 6, size)),
        "strongest": torch.full((size,), -0.6066),
        "limit": torch.full((size,), -8.0),
    }[level]
    g = strength.double() * (1 - 0.01 * noise(1, length, heads, size, seed=4).abs().clamp(max=1))
    v, q = noise(1, length, heads, size, seed=5), noise(1, length, heads, size, seed=6)
    rounded = [x.float() for x in (q, -u, v, g, u, z, noise(1, heads, size, size, seed=7))]
    results = []
    for dtype in (torch.float32, torch.float64):  # test_generalised_delta_rule_is_the_loop vouches for float64
        inputs = [x.to(dtype).requires_grad_() for x in rounded]
        out = generalised_delta_rule(*inputs)
        results.append((*out, *gradients(out, inputs)))
    # At the limit a chunk's 16 gates of 8 add up to exponents of up to 128, whose roundings are 2⁻¹⁸ each at most. The
    # gradient in g, exp(−8) of its terms, is their sum.
    limit = 16 * 2**-18
    names = ["o", "state", "dq", "dk", "dv", "dg", "du", "dz", "d initial state"]
    for name, got, want in zip(names, *results, strict=True):
        tolerance = 1e-5 if level != "limit" else limit if name != "dg" else limit * math.exp(8)
        assert_close(got.double(), want, tolerance=tolerance)


def test_rwkv7_is_the_authors_own(monkeypatch):
    """The time mixing of pip's `rwkv`, which runs on a CPU in float32, with our weights."""
    pytest.importorskip("rwkv")
    monkeypatch.setenv("RWKV_V7_ON", "1")
    monkeypatch.setenv("RWKV_CUDA_ON", "0")
    theirs = importlib.import_module("rwkv.model")
    width = H * K
    mixer, x = RWKV7(width, H, K), noise(1, T, width).float()
    for i, p in enumerate(mixer.parameters()):
        p.data += 0.2 * noise(*p.shape, seed=100 + i).float()
    low_rank = [
        a
        for layer in (mixer.w_lora, mixer.a_lora)
        for a in (layer.up.bias, layer.down.weight.T.contiguous(), layer.up.weight.T.contiguous())
    ]
    nothing = torch.empty(0)  # the value residual, which the first layer has not
    gate = [mixer.g_lora.down.weight.T.contiguous(), mixer.g_lora.up.weight.T.contiguous()]
    per_channel = [a.flatten() for a in (mixer.removal, mixer.replacement, mixer.bonus)]
    products = [p.weight.T.contiguous() for p in (mixer.r_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj)]
    with torch.no_grad():
        want, _, state, _ = theirs.RWKV_x070_TMix_seq(
            0, H, K, x[0], torch.zeros(width), nothing, torch.zeros(H, K, K), *mixer.mix_weight, *low_rank,
            *[nothing] * 3, *gate, *per_channel, *products, mixer.norm_weight.flatten(), mixer.norm_bias.flatten(),
        )  # fmt: skip
        y, end = mixer(x)
    # Theirs divides by ‖κ‖ and not √(‖κ‖² + 1e-6), and knows e^(−½) to six digits.
    assert_close(end.recurrent[0], state.mT, tolerance=SINGLE)
    assert_close(y[0], want, tolerance=SINGLE)


# Sizes and models


SIZES = ["hidden_size", "num_heads", "head_dim", "norm_eps"]


@pytest.mark.parametrize(
    ("mixer", "name"),
    [*((m, n) for m in (TTTLinear, Titans) for n in SIZES), (TTTLinear, "ttt_chunk_size"), (TTTLinear, "ttt_base_lr")],
)
def test_impossible_sizes_are_refused(mixer, name):
    with pytest.raises(UsageError, match=rf"^{name} must be positive, not 0\.$"):
        mixer(**({"hidden_size": D, "num_heads": H, "head_dim": K} | {name: 0}))


@pytest.mark.parametrize(("name", "wanted"), [("ttt_chunk_size", "at least 1"), ("ttt_base_lr", "positive")])
def test_impossible_fields_are_refused(name, wanted):
    with pytest.raises(UsageError, match=rf"^{name} must be {wanted}, not 0\.$"):
        ModelConfig.build(vocab_size=5, num_labels=5, mixer="ttt_linear", **{name: 0})


@pytest.mark.parametrize("name", ["ttt_linear", "titans"])
def test_models_stream_and_come_back_from_disk(name, tmp_path):
    torch.manual_seed(0)
    config = ModelConfig.build(5, 4, hidden_size=D, num_heads=H, head_dim=K, mixer=name, defaults={"ttt_chunk_size": 6})
    model = SequenceModel(config)
    model.save_pretrained(tmp_path / "model")
    again = SequenceModel.from_pretrained(tmp_path / "model")
    tokens = pick((B, 2 * T), 5)
    with torch.no_grad():
        want, _ = model(tokens)
        first, state = again(tokens[:, :T])
        second, _ = again(tokens[:, T:], state)
    assert_close(torch.cat((first, second), 1), want, tolerance=1e-4)  # float32 through two norms
    assert want.std() > 1e-3
