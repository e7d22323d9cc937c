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
    inverse_norm,
    load_rows,
    log_decays,
    product,
    whole_log_decay,
)
from deltaproduct.ops.triton.tuning import tuned


@triton.jit
def _block_diagonal(x, n: tl.constexpr, b: tl.constexpr):
    """[n·b,n·b] → the blocks [n,b,b] on its diagonal."""
    blocks = tl.reshape(x, [n, b, n, b])
    row, col = tl.arange(0, n)[:, None, None, None], tl.arange(0, n)[None, None, :, None]
    return tl.sum(tl.where(row == col, blocks, 0.0), axis=2)


@triton.jit
def _joined(inverse, lower, n: tl.constexpr, b: tl.constexpr, MODE: tl.constexpr):
    """Inverses of the diagonal blocks of b rows, [2n,b,b], → of the blocks of twice that, [n,2b,2b].

    [[A,0],[L,D]]⁻¹ = [[A⁻¹,0],[−D⁻¹ L A⁻¹,D⁻¹]]; the unit diagonal is in A and D. lower [C,C] holds L."""
    first, second = tl.split(tl.permute(tl.reshape(inverse, [n, 2, b, b]), [0, 2, 3, 1]))
    pairs = tl.reshape(_block_diagonal(lower, n, 2 * b), [n, 2, b, 2, b])
    half_row, half_col = tl.arange(0, 2)[None, :, None, None, None], tl.arange(0, 2)[None, None, None, :, None]
    below = tl.sum(tl.sum(tl.where((half_row == 1) & (half_col == 0), pairs, 0.0), axis=3), axis=1)
    corner = -product(product(second, below, MODE), first, MODE)
    # Four blocks back to one: columns are joined first, then rows.
    top = tl.permute(tl.join(first, tl.zeros_like(first)), [0, 1, 3, 2])  # [n,b,2,b]
    bottom = tl.permute(tl.join(corner, second), [0, 1, 3, 2])
    both = tl.join(tl.reshape(top, [n, b, 2 * b]), tl.reshape(bottom, [n, b, 2 * b]))  # [n,b,2b,2]
    return tl.reshape(tl.permute(both, [0, 3, 1, 2]), [n, 2 * b, 2 * b])


@triton.jit
def _doubled(inverse, blocks, b: tl.constexpr, MODE: tl.constexpr):
    """The same rule where the blocks of b rows stay within [n,16,16], of which `inverse` holds the inverses."""
    row, col = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    below = tl.where((row // b % 2 == 1) & (col // b == row // b - 1), blocks, 0.0)
    return inverse - product(inverse, product(below, inverse, MODE), MODE)


@triton.jit
def unit_lower_inverse(lower, C: tl.constexpr, MODE: tl.constexpr):
    """(I + lower)⁻¹ for a strictly lower triangular [C,C] in float32, C one of 16, 32, 64, by blocks.

    Only ever the inverse's own entries are formed, which are small: every transition has norm ≤ 1."""
    blocks = _block_diagonal(lower, C // 16, 16)
    row, col = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    inverse = tl.where(row == col, 1.0, 0.0) - tl.where((row % 2 == 1) & (col == row - 1), blocks, 0.0)
    inverse = _doubled(inverse, blocks, 2, MODE)
    inverse = _doubled(inverse, blocks, 4, MODE)
    inverse = _doubled(inverse, blocks, 8, MODE)
    if C >= 32:
        inverse = _joined(inverse, lower, C // 32, 16, MODE)
    if C >= 64:
        inverse = _joined(inverse, lower, C // 64, 32, MODE)
    return tl.reshape(inverse, [C, C])


@tuned((None, 4, 2), (None, 8, 2), key=["GATED", "NORMALISE"])
@triton.jit
def prepare_kernel(
    q, k, beta, g, inverse, attend, seen, writes, reads, whole, table, scale, T, chunks,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, N: tl.constexpr, C: tl.constexpr, TOKENS: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, EPS: tl.constexpr, NORMALISE: tl.constexpr, GATED: tl.constexpr,
    PACKED: tl.constexpr, ATTEND: tl.constexpr, MODE: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """Grid: chunks × value heads. ATTEND: also what outputs need. SOLVE: the mode of the inverse's own products."""
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
    high, low = log_decays(g, first, tokens, head, HV, C, N, GATED)
    end_high, end_low = whole_log_decay(g, first, tokens, head, HV, BT, GATED)
    tl.store(seen + at * C + row, norm * tl.exp(high))
    tl.store(writes + at * C + row, norm * rate * between(end_high, end_low, high, low))
    tl.store(whole + at, tl.exp(end_high))

    lower = product(keys, tl.trans(keys), MODE) * norm[:, None] * (norm * rate)[None, :]
    if GATED:
        lower *= between(high[:, None], low[:, None], high[None, :], low[None, :])
    lower = tl.where(row[:, None] > row[None, :], lower, 0.0)
    tile = row[:, None] * C + row[None, :]
    tl.store(inverse + at * C * C + tile, unit_lower_inverse(lower, C, SOLVE))

    if ATTEND:
        queries = load_rows(q + key_head * K, first, token, token_valid, H * K, 0, K, BK)
        q_norm = inverse_norm(queries, NORMALISE, EPS) * scale
        q_high, q_low = log_decays(g, first, tokens, head, HV, BT, 1, GATED)
        tl.store(reads + at * BT + token, q_norm * tl.exp(q_high))
        pairs = product(queries, tl.trans(keys), MODE) * q_norm[:, None] * (norm * rate)[None, :]
        if GATED:
            pairs *= between(q_high[:, None], q_low[:, None], high[None, :], low[None, :])
        pairs = tl.where((row // N)[None, :] <= token[:, None], pairs, 0.0)
        tile = token[:, None] * C + row[None, :]
        tl.store(attend + at * BT * C + tile, pairs.to(attend.dtype.element_ty))
