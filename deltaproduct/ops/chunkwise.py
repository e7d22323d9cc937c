"""The recurrence in chunks of C Householder steps, as matrix products: any device that PyTorch knows.

The derivation of both passes, with these names, is in `ops/README.md`. In one chunk that starts from state S₀, with
W = diag(β) K and L = strict_tril(decay ⊙ K Wᵀ), the errors E (rows v − Sᵀk) solve (I + L) E = V − decay K S₀. Nothing
is inverted by squaring and β is never divided by, so correlated keys, β = 2 and β = 0 are all ordinary inputs.

The forward keeps its inputs and the state at every chunk boundary; the backward recomputes the rest, group of chunks
by group of chunks, so that the temporaries stay in cache and the cost stays linear in T.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deltaproduct.ops import transforms
from deltaproduct.ops.chunks import Chunks, Inputs, boundaries, chunk_tokens
from deltaproduct.ops.differentiable import differentiable, differentiable_starts
from deltaproduct.ops.inputs import MIN_LOG_DECAY, backward_dtype, compute_dtype, expand_heads, pad_time
from deltaproduct.ops.inverse import unit_lower_inverse
from deltaproduct.ops.reference import reference_states


@dataclass
class Terms:
    """A group's chunks in matrix form, n = rows × HV of them; c tokens and C = c·N steps in each. None where g is."""

    q: Tensor  # [n,c,K]
    k: Tensor  # [n,C,K]
    w: Tensor  # [n,C,K] what an error is written at: β k
    v: Tensor  # [n,C,V]
    beta: Tensor  # [n,C,1]
    pair: Tensor | None  # [n,c,c] exp(G_t − G_r) for r ≤ t: the decay between two tokens
    from_start: Tensor | None  # [n,c,1] exp(G_t): the decay since the chunk began
    to_end: Tensor | None  # [n,c,1] exp(G_c − G_t): the decay until the chunk ends
    whole: Tensor | None  # [n,1,1] exp(G_c)

    def per_step(self, decay: Tensor | None) -> Tensor | None:
        """[n,c,1] at token rate → [n,C,1] at step rate."""
        steps = self.k.shape[1] // self.q.shape[1]
        return decay if decay is None or steps == 1 else decay.repeat_interleave(steps, dim=1)


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
        return Terms(q, k, w, v, beta, None, None, None, None)
    # Differences of sums lose digits when a gate is very negative; in float64 what is lost is below float32's rounding.
    g = chunks.take(x.g, lo, hi).double().clamp(min=MIN_LOG_DECAY)
    total = _heads_first(g.unsqueeze(-1), heads).cumsum(1)
    ends = total[:, -1:]
    pair = (total - total.mT).tril().exp().tril()
    decays = (pair, total.exp(), (ends - total).exp(), ends.exp())
    return Terms(q, k, w, v, beta, *(y.to(dtype) for y in decays))


def _scaled(x: Tensor, decay: Tensor | None) -> Tensor:
    return x if decay is None else x * decay


def _step_pairs(pair: Tensor | None, rows: int, cols: int) -> Tensor | None:
    """Decay between tokens [n,c,c] repeated to [n,rows,cols], where rows and cols are c or C."""
    if pair is None:
        return None
    n, c, _ = pair.shape
    return pair[:, :, None, :, None].expand(n, c, rows // c, c, cols // c).reshape(n, rows, cols)


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
    if t.pair is not None:
        lower.mul_(_step_pairs(t.pair, steps, steps))
        attend.mul_(_step_pairs(t.pair, c, steps))
    return lower, attend


def _forward(
    x: Inputs, initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float, c: int
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, length, _, heads, value_dim), key_dim = x.v.shape, x.k.shape[-1]
    dtype = compute_dtype(x.q, x.k, x.v, x.beta)
    chunks = Chunks.of(x, cu_seqlens, c)
    o = x.v.new_empty(batch, length, heads, value_dim)
    states = x.v.new_empty(boundaries(batch, length, c, cu_seqlens), heads, key_dim, value_dim, dtype=dtype)
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
        seen, writes = _scaled(t.k, t.per_step(t.from_start)), _scaled(t.w, t.per_step(t.to_end))
        begin = states[chunks.starts[lo] : chunks.starts[hi]].flatten(0, 1)
        error = torch.empty_like(t.v)
        for rows in chunks.scan(lo, hi, heads):  # the only sequential part
            s = flat_state[: rows.stop - rows.start]
            begin[rows] = s
            torch.bmm(inverse[rows], torch.baddbmm(t.v[rows], seen[rows], s, alpha=-1), out=error[rows])
            if t.whole is not None:
                s.mul_(t.whole[rows])
            s.baddbmm_(writes[rows].mT, error[rows])
        out = (attend @ error).baddbmm_(_scaled(t.q, t.from_start), begin).mul_(scale)
        chunks.put(o, out.unflatten(0, (-1, heads)).transpose(1, 2), lo, hi)
    return o, chunks.as_given(state), states


def _backward(
    d_o: Tensor,
    d_final: Tensor | None,
    d_states: Tensor | None,
    x: Inputs,
    states: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    c: int,
) -> tuple[Inputs, Tensor]:
    heads, dtype = x.v.shape[3], backward_dtype(x.k, x.g, states.dtype)
    chunks = Chunks.of(x, cu_seqlens, c)
    grads = Inputs(*(None if y is None else torch.empty_like(y) for y in x))
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
        start_decay, end_decay = t.per_step(t.from_start), t.per_step(t.to_end)
        seen, writes, reads = _scaled(t.k, start_decay), _scaled(t.w, end_decay), _scaled(t.q, t.from_start)
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
            if t.whole is not None:
                ds.mul_(t.whole[rows])
            ds.add_(d_read[rows]).baddbmm_(seen[rows].mT, d_v[rows], alpha=-1)

        d_lower = (d_v @ error.mT).tril_(-1).neg_()
        d_attend = (do @ error.mT).mul_(_causal(t))
        d_seen, d_write, d_reads = (d_v @ begin.mT).neg_(), error @ d_end.mT, do @ begin.mT
        if x.g is not None:
            tokens = (-1, chunks.tokens, t.k.shape[1] // chunks.tokens)
            d_g = _gate_gradient(
                pair=_per_token(d_lower * lower, chunks.tokens) + _per_token(d_attend * attend, chunks.tokens),
                seen=(d_reads * reads).sum(-1) + (d_seen * seen).sum(-1).view(tokens).sum(-1),
                ends=(d_write * writes).sum(-1).view(tokens).sum(-1),
                whole=(begin * d_end * t.whole).sum((1, 2)),
            )
            chunks.put(grads.g, d_g.unflatten(0, (-1, heads)).transpose(1, 2), lo, hi)
            d_lower.mul_(_step_pairs(t.pair, t.k.shape[1], t.k.shape[1]))
            d_attend.mul_(_step_pairs(t.pair, chunks.tokens, t.k.shape[1]))
            d_seen, d_write, d_reads = d_seen * start_decay, d_write * end_decay, d_reads * t.from_start
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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    c: int,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(v.device.type, enabled=False):
        return _forward(Inputs(q, k, v, beta, g), initial_state, cu_seqlens, scale, c)


@chunkwise_forward.register_fake
def _(q, k, v, beta, g, initial_state, cu_seqlens, scale, c):
    batch, length, _, heads, value_dim = v.shape
    dtype = compute_dtype(q, k, v, beta)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = (heads, k.shape[-1], value_dim)
    return (
        v.new_empty(batch, length, heads, value_dim),
        v.new_empty(sequences, *state, dtype=dtype),
        v.new_empty(boundaries(batch, length, c, cu_seqlens), *state, dtype=dtype),
    )


@torch.library.custom_op("deltaproduct::chunkwise_backward", mutates_args=())
def chunkwise_backward(
    d_o: Tensor,
    d_final: Tensor | None,
    d_states: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    states: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    c: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(v.device.type, enabled=False):
        x = Inputs(q, k, v, beta, g)
        grads, d_initial = _backward(d_o, d_final, d_states, x, states, cu_seqlens, scale, c)
    d_g = v.new_empty(0) if grads.g is None else grads.g  # an operator's result cannot be None
    return grads.q, grads.k, grads.v, grads.beta, d_g, d_initial


@chunkwise_backward.register_fake
def _(d_o, d_final, d_states, q, k, v, beta, g, states, cu_seqlens, scale, c):
    sequences = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    d_g = v.new_empty(0) if g is None else torch.empty_like(g)
    return (*(torch.empty_like(x) for x in (q, k, v, beta)), d_g, states.new_empty(sequences, *states.shape[1:]))


class _Chunkwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, beta, g, initial_state, cu_seqlens, scale, c):
        ctx.set_materialize_grads(False)
        o, final, states = chunkwise_forward(q, k, v, beta, g, initial_state, cu_seqlens, scale, c)
        ctx.save_for_backward(q, k, v, beta, g, initial_state, cu_seqlens, states)
        ctx.scale, ctx.c = scale, c
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        return o, final, states

    @staticmethod
    def backward(ctx, d_o, d_final, d_states):
        *inputs, states = ctx.saved_tensors
        if transforms.beyond_first(d_o, d_final, d_states, *inputs):
            return *_transformable_backward(inputs, (d_o, d_final, d_states), ctx.scale), None, None
        q, k, v, beta, g, _, cu_seqlens = inputs
        if d_o is None:
            d_o = v.new_zeros(v.shape[0], v.shape[1], *v.shape[3:])
        d_q, d_k, d_v, d_beta, d_g, d_initial = chunkwise_backward(
            d_o, d_final, d_states, q, k, v, beta, g, states, cu_seqlens, ctx.scale, ctx.c
        )
        d_initial = None if ctx.initial_dtype is None else d_initial.to(ctx.initial_dtype)
        return d_q, d_k, d_v, d_beta, None if g is None else d_g, d_initial, None, None, None


def _transformable_backward(
    inputs: list[Tensor | None], cotangents: tuple[Tensor | None, ...], scale: float
) -> list[Tensor | None]:
    """The gradients of (o, final state, states) in plain operations; no inputs are packed where states have one."""

    def formula(q, k, v, beta, g, initial_state, cu_seqlens):
        if cu_seqlens is not None:
            return differentiable(q, k, v, beta, g, initial_state, cu_seqlens, scale)
        o, final, starts = differentiable_starts(q, k, v, beta, g, initial_state, scale)
        return o, final, starts.flatten(0, 1)

    return transforms.gradients(formula, inputs, cotangents if inputs[6] is None else cotangents[:2])


def chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The operator in chunks; shapes as in `delta_product`. Returns (o [B,T,HV,V], final state [B or S,HV,K,V])."""
    o, final, _ = _Chunkwise.apply(q, k, v, beta, g, initial_state, cu_seqlens, scale, chunk_tokens(k.shape[2]))
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
        _, final, states = _Chunkwise.apply(q, k, v, beta, g, initial_state, None, 1.0, c)
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
