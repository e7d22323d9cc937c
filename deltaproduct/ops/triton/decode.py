"""One token for every sequence: all N Householder steps in one launch, each state read and written once."""

import triton
import triton.language as tl

from deltaproduct.ops.triton.parts import inverse_norm, rounded
from deltaproduct.ops.triton.scan import program_place, state_tile
from deltaproduct.ops.triton.tuning import tuned


@triton.jit
def _step(k, v, beta, row, cols, at_key, at_value, K, V):
    """One step's key, values and rate, as they are given."""
    key = tl.load(k + at_key * K + row, mask=row < K, other=0.0)
    value = tl.load(v + at_value * V + cols, mask=cols < V, other=0.0)
    return key, value, tl.load(beta + at_value)


@triton.jit
def _unit(x, NORMALISE: tl.constexpr, EPS: tl.constexpr):
    x = x.to(tl.float32)
    return x * tl.sum(inverse_norm(x[None, :], NORMALISE, EPS), axis=0)


@tuned([(16, 1, 1), (32, 2, 1), (32, 4, 1)], key=["GATED", "NORMALISE"], restore=["new_state"])
@triton.jit
def decode_kernel(
    q, k, v, beta, g, state, new_state, o, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, N: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, EPS: tl.constexpr, NORMALISE: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Grid: sequences · value heads · blocks of V's columns. `new_state` may be `state` itself."""
    block, head, sequence = program_place(HV, (V + BV - 1) // BV)
    sequence = sequence.to(tl.int64)
    item = sequence * HV + head
    key_head = head // (HV // H)
    col = block * BV
    row, cols = tl.arange(0, BK), col + tl.arange(0, BV)
    at_key, at_value = sequence * N * H + key_head, sequence * N * HV + head
    at, mask = state_tile(state, sequence, head, HV, col, K, V, BK, BV)
    x = tl.load(at, mask=mask, other=0.0)
    query = tl.load(q + (sequence * H + key_head) * K + row, mask=row < K, other=0.0)
    key, value, rate = _step(k, v, beta, row, cols, at_key, at_value, K, V)
    x *= tl.exp(tl.load(g + item).to(tl.float32)) if GATED else 1.0
    for step in tl.static_range(N):
        # Asked for before this step waits for its sum: one latency for two steps, and not one for each.
        following = min(step + 1, N - 1)
        next_key, next_value, next_rate = _step(
            k, v, beta, row, cols, at_key + following * H, at_value + following * HV, K, V
        )
        key = _unit(key, NORMALISE, EPS)
        error = value.to(tl.float32) - tl.sum(x * key[:, None], axis=0)
        x += key[:, None] * (rate.to(tl.float32) * error)[None, :]
        key, value, rate = next_key, next_value, next_rate
    out = scale * tl.sum(x * _unit(query, NORMALISE, EPS)[:, None], axis=0)
    tl.store(o + item * V + cols, rounded(out, o.dtype.element_ty), mask=cols < V)
    at, mask = state_tile(new_state, sequence, head, HV, col, K, V, BK, BV)
    tl.store(at, x, mask=mask)
