"""The gate's gradient where N ≥ K steps follow each gate: a token's steps can wipe out what its gate let through.

Almost nothing depends on such a gate. In chunks its gradient is a sum over pairs of steps that cancel, each of size
√(KV)·|S|·|dS|: in float32 their roundings, 1e-6 to 1e-5, would be left, where the loop in float32 gives 1e-6 times the
gradient itself. That is what is asked of chunks here too.
"""

import numpy as np
import pytest
import torch
from operator_cases import Problem, draw, leaves, run, serving
from oracle import Answer, oracle

pytestmark = pytest.mark.numerical

CHUNKED = [name for name in serving() if name in ("cpu", "chunkwise")]
SHAPES = [
    Problem(T=5, N=40, K=1, V=5),
    Problem(T=5, N=60, K=1, V=5),
    Problem(T=5, N=20, K=1, V=5, H=1),
    Problem(T=5, N=40, K=4, V=5),
    Problem(T=8, N=20, K=2, V=8),
    Problem(T=40, N=4, K=1, V=5, initial=False),
    Problem(T=40, N=3, K=3, V=6),
    Problem(T=40, N=1, K=1, V=6),
    Problem(T=12, N=8, K=3, B=1, cu=(0, 0, 5, 6, 6, 12, 12)),
]
SEEDS = 3
# s, K and V are the lengths of the sums behind a result. √(s + K + V)·u is their rounding, u = 2⁻²⁴, and the worst of a
# thousand entries of 4 standard deviations, which a chunk's own sums add to, makes 10: as in test_native.py.
ROUNDINGS = 10


def worst(p: Problem, backend: str) -> dict[str, float]:
    """Over SEEDS, the largest error of each gradient as a multiple of its largest entry."""
    found: dict[str, float] = {}
    for seed in range(SEEDS):
        x = draw(p, seed)
        cu = None if p.cu is None else list(p.cu)
        want: Answer = oracle(**{n: a.numpy() for n, a in x.items()}, cu_seqlens=cu)
        got = run(backend, x, leaves(x, torch.float32), cu_seqlens=None if cu is None else torch.tensor(cu))
        for name, grad in got.grads.items():
            # What is added up is of size 1 at least. Of a gate that hardly anything depends on, a hundredth of that;
            # less would ask for digits that the forward pass has not: β = 0.999 leaves 1 − β with three fewer.
            size = max(np.abs(want.grads[name]).max(), 0.01 if name == "g" else 1)
            found[name] = max(found.get(name, 0), np.abs(grad - want.grads[name]).max() / size)
    return found


@pytest.mark.parametrize("backend", CHUNKED)
@pytest.mark.parametrize("p", SHAPES, ids=str)
def test_a_gate_that_its_own_steps_wipe_out(p, backend):
    bound = ROUNDINGS * np.sqrt(p.T * p.N + p.K + p.V) * 2**-24
    found = worst(p, backend)
    assert all(error <= bound for error in found.values()), (bound, found)


@pytest.mark.parametrize("backend", CHUNKED)
def test_gradients_keep_their_dtypes(backend):
    x = draw(SHAPES[0], 0)
    inputs = {n: a.detach().requires_grad_() for n, a in leaves(x, torch.float32).items()}
    inputs["initial_state"] = inputs["initial_state"].detach().bfloat16().requires_grad_()
    inputs["q"] = inputs["q"].detach().bfloat16().requires_grad_()
    run(backend, x, inputs)
    assert all(a.grad.dtype == a.dtype for a in inputs.values())
