"""Gates, rates and weights of bfloat16 are widened before they are exponentiated, squashed or multiplied by.

bfloat16 numbers are float32 numbers: given as either, they must give the same float32 results, to the last bit. An
exponential or a product in bfloat16 would be off by up to 2⁻⁹.
"""

from collections.abc import Callable

import pytest
import torch
from operator_cases import serving
from torch import Tensor

from deltaproduct.errors import UsageError
from deltaproduct.ops import cpu, delta_product, delta_product_states, delta_product_step
from deltaproduct.ops.engine_program import EngineProgram
from deltaproduct.ops.norm import rms_norm
from deltaproduct.ops.scan import diagonal_scan, gated_linear_attention
from deltaproduct.ops.selective_scan import selective_scan

pytestmark = pytest.mark.numerical


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


Q, K, V = numbers(2, 9, 2, 4), numbers(2, 9, 2, 2, 4, seed=1) / 4, numbers(2, 9, 2, 2, 3, seed=2)
BETA, G = 2 * numbers(2, 9, 2, 2, seed=3).sigmoid(), -numbers(2, 9, 2, seed=4).abs()
STATE = numbers(2, 2, 4, 3, seed=5)


def whole(backend: str) -> Callable[..., Tensor]:
    return lambda beta, g: delta_product(Q, K, V, beta, g, backend=backend)[0]


CALLS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    **{f"delta_product, {backend}": (whole(backend), (BETA, G)) for backend in serving()},
    "delta_product_step": (
        lambda beta, g: delta_product_step(Q[:, 0], K[:, 0], V[:, 0], beta, g, state=STATE)[0],
        (BETA[:, 0], G[:, 0]),
    ),
    "delta_product_states": (lambda beta, g: delta_product_states(K, V, beta, g, positions=[3, 18]), (BETA, G)),
    "gated_linear_attention, g": (lambda g: gated_linear_attention(Q, K[:, :, 0], V[:, :, 0], g)[0], (G,)),
    "gated_linear_attention, a": (lambda a: gated_linear_attention(Q, K[:, :, 0], V[:, :, 0], a=a)[0], (G.exp(),)),
    "diagonal_scan": (lambda a: diagonal_scan(a, V[:, :, 0, 0])[0], (numbers(2, 9, 3).tanh(),)),
    "selective_scan": (
        lambda A, B: selective_scan(V[:, :, 0, 0], V[:, :, 1, 0].abs(), A, B, B)[0],
        (-numbers(3, 5).abs(), numbers(2, 9, 5)),
    ),
    "rms_norm": (lambda weight: rms_norm(V, weight, 1e-5), (1 + numbers(3),)),
}


@pytest.mark.parametrize("name", CALLS)
def test_bfloat16_parameters_are_widened_first(name):
    call, parameters = CALLS[name]
    narrow = [x.bfloat16().requires_grad_() for x in parameters]
    wide = [x.detach().float().requires_grad_() for x in narrow]
    got, want = call(*narrow), call(*wide)
    assert got.dtype == want.dtype == torch.float32
    # selective_scan and rms_norm leave the engine for PyTorch, whose sums have another order: a few roundings.
    few = 8 * 2**-24 * float(want.detach().abs().max()) if name in ("selective_scan", "rms_norm") else 0
    assert (got - want).abs().max() <= few
    for a, b in zip(torch.autograd.grad(got.sum(), narrow), torch.autograd.grad(want.sum(), wide), strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b).abs().max() <= 2**-8 * b.abs().max()


@pytest.mark.skipif(cpu.ENGINE is None, reason="no program runs without the engine")
def test_a_tape_takes_no_bfloat16():
    """Its gate is −exp(A_log) · softplus(…) of float32 numbers alone."""
    program = EngineProgram(1)
    with pytest.raises(UsageError, match="float32"):
        program.gate(program.buffer(1, 2), torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2))
