"""The state's way through the chunks of a run, forwards: the only sequential part of the forward pass.

A run is a whole sequence, or one of the segments that sequences are cut into; runs, value heads and blocks of V's
columns go side by side. Per chunk, with what `prepare.py` has found,

    E  = (I + L)⁻¹ (V − K̃ S)         o = Q̃ S + P E         S ← exp(G_C) S + W̃ᵀ E
"""

import triton
import triton.language as tl

from deltaproduct.ops.triton.parts import chunk_place, load_rows, product, rounded, store_rows
from deltaproduct.ops.triton.tuning import LENGTHS, tuned


@triton.jit
def program_place(HV: tl.constexpr, BLOCKS: tl.constexpr):
    """(block of columns, value head, run) of a program. All are on one axis of the grid, since the others are short."""
    number = tl.program_id(0)
    return number % BLOCKS, number // BLOCKS % HV, number // (BLOCKS * HV)


@triton.jit
def run_place(run, starts, owners, chunks, segments, SPAN: tl.constexpr, SEGMENTED: tl.constexpr, PACKED: tl.constexpr):
    """(the run's sequence, its first chunk, how many it has, its first segment); see `layout.Layout`."""
    if PACKED:
        sequence = tl.load(owners + run) if SEGMENTED else run
        first, end = tl.load(starts + 2 * sequence), tl.load(starts + 2 * sequence + 2)
        segment = run if SEGMENTED else tl.load(starts + 2 * sequence + 1)
        index = run - tl.load(starts + 2 * sequence + 1) if SEGMENTED else 0
    else:
        sequence = run // segments if SEGMENTED else run
        first, end = sequence * chunks, sequence * chunks + chunks
        segment = run if SEGMENTED else run * segments
        index = run % segments if SEGMENTED else 0
    if SEGMENTED:
        first += index * SPAN
        end = tl.minimum(end, first + SPAN)
    return sequence, first, end - first, segment


@triton.jit
def state_tile(x, slot, head, heads, col, K, V, BK: tl.constexpr, BV: tl.constexpr):
    """(addresses, mask) of the columns from `col` on of state `slot` in x [slots,HV,K,V]."""
    row, cols = tl.arange(0, BK), col + tl.arange(0, BV)
    at = x + (slot.to(tl.int64) * heads + head) * K * V + (row[:, None] * V + cols[None, :])
    return at, (row < K)[:, None] & (cols < V)[None, :]


@tuned([(64, 4, 2), (32, 4, 2)], [(16, 4, 2), (32, 8, 2)], key=["OUTPUT", "REPLAY", "SUMMARY", "SEGMENTED"])
@triton.jit(do_not_specialize=LENGTHS)
def scan_kernel(
    q, k, v, inverse, attend, seen, writes, reads, whole, start, o, final, kept, states, errors, summary,
    table, starts, owners, T, chunks, segments,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
    TOKENS: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SPAN: tl.constexpr,
    START: tl.constexpr, OUTPUT: tl.constexpr, FINAL: tl.constexpr, KEEP: tl.constexpr, REPLAY: tl.constexpr,
    SUMMARY: tl.constexpr, SEGMENTED: tl.constexpr, PACKED: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Grid: runs · value heads · blocks of columns. What it writes:

    OUTPUT: o. FINAL: the state after each sequence. KEEP: the state at the start of every segment. REPLAY: the state at
    the start of every chunk, and E, for the backward. SUMMARY: a segment's B and A in S ↦ A S + B, side by side
    [K,V+K]: the blocks after V's start from the identity's columns, with values of zero.
    """
    value_blocks: tl.constexpr = (V + BV - 1) // BV
    key_blocks: tl.constexpr = (K + BV - 1) // BV if SUMMARY else 0
    block, head, run = program_place(HV, value_blocks + key_blocks)
    sequence, first_chunk, count, segment = run_place(run, starts, owners, chunks, segments, SPAN, SEGMENTED, PACKED)
    key_head = head // (HV // H)
    row, token, state_row = tl.arange(0, C), tl.arange(0, BT), tl.arange(0, BK)
    col, values = block * BV, V
    state = tl.zeros([BK, BV], tl.float32)
    if SUMMARY:
        if block >= value_blocks:
            col, values = (block - value_blocks) * BV, 0
            state = tl.where(state_row[:, None] == (col + tl.arange(0, BV))[None, :], 1.0, 0.0)
    elif START:
        begin, here = state_tile(start, segment if SEGMENTED else sequence, head, HV, col, K, V, BK, BV)
        state = tl.load(begin, mask=here, other=0.0).to(tl.float32)

    for i in range(count):
        chunk = first_chunk + i
        first, tokens = chunk_place(chunk, table, T, chunks, TOKENS, PACKED)
        place = chunk.to(tl.int64) * HV + head
        row_valid = row < tokens * N
        if KEEP:  # noqa: SIM102 - without it, there is nothing to compile below
            if i % SPAN == 0:
                border, mask = state_tile(kept, segment + i // SPAN, head, HV, col, K, V, BK, BV)
                tl.store(border, state, mask=mask)
        if REPLAY:
            at, mask = state_tile(states, chunk, head, HV, col, K, V, BK, BV)
            tl.store(at, rounded(state, states.dtype.element_ty), mask=mask)

        keys = load_rows(k + key_head * K, first * N, row, row_valid, H * K, 0, K, BK)
        value = load_rows(v + head * V, first * N, row, row_valid, HV * V, col, values, BV).to(tl.float32)
        solve = tl.load(inverse + place * C * C + (row[:, None] * C + row[None, :]))
        error = product(
            solve, value - product(keys, state, MODE) * tl.load(seen + place * C + row)[:, None], MODE, ROUNDED=1
        )
        if REPLAY:
            store_rows(errors + head * V, error, first * N, row, row_valid, HV * V, col, V, BV)
        if OUTPUT:
            token_valid = token < tokens
            queries = load_rows(q + key_head * K, first, token, token_valid, H * K, 0, K, BK)
            pairs = tl.load(attend + place * BT * C + (token[:, None] * C + row[None, :]))
            # Transposed: V's columns are as many rows as tensor cores take at once, a chunk's tokens may be fewer.
            out = product(tl.trans(state), tl.trans(queries), MODE) * tl.load(reads + place * BT + token)[None, :]
            out += product(tl.trans(error), tl.trans(pairs), MODE)
            store_rows(o + head * V, tl.trans(out), first, token, token_valid, HV * V, col, V, BV)
        written = error * tl.load(writes + place * C + row)[:, None]
        state = state * tl.load(whole + place) + product(tl.trans(keys), written, MODE)

    if FINAL:
        end, here = state_tile(final, sequence, head, HV, col, K, V, BK, BV)
        tl.store(end, state, mask=here)
    if SUMMARY:
        shift = tl.where(values > 0, 0, V)  # A's columns come after B's
        cols = col + tl.arange(0, BV)
        rows = summary + (run.to(tl.int64) * HV + head) * K * (V + K) + state_row * (V + K)
        inside = (state_row < K)[:, None] & (cols < tl.where(shift > 0, K, V))[None, :]
        tl.store(rows[:, None] + (shift + cols)[None, :], state, mask=inside)
