"""The recurrence and its gradients once more: float64 loops in numpy, from the equations alone (`ops/README.md`).

Nothing here is imported from the package, and the gradients are a hand-written reverse loop, not autograd: a mistake in
the package's formula, in its chunks or in its use of autograd cannot also be a mistake of this file.

    S ← exp(g_t)·S                                         dS ← exp(g_t)·dS             dg_t = ⟨S after, dS after⟩
    e = v − Sᵀk;  S ← S + β k eᵀ      (N times)            de = β dSᵀk;  dβ = kᵀ dS e;  dk = β dS e − S de;  dv = de
                                                           dS ← dS − k deᵀ
    o_t = scale · Sᵀ q_t                                   dS ← dS + scale · q doᵀ;     dq = scale · S do
"""

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

Array = np.ndarray


@dataclass
class Answer:
    """What the operator must give; gradients are of ⟨o, d_o⟩ + ⟨final, d_final⟩ + Σ ⟨state at p, d_states[p]⟩."""

    o: Array  # [B,T,HV,V]
    final: Array  # [B or S,HV,K,V]
    states: dict[int, Array] = field(default_factory=dict)  # position → [B,HV,K,V], at those asked for
    grads: dict[str, Array] = field(default_factory=dict)  # q, k, v, beta, g, initial_state


def _outer(a: Array, b: Array) -> Array:
    return a[..., :, None] * b[..., None, :]


def _steps(state: Array, k: Array, v: Array, beta: Array) -> list[Array]:
    """The states before each of a token's steps and after the last. k [B,N,HV,K], v [B,N,HV,V], beta [B,N,HV]."""
    states = [state]
    for j in range(k.shape[1]):
        error = v[:, j] - (k[:, j, :, None, :] @ state)[..., 0, :]
        state = state + _outer(k[:, j], beta[:, j, :, None] * error)
        states.append(state)
    return states


def oracle(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    g: Array | None = None,
    *,
    scale: float | None = None,
    initial_state: Array | None = None,
    cu_seqlens: list[int] | None = None,
    d_o: Array | None = None,
    d_final: Array | None = None,
    positions: list[int] | None = None,
    d_states: dict[int, Array] | None = None,
) -> Answer:
    """The operator of `deltaproduct.ops.delta_product`, on numpy arrays of its shapes; gradients if d_o is given."""
    q, k, v, beta = (np.asarray(x, np.float64) for x in (q, k, v, beta))
    if cu_seqlens is not None:
        pieces = []
        for s, (lo, hi) in enumerate(pairwise(cu_seqlens)):
            time = [x if x is None else x[:, lo:hi] for x in (q, k, v, beta, g)]
            one = {"initial_state": initial_state, "d_final": d_final}
            one = {name: x if x is None else x[s : s + 1] for name, x in one.items()}
            pieces.append(oracle(*time, scale=scale, d_o=None if d_o is None else d_o[:, lo:hi], **one))
        grads = {
            name: np.concatenate([p.grads[name] for p in pieces], axis=0 if name == "initial_state" else 1)
            for name in pieces[0].grads
        }
        o, final = np.concatenate([p.o for p in pieces], axis=1), np.concatenate([p.final for p in pieces])
        return Answer(o, final, grads=grads)

    (batch, length, n, heads, key_dim), (value_heads, value_dim) = k.shape, v.shape[3:]
    scale = 1 / np.sqrt(key_dim) if scale is None else scale
    q, k = (np.repeat(x, value_heads // heads, axis=-2) for x in (q, k))
    decay = np.ones((batch, length, value_heads)) if g is None else np.exp(np.asarray(g, np.float64))
    state = np.zeros((batch, value_heads, key_dim, value_dim)) if initial_state is None else initial_state
    state = np.asarray(state, np.float64)

    positions, kept = positions or [], {}
    o, begin = np.empty((batch, length, value_heads, value_dim)), []
    for t in range(length):
        if t * n in positions:
            kept[t * n] = state
        begin.append(state)
        inner = _steps(decay[:, t, :, None, None] * state, k[:, t], v[:, t], beta[:, t])
        kept |= {t * n + j: inner[j] for j in range(1, n + 1) if t * n + j in positions}
        state = inner[-1]
        o[:, t] = scale * (q[:, t, :, None, :] @ state)[..., 0, :]
    if length * n in positions:
        kept[length * n] = state
    answer = Answer(o, state, kept)
    if d_o is None and d_states is None:
        return answer

    d_o = np.zeros_like(o) if d_o is None else d_o
    d_states = d_states or {}
    d = np.zeros_like(state) if d_final is None else d_final.copy()
    dq, dk, dv, dbeta, dg = (np.zeros_like(x) for x in (q, k, v, beta, decay))
    for t in reversed(range(length)):
        inner = _steps(decay[:, t, :, None, None] * begin[t], k[:, t], v[:, t], beta[:, t])
        dq[:, t] = scale * (inner[-1] @ d_o[:, t, :, :, None])[..., 0]
        d = d + scale * _outer(q[:, t], d_o[:, t])
        for j in reversed(range(n)):
            if t * n + j + 1 in d_states:
                d = d + d_states[t * n + j + 1]
            k_j, beta_j, before = k[:, t, j], beta[:, t, j, :, None], inner[j]
            error = v[:, t, j] - (k_j[..., None, :] @ before)[..., 0, :]
            d_error = beta_j * (k_j[..., None, :] @ d)[..., 0, :]
            along = (d @ error[..., None])[..., 0]
            dbeta[:, t, j] = (k_j * along).sum(-1)
            dk[:, t, j] = beta_j * along - (before @ d_error[..., None])[..., 0]
            dv[:, t, j] = d_error
            d = d - _outer(k_j, d_error)
        dg[:, t] = (d * inner[0]).sum((-1, -2))
        d = decay[:, t, :, None, None] * d
    if 0 in d_states:
        d = d + d_states[0]
    dq, dk = (x.reshape(*x.shape[:-2], heads, value_heads // heads, key_dim).sum(-2) for x in (dq, dk))
    answer.grads = {"q": dq, "k": dk, "v": dv, "beta": dbeta, "initial_state": d}
    if g is not None:
        answer.grads["g"] = dg
    return answer


def l2_normalised(x: Array) -> Array:
    """x / √(Σx² + 1e-6) over the last dimension."""
    return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)


def l2_normalised_gradient(x: Array, d: Array) -> Array:
    """The gradient in x of ⟨l2_normalised(x), d⟩."""
    norm = np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)
    return d / norm - x * (x * d).sum(-1, keepdims=True) / norm**3


def relative_error(got: Array, want: Array, floor: float = 1e-300) -> float:
    """max|got − want| / max(max|want|, floor); NaN shows as NaN, which no tolerance passes."""
    assert got.shape == want.shape, (got.shape, want.shape)
    if want.size == 0:
        return 0.0
    return float(np.abs(got - want).max() / max(np.abs(want).max(), floor))
