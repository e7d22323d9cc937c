"""RMSNorm with a gradient. A norm is nothing but passes over memory; the fewest of them are the best formulation.

Three norms took a fifth of a small model's training step in PyTorch's elementwise operations (docs/LOG.md).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltaproduct.ops import cpu, transforms
from deltaproduct.ops.engine_program import Kind
from deltaproduct.ops.inputs import compute_dtype
from deltaproduct.ops.native.library import Instruction

BLOCK = 256  # NORM_BLOCK of norm.h
FEW = 1 << 15  # numbers; for fewer, a second thread takes longer to wake than to work


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + eps) · weight over the last dimension, x [...,D], weight [D]; in float32 or better."""
    if transforms.active(x, weight):
        return _formula(x, weight, eps)
    return (_NativeRMSNorm if _is_native(x, weight) else _RMSNorm).apply(x, weight, eps)


def _is_native(x: Tensor, weight: Tensor) -> bool:
    """Whether the engine takes it. A compiler makes one pass of the formula itself."""
    plain = type(x) in (Tensor, nn.Parameter) and type(weight) in (Tensor, nn.Parameter)  # there is memory behind them
    float32 = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    return plain and float32 and cpu.ENGINE is not None and x.numel() > 0 and not torch.compiler.is_compiling()


def _formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In plain PyTorch operations, for what has no backward by hand (`ops/transforms.py`)."""
    wide = x.to(compute_dtype(x))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


Gradients = tuple[Tensor | None, Tensor | None, None]  # of x, the weight and eps


class _Normed(NamedTuple):
    x: Tensor
    weight: Tensor


def _again(x: Tensor, weight: Tensor, eps: float, d_y: Tensor) -> Gradients | None:
    """The gradients in plain operations, where they are transformed; None where they are not."""
    transforms.refuse_batched(d_y)
    if not transforms.beyond_first(x, weight, d_y):
        return None

    def formula(given: transforms.Tensors) -> tuple[Tensor, ...]:
        return (_formula(*_Normed._make(given), eps),)

    d_x, d_weight = transforms.gradients(formula, (x, weight), (d_y,))
    return d_x, d_weight, None


class _NativeRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        x, weight = x.contiguous(), weight.contiguous()
        y = torch.empty_like(x)
        _run(Kind.NORM, x, weight, eps, y=y)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> Gradients:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        if found := _again(x, weight, ctx.eps, d_y):
            return found
        x, weight = x.contiguous(), weight.contiguous()
        d_x = torch.empty_like(x)
        blocks = -(-x.numel() // (x.shape[-1] * BLOCK))
        d_weight = x.new_empty(blocks, x.shape[-1])
        _run(Kind.NORM_BACKWARD, x, weight, ctx.eps, u=d_y.contiguous(), y=d_x, z=d_weight)
        return d_x, d_weight.sum(0), None


def _run(kind: Kind, x: Tensor, weight: Tensor, eps: float, **others: Tensor) -> None:
    columns = x.shape[-1]
    pointers = {name: tensor.data_ptr() for name, tensor in ({"x": x, "w": weight} | others).items()}
    program = (Instruction * 1)(Instruction(kind=kind, rows=x.numel() // columns, columns=columns, a=eps, **pointers))
    cpu.engine().run_program(program, 1 if x.numel() < FEW else torch.get_num_threads())


class _RMSNorm(torch.autograd.Function):
    """x̂ · weight with x̂ = x / √(mean x² + eps). Autograd's own gradient of the formula, and of PyTorch's `rms_norm`,
    passes over memory twice as often."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        wide = x.to(compute_dtype(x))
        factor = torch.rsqrt(torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1] + eps)
        ctx.save_for_backward(x, factor, weight)
        ctx.eps = eps
        return (wide * factor * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> Gradients:  # type: ignore[override]
        x, factor, weight = ctx.saved_tensors
        if found := _again(x, weight, ctx.eps, d_y):
            return found
        wide, d_y = x.to(factor.dtype), d_y.to(factor.dtype)
        product = (d_y * wide).mul_(factor)
        d_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
        along = (product @ weight.to(product.dtype)).unsqueeze(-1) * factor / wide.shape[-1]
        d_x = torch.addcmul(d_y * weight, wide, along, value=-1) * factor
        return d_x.to(x.dtype), d_weight, None
