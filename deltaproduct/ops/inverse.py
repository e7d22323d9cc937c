"""The inverse of I + L that every chunked algorithm here needs."""

from typing import Any

import torch
from torch import Tensor

from deltaproduct.ops import transforms


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """(I + L)⁻¹ [n,C,C] by forward substitution, which stays accurate where squaring overflows (ops/README.md)."""
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
    return torch.linalg.solve_triangular(lower, eye, upper=False, unitriangular=True)


def differentiable_inverse(lower: Tensor) -> Tensor:
    """`unit_lower_inverse` of a strictly lower triangular L, for algorithms that leave the backward to autograd."""
    if transforms.active(lower):
        return unit_lower_inverse(lower)
    inverse: Tensor = _Inverse.apply(lower)
    return inverse


class _Inverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lower: Tensor) -> Tensor:  # type: ignore[override]
        inverse = unit_lower_inverse(lower)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        # Two products, where the gradient of a solve would be two more solves; differentiable.
        (inverse,) = ctx.saved_tensors
        return -inverse.mT @ grad @ inverse.mT
