"""The sums of log gates within a chunk: for all chunks at once, before anything that decays."""

import triton
import triton.language as tl

from deltaproduct.ops.triton.parts import chunk_place
from deltaproduct.ops.triton.tuning import LENGTHS, tuned

MIN_LOG_DECAY = tl.constexpr(-1000.0)  # as in inputs.py: exp of it is 0, and without a floor −inf − (−inf) is NaN


@tuned([(None, 1, 1)])
@triton.jit(do_not_specialize=LENGTHS)
def gates_kernel(
    g, decays, table, T, chunks, HV: tl.constexpr, TOKENS: tl.constexpr, BT: tl.constexpr, PACKED: tl.constexpr
):
    """Grid: chunks × value heads. decays [chunks,HV,2,BT]: the sum of log gates up to each token, its own among them (a
    gate acts before its token's first step), as a float32 and what that leaves out; after the last token, of all.

    A difference of two sums is then right to a rounding of the difference, however far the sums themselves have gone
    (a gate may be a full reset)."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    first, tokens = chunk_place(chunk, table, T, chunks, TOKENS, PACKED)
    token = tl.arange(0, BT)
    x = tl.load(g + (first + token) * HV + head, mask=token < tokens, other=0.0).to(tl.float64)
    total = tl.cumsum(tl.maximum(x, MIN_LOG_DECAY), axis=0)
    high = total.to(tl.float32)
    at = decays + (chunk.to(tl.int64) * HV + head) * 2 * BT + token
    tl.store(at, high)
    tl.store(at + BT, (total - high.to(tl.float64)).to(tl.float32))
