"""The recurrence in chunks once more, of plain PyTorch operations: for whatever a hand-written backward does not do.

PyTorch differentiates it in both modes, any number of times, and maps it over batches (`torch.func`). What it keeps for
that, and its time, are several times those of `chunkwise.py`, whose equations and names these are (ops/README.md).
"""

import torch
from torch import Tensor

from deltaproduct.ops.chunks import chunk_tokens
from deltaproduct.ops.inputs import (
    MIN_LOG_DECAY,
    backward_dtype,
    compute_dtype,
    expand_heads,
    normalised,
    pad_time,
    sequence_bounds,
)
from deltaproduct.ops.inverse import unit_lower_inverse


def differentiable(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, qk_l2norm: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator; shapes as in `delta_product`. Returns (o [B,T,HV,V], final state [B or S,HV,K,V])."""
    q, k = normalised(q, k, qk_l2norm)
    if cu_seqlens is None:
        return differentiable_starts(q, k, v, beta, g, initial_state, scale)[:2]
    outputs, finals = [], []
    for s, (lo, hi) in enumerate(sequence_bounds(cu_seqlens)):
        q_, k_, v_, beta_ = (x[:, lo:hi] for x in (q, k, v, beta))
        start = None if initial_state is None else initial_state[s : s + 1]
        o, final, _ = differentiable_starts(q_, k_, v_, beta_, None if g is None else g[:, lo:hi], start, scale)
        outputs.append(o)
        finals.append(final)
    return torch.cat(outputs, dim=1), torch.cat(finals)


def differentiable_starts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, dense, and the state at each chunk's start [chunks,B,HV,K,V]."""
    (batch, length, steps, heads, value_dim), key_dim = v.shape, k.shape[-1]
    result, out_dtype = compute_dtype(q, k, v, beta), v.dtype
    dtype = backward_dtype(k, g, result)
    c = chunk_tokens(steps)
    chunks = -(-length // c)

    def cut(x: Tensor) -> Tensor:  # [B,T,(N,)HV,·] → [chunks,B,HV,c or C,·]
        x = pad_time(x, chunks * c).unflatten(1, (chunks, c)).movedim(1, 0).movedim(-2, 2)
        return x if x.dim() == 5 else x.flatten(3, 4)

    if initial_state is None:
        state = v.new_zeros(batch, heads, key_dim, value_dim, dtype=dtype)
    else:
        state = initial_state.to(dtype)
    if chunks == 0:
        return v.sum(2), state.to(result), state.to(result).unsqueeze(0)[:0]
    q, k = (cut(expand_heads(x.to(dtype), heads)) for x in (q, k))
    v = cut(v.to(dtype))
    w = k * cut(beta.to(dtype).unsqueeze(-1))
    token_of_step = torch.arange(c * steps, device=v.device) // steps
    causal = (token_of_step <= torch.arange(c, device=v.device)[:, None]).to(dtype)
    lower, attend = (k @ w.mT).tril(-1), (q @ w.mT) * causal
    reads, seen, writes, whole = q, k, w, None
    if g is not None:
        total = cut(g.double().clamp(min=MIN_LOG_DECAY).unsqueeze(-1)).cumsum(-2)
        ends = total[..., -1:, :]
        pair = (total - total.mT).tril().exp().tril().to(dtype)
        start, end = total.exp().to(dtype), (ends - total).exp().to(dtype)
        whole = ends.exp().to(dtype)
        pair = pair[..., token_of_step]
        lower, attend = lower * pair[..., token_of_step, :], attend * pair
        reads, seen, writes = q * start, k * start[..., token_of_step, :], w * end[..., token_of_step, :]
    inverse = unit_lower_inverse(lower)
    starts, errors = [], []
    for i in range(chunks):
        starts.append(state)
        errors.append(inverse[i] @ (v[i] - seen[i] @ state))
        state = (state if whole is None else state * whole[i]) + writes[i].mT @ errors[i]
    begin = torch.stack(starts)
    o = (reads @ begin + attend @ torch.stack(errors)) * scale  # [chunks,B,HV,c,V]
    o = o.movedim(2, 3).movedim(0, 1).flatten(1, 2)[:, :length]
    return o.to(out_dtype), state.to(result), begin.to(result)
