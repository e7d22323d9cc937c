"""The regime of state tracking, where chunked algorithms break: few or almost parallel keys, β → 2, no decay, T = 4096.

Nothing forgets here, so every rounding stays. float32 inputs against float64 on the same inputs, relative to the
largest entry. s = T·N steps of u = 6e-8 each: √s·u ≈ 7e-6 if roundings were independent, s·u ≈ 7e-4 if they all
pulled one way; keys that repeat make them do so in part. The bound is 1e-3; a method that inverts by squaring, or
multiplies in bfloat16, is wrong by 1e-2 or overflows.
"""

from functools import cache

import numpy as np
import pytest
import torch
from oracle import Answer, oracle
from test_operator import BACKEND, run

from deltaproduct.ops import delta_product

pytestmark = pytest.mark.numerical

T, H = 4096, 2
TOLERANCE = 1e-3
KEYS = ("2 directions", "12 directions", "cosine .99")  # one a batch row, so that one loop serves all three
CASES = [(1, 32, 32), (2, 32, 16), (3, 32, 16), (1, 64, 64)]  # N, K, V; the oracle's time and memory grow with all


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def keys(rng: np.random.Generator, kind: str, n: int, key_dim: int) -> np.ndarray:
    if kind == "cosine .99":
        # Around a common direction c, √.99·c + √.01·(unit noise): the cosine of two is .99 but for the noises' own.
        noise = unit(rng.standard_normal((T, n, H, key_dim)))
        return unit(np.sqrt(0.99) * unit(rng.standard_normal(key_dim)) + np.sqrt(0.01) * noise)
    directions = unit(rng.standard_normal((int(kind.split()[0]), key_dim)))
    return directions[rng.integers(len(directions), size=(T, n, H))]


@cache
def hard(n: int, key_dim: int, value_dim: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(n)
    kinds = KEYS if key_dim == 32 else KEYS[:1]
    x = {
        "q": unit(rng.standard_normal((len(kinds), T, H, key_dim))),
        "k": np.stack([keys(rng, kind, n, key_dim) for kind in kinds]),
        "v": rng.standard_normal((len(kinds), T, n, H, value_dim)),
        "beta": rng.uniform(1.9, 2, (len(kinds), T, n, H)),
        "initial_state": rng.standard_normal((len(kinds), H, key_dim, value_dim)),
        "d_o": rng.standard_normal((len(kinds), T, H, value_dim)),
        "d_final": rng.standard_normal((len(kinds), H, key_dim, value_dim)),
    }
    return {name: torch.tensor(a, dtype=dtype) for name, a in x.items()}


@cache
def truth(n: int, key_dim: int, value_dim: int) -> Answer:
    return oracle(**{name: a.double().numpy() for name, a in hard(n, key_dim, value_dim).items()})


def errors(got: Answer, want: Answer) -> dict[str, list[float]]:
    """For each result and gradient, the error of each row of KEYS, relative to that row's largest entry."""
    pairs = {"o": (got.o, want.o), "final": (got.final, want.final)}
    pairs |= {f"d_{name}": (a, want.grads[name]) for name, a in got.grads.items()}
    return {name: [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(*pair)] for name, pair in pairs.items()}


@BACKEND
@pytest.mark.parametrize("case", CASES, ids=[f"N{n}-K{k}-V{v}" for n, k, v in CASES])
def test_float32_against_float64(case, backend):
    x = hard(*case)
    inputs = {n: a.detach().clone().requires_grad_() for n, a in x.items() if not n.startswith("d_")}
    found = errors(run(backend, x, inputs), truth(*case))
    bad = {name: e for name, e in found.items() if not max(e) <= TOLERANCE}
    assert not bad, bad


@BACKEND
def test_bfloat16_inputs_lose_only_their_own_rounding(backend):
    # Arithmetic stays in float32, so that only rounding o to 8 bits is added. Arithmetic in bfloat16 loses 1 to 14%.
    x = hard(2, 32, 16, torch.bfloat16)
    inputs = {name: a for name, a in x.items() if not name.startswith("d_")}
    want = oracle(**{name: a.double().numpy() for name, a in inputs.items()})
    o, final = delta_product(**inputs, output_final_state=True, backend=backend)
    assert o.dtype == torch.bfloat16
    for row in range(len(KEYS)):
        error = np.abs(o[row].double().numpy() - want.o[row]).max() / np.abs(want.o[row]).max()
        assert error <= 2**-8 + TOLERANCE, KEYS[row]
        assert np.abs(final[row].double().numpy() - want.final[row]).max() / np.abs(want.final[row]).max() <= TOLERANCE
