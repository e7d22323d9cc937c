"""The gradient of the state on its way back through the chunks of a run: the sequential part of the backward pass.

dE = Pᵀ dO + W̃ dS         dV = (I + L)⁻ᵀ dE         dS ← exp(G_C) dS + Q̃ᵀ dO − K̃ᵀ dV
"""

import triton
import triton.language as tl

from deltaproduct.ops.triton.parts import chunk_place, load_rows, product, rounded, store_rows
from deltaproduct.ops.triton.scan import program_place, run_place, state_tile
from deltaproduct.ops.triton.tuning import LENGTHS, tuned


@tuned([(64, 4, 2), (32, 4, 2)], [(16, 4, 2), (32, 8, 2)], key=["STORE", "SEGMENTED"])
@triton.jit(do_not_specialize=LENGTHS)
def reverse_kernel(
    q, k, d_o, inverse, attend, seen, writes, reads, whole, d_end, d_v, d_states, d_start, table, starts, owners,
    T, chunks, segments,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
    TOKENS: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SPAN: tl.constexpr,
    END: tl.constexpr, STORE: tl.constexpr, DONE: tl.constexpr, SEGMENTED: tl.constexpr, PACKED: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """Grid: runs · value heads · blocks of V's columns.

    END: the gradient of a run's last state is given, otherwise zero. STORE: write dV, and the gradient of the state at
    every chunk's end. DONE: write that of the run's first state, per segment or per sequence as runs are.
    """
    block, head, run = program_place(HV, (V + BV - 1) // BV)
    sequence, first_chunk, count, segment = run_place(run, starts, owners, chunks, segments, SPAN, SEGMENTED, PACKED)
    key_head = head // (HV // H)
    row, token = tl.arange(0, C), tl.arange(0, BT)
    col = block * BV
    slot = segment if SEGMENTED else sequence
    d_state = tl.zeros([BK, BV], tl.float32)
    if END:
        end, here = state_tile(d_end, slot, head, HV, col, K, V, BK, BV)
        d_state = tl.load(end, mask=here, other=0.0).to(tl.float32)

    for i in range(count):
        chunk = first_chunk + count - 1 - i
        first, tokens = chunk_place(chunk, table, T, chunks, TOKENS, PACKED)
        place = chunk.to(tl.int64) * HV + head
        row_valid, token_valid = row < tokens * N, token < tokens
        if STORE:
            at, mask = state_tile(d_states, chunk, head, HV, col, K, V, BK, BV)
            tl.store(at, rounded(d_state, d_states.dtype.element_ty), mask=mask)

        keys = load_rows(k + key_head * K, first * N, row, row_valid, H * K, 0, K, BK)
        queries = load_rows(q + key_head * K, first, token, token_valid, H * K, 0, K, BK)
        d_out = load_rows(d_o + head * V, first, token, token_valid, HV * V, col, V, BV)
        pairs = tl.load(attend + place * BT * C + (token[:, None] * C + row[None, :]))
        solve = tl.load(inverse + place * C * C + (row[:, None] * C + row[None, :]))
        d_error = product(keys, d_state, MODE) * tl.load(writes + place * C + row)[:, None]
        d_error += product(tl.trans(pairs), d_out, MODE)
        d_value = product(tl.trans(solve), d_error, MODE, ROUNDED=1)
        if STORE:
            store_rows(d_v + head * V, d_value, first * N, row, row_valid, HV * V, col, V, BV)
        read = d_out.to(tl.float32) * tl.load(reads + place * BT + token)[:, None]
        d_state = d_state * tl.load(whole + place) + product(tl.trans(queries), read, MODE)
        d_state -= product(tl.trans(keys), d_value * tl.load(seen + place * C + row)[:, None], MODE)

    if DONE:
        begin, here = state_tile(d_start, slot, head, HV, col, K, V, BK, BV)
        tl.store(begin, d_state, mask=here)
