"""Diagonal recurrences in parallel against float64 loops: forward, every gradient, packed, decays of any size and sign.

In float64 both ways differ by rounding alone: 1e-16 for each of a few hundred sums, hence 1e-12 of the largest entry.
In float32 a chunk's products have one rounding of 6e-8 for each of at most 32 decays; 1e-5 leaves a margin of five.
"""

from itertools import pairwise

import pytest
import torch

from deltaproduct.errors import UsageError
from deltaproduct.ops.scan import diagonal_scan, gated_linear_attention, running_max

pytestmark = pytest.mark.numerical

EXACT, SINGLE = 1e-12, 1e-5
# Decays: near 1, near 0 (whose cumulative products underflow within a chunk), 0 itself, of both signs, and all at once.
RANGES = {
    "near 1": lambda u: 1 - 1e-4 * u,
    "near 0": lambda u: 1e-4 * u,
    "resets": lambda u: torch.where(u > 0.9, torch.zeros_like(u), u),
    "signed": lambda u: 2 * u - 1,
    "negative": lambda u: -1 + 1e-3 * u,
    "all": lambda u: torch.where(u > 0.5, 1 - 1e-6 * u, (u - 0.25) ** 9),
}
EACH_RANGE = pytest.mark.parametrize("decays", RANGES.values(), ids=RANGES)
PACKED = [None, [0, 0, 40, 41, 41, 75], [0, 1, 2, 75, 75]]
EACH_PACKING = pytest.mark.parametrize("cu", PACKED, ids=str)
T = 75


def random(*shape: int, seed: int = 0, uniform: bool = False) -> torch.Tensor:
    draw = torch.rand if uniform else torch.randn
    return draw(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rows(cu, batch: int):
    """(row, first token, end, state number) of every sequence."""
    if cu is None:
        return [(b, 0, T, b) for b in range(batch)]
    return [(0, lo, hi, s) for s, (lo, hi) in enumerate(pairwise(cu))]


def loop(step, state, inputs, cu):
    """One token after another; step(state, token's inputs) → (output, state)."""
    batch = inputs[0].shape[0]
    outputs, finals = [[] for _ in range(batch)], []
    for row, lo, hi, s in rows(cu, batch):
        now = state[s]
        for t in range(lo, hi):
            o, now = step(now, *(x[row, t] for x in inputs))
            outputs[row].append(o)
        finals.append(now)
    return torch.stack([torch.stack(o) for o in outputs]), torch.stack(finals)


def attention_step(scale: float):
    def step(s, q, k, v, a):  # s [HV,K,V], q, k [H,K], v [HV,V], a [HV,K] or [HV,1]
        q, k = (x.repeat_interleave(v.shape[0] // x.shape[0], 0) for x in (q, k))
        s = a.unsqueeze(-1) * s + k.unsqueeze(-1) * v.unsqueeze(-2)
        return scale * torch.einsum("hk,hkv->hv", q, s), s

    return step


def max_step(m, g, i):
    m = torch.maximum(m + g, i)
    return m, m


def assert_equal_with_gradients(fast, slow, tensors, tolerance):
    """Outputs, and gradients of a random projection of all of them, relative to each one's largest entry."""
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    got, want = fast(*tensors), slow(*tensors)
    weights = [random(*y.shape, seed=9 + n) for n, y in enumerate(want)]
    grads = [
        torch.autograd.grad(sum((y * w).sum() for y, w in zip(out, weights)), tensors, allow_unused=True)
        for out in (got, want)
    ]
    pairs = [*zip(got, want), *zip(*grads)]
    assert len(got) == len(want) and all(y.abs().max() > 0 for y in want)
    for a, b in pairs:
        assert a.shape == b.shape
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-3), (a - b).abs().max()


@EACH_PACKING
@EACH_RANGE
@pytest.mark.parametrize("heads", [(1, 3), (2, 4)], ids=str)
@pytest.mark.parametrize("per_channel", [False, True], ids=["per head", "per channel"])
def test_linear_attention_is_the_loop(per_channel, heads, decays, cu):
    (h, hv), batch = heads, 2 if cu is None else 1
    sequences = batch if cu is None else len(cu) - 1
    q, k, v = random(batch, T, h, 4), random(batch, T, h, 4, seed=1), random(batch, T, hv, 3, seed=2)
    a = decays(random(batch, T, hv, *([4] if per_channel else []), seed=3, uniform=True))
    state = random(sequences, hv, 4, 3, seed=4)
    packed = None if cu is None else torch.tensor(cu)

    def fast(q, k, v, a, state):
        return gated_linear_attention(q, k, v, a=a, initial_state=state, cu_seqlens=packed, scale=0.7)

    def slow(q, k, v, a, state):
        return loop(attention_step(0.7), state, (q, k, v, a if per_channel else a.unsqueeze(-1)), cu)

    assert_equal_with_gradients(fast, slow, (q, k, v, a, state), EXACT)
    single = fast(*(x.float() for x in (q, k, v, a, state)))
    rounded = [x.float().double() for x in (q, k, v, a, state)]
    for x, want in zip(single, slow(*rounded)):
        assert x.dtype == torch.float32
        assert (x - want).abs().max() <= SINGLE * want.abs().max()


@EACH_PACKING
@pytest.mark.parametrize("per_channel", [False, True], ids=["per head", "per channel"])
def test_log_decays_and_none(per_channel, cu):
    """g = log a, −∞ included, gives the same; none is a decay of 1."""
    batch = 2 if cu is None else 1
    q, k, v = random(batch, T, 2, 4), random(batch, T, 2, 4, seed=1), random(batch, T, 2, 3, seed=2)
    a = RANGES["resets"](random(batch, T, 2, *([4] if per_channel else []), seed=3, uniform=True))
    packed = None if cu is None else torch.tensor(cu)
    g = a.log().requires_grad_()
    got = gated_linear_attention(q, k, v, g, cu_seqlens=packed)
    want = gated_linear_attention(q, k, v, a=a, cu_seqlens=packed, scale=4**-0.5)
    assert all(torch.allclose(x, y, rtol=0, atol=1e-13) for x, y in zip(got, want))
    (d_g,) = torch.autograd.grad(got[0].sum(), g)
    assert (a == 0).any() and torch.isfinite(d_g).all() and (d_g[a == 0] == 0).all()
    got = gated_linear_attention(q, k, v, cu_seqlens=packed)
    want = gated_linear_attention(q, k, v, torch.zeros_like(a), cu_seqlens=packed)
    assert all(torch.allclose(x, y, rtol=0, atol=1e-13) for x, y in zip(got, want))


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 64, 200])
def test_every_length(length):
    q, k, v = (random(1, length, 2, 3, seed=n) for n in range(3))
    a = RANGES["signed"](random(1, length, 2, 3, seed=3, uniform=True))
    o, end = gated_linear_attention(q, k, v, a=a, scale=1.0)
    s = torch.zeros(2, 3, 3, dtype=torch.float64)
    for t in range(length):
        want, s = attention_step(1.0)(s, q[0, t], k[0, t], v[0, t], a[0, t])
        assert (o[0, t] - want).abs().max() <= EXACT * max(1, want.abs().max())
    assert (end[0] - s).abs().max() <= EXACT * s.abs().max()
    h, last = diagonal_scan(a, v)
    want = torch.zeros(2, 3, dtype=torch.float64)
    for t in range(length):
        want = a[0, t] * want + v[0, t]
        assert (h[0, t] - want).abs().max() <= EXACT * max(1, want.abs().max())
    assert torch.equal(last, h[:, -1])


@EACH_PACKING
@EACH_RANGE
def test_diagonal_scan_is_the_loop(decays, cu):
    batch = 2 if cu is None else 1
    a, b = decays(random(batch, T, 3, 2, seed=1, uniform=True)), random(batch, T, 3, 2)
    initial = random(batch if cu is None else len(cu) - 1, 3, 2, seed=2)
    packed = None if cu is None else torch.tensor(cu)

    def step(h, a, b):
        h = a * h + b
        return h, h

    def slow(a, b, initial):
        return loop(step, initial, (a, b), cu)

    assert_equal_with_gradients(lambda a, b, h: diagonal_scan(a, b, h, packed), slow, (a, b, initial), EXACT)
    rounded = [x.float() for x in (a, b, initial)]
    for x, want in zip(diagonal_scan(*rounded, packed), slow(*(x.double() for x in rounded))):
        assert x.dtype == torch.float32
        assert (x - want).abs().max() <= SINGLE * want.abs().max()


@EACH_PACKING
def test_running_max_is_the_loop(cu):
    batch = 2 if cu is None else 1
    g, i = -random(batch, T, 3, uniform=True), 3 * random(batch, T, 3, seed=1)
    initial = random(batch if cu is None else len(cu) - 1, 3, seed=2)
    packed = None if cu is None else torch.tensor(cu)

    def slow(g, i, initial):
        m = loop(max_step, initial, (g, i), cu)[0]
        before = torch.empty_like(m)
        for row, lo, hi, s in rows(cu, batch):
            for t in range(lo, hi):
                before[row, t] = initial[s] if t == lo else m[row, t - 1]
        return before, m

    assert_equal_with_gradients(lambda g, i, m: running_max(g, i, m, packed), slow, (g, i, initial), EXACT)


def test_what_diagonal_scan_keeps_for_its_backward():
    """a, h and the initial state: no products of decays, no blocks."""
    a, b = random(1, 400, 50, uniform=True).requires_grad_(), random(1, 400, 50).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        diagonal_scan(a, b)
    assert 0 < sum(kept) <= 2 * a.numel() + 50


@pytest.mark.parametrize("per_channel", [False, True], ids=["per head", "per channel"])
def test_what_linear_attention_keeps_grows_with_the_length_alone(per_channel):
    def kept(length: int) -> int:
        x = [random(1, length, 2, 16, seed=n).requires_grad_() for n in range(3)]
        g = -random(1, length, 2, *([16] if per_channel else []), seed=3, uniform=True)
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda y: sizes.update({y.untyped_storage().data_ptr(): y.untyped_storage().nbytes() // 8}) or y,
            lambda y: y,
        ):
            gated_linear_attention(*x, g.requires_grad_())
        return sum(sizes.values())

    short, long = kept(512), kept(2048)
    assert long <= 4.1 * short
    assert short <= 30 * 512 * 2 * 16  # 27 tensors of queries; pairs for every key channel would be 32 more


@pytest.mark.parametrize(
    ("match", "changed"),
    [
        ("not both", {"g": torch.zeros(1, 5, 2), "a": torch.ones(1, 5, 2)}),
        ("g is", {"g": torch.zeros(1, 5, 3)}),
        ("a is", {"a": torch.zeros(1, 5, 2, 3)}),
        ("state", {"initial_state": torch.zeros(1, 2, 4, 4)}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 4])}),
        ("q ", {"q": torch.zeros(1, 5, 1, 4)}),
        ("value heads", {"q": torch.zeros(1, 5, 3, 4), "k": torch.zeros(1, 5, 3, 4)}),
    ],
)
def test_impossible_calls_are_refused(match, changed):
    x = {"q": torch.zeros(1, 5, 2, 4), "k": torch.zeros(1, 5, 2, 4), "v": torch.zeros(1, 5, 2, 3)}
    with pytest.raises(UsageError, match=match) as refusal:
        gated_linear_attention(**(x | changed))
    assert "\n" not in str(refusal.value)


def test_impossible_scans_are_refused():
    x = torch.zeros(1, 5, 2)
    for match, arguments in (
        ("one shape", (x, x[:, :4])),
        ("initial is", (x, x, torch.zeros(1, 3))),
        ("cu_seqlens", (x, x, None, torch.tensor([0, 4]))),
    ):
        with pytest.raises(UsageError, match=match):
            diagonal_scan(*arguments)
