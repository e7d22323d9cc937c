"""The recurrence as a plain loop: the executable specification, and the formula's only home.

B batch · T tokens · N Householder steps per token · H query/key heads · HV value heads · K key and V value dimension.
Every other backend must give what this file gives, forward and backward. It is slow on purpose: one step at a time,
differentiated by autograd, in float64 when the inputs are float64 and otherwise in float32.
"""

import torch
from torch import Tensor

from deltaproduct.ops.inputs import compute_dtype, expand_heads, normalised, sequence_bounds


def decay(state: Tensor, g: Tensor | None) -> Tensor:
    """The forget gate, once per token before its first step: S ← exp(g)·S. state [..., K, V], g [...]."""
    return state if g is None else g.exp()[..., None, None] * state


def householder_step(state: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """One generalised Householder step: S ← S + β k (v − Sᵀk)ᵀ = (I − β k kᵀ) S + β k vᵀ.

    state [..., K, V], k [..., K], v [..., V], beta [...].
    """
    error = v - (k.unsqueeze(-2) @ state).squeeze(-2)
    return state + k.unsqueeze(-1) * (beta.unsqueeze(-1) * error).unsqueeze(-2)


def read(state: Tensor, q: Tensor, scale: float) -> Tensor:
    """The output of a token, read after its last step: o = scale · Sᵀq. state [..., K, V], q [..., K]."""
    return scale * (q.unsqueeze(-2) @ state).squeeze(-2)


def token_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """All N steps of one token. q [B,HV,K], k [B,N,HV,K], v [B,N,HV,V], beta [B,N,HV], g [B,HV] → (o, state)."""
    state = decay(state, g)
    for k_j, v_j, beta_j in zip(k.unbind(1), v.unbind(1), beta.unbind(1), strict=True):
        state = householder_step(state, k_j, v_j, beta_j)
    return read(state, q, scale), state


def reference(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, qk_l2norm: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator by the loop; shapes as in `delta_product`. Returns (o [B,T,HV,V], final state [B or S,HV,K,V])."""
    q, k = normalised(q, k, qk_l2norm)
    if cu_seqlens is not None:
        outputs, finals = [], []
        for s, (lo, hi) in enumerate(sequence_bounds(cu_seqlens)):
            span = (slice(None), slice(lo, hi))
            gate = None if g is None else g[span]
            start = None if initial_state is None else initial_state[s : s + 1]
            o, final = reference(q[span], k[span], v[span], beta[span], gate, start, None, scale, False)
            outputs.append(o)
            finals.append(final)
        return torch.cat(outputs, dim=1), torch.cat(finals)

    dtype, out_dtype, value_heads = compute_dtype(q, k, v, beta), v.dtype, v.shape[3]
    q, k = (expand_heads(x.to(dtype), value_heads) for x in (q, k))
    v, beta = v.to(dtype), beta.to(dtype)
    if initial_state is None:
        state = q.new_zeros(q.shape[0], value_heads, k.shape[-1], v.shape[-1])
    else:
        state = initial_state.to(dtype)
    # unbind, not x[:, t]: the backward of indexing writes a whole zero tensor per token, which is quadratic in T.
    gates = [None] * q.shape[1] if g is None else g.to(dtype).unbind(1)
    outputs = []
    for q_t, k_t, v_t, beta_t, g_t in zip(q.unbind(1), k.unbind(1), v.unbind(1), beta.unbind(1), gates, strict=True):
        o_t, state = token_step(state, q_t, k_t, v_t, beta_t, g_t, scale)
        outputs.append(o_t)
    o = torch.stack(outputs, dim=1) if outputs else v.sum(2)  # of no tokens: empty, but part of the graph
    return o.to(out_dtype), state


def reference_states(
    k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None, positions: list[int]
) -> Tensor:
    """The state after each of `positions` Householder steps (0 … T·N) → [B,P,HV,K,V]; shapes as `delta_product_states`.

    Position t·N + j is S_{t,j}: after the j-th step of token t. Position t·N is before token t's gate.
    """
    dtype, value_heads, steps = compute_dtype(k, v, beta), v.shape[3], k.shape[2]
    k, v, beta = expand_heads(k.to(dtype), value_heads), v.to(dtype), beta.to(dtype)
    if initial_state is None:
        state = k.new_zeros(k.shape[0], value_heads, k.shape[-1], v.shape[-1])
    else:
        state = initial_state.to(dtype)
    wanted, last, kept = set(positions), max(positions, default=0), {0: state}
    gates = None if g is None else g.to(dtype).unbind(1)
    flat = zip(k.flatten(1, 2).unbind(1), v.flatten(1, 2).unbind(1), beta.flatten(1, 2).unbind(1), strict=True)
    for s, (k_s, v_s, beta_s) in enumerate(flat):
        if s == last:
            break
        if gates is not None and s % steps == 0:
            state = decay(state, gates[s // steps])
        state = householder_step(state, k_s, v_s, beta_s)
        if s + 1 in wanted:
            kept[s + 1] = state
    if not positions:
        return state.new_zeros(state.shape[0], 0, *state.shape[1:])
    return torch.stack([kept[p] for p in positions], dim=1)
