"""`delta_product_step` by every backend that can be named: token by token against the float64 reference.

The regime is that of state tracking: three keys that are far from orthogonal, β near 2, no decay, so that nothing is
forgotten and every rounding stays. After s = T·N steps of a few roundings each an error is at most a few s·u, which is
the tolerance: with s = 64 · 2 = 128 steps, 4 · 128 · 6e-8 = 3e-5 in float32 and 4 · 128 · 1.1e-16 = 6e-14 in
float64, relative to the largest entry. The gradients are a recurrence of the same transitions backwards in time.
"""

import dataclasses
from functools import cache

import pytest
import torch
from operator_cases import BACKEND, serving

from deltaproduct.errors import UsageError
from deltaproduct.ops import BACKENDS, delta_product, delta_product_step

pytestmark = pytest.mark.numerical

T, N, K, V = 64, 2, 16, 8
TOLERANCE = {torch.float32: 4 * T * N * 2.0**-24, torch.float64: 4 * T * N * 2.0**-53}


def hard(normalised: bool) -> dict[str, torch.Tensor]:
    """Values that float32 holds exactly; keys of length 1, or of any length for `qk_l2norm`."""
    draw = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    directions = torch.nn.functional.normalize(normal(3, K) + 1.5, dim=-1)
    k = directions[torch.randint(3, (2, T, N, 2), generator=draw)]
    if not normalised:
        k = k * (1 + torch.rand(2, T, N, 2, 1, generator=draw, dtype=torch.float64))
    x = {
        "q": normal(2, T, 2, K),
        "k": k,
        "v": normal(2, T, N, 4, V),
        "beta": 2 - 0.01 * torch.rand(2, T, N, 4, generator=draw, dtype=torch.float64),
        "state": normal(2, 4, K, V),
    }
    return {name: a.float().double() for name, a in x.items()}


def leaves(x: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: a.to(dtype).requires_grad_() for name, a in x.items()}


def loss(o: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    weight = torch.arange(1, o.numel() + 1, dtype=torch.float64).view(o.shape).sin()
    return (o.double() * weight).sum() + state.double().sum()


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.detach().double() - want.detach()).abs().max() / want.detach().abs().max())


@cache
def truth(qk_l2norm: bool) -> dict[str, torch.Tensor]:
    """o, the last state and the gradients of `loss`, by the reference in float64 over the whole sequence."""
    x = leaves(hard(not qk_l2norm), torch.float64)
    sequences = [x[n] for n in ("q", "k", "v", "beta")]
    o, final = delta_product(
        *sequences, initial_state=x["state"], output_final_state=True, qk_l2norm=qk_l2norm, backend="reference"
    )
    loss(o, final).backward()
    return {"o": o, "final": final} | {f"d_{name}": a.grad for name, a in x.items()}


@BACKEND
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("qk_l2norm", [False, True])
def test_token_by_token_in_the_hard_regime(backend, dtype, qk_l2norm):
    x, state, outputs = leaves(hard(not qk_l2norm), dtype), None, []
    for t in range(T):
        o, state = delta_product_step(
            *(x[n][:, t] for n in ("q", "k", "v", "beta")), state=x["state"] if state is None else state,
            qk_l2norm=qk_l2norm, backend=backend,
        )  # fmt: skip
        outputs.append(o)
    o = torch.stack(outputs, 1)
    loss(o, state).backward()
    got = {"o": o, "final": state} | {f"d_{name}": a.grad for name, a in x.items()}
    found = {name: relative(got[name], want) for name, want in truth(qk_l2norm).items()}
    assert not {name: e for name, e in found.items() if not e <= TOLERANCE[dtype]}, found


@BACKEND
def test_a_named_backend_is_the_one_that_runs(backend, monkeypatch):
    """And no other: neither that of "auto" nor the loop's body."""
    calls = []
    for name, b in BACKENDS.items():

        def run(*inputs, name=name, run=b.run):
            calls.append(name)
            return run(*inputs)

        def step(*inputs, name=name, step=b.step):
            calls.append(name)
            return step(*inputs)

        monkeypatch.setitem(BACKENDS, name, dataclasses.replace(b, run=run, step=b.step and step))
    x = {name: a if name == "state" else a[:, 0] for name, a in hard(True).items()}
    delta_product_step(**x, backend=backend)
    assert calls == [backend]


@BACKEND
def test_in_place(backend):
    x = {name: a if name == "state" else a[:, 0] for name, a in hard(True).items()}
    want, after = delta_product_step(**x, backend=backend)
    state = x["state"].clone()
    o, found = delta_product_step(**x | {"state": state}, backend=backend, inplace=True)
    assert torch.equal(o, want) and found is state and torch.equal(state, after)


@BACKEND
def test_no_sequences(backend):
    x = {name: a[:0] if name == "state" else a[:0, 0] for name, a in hard(True).items()}
    o, state = delta_product_step(**x, backend=backend)
    assert o.shape == (0, 4, V) and state.shape == (0, 4, K, V)


@pytest.mark.parametrize("name", sorted(set(BACKENDS) - set(serving())))
def test_naming_one_that_cannot_serve_says_why(name):
    x = {name: a if name == "state" else a[:, 0] for name, a in hard(True).items()}
    with pytest.raises(UsageError, match=rf"^Backend '{name}' cannot serve: .+\.$"):
        delta_product_step(**x, backend=name)


def test_a_misspelt_name_is_answered_with_the_right_one():
    x = {name: a if name == "state" else a[:, 0] for name, a in hard(True).items()}
    with pytest.raises(UsageError, match=r"no backend 'referense' \(did you mean 'reference'\?\)"):
        delta_product_step(**x, backend="referense")


@BACKEND
def test_mapped_and_forward_mode(backend):
    """Under `torch.func` a named backend does what it does in `delta_product`: it serves, or says that it cannot."""
    x = {name: a if name == "state" else a[:, 0] for name, a in hard(True).items()}

    def read(q: torch.Tensor) -> torch.Tensor:
        return delta_product_step(**x | {"q": q}, backend=backend)[0]

    want = read(x["q"])
    mapped = torch.func.vmap(read)(torch.stack((x["q"], 2 * x["q"])))
    # o is linear in q: two roundings of numbers of the size of the largest
    assert relative(mapped, torch.stack((want, 2 * want))) <= 4 * K * 2.0**-53
    if backend in ("reference", "chunkwise"):
        _, tangent = torch.func.jvp(read, (x["q"],), (x["q"],))
        assert relative(tangent, want) <= 4 * K * 2.0**-53
    else:
        with pytest.raises(UsageError, match="has no derivative in forward mode"):
            torch.func.jvp(read, (x["q"],), (x["q"],))
