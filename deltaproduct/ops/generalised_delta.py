"""The generalised delta rule of RWKV-7, in chunks, as matrix products: plain PyTorch, any device.

B batch · T tokens · H heads · K key and V value dimension · C tokens in a chunk.

    S_t = (diag(w_t) + u_t z_tᵀ) S_{t−1} + k_t v_tᵀ,   o_t = S_tᵀ q_t,   w_t = exp(g_t)

Inside a chunk that begins with S₀, put y_t = S_{t−1}ᵀ z_t, what token t reads before it writes, and W_t = w_1 ⊙ … ⊙
w_t. Every token then adds u_t y_tᵀ + k_t v_tᵀ, which later decays shrink channel by channel:

    S_t = diag(W_t) S₀ + Σ_{s≤t} diag(W_t / W_s) (u_s y_sᵀ + k_s v_sᵀ)

This, read by z_{t+1}, is a triangular system for the rows y_t of Y [C,V]; read by q_t, it is the output:

    (I − A) Y = Z̃ S₀ + A' V           A_ts = z_tᵀ diag(W_{t−1} / W_s) u_s for s < t, else 0;   Z̃_t = W_{t−1} ⊙ z_t
    O = Q̃ S₀ + P Y + P' V             P_ts = q_tᵀ diag(W_t / W_s) u_s for s ≤ t, else 0;       Q̃_t = W_t ⊙ q_t

where A' and P' have k in place of u. The state at the chunk's end is one product per chunk away from that at its start:

    S_C = M S₀ + N                    M = diag(W_C) + Ũᵀ (I − A)⁻¹ Z̃;   Ũ_s = (W_C / W_s) ⊙ u_s, K̃ likewise
                                      N = Ũᵀ (I − A)⁻¹ A' V + K̃ᵀ V

so that only S ← M S + N is sequential, T/C steps; the rest is done for all chunks at once.

W_t / W_s is formed as (W_t / W_m) · (W_m / W_s), with the token m in the middle of the chunk as the point of reference:
A, A', P and P' together are then one matrix product. Whichever m is taken, a factor's relative error is that of its
exponent, a few roundings of C |g|, since no decay is subtracted from another; m decides how large the factors get. The
middle has the least, exp(|g| (C/2 + 1)): 150 for RWKV-7, where the first or the last token would give 1e4.
"""

import torch
from einops import rearrange
from torch import Tensor

from deltaproduct.ops.inputs import pad_time
from deltaproduct.ops.inverse import differentiable_inverse

CHUNK_TOKENS = 16


def generalised_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, u: Tensor, z: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """S_t = (diag(exp g_t) + u_t z_tᵀ) S_{t−1} + k_t v_tᵀ and o_t = S_tᵀ q_t (arXiv 2503.14456, section 4).

    A token with g = 0, u = 0 and k = 0 leaves the state as it is. In the papers' table H_i = A(x_i) H_{i−1} + B(x_i):
    A = diag(exp g) + u zᵀ, B = k vᵀ.

    Args:
        q, k, u, z: [B,T,H,K].
        v: [B,T,H,V].
        g: [B,T,H,K], log decay from −8 to 0 a token (RWKV-7's is above −0.61): exp(9 |g|) must be in float32's range.
        state: [B,H,K,V] before the first token; all tensors are of one dtype, float32 or float64.

    Returns:
        (o [B,T,H,V], state after the last token [B,H,K,V]).
    """
    batch, length, heads = v.shape[:3]
    if length == 0:
        return v, state
    c = min(CHUNK_TOKENS, length)

    def cut(x: Tensor) -> Tensor:
        return rearrange(pad_time(x, -(-length // c) * c), "b (n c) h k -> (n b h) c k", c=c)

    g, v = cut(g), cut(v)
    total = g.cumsum(1)  # log W
    middle = total[:, c // 2, None].detach()  # nothing depends on it, so that no gradient has to go through it
    whole = total[:, -1:]
    since, fade = total - middle, (middle - total).exp()
    reads = torch.cat((cut(z) * (since - g).exp(), cut(q) * since.exp()), 1)
    writes = torch.cat((cut(u) * fade, cut(k) * fade), 1)
    later = torch.ones(c, c, dtype=torch.bool, device=v.device).triu()
    not_read = torch.cat((later, later.triu(1))).tile(1, 2)
    before, p = (reads @ writes.mT).masked_fill(not_read, 0).split(c, 1)  # [A A'] and [P P']
    a, a_v = before.split(c, 2)
    z, q = (reads * middle.exp()).split(c, 1)
    u, k = (writes * (whole - middle).exp()).split(c, 1)
    inverse = differentiable_inverse(-a)
    y_state, y_v = inverse @ z, inverse @ (a_v @ v)  # Y = y_state S₀ + y_v
    m = torch.baddbmm(torch.diag_embed(whole[:, 0].exp()), u.mT, y_state)
    n = torch.baddbmm(k.mT @ v, u.mT, y_v)
    s, starts = state.flatten(0, 1), []
    for m_, n_ in zip(m.split(batch * heads), n.split(batch * heads), strict=True):
        starts.append(s)
        s = torch.baddbmm(n_, m_, s)
    start = torch.cat(starts)
    y = torch.baddbmm(y_v, y_state, start)
    o = torch.baddbmm(q @ start, p, torch.cat((y, v), 1))
    return rearrange(o, "(n b h) c v -> b (n c) h v", b=batch, h=heads)[:, :length], s.unflatten(0, (batch, heads))
