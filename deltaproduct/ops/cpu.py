"""The recurrence on the native CPU engine: any PyTorch, no compiler at run time.

The algorithm is the one of `chunkwise.py` (ops/README.md), in C++ (`native/`): one value head at a time with its state
in cache, threads over sequences × value heads. Where there are fewer of those than threads, a head's V columns, which
are independent, and then its time are divided as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from deltaproduct.errors import UsageError
from deltaproduct.ops import transforms
from deltaproduct.ops.autograd import Gradients, as_given, cotangent_of_output, empty_gradients, register_gradients
from deltaproduct.ops.chunks import kept_states
from deltaproduct.ops.differentiable import differentiable
from deltaproduct.ops.inputs import (
    NORM_EPS,
    Arguments,
    backward_dtype,
    check_cu_seqlens,
    compute_dtype,
    num_sequences,
)
from deltaproduct.ops.native.library import (
    ENGINE,
    MAX_CHUNKS_PER_STATE,
    WHY_NO_ENGINE,
    Empty,
    Engine,
    EngineCall,
    TensorField,
)
from deltaproduct.ops.transforms import Tensors

WORKSPACE_BYTES = 600 << 10  # of one thread in the backward: well within the second-level cache of today's cores
# Householder steps in a chunk, measured against others (docs/LOG.md). Small states are cheap to move on, and the
# chunk's own matrices outweigh them.
CHUNK_STEPS, SMALL_KEY_CHUNK_STEPS, SMALL_KEY_DIM = 32, 16, 48
MIN_VALUE_BLOCK = 16  # columns; below, the work that every block repeats outweighs the rest
MIN_SPANS_PER_SEGMENT = 4


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """None if the engine can serve, else the reason why not."""
    if device.type != "cpu":
        return f"it computes on the CPU, not on {device.type}"
    return None if ENGINE is not None else WHY_NO_ENGINE


def engine() -> Engine:
    """The engine, for what runs only where there is one; `UsageError` otherwise."""
    if ENGINE is None:
        raise UsageError(f"There is no native CPU engine here: {WHY_NO_ENGINE}.")
    return ENGINE


@dataclass(frozen=True)
class Chunking:
    """How a sequence is cut into chunks, and how often a state is kept: what shapes alone decide."""

    chunk_tokens: int
    chunks_per_state: int

    @classmethod
    def of(cls, steps: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> "Chunking":
        tokens = max(1, (SMALL_KEY_CHUNK_STEPS if key_dim <= SMALL_KEY_DIM else CHUNK_STEPS) // steps)
        chunk = tokens * steps
        floats = key_dim * value_dim + chunk * (3 * key_dim + value_dim + 2 * chunk)
        each = WORKSPACE_BYTES // (floats * dtype.itemsize)
        return cls(tokens, min(max(1, each), MAX_CHUNKS_PER_STATE))

    def slots(self, batch: int, length: int, cu_seqlens: Tensor | None) -> int:
        """How many states are kept."""
        return kept_states(batch, length, self.chunk_tokens * self.chunks_per_state, cu_seqlens)


def _division(chunking: Chunking, k: Tensor, v: Tensor, sequences: int, threads: int) -> tuple[int, int]:
    """(blocks of V columns, segments of time) so that every thread has work; each costs some repeated work."""
    heads = sequences * v.shape[3]
    if heads >= threads:
        return 1, 1
    blocks = min(-(-threads // heads), max(1, v.shape[4] // MIN_VALUE_BLOCK))
    # A segment's summary costs about as much again as the segment, so that two of them gain nothing.
    segments = threads // (heads * blocks)
    spans = k.shape[1] // (sequences * chunking.chunk_tokens * chunking.chunks_per_state)
    segments = min(segments, spans // MIN_SPANS_PER_SEGMENT)
    return blocks, segments if segments >= 4 else 1


def aligned(x: Tensor) -> Tensor:
    """x with its last dimension contiguous, as the kernels read it; strides between rows are free."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _engine_call(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, scale: float,
    qk_l2norm: bool, dtype: torch.dtype, chunking: Chunking,
) -> EngineCall:  # fmt: skip
    batch, length, steps, value_heads, value_dim = v.shape
    sequences = num_sequences(batch, cu_seqlens)
    threads = torch.get_num_threads()
    blocks, segments = _division(chunking, k, v, sequences, threads)
    return EngineCall(
        batch=batch,
        length=length,
        steps=steps,
        heads=k.shape[3],
        value_heads=value_heads,
        key_dim=k.shape[4],
        value_dim=value_dim,
        sequences=sequences,
        cu_seqlens=pointer(cu_seqlens),
        scale=scale,
        norm_eps=NORM_EPS if qk_l2norm else 0.0,
        wide=dtype == torch.float64,
        chunk_tokens=chunking.chunk_tokens,
        chunks_per_state=chunking.chunks_per_state,
        value_blocks=blocks,
        segments=segments,
        threads=threads,
        q=TensorField.of(q, per_step=False),
        k=TensorField.of(k, per_step=True),
        v=TensorField.of(v, per_step=True),
        beta=TensorField.of(beta, per_step=True),
        g=TensorField() if g is None else TensorField.of(g, per_step=False),
    )


def token_call(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, o: Tensor) -> EngineCall:
    """One float32 token with `qk_l2norm`, its state moved on in place; shapes as in `delta_product_step`."""
    scale, chunking = k.shape[-1] ** -0.5, Chunking(chunk_tokens=1, chunks_per_state=1)
    g = None if g is None else g.unsqueeze(1)
    q, k, v, beta, o = (x.unsqueeze(1) for x in (q, k, v, beta, o))
    call = _engine_call(q, k, v, beta, g, None, scale, True, torch.float32, chunking)
    call.value_blocks = call.segments = 1
    call.o = TensorField.of(o, per_step=False)
    call.initial_state = call.final_state = pointer(state)
    return call


@torch.library.custom_op("deltaproduct::cpu_forward", mutates_args=())
def cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, keep: bool, qk_l2norm: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(o [B,T,HV,V], final state [B or S,HV,K,V], the states that a backward needs, none unless `keep`)."""
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, k)  # a compiled graph has not, and C++ reads memory by these numbers
    dtype, chunking, o, final, states = _results(engine().empty, q, k, v, beta, cu_seqlens, keep)
    if cu_seqlens is None and not keep:  # nothing of the backward's, so that a few tokens can be a small chunk
        chunking = replace(chunking, chunk_tokens=min(chunking.chunk_tokens, v.shape[1]))
    q, k, v = aligned(q), aligned(k), aligned(v)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    initial = None if initial_state is None else initial_state.to(dtype).contiguous()
    call = _engine_call(q, k, v, beta, g, cu_seqlens, scale, qk_l2norm, dtype, chunking)
    call.o = TensorField.of(o, per_step=False)
    call.initial_state, call.final_state = pointer(initial), pointer(final)
    call.states = pointer(states) if keep else None
    engine().forward(call)
    return o, final, states


def _results(
    empty: Empty, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, cu_seqlens: Tensor | None, keep: bool
) -> tuple[torch.dtype, Chunking, Tensor, Tensor, Tensor]:
    batch, length, steps, heads, value_dim = v.shape
    key_dim, dtype = k.shape[-1], compute_dtype(q, k, v, beta)
    chunking = Chunking.of(steps, key_dim, value_dim, dtype)
    sequences = num_sequences(batch, cu_seqlens)
    slots = chunking.slots(batch, length, cu_seqlens) if keep else 0
    o = empty(v, batch, length, heads, value_dim)
    final = v.new_empty(sequences, heads, key_dim, value_dim, dtype=dtype)
    return dtype, chunking, o, final, empty(v, slots, heads, key_dim, value_dim, dtype=dtype)


def fake_empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty(shape, dtype=dtype)


@cpu_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, keep: bool, qk_l2norm: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _results(fake_empty, q, k, v, beta, cu_seqlens, keep)[2:]


@torch.library.custom_op("deltaproduct::cpu_backward", mutates_args=())
def cpu_backward(
    d_o: Tensor, d_final: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None,
    states: Tensor, cu_seqlens: Tensor | None, scale: float, qk_l2norm: bool = False,
) -> Gradients:  # fmt: skip
    """The gradients of q, k, v, beta, g (empty where g is None) and the initial state."""
    dtype, heads, key_heads = backward_dtype(k, g, states.dtype), v.shape[3], k.shape[3]
    chunking = Chunking.of(v.shape[2], k.shape[4], v.shape[4], states.dtype)  # the forward's
    d_o, q_in, k_in, v_in = aligned(d_o), aligned(q), aligned(k), aligned(v)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    call = _engine_call(q_in, k_in, v_in, beta, g, cu_seqlens, scale, qk_l2norm, dtype, chunking)
    sequences, blocks, empty = call.sequences, call.value_blocks, engine().empty

    def parts(x: Tensor, at: int, each: int) -> Tensor:
        """Room for the gradient of x, whose heads are dimension `at`: `each` times the heads where items share one."""
        if each == 1:
            return empty(x, *x.shape)
        return empty(x, *x.shape[:at], x.shape[at] * each, *x.shape[at + 1 :], dtype=dtype)

    shared = heads // key_heads * blocks
    d_q, d_k, d_beta = parts(q, 2, shared), parts(k, 3, shared), parts(beta, 3, blocks)
    d_g = None if g is None else parts(g, 2, blocks)
    d_v = empty(v, *v.shape)
    d_initial = torch.empty(sequences, heads, *states.shape[2:], dtype=dtype)
    d_final = None if d_final is None else d_final.to(dtype).contiguous()
    call.d_o, call.d_q = TensorField.of(d_o, per_step=False), TensorField.of(d_q, per_step=False)
    call.d_k, call.d_v = TensorField.of(d_k, per_step=True), TensorField.of(d_v, per_step=True)
    call.d_beta = TensorField.of(d_beta, per_step=True)
    if d_g is not None:
        call.d_g = TensorField.of(d_g, per_step=False)
    kept = states.to(dtype)
    call.states, call.d_final_state = pointer(kept), pointer(d_final)
    call.d_initial_state = pointer(d_initial)
    engine().backward(call)
    return (
        _summed(d_q, q, 2),
        _summed(d_k, k, 3),
        d_v,
        _summed(d_beta, beta, 3),
        v.new_empty(0) if g is None or d_g is None else _summed(d_g, g, 2),  # an operator's result cannot be None
        d_initial.to(states.dtype),
    )


def _summed(parts: Tensor, x: Tensor, at: int) -> Tensor:
    """Add up what the items that share a head found."""
    if parts.shape == x.shape:
        return parts
    return parts.unflatten(at, (x.shape[at], -1)).sum(at + 1).to(x.dtype)


@cpu_backward.register_fake
def _(
    d_o: Tensor, d_final: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None,
    states: Tensor, cu_seqlens: Tensor | None, scale: float, qk_l2norm: bool = False,
) -> Gradients:  # fmt: skip
    return empty_gradients(q, k, v, beta, g, states, cu_seqlens)


def _first(inputs: Tensors, kept: Sequence[Tensor], cotangents: Tensors, options: Sequence[Any]) -> Tensors:
    x, (scale, _, qk_l2norm) = Arguments._make(inputs), options
    d_o = cotangent_of_output(x, cotangents[0])
    return as_given(x, cpu_backward(d_o, cotangents[1], *x[:5], kept[0], x.cu_seqlens, scale, qk_l2norm))


def _again(inputs: Tensors, cotangents: Tensors, options: Sequence[Any]) -> Tensors:
    scale, _, qk_l2norm = options
    rule = transforms.Rule(
        partial(cpu, scale=scale, qk_l2norm=qk_l2norm), partial(differentiable, scale=scale, qk_l2norm=qk_l2norm)
    )
    return rule.once(cotangents[0], cotangents[1], inputs)


register_gradients(cpu_forward, _first, _again)


def cpu(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, qk_l2norm: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator on the engine; shapes as in `delta_product`. Returns (o [B,T,HV,V], final state [B or S,HV,K,V])."""
    given = (x for x in (q, k, v, beta, g, initial_state) if x is not None)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    o, final, _ = cpu_forward(q, k, v, beta, g, initial_state, cu_seqlens, scale, keep, qk_l2norm)
    return o, final


def cpu_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, scale: float, qk_l2norm: bool
) -> tuple[Tensor, Tensor]:
    """One token on the engine; shapes as in `delta_product_step`. Returns (o [B,HV,V], state)."""
    g = None if g is None else g.unsqueeze(1)
    q, k, v, beta = (x.unsqueeze(1) for x in (q, k, v, beta))
    o, state = cpu(q, k, v, beta, g, state, None, scale, qk_l2norm)
    return o.squeeze(1), state
