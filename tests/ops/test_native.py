"""The native CPU engine against the oracle of `oracle.py`: any shape, dtype, layout, kernels and division of the work.

`test_operator.py` and `test_operator_hard.py` hold every backend, this one too, to the operator's contract. Here is
what only the engine has: widths of vectors, kernels for several instruction sets, threads, memory of its own. `make
sanitize` runs this file once more, on a build that traps whatever C++ leaves undefined.

Tolerance: s steps, K and V are the lengths of the sums that make a result, √(s + K + V) · u their rounding if roundings
are independent (u = 2⁻²⁴ or 2⁻⁵³). The worst of a thousand entries is 4 standard deviations off, and a chunk's own
sums, which the loop does not have, come on top: ROUNDINGS = 10. The worst of 7500 runs (2500 seeds, three sets of
kernels) shows 4.5. What is not stored in the type that is computed in is rounded once more.
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
import torch
from hard_regime import T, keys, unit
from hard_regime import errors as hard_errors
from operator_cases import CU, Problem, draw, errors, leaves, options, run
from oracle import l2_normalised, l2_normalised_gradient, oracle, relative_error

from deltaproduct.ops import cpu, delta_product
from deltaproduct.ops.inputs import compute_dtype
from deltaproduct.ops.native import library
from deltaproduct.ops.native.library import ENGINE, WHY_NO_ENGINE

if ENGINE is None:
    # Whoever names a library wants it tested; and without a compiler (test_native_build.py) there is nothing to test.
    assert "DELTAPRODUCT_ENGINE" not in os.environ, WHY_NO_ENGINE
    pytest.skip(WHY_NO_ENGINE, allow_module_level=True)

UNIT = {torch.float64: 2**-53, torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
HALVES = [torch.bfloat16, torch.float16]
ROUNDINGS = 10
KERNELS = ENGINE.kernels_here()
EVERY_KERNELS = pytest.mark.parametrize("kernels", KERNELS)


@pytest.fixture(autouse=True)
def as_it_was():
    kernels, threads = ENGINE.kernels, torch.get_num_threads()
    yield
    ENGINE.use_kernels(kernels)
    torch.set_num_threads(threads)


@pytest.fixture
def divide(monkeypatch):
    """Divides the work as the test says: (blocks of V columns, segments of time)."""
    return lambda *division: monkeypatch.setattr(cpu, "_division", lambda *_: division)


def laid_out(rng: np.random.Generator, x: torch.Tensor, unit_rows: bool = False) -> torch.Tensor:
    """x in one of the layouts that a caller may use; "expanded" repeats values, of unit vectors only whole ones."""
    how = rng.choice(["plain", "plain", "plain", "transposed", "last", "padded", "expanded"])
    if how == "transposed":
        order = [*rng.permutation(x.dim() - 1).tolist(), x.dim() - 1]
        return x.permute(order).contiguous().permute(np.argsort(order).tolist())
    if how == "last":
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    if how == "padded":
        room = torch.full([n + 3 for n in x.shape], torch.nan, dtype=x.dtype)
        return room[tuple(slice(1, 1 + n) for n in x.shape)].copy_(x)
    if how == "expanded":
        return x.narrow(int(rng.integers(x.dim() - unit_rows)), 0, 1).expand(x.shape)
    return x


def random_problem(seed: int) -> tuple[dict, dict, dict]:
    """Inputs, gradients of the results (of o, of the final state, or of both) and options."""
    rng = np.random.default_rng(seed)

    def some(probability: float) -> bool:
        return bool(rng.random() < probability)

    N = int(rng.choice([33, 40]) if some(0.1) else rng.integers(1, 9))  # 33 and 40 are more than a chunk
    length = int(rng.integers(1, 12 if N > 8 else 91))
    K, V = (int(rng.choice([128, 255, 256]) if some(0.08) else rng.integers(1, 71)) for _ in "KV")
    length = min(length, 1 + 100 // N) if K * V > 5000 else length
    B, H, cu = int(rng.integers(1, 3)), int(rng.integers(1, 3)), None
    if some(0.3):
        B, cuts = 1, sorted(rng.integers(0, length + 1, rng.integers(0, 6)).tolist())
        cu = torch.tensor([0, *cuts, length], dtype=torch.int32 if some(0.5) else torch.int64)
    HV, S = H * int(rng.integers(1, 3)), B if cu is None else len(cu) - 1

    beta = rng.uniform(0, 2, (B, length, N, HV))
    x = {
        "q": rng.standard_normal((B, length, H, K)),
        "k": unit(rng.standard_normal((B, length, N, H, K))),
        "v": rng.standard_normal((B, length, N, HV, V)),
        "beta": np.where(rng.random(beta.shape) < 0.3, rng.choice([0.0, 2.0], beta.shape), beta),
    }
    if some(0.65):
        g = -rng.exponential(0.2, (B, length, HV))
        resets = rng.choice([0.0, -80.0, -1e4, -np.inf], g.shape)
        x["g"] = np.where(rng.random(g.shape) < rng.choice([0, 0.2]), resets, g)
    if some(0.5):
        x["initial_state"] = rng.standard_normal((S, HV, K, V))
    if norm := some(0.25):  # short enough that the 1e-6 under the root is seen
        x |= {n: x[n] * rng.choice([0.03, 1, 3], x[n].shape[:-1])[..., None] for n in "qk"}
    # One dtype for all, or one for each; half of the mixtures without float64, which would decide for all.
    kinds, mixture = list(UNIT), int(rng.integers(6))
    each = [kinds[mixture] if mixture < 4 else kinds[rng.integers(mixture - 4, 4)] for _ in x]
    x = {n: laid_out(rng, torch.tensor(a).to(t), unit_rows=n == "k") for (n, a), t in zip(x.items(), each)}
    d = {
        "d_o": torch.tensor(rng.standard_normal((B, length, HV, V))).to(x["v"].dtype),
        "d_final": torch.tensor(rng.standard_normal((S, HV, K, V))).to(compute_dtype(*list(x.values())[:4])),
    }
    d = {n: laid_out(rng, a) for n, a in d.items()}
    if some(2 / 3):
        del d[rng.choice(list(d))]
    return x, d, {"scale": None if some(0.5) else float(rng.uniform(0.1, 1.5)), "cu_seqlens": cu, "qk_l2norm": norm}


def answer(x: dict, d: dict, opts: dict) -> dict[str, tuple[np.ndarray, float]]:
    """What `computed` has to give, and the size that errors are relative to where the largest entry is smaller: a
    gradient can vanish, but not what was summed for it. That is V products of size 1 for most; K·V products of a state
    and its gradient for a gate; steps as large as d_v for the initial state; two large terms for what is normalised."""
    a = {n: t.double().numpy() for n, t in (x | d).items()}
    a.setdefault("d_o", np.zeros((*x["v"].shape[:2], *x["v"].shape[3:])))
    given = {n: a[n] for n in "qk"} if opts["qk_l2norm"] else {}
    cu, K, V = opts["cu_seqlens"], x["k"].shape[-1], x["v"].shape[-1]
    a |= {n: l2_normalised(y) for n, y in given.items()}
    want = oracle(**a, scale=opts["scale"], cu_seqlens=None if cu is None else cu.tolist())
    state, d_state = max(np.abs(want.final).max(), 1), max(np.abs(want.grads["v"]).max(), 1)
    sizes = {"v": 1, "initial_state": d_state, "g": np.sqrt(K * V) * state * d_state}
    for n, y in given.items():
        sizes[n] = np.abs(want.grads[n] / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-6)).max()
        want.grads[n] = l2_normalised_gradient(y, want.grads[n])
    grads = {f"d_{n}": (want.grads[n], max(sizes.get(n, 0), np.sqrt(V) if n in ("q", "k", "beta") else 0)) for n in x}
    return {"o": (want.o, 1), "final": (want.final, 1)} | grads


def computed(x: dict, d: dict, opts: dict) -> dict[str, torch.Tensor]:
    inputs = {n: a.detach().requires_grad_() for n, a in x.items()}
    o, final = delta_product(**inputs, **opts, output_final_state=True, backend="cpu")
    results = [(y, d[n]) for n, y in (("d_o", o), ("d_final", final)) if n in d]
    grads = torch.autograd.grad([y for y, _ in results], list(inputs.values()), [grad for _, grad in results])
    return {"o": o.detach(), "final": final.detach()} | {f"d_{n}": grad for n, grad in zip(inputs, grads)}


def ruin_scratch(x: dict) -> None:
    """Leaves NaN in the memory that the engine keeps between calls, wherever a problem of these widths writes to it."""
    (_, _, N, _, K), V = x["k"].shape, x["v"].shape[-1]
    some, dtype = 256 // N + 2, compute_dtype(*(x[n] for n in ("q", "k", "v", "beta")))  # more than a kept state's span
    shapes = {"q": (1, K), "k": (N, 1, K), "v": (N, 1, V), "beta": (N, 1)} | ({"g": (1,)} if "g" in x else {})
    nan = {n: torch.full((1, some, *shape), torch.nan, dtype=dtype) for n, shape in shapes.items()}
    d_o = torch.full((1, some, 1, V), torch.nan, dtype=dtype)
    assert all(a.isnan().all() for n, a in computed(nan, {"d_o": d_o}, {}).items() if n != "d_g")


def compare(got: dict[str, torch.Tensor], want: dict[str, tuple[np.ndarray, float]], x: dict, of: object) -> None:
    (_, length, N, _, K), V = x["k"].shape, x["v"].shape[-1]
    dtype = compute_dtype(*(x[n] for n in ("q", "k", "v", "beta")))
    dtypes = {"o": x["v"].dtype, "final": dtype} | {f"d_{n}": a.dtype for n, a in x.items()}
    for name, a in got.items():
        assert a.dtype == dtypes[name], (of, name)
        error = relative_error(a.double().numpy(), *want[name])
        own = UNIT[a.dtype] if UNIT[a.dtype] > UNIT[dtype] else 0
        bound = ROUNDINGS * np.sqrt(length * N + K + V) * UNIT[dtype] + own
        assert error <= bound, f"{of}: {name} is off by {error:.1e}, more than {bound:.1e}; {description(x)}"


def description(x: dict) -> dict:
    return {n: (a.dtype, tuple(a.shape), a.stride()) for n, a in x.items()}


@pytest.mark.one_in(8)
@pytest.mark.parametrize("seed", range(300))
def test_any_problem(seed, poisoned, divide):
    x, d, opts = random_problem(seed)
    want, rng = answer(x, d, opts), np.random.default_rng(seed)
    before = {n: a.clone() for n, a in (x | d).items()}
    for kernels in KERNELS:
        ENGINE.use_kernels(kernels)
        ruin_scratch(x)
        compare(computed(x, d, opts), want, x, kernels)
    # And divided: more blocks than vectors and more segments than time are allowed, and then some have nothing to do.
    kernels, division, threads = rng.choice(KERNELS), rng.integers(1, 6, 2).tolist(), int(rng.integers(1, 4))
    ENGINE.use_kernels(kernels)
    torch.set_num_threads(threads)
    divide(*division)
    compare(computed(x, d, opts), want, x, f"{kernels} on {threads} threads, divided {division}")
    assert all(torch.equal(a, before[n]) for n, a in (x | d).items()), "an input was changed"


@EVERY_KERNELS
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_precision_number_is_read_and_written_exactly(dtype, kernels):
    # One step with q = k = β = 1 makes the state v, and the output is the state.
    ENGINE.use_kernels(kernels)
    v = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 1, 1, 1, -1)
    one = torch.ones(1, 1, 1, 1)
    o, final = delta_product(one, one[None], v, one, scale=1.0, output_final_state=True, backend="cpu")
    v = v.flatten()
    for got, want in ((final, v.float()), (o, v)):
        assert torch.equal(got.isnan().flatten(), v.isnan())
        assert torch.equal(got.flatten()[~v.isnan()], want[~v.isnan()])


@EVERY_KERNELS
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_to_half_precision_is_pytorchs(dtype, kernels):
    # As above, and then the outputs are q: float32 numbers of every size at, just below and just above a tie.
    ENGINE.use_kernels(kernels)
    ties = [0x7FFF, 0x8000, 0x8001] if dtype == torch.bfloat16 else [0x0FFF, 0x1000, 0x1001, 0x3000, 0x3001]
    upper = torch.arange(-(2**15), 2**15, len(ties) - 2)[:, None] * 2**16
    q = (upper + torch.tensor(ties)).flatten().to(torch.int32).view(torch.float32)
    q = q[q.isfinite()]
    ones = torch.ones(1, len(q), 1, 1)
    v = torch.ones(1, len(q), 1, 1, 17, dtype=dtype)  # a vector's width and one more
    o, _ = delta_product(q.view(1, -1, 1, 1), ones[..., None], v, ones, scale=1.0, backend="cpu")
    assert torch.equal(o, q.to(dtype).view(1, -1, 1, 1).expand(o.shape))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("p", [Problem(T=45, N=3, K=20, V=37), Problem(T=75, B=1, cu=CU, H=1)], ids=str)
def test_half_precision_is_the_float32_result_rounded_once(p, dtype):
    x = {n: a.to(dtype) for n, a in draw(p).items()}
    half = computed(leaves(x), {n: x[n] for n in ("d_o",)}, options(p))
    single = computed(leaves(x, torch.float32), {"d_o": x["d_o"].float()}, options(p))
    for name, a in single.items():
        assert torch.equal(half[name], a.to(half[name].dtype)), name


REPEATED, CORRELATED = ("2 directions", "12 directions"), ("cosine .99", "2 at cosine .99", "12 at cosine .99")
KINDS = REPEATED + CORRELATED


def hard_problem(seed: int, N: int, K: int = 32, V: int = 16) -> dict[str, torch.Tensor]:
    """The regime of `test_operator_hard.py`, one of KINDS a batch row: its keys, and correlated ones that come back."""
    rng = np.random.default_rng(seed)

    def rows(kind: str) -> np.ndarray:
        if "at" not in kind:
            return keys(rng, kind, N, K)
        noise = np.linalg.qr(rng.standard_normal((K, K)))[0][: int(kind.split()[0])]
        directions = unit(np.sqrt(0.99) * unit(rng.standard_normal(K)) + np.sqrt(0.01) * noise)
        return directions[rng.integers(len(directions), size=(T, N, 2))]

    B = len(KINDS)
    x = {
        "q": unit(rng.standard_normal((B, T, 2, K))),
        "k": np.stack([rows(kind) for kind in KINDS]),
        "v": rng.standard_normal((B, T, N, 2, V)),
        "beta": rng.uniform(1.9, 2, (B, T, N, 2)),
        "initial_state": rng.standard_normal((B, 2, K, V)),
        "d_o": rng.standard_normal((B, T, 2, V)),
        "d_final": rng.standard_normal((B, 2, K, V)),
    }
    return {name: torch.tensor(a, dtype=torch.float32) for name, a in x.items()}


@cache
def hard_ratios(N: int, seed: int = 0) -> dict[tuple[str, str], dict[str, float]]:
    """For kernels and kind of keys, the engine's errors in float32 as multiples of the loop's."""
    x = hard_problem(seed, N)
    want = oracle(**{n: a.double().numpy() for n, a in x.items()})
    loop, ratios = hard_errors(run("reference", x, leaves(x)), want), {}
    for kernels in KERNELS:
        ENGINE.use_kernels(kernels)
        found = hard_errors(run("cpu", x, leaves(x)), want)
        for row, kind in enumerate(KINDS):
            ratios[kernels, kind] = {n: found[n][row] / loop[n][row] for n in found}
    return ratios


STEPS = pytest.mark.parametrize("N", [1, *(pytest.param(N, marks=pytest.mark.slow("exhaustive")) for N in (2, 3))])


@STEPS
@pytest.mark.parametrize("kinds", [REPEATED, CORRELATED], ids=["repeated", "correlated"])
def test_hard_regime_at_most_three_times_the_loops_error(N, kinds):
    # Correlated keys are why the interactions of keys are computed in double: in float32 they came to 2 to 7.5.
    bad = {at: r for at, r in hard_ratios(N).items() if at[1] in kinds and not max(r.values()) <= 3}
    assert not bad, bad


FEW_HEADS = {"B": 1, "H": 1, "HV": 1, "K": 20, "V": 50}
LONG_CU = (0, 0, 300, 301, 301, 700, 700)
DIVIDED = [
    Problem(T=700, **FEW_HEADS),
    Problem(T=700, gate=False, **FEW_HEADS),
    Problem(T=400, N=3, initial=False, resets="-inf", **FEW_HEADS),
    Problem(T=700, cu=LONG_CU, **FEW_HEADS),
    Problem(T=700, N=1, cu=LONG_CU, gate=False, beta="ends", **(FEW_HEADS | {"HV": 2})),
]


@pytest.mark.parametrize("division", [(1, 5), (3, 4), (2, 1), (4, 7)], ids=str)
@pytest.mark.parametrize("p", DIVIDED, ids=str)
def test_divided_work_gives_the_same(p, division, divide, poisoned):
    x = draw(p)
    want = run("cpu", x, leaves(x), **options(p))
    divide(*division)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        got = run("cpu", x, leaves(x), **options(p))
        found = errors(got, want)
        assert max(found.values()) <= ROUNDINGS * np.sqrt(p.T * p.N) * 2**-53, (threads, found)


@pytest.mark.parametrize("division", [(1, 16), (2, 5)], ids=str)
def test_divided_work_in_the_hard_regime(division, divide):
    x = hard_problem(1, 1)
    exact = run("cpu", {n: a.double() for n, a in x.items()}, leaves(x, torch.float64))
    whole = hard_errors(run("cpu", x, leaves(x)), exact)
    divide(*division)
    for n, found in hard_errors(run("cpu", x, leaves(x)), exact).items():
        # Segments are joined by products of K × K matrices: a few more roundings.
        assert all(a <= 3 * b for a, b in zip(found, whole[n])), (n, found, whole[n])


def same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(got[n], want[n]) for n in want)


def some_problem(**changes) -> tuple[dict, dict, dict]:
    p = Problem(T=300, **({"H": 1, "K": 20, "V": 70} | changes))
    x = draw(p)
    d = {n: x[n].float() for n in ("d_o", "d_final")}
    return {n: a.float() for n, a in x.items() if n not in d}, d, options(p)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_change_no_bit_where_heads_are_enough_for_them(threads):
    problem = some_problem(B=3, HV=2)
    want = computed(*problem)
    torch.set_num_threads(threads)
    for _ in range(3):
        assert same(computed(*problem), want)


@pytest.mark.parametrize("threads", [2, 3, 5, 16])
@pytest.mark.parametrize("V", [16, 70])
def test_more_threads_than_heads(V, threads):
    # V = 16 leaves nothing but time to divide: 64 spans of 256 steps.
    p = Problem(T=16384, N=1, B=1, H=1, HV=1, K=5, V=V)
    x = draw(p)
    want = run("cpu", x, leaves(x))
    torch.set_num_threads(threads)
    found = errors(run("cpu", x, leaves(x)), want)
    assert max(found.values()) <= ROUNDINGS * np.sqrt(p.T) * 2**-53, found


def test_work_is_divided_only_where_heads_are_fewer_than_threads():
    for V, threads, heads in [(16, 16, 1), (70, 16, 1), (256, 4, 1), (64, 8, 2), (64, 2, 2), (8, 3, 1)]:
        k, v = torch.empty(1, 16384, 1, 1, 16), torch.empty(1, 16384, 1, heads, V)
        blocks, segments = cpu._division(cpu.Chunking.of(1, 16, V, torch.float32), k, v, 1, threads)
        assert (blocks, segments) == (1, 1) if heads >= threads else blocks * segments > 1 or V < 32
        assert blocks * 16 <= max(V, 16) and blocks * segments * heads <= 2 * threads


def test_calls_from_several_python_threads():
    problems = [some_problem(N=N, K=K) for N, K in [(1, 20), (2, 37), (3, 5), (2, 64)] * 3]
    want = [computed(*problem) for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        assert all(same(got, a) for got, a in zip(pool.map(lambda problem: computed(*problem), problems), want))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_without_openmp_the_engine_starts_threads_of_its_own(threads, tmp_path, monkeypatch):
    problem = some_problem(B=3, HV=2)
    want = computed(*problem)
    # A copy is loaded beside the original, with variables of its own.
    monkeypatch.setattr(library, "_openmp_of_process", lambda: None)
    engine = library.Engine(shutil.copy(ENGINE.path, tmp_path))
    assert engine.openmp is None
    monkeypatch.setattr(cpu, "ENGINE", engine)
    torch.set_num_threads(threads)
    assert same(computed(*problem), want)


@pytest.mark.parametrize("p", [Problem(T=700, N=3), Problem(T=75, B=1, cu=CU), Problem(T=33, N=40, K=70)], ids=str)
def test_states_are_kept_for_training_only(p, monkeypatch, poisoned):
    kept = []

    def spy(*arguments):
        results = cpu_forward(*arguments)
        kept.append(results[2])
        return results

    cpu_forward, x = cpu.cpu_forward, draw(p)
    monkeypatch.setattr(cpu, "cpu_forward", spy)
    inputs = {n: a for n, a in x.items() if not n.startswith("d_")}
    delta_product(**inputs, **options(p), backend="cpu")
    with torch.no_grad():
        delta_product(**leaves(x), **options(p), backend="cpu")
    delta_product(**leaves(x), **options(p), backend="cpu")
    chunking = cpu.Chunking.of(p.N, p.K, p.V, torch.float64)
    span = chunking.chunk_tokens * chunking.chunks_per_state
    slots = p.B * -(-p.T // span) if p.cu is None else p.T // span + len(p.cu) - 1
    assert [len(a) for a in kept] == [0, 0, slots] and kept[2].shape[1:] == (p.HV, p.K, p.V)
    assert kept[2].isfinite().all()  # those that no sequence fills, too


@pytest.mark.parametrize("threads", [1, 2])
def test_too_little_memory_is_an_error_and_not_the_end(threads):
    torch.set_num_threads(threads)
    problem = some_problem()
    want = computed(*problem)
    # A chunk of 2²³ steps has 2⁴⁶ pairs: more than a process can address. All the inputs are one number, repeated.
    one, N = torch.ones(1), 2**23
    k, beta = one.expand(1, 1, N, 1, 1), one.expand(1, 1, N, 2)
    with pytest.raises(MemoryError, match="native CPU engine could not allocate"):
        delta_product(one.expand(1, 1, 1, 1), k, beta[..., None], beta, backend="cpu")
    assert same(computed(*problem), want)


# --- Short sequences, which work on the states' own tensors -----------------------------------------------------------


@pytest.mark.one_in(3)
@EVERY_KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("length", "value_dim"), [(1, 16), (1, 80), (3, 64), (1, 17), (5, 144)])
@pytest.mark.parametrize("options", [{}, {"gated": True, "initial": True}, {"initial": True}, {"gated": True}])
@pytest.mark.parametrize("division", [None, (2, 1), (3, 5)], ids=str)
def test_few_tokens_without_a_backward(kernels, dtype, length, value_dim, options, division, divide, poisoned):
    """Whole vectors of columns or not, with and without a gate and a state; the given state stays as it was."""
    ENGINE.use_kernels(kernels)
    if division:
        divide(*division)
        torch.set_num_threads(3)
    rng = np.random.default_rng(length * value_dim)
    x = {
        "q": rng.standard_normal((2, length, 2, 24)),
        "k": unit(rng.standard_normal((2, length, 2, 2, 24))),
        "v": rng.standard_normal((2, length, 2, 4, value_dim)),
        "beta": rng.uniform(0, 2, (2, length, 2, 4)),
    }
    if options.get("gated"):
        x["g"] = -rng.exponential(0.5, (2, length, 4))
    if options.get("initial"):
        x["initial_state"] = rng.standard_normal((2, 4, 24, value_dim))
    given = {name: torch.from_numpy(value).to(dtype) for name, value in x.items()}
    kept = {name: value.clone() for name, value in given.items()}
    with torch.no_grad():
        o, state = delta_product(**given, output_final_state=True, backend="cpu")
        wide = {name: value.double() for name, value in given.items()}
        want, want_state = delta_product(**wide, output_final_state=True, backend="reference")
    limit = ROUNDINGS * UNIT[dtype] * (2 * length + 24 + value_dim) ** 0.5
    for got, wanted in ((o, want), (state, want_state)):
        assert relative_error(got.double().numpy(), wanted.numpy()) < limit
    assert all(torch.equal(given[name], kept[name]) for name in given)
