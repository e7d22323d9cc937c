"""One token for every sequence: all N Householder steps in one launch, each state read and written once."""

import triton
import triton.language as tl

from deltaproduct.ops.triton.parts import inverse_norm, rounded
from deltaproduct.ops.triton.scan import state_tile
from deltaproduct.ops.triton.tuning import tuned


@tuned([(32, 4, 1), (64, 4, 1), (16, 2, 1)], key=["GATED", "NORMALISE"], restore=["new_state"])
@triton.jit
def decode_kernel(
    q, k, v, beta, g, state, new_state, o, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, N: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, EPS: tl.constexpr, NORMALISE: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of V's columns × sequences·value heads. `new_state` may be `state` itself."""
    block, item = tl.program_id(0), tl.program_id(1).to(tl.int64)
    sequence, head = item // HV, item % HV
    key_head = head // (HV // H)
    col = block * BV
    row, cols = tl.arange(0, BK), col + tl.arange(0, BV)
    at, mask = state_tile(state, sequence, head, HV, col, K, V, BK, BV)
    x = tl.load(at, mask=mask, other=0.0)
    if GATED:
        x *= tl.exp(tl.load(g + item).to(tl.float32))
    for step in tl.static_range(N):
        at = (sequence * N + step) * H + key_head
        key = tl.load(k + at * K + row, mask=row < K, other=0.0).to(tl.float32)
        key *= tl.sum(inverse_norm(key[None, :], NORMALISE, EPS), axis=0)
        at = (sequence * N + step) * HV + head
        value = tl.load(v + at * V + cols, mask=cols < V, other=0.0).to(tl.float32)
        error = value - tl.sum(x * key[:, None], axis=0)
        x += key[:, None] * (tl.load(beta + at).to(tl.float32) * error)[None, :]
    query = tl.load(q + (sequence * H + key_head) * K + row, mask=row < K, other=0.0).to(tl.float32)
    query *= tl.sum(inverse_norm(query[None, :], NORMALISE, EPS), axis=0)
    out = scale * tl.sum(x * query[:, None], axis=0)
    tl.store(o + item * V + cols, rounded(out, o.dtype.element_ty), mask=cols < V)
    at, mask = state_tile(new_state, sequence, head, HV, col, K, V, BK, BV)
    tl.store(at, x, mask=mask)
