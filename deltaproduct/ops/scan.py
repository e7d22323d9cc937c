"""Recurrences whose transition is diagonal, in parallel over time: plain PyTorch, any device.

B batch · T tokens · H query/key heads · HV value heads · K key and V value dimension · S packed sequences · c chunk.

* `gated_linear_attention`: S_t = diag(a_t) S_{t−1} + k_t v_tᵀ in chunks, as matrix products (arXiv 2312.06635, section
  4; arXiv 2405.21060, section 6).
* `diagonal_scan`: h_t = a_t ⊙ h_{t−1} + b_t, elementwise, in two passes over √T blocks.
* `running_max`: m_t = max(m_{t−1} + g_t, i_t), what keeps exponential gates in range (arXiv 2405.04517, equation 15).

Decays are multiplied and never divided by: a product that underflows is a contribution that is gone, so a decay may be
0, and it may be negative. The usual form, differences of cumulative log-decays, has neither.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaproduct.errors import UsageError
from deltaproduct.ops import transforms
from deltaproduct.ops.chunks import Chunks, Inputs
from deltaproduct.ops.inputs import (
    check_cu_seqlens,
    check_inputs,
    check_query,
    check_state,
    compute_dtype,
    num_sequences,
    pad_time,
)

CHUNK_TOKENS = 32  # a power of two


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    a: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear attention with a decay per key channel, or one per head (arXiv 2312.06635, equation 3).

    Per value head, with state S [K,V]: S_t = diag(a_t) S_{t−1} + k_t v_tᵀ and o_t = scale · S_tᵀ q_t; a = exp(g).
    In the papers' table H_i = A(x_i) H_{i−1} + B(x_i): A = diag(a_t), B = k_t v_tᵀ.

    Args:
        q, k: [B,T,H,K].
        v: [B,T,HV,V]; HV is a multiple of H, and HV/H consecutive value heads share a query/key head.
        g: log decay, [B,T,HV,K] per key channel or [B,T,HV] per head; −∞ is a full reset. None means no decay.
        a: in place of g, the decay itself, of the same shapes and any sign; |a| ≤ 1 keeps the state from growing.
        initial_state: [B,HV,K,V], or [S,HV,K,V] for S packed sequences; None means zeros.
        cu_seqlens: [S+1] ints from 0 to T: packed sequences (B = 1); empty ones are allowed.
        scale: factor of the output; None means K^-½.

    Returns:
        (o [B,T,HV,V] in v's dtype, final state in float32, or float64 if an input is).

    Raises:
        UsageError: shapes, dtypes or devices disagree, or both g and a are given.
    """
    check_inputs(k.unsqueeze(2), v.unsqueeze(2), v[..., 0].unsqueeze(2), None)
    check_query(q, k.unsqueeze(2))
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, k)
    sequences = num_sequences(k.shape[0], cu_seqlens)
    check_state(initial_state, k, v, sequences)
    if g is not None and a is not None:
        raise UsageError("Give either g, the logarithm of a decay, or a, the decay itself, not both.")
    shape = (*v.shape[:3], k.shape[-1])
    for name, x in (("g", g), ("a", a)):
        if x is not None and x.shape not in (shape, shape[:3]):
            raise UsageError(f"{name} is {list(x.shape)} and should be [B,T,HV,K] = {list(shape)} or [B,T,HV].")
    dtype = compute_dtype(q, k, v)
    scale = k.shape[-1] ** -0.5 if scale is None else float(scale)
    with torch.autocast(k.device.type, enabled=False):
        if initial_state is None:
            state = k.new_zeros(sequences, v.shape[2], k.shape[3], v.shape[3], dtype=dtype)
        else:
            state = initial_state.to(dtype)
        if 0 in k.shape[:2]:
            return torch.empty_like(v), state
        decay = a.to(dtype) if g is None and a is not None else None if g is None else g.to(dtype).exp()
        o, state = _gated_linear_attention(q.to(dtype) * scale, k.to(dtype), v.to(dtype), decay, state, cu_seqlens)
    return o.to(v.dtype), state


def _gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor | None, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    length, heads = v.shape[1:3]
    c = min(CHUNK_TOKENS, 1 << (length - 1).bit_length())  # a single token is not filled up to a chunk
    # A token is one step, so that chunks lie as the operator's do; only their places are asked for here.
    chunks = Chunks.of(
        Inputs(q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2), v[..., 0].unsqueeze(2), None), cu_seqlens, c
    )
    steps = len(chunks.starts) - 1

    def cut(x: Tensor) -> Tensor:
        """[B,T,H,·] → [chunks,H,c,·] in the order of the scan."""
        return chunks.take(x, 0, steps).flatten(0, 1).transpose(1, 2)

    per_channel = a is not None and a.dim() == 4
    if k.shape[2] not in (1, heads) or (per_channel and k.shape[2] != heads):
        q, k = (x.repeat_interleave(heads // k.shape[2], dim=2) for x in (q, k))  # one head alone is broadcast
    q_, k_, v_ = cut(q), cut(k), cut(v)
    whole: Tensor | None = None  # decay over a whole chunk, [chunks,HV,K or 1,1]
    if a is None:
        attend, read, write = (q_ @ k_.mT).tril(), None, k_.mT @ v_
    else:
        decay = cut(a if per_channel else a.unsqueeze(-1))
        if chunks.index is not None or length % c:
            real = cut(a.new_ones(*a.shape[:2], 1, 1)) > 0
            decay = torch.where(real, decay, 1)  # nothing happens where there is no token
        if per_channel:
            attend, since, until = _pairs(q_, k_, decay)
            read, write = q_ * since, (k_ * until).mT @ v_
        else:
            ones = torch.ones_like(decay)
            pairs, since, until = _pairs(ones, ones, decay)
            attend, read, write = (q_ @ k_.mT) * pairs, since, k_.mT @ (v_ * until)
        whole = since[..., -1:, :].mT
    begin = []
    state = chunks.longest_first(state)
    for first, last in pairwise(chunks.starts):  # the only sequential part
        old, rest = state[: last - first], state[last - first :]
        begin.append(old)
        new = write[first:last] + (old if whole is None else old * whole[first:last])
        state = torch.cat((new, rest)) if rest.shape[0] else new
    starts = torch.cat(begin)
    if read is None:
        carried = q_ @ starts
    elif per_channel:
        carried = read @ starts
    else:
        carried = read * (q_ @ starts)
    return _join(chunks, (attend @ v_ + carried).transpose(1, 2), v.shape[0], length), chunks.as_given(state)


def _pairs(q: Tensor, k: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What every token reads from itself and the earlier ones of its chunk, Σ_K q_t k_r ∏_{r<s≤t} a_s for r ≤ t.

    q, k, a [...,c,K] → (pairs [...,c,c], decay since the chunk began [...,c,K], decay until it ends [...,c,K]).

    Blocks are joined in twos, log₂ c times. Tokens t and r are in two halves of a block once: there their decay is
    the decay from r to the end of its half times the decay from the start of t's half to t. Both are products of
    decays, so nothing overflows or cancels, and no tensor has c·c·K elements.
    """
    q, k = q.unsqueeze(-2), k.unsqueeze(-2)  # [..., blocks, tokens, K]
    since, until = a.unsqueeze(-2), torch.ones_like(a).unsqueeze(-2)
    pairs = (q * k).sum(-1, keepdim=True)
    while since.shape[-3] > 1:
        (_, q2), (k1, _), (s1, s2), (u1, u2) = (_halves(x) for x in (q, k, since, until))
        (p1, p2), across = _halves(pairs), (q2 * s2) @ (k1 * u1).mT
        pairs = torch.cat((torch.cat((p1, torch.zeros_like(across)), -1), torch.cat((across, p2), -1)), -2)
        q, k = (x.unflatten(-3, (-1, 2)).flatten(-3, -2) for x in (q, k))
        since, until = torch.cat((s1, s2 * s1[..., -1:, :]), -2), torch.cat((u1 * s2[..., -1:, :], u2), -2)
    return pairs.squeeze(-3), since.squeeze(-3), until.squeeze(-3)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., 2m, s, ·] → the first and the second of each pair of blocks, [..., m, s, ·] each."""
    return x[..., 0::2, :, :], x[..., 1::2, :, :]


def _join(chunks: Chunks, x: Tensor, batch: int, length: int) -> Tensor:
    """The inverse of `Chunks.take` as a new tensor: chunks [n,c,...] in the order of the scan → [B,T,...]."""
    if chunks.index is None:
        return x.unflatten(0, (-1, batch)).transpose(0, 1).flatten(1, 2)[:, :length]
    places = torch.empty(length + 1, dtype=torch.long, device=x.device)  # the last one for places without a token
    flat = chunks.index.flatten()
    places[flat] = torch.arange(flat.shape[0], device=x.device)
    return x.flatten(0, 1).index_select(0, places[:-1])[None]


def diagonal_scan(
    a: Tensor, b: Tensor, initial: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h_t = a_t ⊙ h_{t−1} + b_t, elementwise, for any real a.

    In the papers' table H_i = A(x_i) H_{i−1} + B(x_i): A = diag(a_t), B = b_t. 2√T steps over wide tensors in place of
    T steps; the backward keeps a and h alone.

    Args:
        a, b: [B,T,...], of one shape.
        initial: [B,...], or [S,...] for S packed sequences; None means zeros.
        cu_seqlens: [S+1] ints from 0 to T: packed sequences (B = 1); empty ones are allowed.

    Returns:
        (h [B,T,...], h after the last token [B or S,...]), in float32, or float64 if an input is.

    Raises:
        UsageError: shapes disagree.
    """
    if a.shape != b.shape or a.dim() < 2:
        raise UsageError(f"a and b must be of one shape [B,T,...], not {list(a.shape)} and {list(b.shape)}.")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, a)
    sequences = num_sequences(a.shape[0], cu_seqlens)
    shape = (sequences, *a.shape[2:])
    if initial is not None and initial.shape != shape:
        raise UsageError(f"initial is {list(initial.shape)} and should be {list(shape)}.")
    dtype = compute_dtype(a, b)
    with torch.autocast(a.device.type, enabled=False):
        a, b = a.to(dtype), b.to(dtype)
        initial = a.new_zeros(shape) if initial is None else initial.to(dtype)
        if 0 in a.shape[:2]:
            return b, initial
        if cu_seqlens is None:
            h = _diagonal_scan(a, b, initial)
            return h, h[:, -1]
        # A decay of 0 where a sequence starts keeps its neighbour out, and what it starts with joins its first input.
        full = cu_seqlens[1:] > cu_seqlens[:-1]
        first = cu_seqlens[:-1][full].long()
        b = b.index_add(1, first, (a[0, first] * initial[full])[None])
        h = _diagonal_scan(a.index_fill(1, first, 0), b, torch.zeros_like(initial[:1]))
        return h, initial.index_copy(0, full.nonzero()[:, 0], h[0, cu_seqlens[1:][full].long() - 1])


def _diagonal_scan(a: Tensor, b: Tensor, initial: Tensor) -> Tensor:
    if transforms.active(a, b, initial):
        return _plain_scan(a, b, initial)
    h: Tensor = _DiagonalScan.apply(a, b, initial)
    return h


class _DiagonalScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, initial: Tensor) -> Tensor:  # type: ignore[override]
        h = _scan(a, b, initial)
        ctx.save_for_backward(a, h, initial)
        return h

    @staticmethod
    def backward(ctx: Any, d_h: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        a, h, initial = ctx.saved_tensors
        transforms.refuse_batched(d_h)
        if transforms.beyond_first(d_h, a, h, initial):
            # h is a result of this very node, so that what depends on it is differentiated by coming here again.
            later = torch.cat((a[:, 1:], torch.zeros_like(a[:, :1])), 1)
            d_b = _diagonal_scan(later.flip(1), d_h.flip(1), torch.zeros_like(initial)).flip(1)
            before = torch.cat((initial.unsqueeze(1), h[:, :-1]), 1)
            return d_b * before, d_b, a[:, 0] * d_b[:, 0]
        # The gradient of h_t is d_h_t plus a_{t+1} times that of h_{t+1}: the same recurrence, backwards in time.
        later = torch.cat((a[:, 1:], torch.zeros_like(a[:, :1])), 1)
        d_b = _scan(later.flip(1), d_h.flip(1), torch.zeros_like(initial)).flip(1)
        d_a = torch.empty_like(a)
        torch.mul(d_b[:, 1:], h[:, :-1], out=d_a[:, 1:])
        torch.mul(d_b[:, 0], initial, out=d_a[:, 0])
        return d_a, d_b, a[:, 0] * d_b[:, 0]


def _plain_scan(a: Tensor, b: Tensor, initial: Tensor) -> Tensor:
    """`_scan` without writing in place, which PyTorch can transform (`ops/transforms.py`)."""
    length = b.shape[1]
    size = math.isqrt(length - 1) + 1
    a, b = (pad_time(x, length + -length % size).unflatten(1, (-1, size)) for x in (a, b))
    decay, total = a[:, :, 0], b[:, :, 0]  # of a block so far
    for t in range(1, size):
        total = b[:, :, t] + a[:, :, t] * total
        decay = decay * a[:, :, t]
    before = [initial]  # what a block starts with
    for block in range(a.shape[1] - 1):
        before.append(total[:, block] + decay[:, block] * before[-1])
    h = [torch.stack(before, 1)]
    for t in range(size):
        h.append(b[:, :, t] + a[:, :, t] * h[-1])
    return torch.stack(h[1:], 2).flatten(1, 2)[:, :length]


def _scan(a: Tensor, b: Tensor, initial: Tensor) -> Tensor:
    """a, b [B,T,...], initial [B,...] → h [B,T,...]: every block's total, the totals in a chain, then every block."""
    batch, length = b.shape[:2]
    size = math.isqrt(length - 1) + 1
    missing = -length % size
    if missing:
        a, b = (F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing)) for x in (a, b))
    a, b = (x.reshape(batch, -1, size, *x.shape[2:]) for x in (a, b))
    decay, total = a[:, :, 0].clone(), b[:, :, 0].clone()  # of a block so far
    for t in range(1, size):
        torch.addcmul(b[:, :, t], a[:, :, t], total, out=total)
        decay.mul_(a[:, :, t])
    before = torch.empty_like(total)  # what a block starts with
    before[:, 0] = initial
    for block in range(1, before.shape[1]):
        torch.addcmul(total[:, block - 1], decay[:, block - 1], before[:, block - 1], out=before[:, block])
    h = torch.empty_like(b)
    for t in range(size):
        before = torch.addcmul(b[:, :, t], a[:, :, t], before)
        h[:, :, t] = before
    return h.flatten(1, 2)[:, :length]


def running_max(g: Tensor, i: Tensor, initial: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """m_t = max(m_{t−1} + g_t, i_t) (arXiv 2405.04517, equation 15), in log₂ T steps.

    Args:
        g, i: [B,T,H].
        initial: [B,H], or [S,H] for S packed sequences.
        cu_seqlens: [S+1] ints from 0 to T: packed sequences (B = 1).

    Returns:
        m before and after every token: (m_{t−1} [B,T,H], m_t [B,T,H]).
    """
    length = g.shape[1]
    if length == 0:
        return i, i
    place = torch.arange(length, device=g.device)
    if cu_seqlens is None:
        start = initial.unsqueeze(1)
    else:
        owner = torch.searchsorted(cu_seqlens[1:].contiguous(), place, right=True)
        place, start = place - cu_seqlens[owner], initial[owner][None]
    decay, m, reach = g, i, 1  # over the last `reach` tokens of the same sequence
    while reach < length:
        earlier = (place >= reach)[:, None]
        before, gone = (F.pad(x, (0, 0, reach, 0))[:, :length] for x in (m, decay))
        m = torch.where(earlier, torch.maximum(m, before + decay), m)
        decay = torch.where(earlier, decay + gone, decay)
        reach *= 2
    m = torch.maximum(m, start + decay)
    previous = torch.where((place == 0)[:, None], start.expand_as(m), F.pad(m, (0, 0, 1, 0))[:, :length])
    return previous, m
