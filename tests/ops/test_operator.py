"""Every backend against the oracle of `oracle.py`: outputs, states and all gradients, over one list of problems.

Tolerances are relative to the largest entry of what is compared. With ‖k‖ = 1 and β in [0,2] no transition enlarges an
error, so after s steps of a few roundings each the error is at most a few s·u, and about a few √s·u in practice
(u = 2⁻²⁴ or 2⁻⁵³). The longest problems here have 300 steps: √300 · 6e-8 · a few ≈ 5e-6, and 1e-14 in float64.

Over the instruction sets that PyTorch, MKL, oneDNN and the engine can be told to use, the largest error is 0.26 of the
tolerance, the final state after 40 steps of one key direction in one chunk; 0.42 where MKL is told to compute as on its
oldest processors (MKL_CBWR=COMPATIBLE), and 0.15 in everything else.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import (
    BACKEND,
    CU,
    TOLERANCE,
    Problem,
    assert_within,
    draw,
    errors,
    leaves,
    options,
    run,
    serving,
    solve,
    solved,
)
from oracle import l2_normalised, l2_normalised_gradient, oracle, relative_error

from deltaproduct.errors import UsageError
from deltaproduct.ops import BACKENDS, delta_product, delta_product_states, delta_product_step, resolve_backend

pytestmark = pytest.mark.numerical("whole")

# One rounding of an output or gradient to its dtype, beside float32 arithmetic: 8 and 11 significant bits.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


PROBLEMS = [
    Problem(T=1, N=1, gate=False, initial=False),
    Problem(T=1, N=3, H=1, HV=2),
    Problem(T=2, N=2, scale=0.7),
    Problem(T=0),
    Problem(T=16, N=2),  # one chunk of 32 steps exactly
    Problem(T=33, N=1, initial=False),  # and one step more
    Problem(T=101, N=1, H=2, HV=4, V=5, K=7),
    Problem(T=97, N=2, gate=False, H=1, HV=3),
    Problem(T=71, N=3, B=1, initial=False),
    Problem(T=41, N=3, gate=False, initial=False, V=13),
    Problem(T=29, N=5, B=3, K=1, V=1, H=3, HV=3),
    Problem(T=21, N=8, K=3, V=1),
    Problem(T=5, N=40, K=1, V=5),  # more steps in a token than in a chunk
    Problem(T=4, N=40, gate=False, H=1),
    Problem(T=75, N=2, B=1, cu=CU, H=1, HV=2),
    Problem(T=75, N=1, B=1, cu=CU, gate=False, initial=False),
    Problem(T=75, N=3, B=1, cu=CU, initial=False, K=5, V=3),
    Problem(T=12, N=40, B=1, H=1, HV=1, K=3, V=2, cu=(0, 0, 5, 6, 6, 12, 12)),
    Problem(T=3, N=2, B=1, cu=(0, 3)),
    Problem(T=0, N=2, B=1, cu=(0, 0, 0)),
    Problem(T=70, N=2, beta="ends"),
    Problem(T=70, N=3, beta="ends", gate=False, B=1),
    Problem(T=70, N=2, resets="-inf"),
    Problem(T=70, N=3, resets="-1e4", H=1),
    Problem(T=75, N=2, B=1, cu=CU, resets="-inf", beta="ends"),
]
# The package floors a log gate at −1000, so that 32 tokens' sums reach 3e4, whose last float64 digit is 4e-12.
FLOAT64_RESETS = 1e-11


def test_oracle_gradients_are_finite_differences():
    p = Problem(T=4, N=2, B=1, H=1, HV=2, K=3, V=2, scale=0.7)
    x = {n: a.numpy() for n, a in draw(p).items()}
    rng = np.random.default_rng(0)
    d_states = {s: rng.standard_normal(x["d_final"].shape) for s in (0, 1, 4, 8)}

    def loss(**changed: np.ndarray) -> float:
        inputs = {n: a for n, a in x.items() if not n.startswith("d_")} | changed
        a = oracle(**inputs, scale=0.7, positions=list(d_states))
        traced = sum((a.states[s] * d).sum() for s, d in d_states.items())
        return (a.o * x["d_o"]).sum() + (a.final * x["d_final"]).sum() + traced

    grads = oracle(**x, scale=0.7, d_states=d_states).grads
    for name, grad in grads.items():
        way = rng.standard_normal(grad.shape)
        slope = (loss(**{name: x[name] + 1e-5 * way}) - loss(**{name: x[name] - 1e-5 * way})) / 2e-5
        # A central difference: h² = 1e-10 times third derivatives, and 1e-16/1e-5 of rounding.
        assert slope == pytest.approx((grad * way).sum(), rel=1e-7, abs=1e-7), name


@BACKEND
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_outputs_and_gradients(p, dtype, backend):
    x = draw(p)
    got = run(backend, x, leaves(x, dtype), **options(p))
    assert_within(errors(got, solved(p)), FLOAT64_RESETS if p.resets and dtype == torch.float64 else TOLERANCE[dtype])


@BACKEND
@pytest.mark.parametrize("p", [Problem(T=45, N=2, H=1, HV=2), Problem(T=75, N=3, B=1, cu=CU)], ids=str)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_half_precision_inputs_lose_only_their_own_rounding(p, dtype, backend):
    x = draw(p)
    inputs = leaves(x, dtype)
    rounded = x | {n: a.detach().double() for n, a in inputs.items()}
    o, final = delta_product(**inputs, output_final_state=True, backend=backend, **options(p))
    assert o.dtype == dtype and final.dtype == torch.float32
    # d_o reaches the operator in o's dtype.
    rounded["d_o"] = x["d_o"].to(dtype).double()
    got = run(backend, rounded, inputs, **options(p))
    want = solve(p, rounded)
    assert relative_error(got.final, want.final) <= TOLERANCE[torch.float32]
    assert_within(errors(got, want), ROUNDING[dtype] + TOLERANCE[torch.float32])


@BACKEND
def test_mixed_dtypes(backend):
    p = Problem(T=40, N=2, H=1, HV=2)
    dtypes = {"q": torch.bfloat16, "k": torch.float32, "v": torch.float16, "beta": torch.float32, "g": torch.float32,
              "initial_state": torch.bfloat16}  # fmt: skip
    x = draw(p)
    inputs = {n: x[n].to(dtype).requires_grad_() for n, dtype in dtypes.items()}
    rounded = x | {n: a.detach().double() for n, a in inputs.items()} | {"d_o": x["d_o"].half().double()}
    got, want = run(backend, rounded, inputs), solve(p, rounded)
    for name, error in errors(got, want).items():
        dtype = torch.float16 if name == "o" else dtypes.get(name.removeprefix("d_"), torch.float32)
        assert error <= ROUNDING.get(dtype, 0) + TOLERANCE[torch.float32], (name, error)
        assert name in ("o", "final") or inputs[name.removeprefix("d_")].grad.dtype == dtype
    # One float64 input is enough for a float64 state.
    o, final = delta_product(**(inputs | {"beta": x["beta"]}), output_final_state=True, backend=backend)
    assert o.dtype == torch.float16 and final.dtype == torch.float64
    assert relative_error(final.detach().numpy(), want.final) <= TOLERANCE[torch.float64]


@BACKEND
def test_qk_l2norm(backend):
    p = Problem(T=37, N=2)
    x = dict(draw(p))
    x["k"] = 0.01 * x["k"]  # so short that the 1e-6 under the root is seen
    normal = x | {n: torch.from_numpy(l2_normalised(x[n].numpy())) for n in "qk"}
    want = solve(p, normal)
    want.grads |= {n: l2_normalised_gradient(x[n].numpy(), want.grads[n]) for n in "qk"}
    got = run(backend, x, leaves(x, torch.float64), qk_l2norm=True)
    assert_within(errors(got, want), TOLERANCE[torch.float64])
    o, _ = delta_product(**leaves(x, torch.float32), qk_l2norm=True, backend=backend)
    assert relative_error(o.detach().numpy(), want.o) <= TOLERANCE[torch.float32]


POISON = [Problem(T=45, N=3, H=1), Problem(T=75, N=2, B=1, cu=CU, H=1), Problem(T=5, N=40)]


@BACKEND
@pytest.mark.parametrize("p", POISON, ids=str)
def test_uninitialised_memory_is_never_read(p, backend):
    x = draw(p)
    torch.use_deterministic_algorithms(True)  # which fills every torch.empty with NaN
    try:
        assert torch.empty(8).isnan().all() and torch.ones(3).new_empty(8).isnan().all()
        got = run(backend, x, leaves(x, torch.float64), **options(p))
        trace = None
        if p.cu is None:
            inputs = {n: a for n, a in leaves(x, torch.float64).items() if n != "q"}
            trace = delta_product_states(**inputs, positions=range(p.T * p.N + 1), backend=backend)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_within(errors(got, solved(p)), TOLERANCE[torch.float64])
    assert trace is None or trace.isfinite().all()


@BACKEND
def test_final_state_only_when_asked_for(backend):
    x = leaves(draw(Problem(T=5)), torch.float32)
    assert delta_product(**x, backend=backend)[1] is None
    assert delta_product(**x, backend=backend, output_final_state=True)[1].dtype == torch.float32


@BACKEND
def test_gradient_of_either_result_alone(backend):
    p = Problem(T=40, N=2)
    x = draw(p)
    for name in ("d_o", "d_final"):
        only = x | {name: torch.zeros_like(x[name])}
        inputs = leaves(x, torch.float64)
        o, final = delta_product(**inputs, output_final_state=True, backend=backend)
        kept = "d_final" if name == "d_o" else "d_o"
        ((final if name == "d_o" else o) * x[kept]).sum().backward()
        want = solve(p, only)
        for n, a in inputs.items():
            grad = np.zeros(a.shape) if a.grad is None else a.grad.numpy()  # the final state does not depend on q
            assert np.abs(grad - want.grads[n]).max() <= 1e-12 * max(np.abs(want.grads[n]).max(), 1), (name, n)


@BACKEND
def test_beta_zero_leaves_the_state_alone(backend):
    x = leaves(draw(Problem(T=40, N=3, gate=False)), torch.float32)
    x["beta"] = torch.zeros_like(x["beta"])
    _, final = delta_product(**x, output_final_state=True, backend=backend)
    assert torch.equal(final, x["initial_state"])


@BACKEND
def test_one_step_without_gate_is_the_delta_rule(backend):
    # DeltaNet in its own form (arXiv 2406.06484): S ← S(I − β k kᵀ) + β v kᵀ with S of V×K, o = S q.
    p = Problem(T=50, N=1, B=1, H=1, HV=1, gate=False, initial=False)
    x = leaves(draw(p), torch.float64)
    o, _ = delta_product(**x, scale=1.0, backend=backend)
    q, k, v, beta = (x[n].detach().numpy().reshape(p.T, -1) for n in ("q", "k", "v", "beta"))
    S = np.zeros((p.V, p.K))
    for t in range(p.T):
        S = S @ (np.eye(p.K) - beta[t] * np.outer(k[t], k[t])) + beta[t] * np.outer(v[t], k[t])
        assert np.abs(S @ q[t] - o[0, t, 0].detach().numpy()).max() <= 1e-12


@BACKEND
def test_n_steps_are_n_tokens_read_at_the_last(backend):
    p = Problem(T=23, N=3)
    x = leaves(draw(p), torch.float64)
    o, final = delta_product(**x, output_final_state=True, backend=backend)
    k, v, beta = (x[n].flatten(1, 2).unsqueeze(2) for n in ("k", "v", "beta"))
    g = torch.zeros(p.B, p.T, p.N, p.HV, dtype=torch.float64)
    g[:, :, 0] = x["g"].detach()
    q = x["q"].repeat_interleave(p.N, dim=1)
    long, end = delta_product(q, k, v, beta, g.flatten(1, 2), initial_state=x["initial_state"], output_final_state=True,
                              backend=backend)  # fmt: skip
    assert (long[:, p.N - 1 :: p.N] - o).abs().max() <= 1e-12 * o.abs().max()
    assert (end - final).abs().max() <= 1e-12 * final.abs().max()


@BACKEND
@pytest.mark.parametrize("cuts", [(1, 2, 40), (16, 32, 33), (69,)], ids=str)
def test_in_pieces_with_the_carried_state(cuts, backend):
    p = Problem(T=70, N=2, H=1, HV=2)
    x = leaves(draw(p), torch.float64)
    o, final = delta_product(**x, output_final_state=True, backend=backend)
    state, pieces = x.pop("initial_state"), []
    for lo, hi in zip((0, *cuts), (*cuts, p.T)):
        piece, state = delta_product(**{n: a[:, lo:hi] for n, a in x.items()}, initial_state=state,
                                     output_final_state=True, backend=backend)  # fmt: skip
        pieces.append(piece)
    assert (torch.cat(pieces, 1) - o).abs().max() <= 1e-12 * o.abs().max()
    assert (state - final).abs().max() <= 1e-12 * final.abs().max()


def test_token_by_token():
    p = Problem(T=20, N=3, H=1, HV=2, V=5)
    x = leaves(draw(p), torch.float64)
    want = solved(p)
    state, outputs = x.pop("initial_state"), []
    for t in range(p.T):
        before = state.detach().clone()
        o, after = delta_product_step(**{n: a[:, t] for n, a in x.items()}, state=state)
        assert torch.equal(state, before)  # the caller's state is not overwritten
        state = after
        outputs.append(o)
    assert relative_error(torch.stack(outputs, 1).detach().numpy(), want.o) <= TOLERANCE[torch.float64]
    assert relative_error(state.detach().numpy(), want.final) <= TOLERANCE[torch.float64]
    q, k = torch.randn(2, 1, 8).double(), torch.randn(2, 3, 1, 8).double()
    v, beta = x["v"][:, 0], x["beta"][:, 0]
    o, _ = delta_product_step(q, k, v, beta, state=state, scale=0.3, qk_l2norm=True)
    whole, _ = delta_product(q[:, None], k[:, None], v[:, None], beta[:, None], initial_state=state, scale=0.3,
                             qk_l2norm=True, backend="reference")  # fmt: skip
    assert (o - whole[:, 0]).abs().max() <= 1e-12
    o, after = delta_product_step(q.bfloat16(), k.bfloat16(), v.bfloat16(), beta.bfloat16(), state=state.float())
    assert o.dtype == torch.bfloat16 and after.dtype == torch.float32


@BACKEND
def test_value_heads_may_be_permuted(backend):
    x = leaves(draw(Problem(T=40, N=2, H=4, HV=4)), torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    o, final = delta_product(**x, output_final_state=True, backend=backend)
    x["q"], x["k"], x["g"] = x["q"][..., order, :], x["k"][..., order, :], x["g"][..., order]
    x["v"], x["beta"], x["initial_state"] = x["v"][..., order, :], x["beta"][..., order], x["initial_state"][:, order]
    o2, final2 = delta_product(**x, output_final_state=True, backend=backend)
    assert (o2 - o[:, :, order]).abs().max() <= 1e-12 and (final2 - final[:, order]).abs().max() <= 1e-12


TRACED = [
    Problem(T=1, N=1),
    Problem(T=37, N=3, H=1),
    Problem(T=40, N=1, gate=False, initial=False),
    Problem(T=3, N=40),
    Problem(T=32, N=2, resets="-inf"),
    Problem(T=0),
]


@BACKEND
@pytest.mark.parametrize("p", TRACED, ids=str)
def test_trace_at_every_position(p, backend):
    x = draw(p)
    inputs = {n: a.numpy() for n, a in x.items()}
    everywhere = list(range(p.T * p.N + 1))
    want = oracle(**inputs, positions=everywhere).states
    inputs = {n: a for n, a in leaves(x).items() if n != "q"}
    tolerance = FLOAT64_RESETS if p.resets else TOLERANCE[torch.float64]
    shuffled = np.random.default_rng(0).permutation([*everywhere, 0, everywhere[-1]]).tolist()
    for positions in (everywhere, shuffled, torch.tensor(everywhere[::-1]), everywhere[-1:], everywhere[:1]):
        got = delta_product_states(**inputs, positions=positions, backend=backend).detach().numpy()
        assert relative_error(got, np.stack([want[int(i)] for i in positions], axis=1)) <= tolerance
    assert delta_product_states(**inputs, positions=[], backend=backend).shape == (p.B, 0, p.HV, p.K, p.V)


@BACKEND
def test_trace_gradients(backend):
    p = Problem(T=37, N=3, H=1)
    x = draw(p)
    positions = [111, 5, 5, 0, 33, 30, 64, 60]  # repeats; ends and insides of chunks and tokens; the first and the last
    d = torch.from_numpy(np.random.default_rng(1).standard_normal((p.B, len(positions), p.HV, p.K, p.V)))
    inputs = {n: a for n, a in leaves(x).items() if n != "q"}
    (delta_product_states(**inputs, positions=positions, backend=backend) * d).sum().backward()
    d_states: dict[int, np.ndarray] = {}
    for i, position in enumerate(positions):
        d_states[position] = d_states.get(position, 0) + d[:, i].numpy()
    want = oracle(**{n: a.numpy() for n, a in x.items() if not n.startswith("d_")}, d_states=d_states)
    for n, a in inputs.items():
        assert relative_error(a.grad.numpy(), want.grads[n]) <= TOLERANCE[torch.float64], n


@BACKEND
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(packed, backend):
    cu = (0, 2, 2, 5) if packed else None
    p = Problem(T=5, N=2, B=1, H=1, HV=2, K=2, V=2, cu=cu)
    x = leaves(draw(p))

    def f(q, k, v, beta, g, initial_state):
        return delta_product(q, k, v, beta, g, initial_state=initial_state, output_final_state=True, backend=backend,
                             **options(p))  # fmt: skip

    assert torch.autograd.gradcheck(f, tuple(x[n] for n in ("q", "k", "v", "beta", "g", "initial_state")))


@BACKEND
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_autocast_changes_nothing(inside, backend):
    if inside and backend == "reference":
        pytest.skip("autograd's own matmuls obey autocast where backward() is called; the loop has no other backward")
    x = draw(Problem(T=40, N=2))
    plain, cast = leaves(x, torch.float32), leaves(x, torch.float32)
    for inputs, enabled in ((plain, False), (cast, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            o, final = delta_product(**inputs, output_final_state=True, backend=backend)
            loss = (o * x["d_o"]).sum() + (final * x["d_final"]).sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        inputs |= {"o": o, "final": final}
    for name in plain:
        a, b = (y[name] if name in ("o", "final") else y[name].grad for y in (plain, cast))
        assert torch.equal(a, b), name


@pytest.mark.parametrize("p", [Problem(T=20, N=2, H=1), Problem(T=75, N=3, B=1, cu=CU, gate=False, initial=False)],
                         ids=str)  # fmt: skip
def test_compiled_equals_eager(p):
    x = draw(p)

    def f(inputs):
        o, final = delta_product(**inputs, output_final_state=True, **options(p))
        return (o * x["d_o"]).sum() + (final * x["d_final"]).sum()

    eager, compiled = leaves(x, torch.float64), leaves(x, torch.float64)
    torch._dynamo.reset()
    # aot_eager traces forward and backward as inductor does and needs no C++ compiler.
    loss = torch.compile(f, fullgraph=True, backend="aot_eager")(compiled)
    loss.backward()
    want = f(eager)
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-12)
    for n in eager:
        assert relative_error(compiled[n].grad.numpy(), eager[n].grad.numpy()) <= 1e-12, n


@pytest.mark.slow("graphs")
@pytest.mark.parametrize("p", [Problem(T=9, N=2, H=1), Problem(T=9, N=2, gate=False, initial=False),
                               Problem(T=75, N=3, B=1, cu=CU)], ids=str)  # fmt: skip
def test_custom_operators_are_well_formed(p):
    x = {n: a.float() for n, a in draw(p).items()}
    ops, cu = torch.ops.deltaproduct, options(p)["cu_seqlens"]
    q, k, v, beta, g = (x.get(n) for n in ("q", "k", "v", "beta", "g"))
    forward = (q, k, v, beta, g, x.get("initial_state"), cu, 0.3, 4)
    torch.library.opcheck(ops.chunkwise_forward.default, forward)
    _, _, states = ops.chunkwise_forward(*forward)
    for d_final, d_states in ((x["d_final"], None), (None, torch.ones_like(states))):
        backward = (x["d_o"], d_final, d_states, q, k, v, beta, g, states, cu, 0.3, 4)
        torch.library.opcheck(ops.chunkwise_backward.default, backward)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_small_problem(data):
    size = st.integers(1, 5)
    packed, heads = data.draw(st.booleans()), data.draw(st.integers(1, 3))
    length = data.draw(st.integers(0, 45))
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=5))) if packed else []
    p = Problem(
        T=length, N=data.draw(size), B=1 if packed else data.draw(st.integers(1, 3)), H=heads,
        HV=heads * data.draw(st.integers(1, 2)), K=data.draw(size), V=data.draw(size), gate=data.draw(st.booleans()),
        initial=data.draw(st.booleans()), cu=(0, *cuts, length) if packed else None,
        beta=data.draw(st.sampled_from(["uniform", "ends"])),
    )  # fmt: skip
    x = draw(p)
    want = solve(p, x)
    for backend in serving():
        found = run(backend, x, leaves(x, torch.float64), **options(p))
        assert_within(errors(found, want), TOLERANCE[torch.float64])


def small(**changed) -> dict:
    shapes = {"q": (2, 3, 2, 4), "k": (2, 3, 2, 2, 4), "v": (2, 3, 2, 4, 5), "beta": (2, 3, 2, 4), "g": (2, 3, 4)}
    return {n: torch.zeros(s) for n, s in shapes.items()} | changed


def packed(cu, **options) -> dict:
    x = {n: a[:1] for n, a in small().items()}
    return x | {"cu_seqlens": torch.tensor(cu)} | options


BAD = [
    ("q", small(q=torch.zeros(2, 3, 2, 5))),
    ("q", small(q=torch.zeros(2, 4, 2, 4))),
    ("q", small(q=torch.zeros(2, 3, 4))),
    ("q", small(q=torch.zeros(2, 3, 2, 4, dtype=torch.int64))),
    ("q", small(q=torch.zeros(2, 3, 2, 4, device="meta"))),
    ("k", small(k=torch.zeros(2, 3, 2, 4))),
    ("k", small(k=torch.zeros(2, 3, 1, 2, 4))),
    ("k", small(k=torch.zeros(2, 3, 2, 2, 4, dtype=torch.complex64))),
    ("v", small(v=torch.zeros(2, 3, 4, 5))),
    ("v", small(v=torch.zeros(2, 3, 2, 4, 5, device="meta"))),
    ("heads", small(v=torch.zeros(2, 3, 2, 3, 5), beta=torch.zeros(2, 3, 2, 3), g=torch.zeros(2, 3, 3))),
    ("K", small(q=torch.zeros(2, 3, 2, 0), k=torch.zeros(2, 3, 2, 2, 0))),
    ("N", small(k=torch.zeros(2, 3, 0, 2, 4), v=torch.zeros(2, 3, 0, 4, 5), beta=torch.zeros(2, 3, 0, 4))),
    ("beta", small(beta=torch.zeros(2, 3, 2, 2))),
    ("beta", small(beta=torch.zeros(2, 3, 2, 4, dtype=torch.int32))),
    ("beta", small(beta=torch.zeros(2, 3, 2, 4, device="meta"))),
    ("g", small(g=torch.zeros(2, 3, 2))),
    ("g", small(g=torch.zeros(2, 3, 2, 4))),
    ("g", small(g=torch.zeros(2, 3, 4, dtype=torch.bool))),
    ("state", small(initial_state=torch.zeros(2, 4, 5, 4))),
    ("state", small(initial_state=torch.zeros(1, 4, 4, 5))),
    ("state", small(initial_state=torch.zeros(2, 4, 4, 5, device="meta"))),
    ("state", packed([0, 1, 3], initial_state=torch.zeros(1, 4, 4, 5))),
    ("cu_seqlens", packed([0, 1, 2])),
    ("cu_seqlens", packed([0, 2, 1, 3])),
    ("cu_seqlens", packed([1, 3])),
    ("cu_seqlens", packed([3])),
    ("cu_seqlens", packed([0.0, 3.0])),
    ("cu_seqlens", packed([[0, 3]])),
    ("cu_seqlens", small(cu_seqlens=torch.tensor([0, 3]))),
    ("nonsense", small(backend="nonsense")),
]


@pytest.mark.parametrize(("name", "arguments"), BAD, ids=[f"{i}-{name}" for i, (name, _) in enumerate(BAD)])
def test_what_cannot_be_is_refused_in_one_line(name, arguments):
    with pytest.raises(UsageError, match=rf"\b{name}\b") as refusal:
        delta_product(**arguments)
    assert "\n" not in str(refusal.value)


def test_wrong_steps_and_positions_are_refused():
    x = {n: a[:, 0] for n, a in small().items()}
    state = torch.zeros(2, 4, 4, 5)
    delta_product_step(**x, state=state)
    for name, changed in (("state", {"state": state[:1]}), ("q", {"q": x["q"][..., :2]}), ("beta", {"beta": x["k"]})):
        with pytest.raises(UsageError, match=rf"\b{name}\b"):
            delta_product_step(**(x | {"state": state} | changed))
    trace = {n: a for n, a in small().items() if n != "q"}
    for positions in ([7], [-1], [0, 3, 100]):
        with pytest.raises(UsageError, match=rf"{positions[-1]} is outside 0 … 6"):
            delta_product_states(**trace, positions=positions)


@pytest.mark.parametrize("name", sorted(set(BACKENDS) - set(serving())))
def test_a_backend_that_cannot_serve_says_why(name):
    with pytest.raises(UsageError, match=rf"'{name}' cannot serve: \S+ \S+") as refusal:
        delta_product(**small(), backend=name)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_auto_says_what_it_passed_over(device):
    name, reason = resolve_backend(device=device)
    assert name == (serving()[0] if device == "cpu" else "chunkwise")
    faster = list(BACKENDS)[: list(BACKENDS).index(name)]
    assert all(f"not {other}: " in reason for other in faster) and reason.count("; not ") == len(faster)
    assert device == "cpu" or {"cpu", "triton"} <= set(faster)
