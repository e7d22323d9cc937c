"""Mamba's selective scan: a diagonal state per channel, whose decay, input and output direction depend on the token.

B batch · T tokens · I channels · N state size · S packed sequences.

The states of all tokens are N times as large as x. On the engine (`native/selective_scan.h`) they do not leave the
cache: the forward keeps one in 16, and the backward computes those in between again. Elsewhere PyTorch makes a, what
is written and h as tensors [B,T,I,N].
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaproduct.errors import UsageError
from deltaproduct.ops import cpu, transforms
from deltaproduct.ops.autograd import register_gradients
from deltaproduct.ops.chunks import kept_states
from deltaproduct.ops.inputs import DTYPES, check_cu_seqlens, compute_dtype, num_sequences
from deltaproduct.ops.native.library import SCAN_CHANNELS, SCAN_TOKENS, Empty, SelectiveScan, TensorField
from deltaproduct.ops.scan import diagonal_scan
from deltaproduct.ops.transforms import Tensors

FEW = 1 << 15  # numbers in all states; for fewer, a second thread takes longer to wake than to work


class ScanArguments(NamedTuple):
    """The scan's tensors, in the order in which the operator takes them; shapes as in `selective_scan`."""

    x: Tensor
    dt: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    initial_state: Tensor | None
    cu_seqlens: Tensor | None


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    allow_neg_eigval: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = a_t ⊙ h_{t−1} + Δ_t x_t B_tᵀ, y_t = h_t C_t with a_t = exp(Δ_t A) (arXiv 2312.00752, algorithm 2).

    In the papers' table H_i = A(x_i) H_{i−1} + B(x_i): A = diag(a_t), B = Δ_t x_t B_tᵀ.

    Args:
        x: [B,T,I].
        dt: Δ, [B,T,I], not negative.
        A: rates, [I,N], not positive.
        B, C: input and output directions, [B,T,N].
        allow_neg_eigval: a_t = 2 exp(Δ_t A) − 1, in [−1,1] (arXiv 2411.12537, section 4).
        initial_state: [B,I,N], or [S,I,N] for S packed sequences; None means zeros.
        cu_seqlens: [S+1] ints from 0 to T: packed sequences (B = 1); empty ones are allowed.

    Returns:
        (y [B,T,I], final state [B or S,I,N]), in float32, or float64 if an input is.

    Raises:
        UsageError: shapes, dtypes or devices disagree.
    """
    _check(x, dt, A, B, C, initial_state, cu_seqlens)
    given = [x, dt, A, B, C] if initial_state is None else [x, dt, A, B, C, initial_state]
    if _is_native(given) and not transforms.active(*given):
        keep = torch.is_grad_enabled() and any(each.requires_grad for each in given)
        return scan_forward(x, dt, A, B, C, initial_state, cu_seqlens, allow_neg_eigval, keep)[:2]
    with torch.autocast(x.device.type, enabled=False):
        return _formula(x, dt, A, B, C, initial_state, cu_seqlens, allow_neg_eigval)


def _formula(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    allow_neg_eigval: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """In plain PyTorch operations."""
    given = [x, dt, A, B, C] if initial_state is None else [x, dt, A, B, C, initial_state]
    dtype = compute_dtype(*given)
    x, dt, A, B, C = (each.to(dtype) for each in (x, dt, A, B, C))
    a = (dt.unsqueeze(-1) * A).exp()
    if allow_neg_eigval:
        a = 2 * a - 1
    h, final = diagonal_scan(a, (dt * x).unsqueeze(-1) * B.unsqueeze(-2), initial_state, cu_seqlens)
    return (h @ C.unsqueeze(-1)).squeeze(-1), final


def _check(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    if x.dim() != 3 or A.dim() != 2:
        raise UsageError(f"x is {list(x.shape)} and A {list(A.shape)}; they should be [B,T,I] and [I,N].")
    batch, length, channels = x.shape
    size = A.shape[1]
    if min(channels, size) < 1:
        raise UsageError(f"I and N must be at least 1: x is {list(x.shape)} and A {list(A.shape)}.")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x)
    sequences = num_sequences(batch, cu_seqlens)
    wanted = {
        "x": (x, x.shape),
        "dt": (dt, x.shape),
        "A": (A, (channels, size)),
        "B": (B, (batch, length, size)),
        "C": (C, (batch, length, size)),
        "initial_state": (initial_state, (sequences, channels, size)),
    }
    for name, (given, shape) in wanted.items():
        if given is None:
            continue
        if given.shape != shape:
            raise UsageError(f"{name} is {list(given.shape)} and should be {list(shape)}.")
        if given.dtype not in DTYPES:
            raise UsageError(f"{name} is {given.dtype}; it should be float64, float32, bfloat16 or float16.")
        if given.device != x.device:
            raise UsageError(f"{name} is on {given.device} and x on {x.device}; put them on one device.")


def _is_native(given: list[Tensor]) -> bool:
    """Whether the engine takes it."""
    float32 = all(x.dtype == torch.float32 and x.device.type == "cpu" for x in given)
    return float32 and cpu.ENGINE is not None and given[0].numel() > 0


@torch.library.custom_op("deltaproduct::selective_scan_forward", mutates_args=())
def scan_forward(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    allow_neg_eigval: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y [B,T,I], final state [B or S,I,N], the states that a backward needs, none unless `keep`)."""
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x)  # a compiled graph has not, and C++ reads memory by these numbers
    y, final, states = _results(cpu.engine().empty, x, a, cu_seqlens, keep)
    call, _alive = _engine_call(x, dt, a, b, c, cu_seqlens, allow_neg_eigval)
    initial_state = None if initial_state is None else initial_state.contiguous()
    call.y = TensorField.of(y, per_step=False)
    call.initial_state, call.final_state = cpu.pointer(initial_state), cpu.pointer(final)
    call.states = cpu.pointer(states) if keep else None
    cpu.engine().selective_scan(call, reverse=False)
    return y, final, states


def _engine_call(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, cu_seqlens: Tensor | None, allow_neg_eigval: bool
) -> tuple[SelectiveScan, list[Tensor | None]]:
    """What both passes need, and the tensors that it points into."""
    (batch, length, channels), size = x.shape, a.shape[1]
    x, dt, b, c = (cpu.aligned(each) for each in (x, dt, b, c))
    a = a.t().contiguous()
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    call = SelectiveScan(
        batch=batch,
        length=length,
        channels=channels,
        state_size=size,
        sequences=num_sequences(batch, cu_seqlens),
        cu_seqlens=cpu.pointer(cu_seqlens),
        allow_neg_eigval=allow_neg_eigval,
        threads=1 if x.numel() * size < FEW else torch.get_num_threads(),
        x=TensorField.of(x, per_step=False),
        dt=TensorField.of(dt, per_step=False),
        b=TensorField.of(b, per_step=False),
        c=TensorField.of(c, per_step=False),
        a=cpu.pointer(a),
    )
    return call, [x, dt, a, b, c, cu_seqlens]


def _results(
    empty: Empty, x: Tensor, a: Tensor, cu_seqlens: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, length, channels), size = x.shape, a.shape[1]
    slots = kept_states(batch, length, SCAN_TOKENS, cu_seqlens) if keep else 0
    final = x.new_empty(num_sequences(batch, cu_seqlens), channels, size)
    return empty(x, *x.shape), final, empty(x, slots, size, channels)


@scan_forward.register_fake
def _(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    allow_neg_eigval: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _results(cpu.fake_empty, x, a, cu_seqlens, keep)


@torch.library.custom_op("deltaproduct::selective_scan_backward", mutates_args=())
def scan_backward(
    d_y: Tensor, d_final: Tensor | None, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, states: Tensor,
    cu_seqlens: Tensor | None, allow_neg_eigval: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, dt, a, b, c and the initial state."""
    call, _alive = _engine_call(x, dt, a, b, c, cu_seqlens, allow_neg_eigval)
    d_y, d_final = cpu.aligned(d_y), None if d_final is None else d_final.contiguous()
    blocks = -(-x.shape[2] // SCAN_CHANNELS)
    empty = cpu.engine().empty
    d_x, d_dt = empty(x, *x.shape), empty(x, *x.shape)
    d_b, d_c = empty(b, blocks, *b.shape), empty(c, blocks, *c.shape)
    d_a, d_initial = (a.new_empty(call.sequences, *a.shape) for _ in range(2))
    call.d_y = TensorField.of(d_y, per_step=False)
    call.d_x, call.d_dt = TensorField.of(d_x, per_step=False), TensorField.of(d_dt, per_step=False)
    call.d_a, call.d_b, call.d_c = cpu.pointer(d_a), cpu.pointer(d_b), cpu.pointer(d_c)
    call.states, call.d_final_state = cpu.pointer(states), cpu.pointer(d_final)
    call.d_initial_state = cpu.pointer(d_initial)
    cpu.engine().selective_scan(call, reverse=True)
    return d_x, d_dt, d_a.sum(0), d_b.sum(0), d_c.sum(0), d_initial


@scan_backward.register_fake
def _(
    d_y: Tensor, d_final: Tensor | None, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, states: Tensor,
    cu_seqlens: Tensor | None, allow_neg_eigval: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_x, d_dt, d_a, d_b, d_c = (each.new_empty(each.shape) for each in (x, dt, a, b, c))
    return d_x, d_dt, d_a, d_b, d_c, a.new_empty(num_sequences(x.shape[0], cu_seqlens), *a.shape)


def _first(inputs: Tensors, kept: Sequence[Tensor], cotangents: Tensors, options: Sequence[Any]) -> Tensors:
    given, (d_y, d_final, _) = ScanArguments._make(inputs), cotangents
    if d_y is None:
        d_y = torch.zeros_like(given.x)
    *grads, d_initial = scan_backward(d_y, d_final, *given[:5], kept[0], given.cu_seqlens, options[0])
    return *grads, None if given.initial_state is None else d_initial, None


def _again(inputs: Tensors, cotangents: Tensors, options: Sequence[Any]) -> Tensors:
    def formula(given: Tensors) -> tuple[Tensor, Tensor]:
        return _formula(*ScanArguments._make(given), options[0])

    return transforms.gradients(formula, inputs, cotangents[:2])


register_gradients(scan_forward, _first, _again)
