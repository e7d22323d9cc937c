"""Titans' neural long-term memory: a gradient step per token on a memory, with momentum and forgetting.

B batch · T tokens · D hidden size · H heads · K head size · C tokens in a chunk · S packed sequences.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from deltaproduct.layers.initialization import fill
from deltaproduct.layers.mixer import About, Mixer
from deltaproduct.layers.options import MixerOptions, option
from deltaproduct.layers.packing import pack, real_tokens, unpack
from deltaproduct.layers.parts import GateProjection, RMSNorm, ShortConvolution
from deltaproduct.layers.sizes import require_positive
from deltaproduct.layers.states import input_options, recurrent_dtype
from deltaproduct.ops.inputs import compute_dtype, l2_normalise, pad_time
from deltaproduct.ops.inverse import differentiable_inverse

CHUNK_TOKENS = 16


def memory_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    momentum: Tensor,
    beta: Tensor,
    state: Tensor,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = η_t S_{t−1} + β_t k_t (v_t − M_{t−1}ᵀ k_t)ᵀ, M_t = a_t M_{t−1} + S_t and o_t = M_tᵀ q_t, in chunks.

    q, k, v [B,T,H,K]; keep a, momentum η and β [B,T,H]; state [B,H,2,K,K], M_0 and S_0; real [B,T] bool: the other
    tokens leave the state as it is → (o [B,T,H,K], state).

    Token s writes β_s k_s e_sᵀ with the error e_s = v_s − M_{s−1}ᵀ k_s. How much of that is in M_t is a number c_ts
    that the gates alone decide, like c_tM and c_tS, how much of M_0 and S_0 is: each source by itself obeys the
    recurrence above. With L_ts = c_{t−1,s} β_s k_t·k_s for s < t, the errors of a chunk solve

        (I + L) E = V − K̃ [M_0; S_0]           row t of K̃ is [c_{t−1,M} k_t, c_{t−1,S} k_t]

    and the state at the chunk's end is one product away from that at its start, as in `ops/generalised_delta.py`. All
    gates are at least 0, so that every c is a sum of positive terms: nothing cancels.
    """
    batch, length, heads, size = q.shape
    if length == 0:
        return v, state
    c = min(CHUNK_TOKENS, length)

    def cut(x: Tensor) -> Tensor:
        return rearrange(pad_time(x, -(-length // c) * c), "b (n c) h ... -> (n b h) c ...", c=c)

    counts = q.new_ones(batch, length) if real is None else real.to(q.dtype)
    counts = cut(counts[..., None].expand(-1, -1, heads))  # 0 behind a sequence's end
    keep, momentum = (torch.where(counts > 0, cut(x), 1) for x in (keep, momentum))
    q, k, v, beta = cut(q), cut(k), cut(v), cut(beta) * counts

    sources = torch.eye(c + 2, dtype=q.dtype, device=q.device).unsqueeze(1)  # the chunk's tokens, M_0, S_0
    in_m, in_s = (source.expand(len(q), -1) for source in sources[c:])
    rows = [in_m]
    gates = (x.unsqueeze(-1).unbind(1) for x in (keep, momentum, counts))
    for a, eta, count, source in zip(*gates, sources, strict=False):
        in_s = eta * in_s + source
        in_m = torch.addcmul(a * in_m, count, in_s)
        rows.append(in_m)
    weights = torch.stack(rows, 1)
    before, after, end = weights[:, :-1], weights[:, 1:], torch.stack((in_m, in_s), 1)

    written = k * beta.unsqueeze(-1)
    pairs = torch.cat((k, q), 1) @ written.mT
    lower, attend = (pairs * torch.cat((before, after), 1)[..., :c]).split(c, 1)
    seen, read = ((w[..., c:, None] * x.unsqueeze(-2)).flatten(2) for w, x in ((before, k), (after, q)))
    write = (end[:, :, :c, None] * written.unsqueeze(1)).permute(0, 1, 3, 2).flatten(1, 2)  # [n,2K,C]
    inverse = differentiable_inverse(lower)
    e_state, e_v = inverse @ seen, inverse @ v  # E = e_v − e_state [M_0; S_0]
    eye = torch.eye(size, dtype=q.dtype, device=q.device)
    kept = (end[:, :, None, c:, None] * eye[:, None, :]).flatten(3).flatten(1, 2)
    step = torch.baddbmm(kept, write, e_state, alpha=-1)
    h, starts = state.flatten(2, 3).flatten(0, 1), []
    for step_, write_ in zip(step.split(batch * heads), (write @ e_v).split(batch * heads), strict=True):
        starts.append(h)
        h = torch.baddbmm(write_, step_, h)
    start = torch.cat(starts)
    o = torch.baddbmm(read @ start, attend, torch.baddbmm(e_v, e_state, start, alpha=-1))
    o = rearrange(o, "(n b h) c v -> b (n c) h v", b=batch, h=heads)[:, :length]
    return o, h.unflatten(0, (batch, heads)).unflatten(2, (2, size))


def fill_gates(bias: Tensor) -> None:
    """Logits of α, η and ρ [3·H]: at first α ≈ 0.02, so that a memory lasts, and η = ρ = ½."""
    alpha = torch.full((bias.numel() // 3,), -4.0, dtype=bias.dtype, device=bias.device)
    fill(bias, torch.cat((alpha, alpha.new_zeros(2 * len(alpha)))))


class TitansState(NamedTuple):
    """What one layer carries; the history is None without the short convolution."""

    recurrent: Tensor  # [B,H,2,K,K]: the memory M and the momentum S, transposes of the paper's: rows are keys
    history: Tensor | None  # [B,conv_size−1,3·H·K]


@dataclass(frozen=True, kw_only=True)
class TitansOptions(MixerOptions):
    """Options of `Titans`."""

    name: ClassVar[str] = "titans"

    num_heads: int = option(4, "H, heads", at_least=1)
    head_dim: int = option(16, "K, size of a head", at_least=1)
    use_short_conv: bool = option(True, "causal convolution on q, k and v")
    conv_size: int = option(4, "width of that convolution", at_least=1)


class Titans(Mixer):
    """Titans' neural long-term memory (arXiv 2501.00663, section 3), with a linear memory: a K×K matrix per head.

    M_t = (1 − α_t) M_{t−1} + S_t,  S_t = η_t S_{t−1} − θ_t ∇ℓ_t(M_{t−1}),  ℓ_t(M) = ‖Mᵀ k_t − v_t‖²,  o_t = M_tᵀ q_t

    with α, η and ρ = σ(gate_proj(x_t)) in (0,1), each a number per head, and θ = (1 − α/2) ρ: the paper leaves the
    gates' ranges open, and up to there no eigenvalue of a step leaves the unit circle. q, k and v pass through a
    convolution and silu; q and k have norm 1. Then y_t = o_proj(silu(g_proj(x_t)) ⊙ norm(o_t)). M and S start at 0. A
    deep memory (an MLP), the persistent tokens and the paper's combinations with attention are not part of this layer.

    In the papers' table H_i = A(x_i) H_{i−1} + B(x_i) it is linear in M and S jointly, with β = 2θ: H = [M; S],

    A(x_t) = [[(1 − α_t) I − β_t k_t k_tᵀ, η_t I], [−β_t k_t k_tᵀ, η_t I]],  B(x_t) = [β_t k_t v_tᵀ; β_t k_t v_tᵀ].

    η = α = 0 is DeltaNet with β in (0,2), and η = 0 Gated DeltaNet but for the error, which here is that of the memory
    before it decays. With momentum no norm bounds a product of different A(x_t). `memory_scan` runs it, in chunks.

    Args:
        hidden_size: D.
        num_heads: H.
        head_dim: K.
        use_short_conv: a causal convolution of width conv_size on q, k and v.
        norm_eps: of the RMSNorm over each head's output.

    Raises:
        UsageError: a size or norm_eps is not positive.
    """

    options: ClassVar[type[MixerOptions]] = TitansOptions
    about: ClassVar[About] = About(
        "a gradient step per token on a linear memory, with momentum and forgetting",
        "arXiv 2501.00663",
        "A = [[(1 − α_t) I − β_t k_t k_tᵀ, η_t I], [−β_t k_t k_tᵀ, η_t I]], "
        "B = [β_t k_t v_tᵀ; β_t k_t v_tᵀ], H = [M; S]",
        "yes",
    )

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        use_short_conv: bool = True,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        require_positive(hidden_size=hidden_size, num_heads=num_heads, head_dim=head_dim, norm_eps=norm_eps)
        self.num_heads, self.head_dim, self.use_short_conv = num_heads, head_dim, use_short_conv
        width = num_heads * head_dim
        self.qkv_proj = nn.Linear(hidden_size, 3 * width, bias=False)
        self.gate_proj = GateProjection(hidden_size, 3 * num_heads, bias_init=fill_gates)
        if use_short_conv:
            self.conv1d = ShortConvolution(3 * width, conv_size)
        self.g_proj = nn.Linear(hidden_size, width, bias=False)
        self.o_norm = RMSNorm(head_dim, norm_eps)
        self.o_proj = nn.Linear(width, hidden_size, bias=False)

    @property
    def state_size(self) -> int:
        floats = 2 * self.num_heads * self.head_dim**2
        if self.use_short_conv:
            floats += self.conv1d.state_size
        return floats

    def init_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> TitansState:
        dtype, device = input_options(self, dtype, device)
        shape = (batch_size, self.num_heads, 2, self.head_dim, self.head_dim)
        recurrent = torch.zeros(shape, dtype=recurrent_dtype(dtype), device=device)
        history = self.conv1d.init_state(batch_size, dtype, device) if self.use_short_conv else None
        return TitansState(recurrent, history)

    def mix(
        self, x: Tensor, state: TitansState, cu_seqlens: Tensor | None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, TitansState]:
        qkv, history = self.qkv_proj(x), None
        real = None if lengths is None else real_tokens(x, lengths)
        if self.use_short_conv:
            qkv, history = self.conv1d(qkv, state.history, cu_seqlens=cu_seqlens, lengths=lengths)
        inputs = torch.cat((F.silu(qkv), self.gate_proj(x)), -1)
        if cu_seqlens is not None:
            inputs, real = unpack(inputs, cu_seqlens)
        qkv, gates = inputs.split((qkv.shape[-1], 3 * self.num_heads), -1)
        with torch.autocast(x.device.type, enabled=False):  # states are float32 at least
            dtype = compute_dtype(x)
            q, k, v = rearrange(qkv.to(dtype), "b t (i h k) -> i b t h k", i=3, h=self.num_heads)
            alpha, eta, theta = torch.sigmoid(gates.to(dtype)).chunk(3, -1)
            q, k, recurrent = l2_normalise(q), l2_normalise(k), state.recurrent.to(dtype)
            o, recurrent = memory_scan(q, k, v, 1 - alpha, eta, (2 - alpha) * theta, recurrent, real)
        o = o if cu_seqlens is None or real is None else pack(o, real)
        o = self.o_norm(o) * F.silu(rearrange(self.g_proj(x), "b t (h k) -> b t h k", h=self.num_heads))
        return self.o_proj(rearrange(o.to(x.dtype), "b t h k -> b t (h k)")), TitansState(recurrent, history)

    def mix_aligned(self, x: Tensor, state: TitansState, lengths: Tensor) -> tuple[Tensor, TitansState]:
        return self.mix(x, state, None, lengths=lengths)
