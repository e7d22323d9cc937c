"""The regime of state tracking, where chunked algorithms break: few or almost parallel keys, β → 2, no decay, T = 4096.

Nothing forgets here, so every rounding stays. float32 inputs against float64 on the same inputs, relative to the
largest entry. s = T·N steps of u = 6e-8 each: √s·u ≈ 7e-6 if roundings were independent, s·u ≈ 7e-4 if they all
pulled one way; keys that repeat make them do so in part. The bound is 1e-3; a method that inverts by squaring, or
multiplies in bfloat16, is wrong by 1e-2 or overflows.
"""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hard_regime import KEYS, H, T, errors, keys, unit
from operator_cases import BACKEND, run
from oracle import Answer, oracle

from deltaproduct.ops import delta_product

pytestmark = pytest.mark.numerical

TOLERANCE = 1e-3
CASES = [(1, 32, 32), (2, 32, 16), (3, 32, 16), (1, 64, 64)]  # N, K, V; the oracle's time and memory grow with all
LONGER = [(2, 32, 16), (1, 64, 64)]  # between the others, and beyond them


def marks_of(case: tuple[int, int, int]) -> Any:
    return pytest.mark.slow("exhaustive") if case in LONGER else ()


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


@BACKEND
@pytest.mark.parametrize(
    "case", [pytest.param(case, id="N{}-K{}-V{}".format(*case), marks=marks_of(case)) for case in CASES]
)
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
