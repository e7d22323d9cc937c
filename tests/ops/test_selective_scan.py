"""Mamba's selective scan (ops/selective_scan.py), native and in PyTorch, against a loop over time in float64.

One rounding is 2⁻²⁴ = 6e-8. Results are sums of up to a few hundred products that partly cancel: √400 roundings and
a factor of 4 for the largest of many entries are 5e-6 of the largest. PyTorch's way also rounds every decay, and gets
twice that. Where states last for thousands of tokens (`test_states_that_last`), see there.
"""

import platform
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from ways import KERNELS, NATIVE, WAYS, computed_by

from deltaproduct.errors import UsageError
from deltaproduct.layers import Mamba
from deltaproduct.ops import cpu
from deltaproduct.ops.selective_scan import scan_backward, scan_forward, selective_scan

pytestmark = pytest.mark.numerical

needs_engine = pytest.mark.skipif(not NATIVE, reason="needs the native engine")
LIMITS = {"pytorch": 1e-5} | dict.fromkeys(KERNELS, 5e-6)
NAMES = ("x", "dt", "A", "B", "C", "initial_state")
# B, T, I, N: one of each; a chunk and one token more or less; I and N that are no whole number of vectors, or are;
# more channels than a block of them has
SIZES = [(1, 1, 1, 1), (2, 7, 130, 20), (2, 64, 64, 16), (3, 129, 37, 5), (1, 16, 65, 16), (2, 17, 8, 2)]
EACH_SIGN = pytest.mark.parametrize("signed", [False, True], ids=["positive", "signed"])


@pytest.fixture(params=WAYS)
def way(request, monkeypatch, poisoned):
    """Each way to compute it."""
    with computed_by(request.param, monkeypatch):
        yield request.param


def draw(B, T, I, N, sequences=None, dtype=torch.float32) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(B + T + I + N)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=dtype)

    tensors = normal(B, T, I), normal(B, T, I).exp(), -normal(I, N).exp(), normal(B, T, N), normal(B, T, N)
    return dict(zip(NAMES, (*tensors, normal(sequences or B, I, N))))


def loop(x, dt, A, B, C, *, allow_neg_eigval, initial_state, cu_seqlens=None):
    """One token after another."""
    if cu_seqlens is not None:
        parts = [
            loop(*(a[:, lo:hi] if a is not A else a for a in (x, dt, A, B, C)), allow_neg_eigval=allow_neg_eigval,
                 initial_state=initial_state[s : s + 1])
            for s, (lo, hi) in enumerate(pairwise(cu_seqlens.tolist()))
        ]  # fmt: skip
        return torch.cat([y for y, _ in parts], 1), torch.cat([h for _, h in parts])
    a, write = (dt[..., None] * A).exp(), (dt * x)[..., None] * B[:, :, None]
    h, states = initial_state, [write[:, :0]]
    for a_t, write_t in zip((2 * a - 1 if allow_neg_eigval else a).unbind(1), write.unbind(1)):
        h = a_t * h + write_t
        states.append(h[:, None])
    return (torch.cat(states, 1) * C[:, :, None]).sum(-1), h


def results(function, tensors, d_y, d_final, **options):
    """y, the final state and the gradients of ⟨y, d_y⟩ + ⟨final state, d_final⟩ in every tensor."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    y, final = function(**leaves, **options)
    weighted = [(out * d.to(out)).sum() for out, d in ((y, d_y), (final, d_final)) if d is not None]
    gradients = torch.autograd.grad(sum(weighted), list(leaves.values()), allow_unused=True)
    zeros = (torch.zeros_like(t) if g is None else g for t, g in zip(tensors.values(), gradients))
    return dict(zip(("y", "final", *tensors), (y.detach(), final.detach(), *zeros)))


def assert_is_the_loop(tensors, limit, use=("y", "final"), **options):
    y, h = tensors["x"], tensors["initial_state"]
    rng = torch.Generator().manual_seed(1)
    d_y, d_final = (torch.randn(t.shape, generator=rng) for t in (y, h))
    d_y, d_final = d_y if "y" in use else None, d_final if "final" in use else None
    got = results(selective_scan, tensors, d_y, d_final, **options)
    want = results(loop, {n: t.double() for n, t in tensors.items()}, d_y, d_final, **options)
    for name, wanted in want.items():
        assert got[name].dtype == torch.float32 and got[name].shape == wanted.shape
        error = (got[name].double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)
        assert error <= limit, (name, error)


@EACH_SIGN
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_is_the_loop(size, signed, way):
    assert_is_the_loop(draw(*size), LIMITS[way], allow_neg_eigval=signed)


@EACH_SIGN
@pytest.mark.parametrize("ends", [[0, 0, 40, 41, 41, 75], [0, 16, 48, 75, 75], [0, 1, 2, 75]], ids=str)
def test_packed_sequences(ends, signed, way):
    tensors = draw(1, 75, 21, 16, len(ends) - 1)
    for dtype in (torch.int64, torch.int32):
        cu_seqlens = torch.tensor(ends, dtype=dtype)
        assert_is_the_loop(tensors, LIMITS[way], allow_neg_eigval=signed, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("use", ["y", "final"])
def test_one_result_alone(use, way):
    assert_is_the_loop(draw(2, 40, 20, 16), LIMITS[way], use=(use,), allow_neg_eigval=True)


def test_without_an_initial_state(way):
    x = draw(2, 40, 20, 16)
    zeros = torch.zeros_like(x.pop("initial_state"))
    options = {"d_y": x["x"].flip(1), "d_final": torch.ones_like(zeros)}
    got = results(selective_scan, x, **options)
    want = results(selective_scan, x, **options, initial_state=zeros)
    assert all(torch.equal(got[n], want[n]) for n in got) and got["A"].abs().max() > 0


def test_any_layout(way):
    """Inputs and gradients that are cut out of wider tensors, not contiguous, or that repeat themselves in memory."""
    tensors = draw(3, 40, 24, 5)
    joined = torch.cat((tensors["B"], tensors["x"], tensors["C"]), -1)
    tensors["B"], tensors["x"], tensors["C"] = joined.split((5, 24, 5), -1)
    tensors["dt"] = tensors["dt"].mT.contiguous().mT
    tensors["A"] = tensors["A"].mT.contiguous().mT
    d_y = torch.ones(1, 1, 1).expand(3, 40, 24)
    d_final = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1)).mT
    leaves = {n: t.detach().requires_grad_() for n, t in tensors.items()}
    got = torch.autograd.grad(selective_scan(**leaves), list(leaves.values()), (d_y, d_final))
    double = {n: t.double().requires_grad_() for n, t in tensors.items()}
    results_of_loop = loop(**double, allow_neg_eigval=False)
    want = torch.autograd.grad(results_of_loop, list(double.values()), (d_y.double(), d_final.double()))
    for a, b in zip(got, want):
        assert (a - b).abs().max() <= LIMITS[way] * b.abs().max()


@EACH_SIGN
def test_decays_are_within_one_rounding(signed, way):
    """A state of 1 after a token that writes nothing is a; 2⁻²³ of exp(z) is the distance of two numbers or less."""
    z = -torch.logspace(-9, 1.9, 4096, dtype=torch.float64).float().view(256, 16)
    nothing, ones = torch.zeros(1, 1, 256), torch.ones(1, 256, 16)
    x = {"x": nothing, "dt": nothing + 1, "A": z, "B": nothing[..., :16], "C": nothing[..., :16]}
    _, a = selective_scan(**x, allow_neg_eigval=signed, initial_state=ones)
    exact = z.double().exp()
    limit = 2**-23 * (torch.ones_like(exact) if signed else exact)
    assert ((a[0] - (2 * exact - 1 if signed else exact)).abs() <= limit).all()


# Where a state lasts: rates whose decays, with a step of 1, are 1 − 1e-6, −1 + 1e-6 (with `signed`) and −1 + tiny
RATES = [-1e-6, -5e-7, -14.5, -25.0, -0.7, -1e-3]
LONG = 4095  # odd: a constant input and a decay of −1 leave 0 after an even number


def lasting(signed, constant):
    tensors = draw(1, LONG, len(RATES), 3)
    if constant:
        tensors |= {n: torch.ones_like(tensors[n]) for n in ("x", "B", "C")}
    spread = torch.tensor([1.0, 1.05, 1.1])
    return tensors | {"dt": torch.ones_like(tensors["dt"]), "A": torch.tensor(RATES)[:, None] * spread}


@cache
def lasting_answer(signed, constant):
    tensors = {n: t.double() for n, t in lasting(signed, constant).items()}
    return results(loop, tensors, tensors["x"].flip(1), None, allow_neg_eigval=signed)


@EACH_SIGN
@pytest.mark.parametrize("constant", [False, True], ids=["random", "constant"])
def test_states_that_last(signed, constant, way):
    """Every token rounds a state once. With random inputs that is √4095 roundings · 4 = 1.5e-5 of the largest; constant
    ones may round the same way every time, 4095 · 2⁻²⁵ = 1.2e-4. PyTorch rounds a decay near 1, 2 exp(z) − 1, by up to
    2⁻²⁴, the same in every token: 2.4e-4. So does a second rounding, without fused multiply-adds (SSE2)."""
    limit = LONG * 2**-25 if constant else 4 * LONG**0.5 * 2**-24
    limit = LONG * 2**-24 if way in ("pytorch", "portable") else limit
    tensors = lasting(signed, constant)
    got = results(selective_scan, tensors, tensors["x"].flip(1), None, allow_neg_eigval=signed)
    for name, wanted in lasting_answer(signed, constant).items():
        channels = {"final": 1, "initial_state": 1, "A": 0, "B": None, "C": None}.get(name, -1)
        error, size = (got[name].double() - wanted).abs(), wanted.abs()
        if channels is not None:  # each relative to itself: those that last are a thousand times as large as others
            error, size = (t.movedim(channels, 0).flatten(1).amax(1) for t in (error, size))
        assert (error / size.amax() if channels is None else error / size).max() <= limit, name


@EACH_SIGN
def test_steps_so_large_that_nothing_is_left(signed, way):
    """exp(−200) is 0: a decay of exactly 0, or of −1."""
    tensors = draw(2, 1, 20, 16)
    tensors |= {"dt": torch.full_like(tensors["dt"], 200), "A": torch.full_like(tensors["A"], -1)}
    tensors["initial_state"] = tensors["initial_state"].sign() * 1e12
    got = results(selective_scan, tensors, None, torch.ones(2, 20, 16), allow_neg_eigval=signed)
    write = (200 * tensors["x"][:, 0])[..., None] * tensors["B"][:, 0, None]
    assert torch.equal(got["final"], write - tensors["initial_state"] if signed else write)
    assert (got["initial_state"] == (-1 if signed else 0)).all() and not got["A"].any()
    long = selective_scan(**(tensors | {"dt": torch.full_like(tensors["dt"], 1e30)}), allow_neg_eigval=signed)
    assert long[1].isfinite().all()


@needs_engine
@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="others are not slowed by them")
def test_tiny_numbers_are_zero_within_and_stay_what_they_are_without():
    still = draw(1, 140, 20, 16) | {"x": torch.zeros(1, 140, 20), "dt": torch.ones(1, 140, 20)}
    still |= {"A": torch.full((20, 16), 0.5).log(), "initial_state": torch.ones(1, 20, 16)}
    assert loop(**still, allow_neg_eigval=False)[1].max() > 0  # 2⁻¹⁴⁰ is there, but below the normal numbers
    assert results(selective_scan, still, still["x"] + 1, None)["final"].max() == 0
    assert (torch.full((8,), 1e-40) * 0.5 > 0).all()


@needs_engine
@pytest.mark.parametrize("size", [(3, 100, 200, 16), (1, 300, 300, 8), (70, 9, 64, 16)], ids=str)
def test_threads_change_no_bit(size):
    tensors = draw(*size)
    options = {"d_y": tensors["x"].flip(1), "d_final": torch.ones_like(tensors["initial_state"])}
    want = results(selective_scan, tensors, **options)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        got = results(selective_scan, tensors, **options)
        assert all(torch.equal(got[n], want[n]) for n in want)


@needs_engine
def test_nothing_as_large_as_all_states_is_kept():
    tensors = {n: t.requires_grad_() for n, t in draw(2, 160, 64, 16).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y, _ = selective_scan(**tensors)
    assert max(kept) <= y.numel() and sum(kept) <= 4 * y.numel()  # x, Δ, a state in 16 tokens; B, C and A
    with torch.no_grad():
        assert scan_forward(*tensors.values(), None, False, False)[2].numel() == 0


@EACH_SIGN
@pytest.mark.parametrize("ends", [None, [0, 0, 3, 7]], ids=str)
def test_float64_gradients_against_finite_differences(ends, signed):
    tensors = draw(1 if ends else 2, 7, 3, 2, ends and len(ends) - 1, torch.float64)
    cu_seqlens = None if ends is None else torch.tensor(ends)

    def function(*values):
        return selective_scan(*values[:5], allow_neg_eigval=signed, initial_state=values[5], cu_seqlens=cu_seqlens)

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors.values()])


def test_other_dtypes_and_no_tokens(way):
    tensors = draw(2, 20, 6, 3)
    half = {n: t.bfloat16() for n, t in tensors.items()}
    y, final = selective_scan(**half)
    want, _ = loop(**{n: t.double() for n, t in half.items()}, allow_neg_eigval=False)
    assert y.dtype == final.dtype == torch.float32 and (y - want).abs().max() <= LIMITS["pytorch"] * want.abs().max()
    assert selective_scan(**(half | {"x": tensors["x"].double()}))[0].dtype == torch.float64
    nothing = {n: t[:, :0] if n in ("x", "dt", "B", "C") else t for n, t in tensors.items()}
    y, final = selective_scan(**nothing)
    assert y.shape == (2, 0, 6) and torch.equal(final, tensors["initial_state"])


@pytest.mark.slow("graphs")
@needs_engine
def test_custom_operators_are_well_formed():
    tensors = list(draw(2, 20, 6, 3).values())
    leaves = [t.clone().requires_grad_() for t in tensors]
    torch.library.opcheck(scan_forward._opoverload, (*leaves, None, True, True))
    states = scan_forward(*tensors, None, True, True)[2]
    torch.library.opcheck(scan_backward._opoverload, (tensors[0], tensors[5], *tensors[:5], states, None, True))
    packed = [t[:1] if t.dim() == 3 else t for t in tensors[:5]]
    cu_seqlens = torch.tensor([0, 5, 5, 20])
    torch.library.opcheck(scan_forward._opoverload, (*packed, None, cu_seqlens, True, False))
    states = scan_forward(*packed, None, cu_seqlens, True, True)[2]
    torch.library.opcheck(scan_backward._opoverload, (packed[0], None, *packed, states, cu_seqlens, True))


@pytest.mark.slow("graphs")
@needs_engine
def test_compiled_for_any_length_equals_eager():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(selective_scan, fullgraph=True, dynamic=True, backend=counter)
    for length in (20, 170, 33):
        tensors = draw(2, length, 6, 3)
        d_y, d_final = tensors["x"].flip(1), tensors["initial_state"].flip(1)
        got, want = (results(run, tensors, d_y, d_final) for run in (compiled, selective_scan))
        assert all(torch.equal(got[n], want[n]) for n in want)
    assert counter.frame_count == 1, "a length was compiled anew"


@needs_engine
@pytest.mark.parametrize("allow_neg_eigval", [False, True])
def test_the_layer_is_the_same_without_the_engine(allow_neg_eigval, monkeypatch):
    torch.manual_seed(0)
    layer = Mamba(24, ssm_state_size=5, allow_neg_eigval=allow_neg_eigval)
    x, native = torch.randn(2, 50, 24), []

    def outcome():
        y, state = layer(x)
        return [y, state.recurrent, *torch.autograd.grad(y.square().sum() + state.recurrent.sum(), layer.parameters())]

    scan = cpu.ENGINE.selective_scan
    monkeypatch.setattr(cpu.ENGINE, "selective_scan", lambda *a, **kw: native.append(kw["reverse"]) or scan(*a, **kw))
    got = outcome()
    assert native == [False, True]
    monkeypatch.setattr(cpu, "ENGINE", None)
    for a, b in zip(got, outcome()):
        assert (a - b).abs().max() <= LIMITS["pytorch"] * b.abs().max()
    assert native == [False, True]


@pytest.mark.parametrize(
    ("match", "changed"),
    [
        ("x is .* and A", {"x": torch.zeros(5, 4)}),
        ("x is .* and A", {"A": torch.zeros(4)}),
        ("at least 1", {"A": torch.zeros(4, 0)}),
        ("dt is", {"dt": torch.zeros(1, 5, 3)}),
        ("A is", {"A": torch.zeros(3, 2)}),
        ("B is", {"B": torch.zeros(1, 4, 2)}),
        ("C is", {"C": torch.zeros(1, 5, 3)}),
        ("C is torch.int64", {"C": torch.zeros(1, 5, 2, dtype=torch.int64)}),
        ("initial_state is", {"initial_state": torch.zeros(2, 4, 2)}),
        ("initial_state is", {"cu_seqlens": torch.tensor([0, 2, 5])}),
        ("cu_seqlens must run", {"cu_seqlens": torch.tensor([0, 4])}),
        ("dt is on meta", {"dt": torch.zeros(1, 5, 4, device="meta")}),
    ],
)
def test_impossible_calls_are_refused(match, changed):
    with pytest.raises(UsageError, match=match) as refusal:
        selective_scan(**(draw(1, 5, 4, 2) | changed))
    assert "\n" not in str(refusal.value)
