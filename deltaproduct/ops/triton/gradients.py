"""The gradients of queries, keys, step sizes and gates, from what both scans have left: for all chunks at once.

With dL = −strict_tril(dV Eᵀ) and dP = causal(dO Eᵀ), and S, dS the states at the chunk's start and end,

    dW = (D ⊙ dL)ᵀ K̂ + scale (D ⊙ dP)ᵀ Q̂ + exp(G_C − G) E dSᵀ
    dK̂ = (D ⊙ dL) Ŵ − exp(G) dV Sᵀ + β dW          dβ_s = dW_s·k̂_s
    dQ̂ = scale ((D ⊙ dP) Ŵ + exp(G) dO Sᵀ)

where Ŵ = β K̂. The gates' gradient is the sum, over all that decays from before a gate to after it, of value times
gradient.
"""

import triton
import triton.language as tl

from deltaproduct.ops.triton.parts import (
    between,
    chunk_place,
    inverse_norm,
    load_rows,
    log_decays,
    product,
    rounded,
    store_rows,
    whole_log_decay,
)
from deltaproduct.ops.triton.scan import state_tile
from deltaproduct.ops.triton.tuning import LENGTHS, tuned


@triton.jit
def _of_raw(d_unit, x, norm, NORMALISE: tl.constexpr):
    """The gradient of rows x from that of x·norm, where norm = (Σx² + ε)^-½."""
    if NORMALISE:
        x = x.to(tl.float32)
        along = tl.sum(d_unit * x, axis=1) * norm * norm
        return norm[:, None] * (d_unit - x * along[:, None])
    else:
        return d_unit


@tuned([(64, 8, 1), (32, 8, 1)], [(16, 8, 1), (32, 8, 1)], key=["GATED", "NORMALISE"])
@triton.jit(do_not_specialize=LENGTHS)
def gradients_kernel(
    q, k, beta, decays, d_o, attend, errors, states, d_states, d_v, d_q, d_k, d_beta, d_g, scale, table, T, chunks,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
    TOKENS: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, EPS: tl.constexpr,
    NORMALISE: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Grid: chunks × key heads; the value heads that share a key head follow one another."""
    chunk, key_head = tl.program_id(0), tl.program_id(1)
    first, tokens = chunk_place(chunk, table, T, chunks, TOKENS, PACKED)
    if tokens <= 0:
        return
    row, token = tl.arange(0, C), tl.arange(0, BT)
    row_valid, token_valid = row < tokens * N, token < tokens
    later = row[:, None] > row[None, :]
    causal = (row // N)[None, :] <= token[:, None]
    keys = load_rows(k + key_head * K, first * N, row, row_valid, H * K, 0, K, BK)
    queries = load_rows(q + key_head * K, first, token, token_valid, H * K, 0, K, BK)
    norm, q_norm = inverse_norm(keys, NORMALISE, EPS), inverse_norm(queries, NORMALISE, EPS)
    d_keys, d_queries = tl.zeros([C, BK], tl.float32), tl.zeros([BT, BK], tl.float32)

    for member in range(HV // H):
        head = key_head * (HV // H) + member
        place = chunk.to(tl.int64) * HV + head
        rate = tl.load(beta + (first * N + row) * HV + head, mask=row_valid, other=0.0).to(tl.float32)
        d_lower, d_attend = tl.zeros([C, C], tl.float32), tl.zeros([BT, C], tl.float32)
        d_seen, d_write = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
        d_read, through = tl.zeros([BT, BK], tl.float32), tl.zeros([BK], tl.float32)
        for block in range((V + BV - 1) // BV):
            col = block * BV
            error = load_rows(errors + head * V, first * N, row, row_valid, HV * V, col, V, BV)
            d_value = load_rows(d_v + head * V, first * N, row, row_valid, HV * V, col, V, BV)
            d_out = load_rows(d_o + head * V, first, token, token_valid, HV * V, col, V, BV)
            at, mask = state_tile(states, chunk, head, HV, col, K, V, BK, BV)
            state = tl.load(at, mask=mask, other=0.0)
            at, mask = state_tile(d_states, chunk, head, HV, col, K, V, BK, BV)
            d_state = tl.load(at, mask=mask, other=0.0)
            d_lower -= product(d_value, tl.trans(error), MODE)
            d_attend += product(d_out, tl.trans(error), MODE)
            d_seen -= product(d_value, tl.trans(state), MODE)
            d_write += product(error, tl.trans(d_state), MODE)
            d_read += product(d_out, tl.trans(state), MODE)
            if GATED:
                through += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), axis=1)

        d_lower, d_attend = tl.where(later, d_lower, 0.0), tl.where(causal, d_attend, 0.0)
        if GATED:
            high, low = log_decays(decays, place, row // N, row_valid, BT)
            q_high, q_low = log_decays(decays, place, token, token_valid, BT)
            end_high, end_low = whole_log_decay(decays, place, BT)
            pair = between(high[:, None], low[:, None], high[None, :], low[None, :])
            q_pair = between(q_high[:, None], q_low[:, None], high[None, :], low[None, :])
            from_start, q_from_start = tl.exp(high), tl.exp(q_high)
            to_end = between(end_high, end_low, high, low)
            # Value times gradient of everything that decays: pairs, from the start, to the end, and all the way. Pairs
            # within a token span no gate: they would cancel below, but for their rounding.
            of, by = (row // N)[:, None], (row // N)[None, :]
            lower = product(keys, tl.trans(keys), MODE) * norm[:, None] * (norm * rate)[None, :] * pair
            lower = tl.where(of > by, lower * d_lower, 0.0)
            pairs = tl.load(attend + place * BT * C + (token[:, None] * C + row[None, :])).to(tl.float32)
            pairs = tl.where(token[:, None] > by, pairs * d_attend, 0.0)
            wide = keys.to(tl.float32)
            from_first = from_start * norm * tl.sum(d_seen * wide, axis=1)
            to_last = to_end * norm * rate * tl.sum(d_write * wide, axis=1)
            q_from_first = scale * q_from_start * q_norm * tl.sum(d_read * queries.to(tl.float32), axis=1)
            # A pair spans the gates that are in one G and not in the other: those up to its later row less those up to
            # its earlier one.
            of_row = tl.sum(lower, axis=1) - tl.sum(lower, axis=0) - tl.sum(pairs, axis=0) + from_first
            of_token = tl.sum(pairs, axis=1) + q_from_first
            d_gate = tl.sum(tl.where(by >= token[:, None], of_row[None, :], to_last[None, :]), axis=1)
            d_gate += tl.sum(tl.where(token[None, :] >= token[:, None], of_token[None, :], 0.0), axis=1)
            d_gate += tl.sum(through, axis=0) * tl.exp(end_high)
            tl.store(d_g + (first + token) * HV + head, rounded(d_gate, d_g.dtype.element_ty), mask=token_valid)
            d_lower, d_attend = d_lower * pair, d_attend * q_pair
            d_seen, d_write, d_read = (
                d_seen * from_start[:, None],
                d_write * to_end[:, None],
                d_read * q_from_start[:, None],
            )

        d_write += product(tl.trans(d_lower * norm[:, None]), keys, MODE)
        d_write += product(tl.trans(d_attend * (scale * q_norm)[:, None]), queries, MODE)
        d_rate = norm * tl.sum(d_write * keys.to(tl.float32), axis=1)
        at = d_beta + (first * N + row) * HV + head
        tl.store(at, rounded(d_rate, d_beta.dtype.element_ty), mask=row_valid)
        weight = (norm * rate)[None, :]
        d_keys += product(d_lower * weight, keys, MODE) + d_seen + rate[:, None] * d_write
        d_queries += scale * (product(d_attend * weight, keys, MODE) + d_read)

    d_keys = _of_raw(d_keys, keys, norm, NORMALISE)
    d_queries = _of_raw(d_queries, queries, q_norm, NORMALISE)
    store_rows(d_k + key_head * K, d_keys, first * N, row, row_valid, H * K, 0, K, BK)
    store_rows(d_q + key_head * K, d_queries, first, token, token_valid, H * K, 0, K, BK)
