"""States at the borders of segments, from the segments' own S ↦ A S + B: a small product for each."""

import triton
import triton.language as tl

from deltaproduct.ops.triton.parts import product
from deltaproduct.ops.triton.scan import program_place, state_tile
from deltaproduct.ops.triton.tuning import LENGTHS, tuned


@tuned([(16, 4, 1), (32, 4, 1)], key=["REVERSE"])
@triton.jit(do_not_specialize=LENGTHS)
def segments_kernel(
    summary, added, start, at_segments, final, starts, segments,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, START: tl.constexpr,
    REVERSE: tl.constexpr, PACKED: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Grid: sequences · value heads · blocks of V's columns. Forwards, from `start` [sequences,HV,K,V]:

        at_segments[i] = S;  S ← A_i S + B_i            for every segment i;  final = S

    where `summary` [segments,HV,K,V+K] holds B and A. REVERSE: the same with Aᵀ and `added` [segments,HV,K,V] in place
    of B, from the last segment to the first.
    """
    block, head, sequence = program_place(HV, (V + BV - 1) // BV)
    if PACKED:
        begin = tl.load(starts + 2 * sequence + 1)
        count = tl.load(starts + 2 * sequence + 3) - begin
    else:
        begin, count = sequence * segments, segments
    col = block * BV
    row, cols = tl.arange(0, BK), col + tl.arange(0, BV)
    here = (row < K)[:, None] & (cols < V)[None, :]
    state = tl.zeros([BK, BV], tl.float32)
    if START:
        at, mask = state_tile(start, sequence, head, HV, col, K, V, BK, BV)
        state = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    PART: tl.constexpr = min(BK, 64)  # of K at a time: all of A does not fit where tensor cores take it from
    for i in range(count):
        segment = begin + (count - 1 - i if REVERSE else i)
        at, mask = state_tile(at_segments, segment, head, HV, col, K, V, BK, BV)
        tl.store(at, state, mask=mask)
        tl.debug_barrier()  # it is read again, part by part
        slot = segment.to(tl.int64) * HV + head
        base = summary + slot * K * (V + K)
        if REVERSE:
            at, mask = state_tile(added, segment, head, HV, col, K, V, BK, BV)
            state = tl.load(at, mask=mask, other=0.0)
        else:
            state = tl.load(base + (row[:, None] * (V + K) + cols[None, :]), mask=here, other=0.0)
        for part in tl.static_range(BK // PART):
            some = part * PART + tl.arange(0, PART)
            if REVERSE:
                at, inside = some[:, None] * (V + K) + V + row[None, :], (some < K)[:, None] & (row < K)[None, :]
                through = tl.trans(tl.load(base + at, mask=inside, other=0.0))
            else:
                at, inside = row[:, None] * (V + K) + V + some[None, :], (row < K)[:, None] & (some < K)[None, :]
                through = tl.load(base + at, mask=inside, other=0.0)
            at, inside = some[:, None] * V + cols[None, :], (some < K)[:, None] & (cols < V)[None, :]
            before = tl.load(at_segments + slot * K * V + at, mask=inside, other=0.0)
            state += product(through, before, MODE)
    at, mask = state_tile(final, sequence, head, HV, col, K, V, BK, BV)
    tl.store(at, state, mask=mask)
