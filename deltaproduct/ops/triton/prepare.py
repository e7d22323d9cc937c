"""What a chunk's outputs and states need of its keys, queries and gates alone: for all chunks at once.

Written once and read by the scans in both directions. With D_sr = exp(G_s − G_r) and unit rows k̂ = ρ k,

    inverse  (I + L)⁻¹ [C,C]        L_sr = D_sr β_r (k̂_s·k̂_r) for r < s
    attend   P [BT,C]               P_tr = scale D_tr β_r (q̂_t·k̂_r) for steps r of tokens ≤ t
    seen     [C] exp(G_s) ρ_s       what a row of K is multiplied by to read the chunk's first state
    writes   [C] exp(G_C − G_r) ρ_r β_r      … to be written into the chunk's last state
    reads    [BT] scale exp(G_t) ρ_t         … a row of Q, to read the chunk's first state
    whole    exp(G_C)
"""

import triton
import triton.language as tl

from deltaproduct.ops.triton.parts import (
    between,
    chunk_place,
    for_product,
    inverse_norm,
    load_rows,
    log_decays,
    product,
    rounded,
    whole_log_decay,
)
from deltaproduct.ops.triton.tuning import LENGTHS, tuned


@triton.jit
def _doubled(inverse, blocks, b: tl.constexpr, MODE: tl.constexpr):
    """Inverses of the blocks of b rows on the diagonals of [n,16,16] → of the blocks of twice that.

    [[A,0],[L,D]]⁻¹ = [[A⁻¹,0],[−D⁻¹ L A⁻¹,D⁻¹]]; the unit diagonal is in A and D. `blocks` holds the L."""
    row, col = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    below = tl.where((row // b % 2 == 1) & (col // b == row // b - 1), blocks, 0.0)
    right = for_product(product(below, inverse, MODE, ROUNDED=2), MODE)
    return for_product(inverse - product(inverse, right, MODE, ROUNDED=2), MODE)


@triton.jit
def _join(x, C: tl.constexpr, b: tl.constexpr, MODE: tl.constexpr):
    """The same rule from blocks of b ≥ 16 rows to blocks of twice that, in memory: x [C,C] holds L below its blocks."""
    pair, row, col = tl.arange(0, C // (2 * b)), tl.arange(0, b), tl.arange(0, b)
    first = x + pair[:, None, None] * (2 * b * C + 2 * b) + row[None, :, None] * C + col[None, None, :]
    below, second = first + b * C, first + b * C + b
    lower, before, after = for_product(tl.load(below), MODE), tl.load(first), tl.load(second)
    left = for_product(product(after, lower, MODE, ROUNDED=2), MODE)
    corner = for_product(-product(left, before, MODE, ROUNDED=2), MODE)
    tl.debug_barrier()  # whoever reads L has read it
    tl.store(below, corner)


@triton.jit
def invert_unit_lower(x, lower, C: tl.constexpr, MODE: tl.constexpr):
    """x [C,C] ← (I + lower)⁻¹ for a strictly lower triangular [C,C] in float32, C one of 16, 32, 64, by blocks.

    Only ever the inverse's own entries are formed, which are small: every transition has norm ≤ 1. Blocks are taken
    out of the matrix and put back in memory, which is near, and saves moving them about between registers."""
    row, col = tl.arange(0, C), tl.arange(0, C)
    tl.store(x + (row[:, None] * C + col[None, :]), lower)
    tl.debug_barrier()
    block, row, col = (
        tl.arange(0, C // 16)[:, None, None],
        tl.arange(0, 16)[None, :, None],
        tl.arange(0, 16)[None, None, :],
    )
    at = x + (block * (16 * C + 16) + row * C + col)
    blocks = for_product(tl.load(at), MODE)
    inverse = tl.where(row == col, 1.0, 0.0) - tl.where((row % 2 == 1) & (col == row - 1), blocks, 0.0)
    inverse = _doubled(inverse, blocks, 2, MODE)
    inverse = _doubled(inverse, blocks, 4, MODE)
    inverse = _doubled(inverse, blocks, 8, MODE)
    tl.debug_barrier()
    tl.store(at, inverse)
    if C >= 32:
        tl.debug_barrier()
        _join(x, C, 16, MODE)
    if C >= 64:
        tl.debug_barrier()
        _join(x, C, 32, MODE)


@tuned([(None, 2, 1), (None, 4, 1)], [(None, 8, 1), (None, 4, 1)], key=["GATED", "NORMALISE"])
@triton.jit(do_not_specialize=LENGTHS)
def prepare_kernel(
    q, k, beta, decays, inverse, attend, seen, writes, reads, whole, scale, table, T, chunks,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, N: tl.constexpr, C: tl.constexpr, TOKENS: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, EPS: tl.constexpr, NORMALISE: tl.constexpr, GATED: tl.constexpr,
    PACKED: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Grid: chunks × value heads."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    first, tokens = chunk_place(chunk, table, T, chunks, TOKENS, PACKED)
    if tokens <= 0:
        return
    key_head = head // (HV // H)
    at = chunk.to(tl.int64) * HV + head
    row, token = tl.arange(0, C), tl.arange(0, BT)
    row_valid, token_valid = row < tokens * N, token < tokens

    keys = load_rows(k + key_head * K, first * N, row, row_valid, H * K, 0, K, BK)
    rate = tl.load(beta + (first * N + row) * HV + head, mask=row_valid, other=0.0).to(tl.float32)
    norm = inverse_norm(keys, NORMALISE, EPS)
    lower = product(keys, tl.trans(keys), MODE) * norm[:, None] * (norm * rate)[None, :]
    queries = load_rows(q + key_head * K, first, token, token_valid, H * K, 0, K, BK)
    q_norm = inverse_norm(queries, NORMALISE, EPS) * scale
    pairs = product(queries, tl.trans(keys), MODE) * q_norm[:, None] * (norm * rate)[None, :]
    if GATED:
        high, low = log_decays(decays, at, row // N, row_valid, BT)
        q_high, q_low = log_decays(decays, at, token, token_valid, BT)
        end_high, end_low = whole_log_decay(decays, at, BT)
        tl.store(seen + at * C + row, norm * tl.exp(high))
        tl.store(writes + at * C + row, norm * rate * between(end_high, end_low, high, low))
        tl.store(reads + at * BT + token, q_norm * tl.exp(q_high))
        tl.store(whole + at, tl.exp(end_high))
        lower *= between(high[:, None], low[:, None], high[None, :], low[None, :])
        pairs *= between(q_high[:, None], q_low[:, None], high[None, :], low[None, :])
    else:
        tl.store(seen + at * C + row, norm)
        tl.store(writes + at * C + row, norm * rate)
        tl.store(reads + at * BT + token, q_norm)
        tl.store(whole + at, 1.0)
    pairs = tl.where((row // N)[None, :] <= token[:, None], pairs, 0.0)
    tile = token[:, None] * C + row[None, :]
    tl.store(attend + at * BT * C + tile, rounded(pairs, attend.dtype.element_ty))
    invert_unit_lower(inverse + at * C * C, tl.where(row[:, None] > row[None, :], lower, 0.0), C, MODE)
