"""The recurrence in chunks of C Householder steps, as matrix products: any device that PyTorch knows.

The derivation of both passes, with these names, is in `ops/README.md`. In one chunk that starts from state S₀, with
W = diag(β) K and L = strict_tril(decay ⊙ K Wᵀ), the errors E (rows v − Sᵀk) solve (I + L) E = V − decay K S₀. Nothing
is inverted by squaring and β is never divided by, so correlated keys, β = 2 and β = 0 are all ordinary inputs.

The forward keeps its inputs and the state at every chunk boundary; the backward recomputes the rest, group of chunks
by group of chunks, so that the temporaries stay in cache and the cost stays linear in T.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaproduct.ops import transforms
from deltaproduct.ops.autograd import Gradients, as_given, cotangent_of_output, empty_gradients, register_gradients
from deltaproduct.ops.chunks import Chunks, Inputs, chunk_tokens, kept_states
from deltaproduct.ops.differentiable import differentiable, differentiable_starts
from deltaproduct.ops.inputs import (
    MIN_LOG_DECAY,
    Arguments,
    backward_dtype,
    compute_dtype,
    expand_heads,
    normalised,
    num_sequences,
    pad_time,
)
from deltaproduct.ops.inverse import unit_lower_inverse
from deltaproduct.ops.reference import reference_states
from deltaproduct.ops.transforms import Tensors


@dataclass
class Decays:
    """What a group's gates make of q, k and w; G_t is the sum of a chunk's log gates up to token t."""

    pair: Tensor  # [n,c,c] exp(G_t − G_r) for r ≤ t: the decay between two tokens
    read: Tensor  # [n,c,1] exp(G_t): the decay since the chunk began, at token rate
    seen: Tensor  # [n,C,1] the same at step rate
    write: Tensor  # [n,C,1] exp(G_c − G_t): the decay until the chunk ends
    whole: Tensor  # [n,1,1] exp(G_c)

    def step_pairs(self, rows: int, cols: int) -> Tensor:
        """`pair` repeated to [n,rows,cols], where rows and cols are c or C."""
        n, c, _ = self.pair.shape
        return self.pair[:, :, None, :, None].expand(n, c, rows // c, c, cols // c).reshape(n, rows, cols)


@dataclass
class Terms:
    """A group's chunks in matrix form, n = rows × HV of them; c tokens and C = c·N steps in each."""

    q: Tensor  # [n,c,K]
    k: Tensor  # [n,C,K]
    w: Tensor  # [n,C,K] what an error is written at: β k
    v: Tensor  # [n,C,V]
    beta: Tensor  # [n,C,1]
    decays: Decays | None  # None where g is

    def decayed(self) -> tuple[Tensor, Tensor, Tensor]:
        """(q reading the chunk's first state, k seeing it, w writing into its last), each with its decay."""
        d = self.decays
        return (self.q, self.k, self.w) if d is None else (self.q * d.read, self.k * d.seen, self.w * d.write)


def _heads_first(x: Tensor, heads: int) -> Tensor:
    """Chunks [steps,chunks,c,(N,)H or HV,·] → [steps·chunks·HV, c or C, ·], in the one copy that this costs."""
    x = expand_heads(x, heads).movedim(-2, 2)
    return x.reshape(x.shape[0] * x.shape[1] * heads, -1, x.shape[-1])


def _terms(x: Inputs, chunks: Chunks, lo: int, hi: int, dtype: torch.dtype) -> Terms:
    heads = x.v.shape[3]
    q, k, v = (_heads_first(chunks.take(y, lo, hi).to(dtype), heads) for y in (x.q, x.k, x.v))
    beta = _heads_first(chunks.take(x.beta, lo, hi).to(dtype).unsqueeze(-1), heads)
    w = k * beta
    if x.g is None:
        return Terms(q, k, w, v, beta, None)
    # Differences of sums lose digits when a gate is very negative; in float64 what is lost is below float32's rounding.
    g = chunks.take(x.g, lo, hi).double().clamp(min=MIN_LOG_DECAY)
    total = _heads_first(g.unsqueeze(-1), heads).cumsum(1)
    ends = total[:, -1:]
    pair = (total - total.mT).tril().exp().tril()
    pair, start, end, whole = (y.to(dtype) for y in (pair, total.exp(), (ends - total).exp(), ends.exp()))
    steps = k.shape[1] // q.shape[1]
    seen, write = (y if steps == 1 else y.repeat_interleave(steps, dim=1) for y in (start, end))
    return Terms(q, k, w, v, beta, Decays(pair, start, seen, write, whole))


def _causal(t: Terms) -> Tensor:
    """[c,C] ones where the step belongs to the token or to an earlier one."""
    c, steps = t.q.shape[1], t.k.shape[1]
    token_of_step = torch.arange(steps, device=t.q.device) // (steps // c)
    return (token_of_step <= torch.arange(c, device=t.q.device)[:, None]).to(t.q.dtype)


def _interactions(t: Terms) -> tuple[Tensor, Tensor]:
    """L [n,C,C] from steps to later steps, strictly lower; P [n,c,C] from a token's own and earlier steps to it."""
    c, steps = t.q.shape[1], t.k.shape[1]
    lower = (t.k @ t.w.mT).tril_(-1)
    attend = (t.q @ t.w.mT).mul_(_causal(t))
    if t.decays is not None:
        lower.mul_(t.decays.step_pairs(steps, steps))
        attend.mul_(t.decays.step_pairs(c, steps))
    return lower, attend


def _forward(
    x: Inputs, initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float, c: int
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, length, _, heads, value_dim), key_dim = x.v.shape, x.k.shape[-1]
    dtype = compute_dtype(x.q, x.k, x.v, x.beta)
    chunks = Chunks.of(x, cu_seqlens, c)
    o = x.v.new_empty(batch, length, heads, value_dim)
    states = x.v.new_empty(kept_states(batch, length, c, cu_seqlens), heads, key_dim, value_dim, dtype=dtype)
    states[chunks.starts[-1] :] = 0
    if initial_state is None:
        state = x.v.new_zeros(chunks.sequences, heads, key_dim, value_dim, dtype=dtype)
    else:
        state = chunks.longest_first(initial_state.to(dtype, copy=True))
    flat_state = state.flatten(0, 1)
    for lo, hi in chunks.groups(x):
        t = _terms(x, chunks, lo, hi, dtype)
        lower, attend = _interactions(t)
        inverse = unit_lower_inverse(lower)
        reads, seen, writes = t.decayed()
        begin = states[chunks.starts[lo] : chunks.starts[hi]].flatten(0, 1)
        error = torch.empty_like(t.v)
        for rows in chunks.scan(lo, hi, heads):  # the only sequential part
            s = flat_state[: rows.stop - rows.start]
            begin[rows] = s
            torch.bmm(inverse[rows], torch.baddbmm(t.v[rows], seen[rows], s, alpha=-1), out=error[rows])
            if t.decays is not None:
                s.mul_(t.decays.whole[rows])
            s.baddbmm_(writes[rows].mT, error[rows])
        out = (attend @ error).baddbmm_(reads, begin).mul_(scale)
        chunks.put(o, out.unflatten(0, (-1, heads)).transpose(1, 2), lo, hi)
    return o, chunks.as_given(state), states


def _backward(
    d_o: Tensor, d_final: Tensor | None, d_states: Tensor | None, x: Inputs, states: Tensor, cu_seqlens: Tensor | None,
    scale: float, c: int,
) -> tuple[Inputs, Tensor]:  # fmt: skip
    heads, dtype = x.v.shape[3], backward_dtype(x.k, x.g, states.dtype)
    chunks = Chunks.of(x, cu_seqlens, c)
    d_g = None if x.g is None else torch.empty_like(x.g)
    grads = Inputs(torch.empty_like(x.q), torch.empty_like(x.k), torch.empty_like(x.v), torch.empty_like(x.beta), d_g)
    if d_final is None:
        d_state = states.new_zeros(chunks.sequences, *states.shape[1:], dtype=dtype)
    else:
        d_state = chunks.longest_first(d_final.to(dtype, copy=True))
    flat_state = d_state.flatten(0, 1)
    for lo, hi in reversed(list(chunks.groups(x))):
        first, last = chunks.starts[lo], chunks.starts[hi]
        t = _terms(x, chunks, lo, hi, dtype)
        lower, attend = _interactions(t)
        inverse = unit_lower_inverse(lower)
        begin = states[first:last].flatten(0, 1).to(dtype)
        reads, seen, writes = t.decayed()
        error = inverse @ torch.baddbmm(t.v, seen, begin, alpha=-1)
        do = _heads_first(chunks.take(d_o, lo, hi).to(dtype), heads) * scale  # [n,c,V]

        d_error = attend.mT @ do
        d_v, d_end = torch.empty_like(t.v), torch.empty_like(begin)
        d_read = reads.mT @ do
        if d_states is not None:
            d_read += d_states[first:last].flatten(0, 1)
        for rows in reversed(list(chunks.scan(lo, hi, heads))):  # the only sequential part
            ds = flat_state[: rows.stop - rows.start]
            d_end[rows] = ds
            # The adjoint of the solve is the solve with the transpose: the inverse itself is not differentiated.
            torch.bmm(inverse[rows].mT, d_error[rows].baddbmm_(writes[rows], ds), out=d_v[rows])
            if t.decays is not None:
                ds.mul_(t.decays.whole[rows])
            ds.add_(d_read[rows]).baddbmm_(seen[rows].mT, d_v[rows], alpha=-1)

        d_lower = (d_v @ error.mT).tril_(-1).neg_()
        d_attend = (do @ error.mT).mul_(_causal(t))
        d_seen, d_write, d_reads = (d_v @ begin.mT).neg_(), error @ d_end.mT, do @ begin.mT
        if t.decays is not None and d_g is not None:
            tokens = (-1, chunks.tokens, t.k.shape[1] // chunks.tokens)
            gates = _gate_gradient(
                pair=_per_token(d_lower * lower, chunks.tokens) + _per_token(d_attend * attend, chunks.tokens),
                seen=(d_reads * reads).sum(-1) + (d_seen * seen).sum(-1).view(tokens).sum(-1),
                ends=(d_write * writes).sum(-1).view(tokens).sum(-1),
                whole=(begin * d_end * t.decays.whole).sum((1, 2)),
            )
            chunks.put(d_g, gates.unflatten(0, (-1, heads)).transpose(1, 2), lo, hi)
            d_lower.mul_(t.decays.step_pairs(t.k.shape[1], t.k.shape[1]))
            d_attend.mul_(t.decays.step_pairs(chunks.tokens, t.k.shape[1]))
            d_seen, d_write, d_reads = d_seen * t.decays.seen, d_write * t.decays.write, d_reads * t.decays.read
        d_w = d_write.baddbmm_(d_lower.mT, t.k).baddbmm_(d_attend.mT, t.q)
        d_k = d_seen.baddbmm_(d_lower, t.w).addcmul_(d_w, t.beta)
        d_q = d_reads.baddbmm_(d_attend, t.w)
        d_beta = (d_w * t.k).sum(-1, keepdim=True)
        for grad, d in ((grads.k, d_k), (grads.v, d_v), (grads.beta.unsqueeze(-1), d_beta)):
            d = d.unflatten(1, (chunks.tokens, -1)).unflatten(0, (-1, heads)).movedim(1, -2)
            chunks.put(grad, _sum_groups(d, grad.shape[3]), lo, hi)
        d_q = _sum_groups(d_q.unflatten(0, (-1, heads)).transpose(1, 2), x.q.shape[2])
        chunks.put(grads.q, d_q, lo, hi)
    return grads, chunks.as_given(d_state).to(states.dtype)


def _sum_groups(x: Tensor, heads: int) -> Tensor:
    """The adjoint of `expand_heads`: [..., HV, K] → [..., H, K]."""
    return x if x.shape[-2] == heads else x.unflatten(-2, (heads, -1)).sum(-2)


def _per_token(x: Tensor, c: int) -> Tensor:
    """Sum [n, c or C, C] over the steps of each token → [n,c,c]."""
    return x.unflatten(2, (c, -1)).unflatten(1, (c, -1)).sum((2, 4))


def _gate_gradient(*, pair: Tensor, seen: Tensor, ends: Tensor, whole: Tensor) -> Tensor:
    """dg [n,c] from the gradients, times value, of every decay that spans a gate.

    Row s and column r of `spans` hold what decays from token r (or the chunk's start) to token s (or its end). Gate t
    lies in the span when r < t ≤ s, so dg_t sums a rectangle. Summing it as such, and not as a difference of
    row and column sums, keeps small gradients exact beside large ones.
    """
    n, c, _ = pair.shape
    spans = pair.new_zeros(n, c + 1, c + 1)  # rows: tokens then the end; columns: the start then tokens
    spans[:, :c, 1:] = pair
    spans[:, :c, 0] = seen
    spans[:, c, 1:] = ends
    spans[:, c, 0] = whole
    below = spans.flip(1).cumsum(1).flip(1)[:, :c]  # Σ over s ≥ t
    return below.tril().sum(-1)  # column r of token t is at t−1 ≥ r, that is, index ≤ t


# Opaque operators, so that torch.compile sees one node in place of an unrolled loop over chunks.


@torch.library.custom_op("deltaproduct::chunkwise_forward", mutates_args=())
def chunkwise_forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, c: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.autocast(v.device.type, enabled=False):
        return _forward(Inputs(q, k, v, beta, g), initial_state, cu_seqlens, scale, c)


@chunkwise_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, c: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, length, _, heads, value_dim = v.shape
    dtype = compute_dtype(q, k, v, beta)
    state = (heads, k.shape[-1], value_dim)
    return (
        v.new_empty(batch, length, heads, value_dim),
        v.new_empty(num_sequences(batch, cu_seqlens), *state, dtype=dtype),
        v.new_empty(kept_states(batch, length, c, cu_seqlens), *state, dtype=dtype),
    )


@torch.library.custom_op("deltaproduct::chunkwise_backward", mutates_args=())
def chunkwise_backward(
    d_o: Tensor, d_final: Tensor | None, d_states: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor,
    g: Tensor | None, states: Tensor, cu_seqlens: Tensor | None, scale: float, c: int,
) -> Gradients:  # fmt: skip
    with torch.autocast(v.device.type, enabled=False):
        x = Inputs(q, k, v, beta, g)
        grads, d_initial = _backward(d_o, d_final, d_states, x, states, cu_seqlens, scale, c)
    d_g = v.new_empty(0) if grads.g is None else grads.g  # an operator's result cannot be None
    return grads.q, grads.k, grads.v, grads.beta, d_g, d_initial


@chunkwise_backward.register_fake
def _(
    d_o: Tensor, d_final: Tensor | None, d_states: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor,
    g: Tensor | None, states: Tensor, cu_seqlens: Tensor | None, scale: float, c: int,
) -> Gradients:  # fmt: skip
    return empty_gradients(q, k, v, beta, g, states, cu_seqlens, torch.preserve_format)


def _first(inputs: Tensors, kept: Sequence[Tensor], cotangents: Tensors, options: Sequence[Any]) -> Tensors:
    x, (d_o, d_final, d_states) = Arguments._make(inputs), cotangents
    d_o = cotangent_of_output(x, d_o)
    return as_given(x, chunkwise_backward(d_o, d_final, d_states, *x[:5], kept[0], x.cu_seqlens, *options))


def _again(inputs: Tensors, cotangents: Tensors, options: Sequence[Any]) -> Tensors:
    """Of (o, final state, states); no inputs are packed where states have a gradient."""
    scale, packed = options[0], Arguments._make(inputs).cu_seqlens is not None

    def formula(given: Tensors) -> tuple[Tensor, ...]:
        x = Arguments._make(given)
        if packed:
            return differentiable(*x, scale, False)
        o, final, starts = differentiable_starts(*x[:6], scale)
        return o, final, starts.flatten(0, 1)

    return transforms.gradients(formula, inputs, cotangents[:2] if packed else cotangents)


register_gradients(chunkwise_forward, _first, _again)


def chunkwise(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, qk_l2norm: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator in chunks; shapes as in `delta_product`. Returns (o [B,T,HV,V], final state [B or S,HV,K,V])."""
    q, k = normalised(q, k, qk_l2norm)
    o, final, _ = chunkwise_forward(q, k, v, beta, g, initial_state, cu_seqlens, scale, chunk_tokens(k.shape[2]))
    return o, final


def chunkwise_states(
    k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None, positions: list[int]
) -> Tensor:
    """The trace; shapes as in `delta_product_states`.

    The states at chunk boundaries come from the chunked scan; inside the chunks that hold a position the reference's
    own loop runs, over all of those chunks at once. So there is no second formula, and only C sequential steps.
    """
    batch, length, steps, _, _ = k.shape
    c = chunk_tokens(steps)
    heads = v.shape[3]
    q = k.new_zeros(batch, length, k.shape[3], k.shape[4])
    if transforms.active(k, v, beta, g, initial_state):
        _, final, states = differentiable_starts(q, k, v, beta, g, initial_state, 1.0)
    else:
        _, final, states = chunkwise_forward(q, k, v, beta, g, initial_state, None, 1.0, c)
        states = states.unflatten(0, (-1, batch))  # [chunks,B,HV,K,V]
    inside = sorted({p // (c * steps) for p in positions if p % (c * steps)})
    offsets = sorted({p % (c * steps) for p in positions if p % (c * steps)})
    found: dict[int, Tensor] = {}
    if inside:
        which = torch.tensor(inside, device=k.device)

        def pick(x: Tensor) -> Tensor:  # [B,T,...] → the chosen chunks as a batch [chosen·B,c,...]
            x = pad_time(x, -(-length // c) * c).unflatten(1, (-1, c))
            return x.index_select(1, which).transpose(0, 1).flatten(0, 1)

        start = states.index_select(0, which).flatten(0, 1)
        gate = None if g is None else pick(g)
        trace = reference_states(pick(k), pick(v), pick(beta), gate, start, offsets)
        trace = trace.unflatten(0, (len(inside), batch))  # [chosen,B,offsets,HV,K,V]
        for p in positions:
            chunk, offset = divmod(p, c * steps)
            if offset:
                found[p] = trace[inside.index(chunk), :, offsets.index(offset)]
    for p in positions:
        if p % (c * steps) == 0:
            found[p] = states[p // (c * steps)] if p < length * steps else final
    if not positions:
        return final.new_zeros(batch, 0, heads, *final.shape[2:])
    return torch.stack([found[p] for p in positions], dim=1)
