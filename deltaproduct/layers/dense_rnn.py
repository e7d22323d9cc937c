"""A linear RNN whose transition is any matrix that the input asks for: the most that a linear recurrence can say.

B batch · T tokens · D hidden size · H heads · K, V sizes of a head's state · S packed sequences.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from deltaproduct.layers.initialization import fill
from deltaproduct.layers.mixer import About, Mixer
from deltaproduct.layers.options import MixerOptions, option
from deltaproduct.layers.packing import pack, real_tokens, unpack
from deltaproduct.layers.parts import BiasedLinear, RMSNorm, ShortConvolution
from deltaproduct.layers.sizes import require_positive
from deltaproduct.layers.states import input_options, recurrent_dtype
from deltaproduct.ops.inputs import compute_dtype, l2_normalise


def matrix_scan(transition: Tensor, write: Tensor, q: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """H_t = A_t H_{t−1} + B_t and o_t = H_tᵀ q_t, for transitions that have no structure to make use of.

    transition A [B,T,H,K,K], write B [B,T,H,K,V], q [B,T,H,K], state H_0 [B,H,K,V] → (o [B,T,H,V], H_T [B,H,K,V]).

    Time is cut into about √T blocks. The prefixes [A_t⋯A_1 | H_t from nothing] of all blocks are formed together, then
    the blocks are chained: 2√T steps over wide tensors in place of T over narrow ones, for K/V + 1 times the products.
    """
    batch, tokens, heads, key_size, _ = transition.shape
    if tokens == 0:
        return write.new_zeros(batch, 0, heads, write.shape[-1]), state
    size = math.isqrt(tokens - 1) + 1
    blocks = -(-tokens // size)
    missing = blocks * size - tokens
    if missing:  # tokens that leave the state as it is
        eye = torch.eye(key_size, dtype=transition.dtype, device=transition.device)
        transition = torch.cat((transition, eye.expand(batch, missing, heads, -1, -1)), 1)
        write, q = F.pad(write, (0, 0) * 3 + (0, missing)), F.pad(q, (0, 0) * 2 + (0, missing))
    transition = rearrange(transition, "b (n t) h i j -> t (b h n) i j", t=size).contiguous()
    write = rearrange(write, "b (n t) h k v -> t (b h n) k v", t=size)
    prefixes = [torch.cat((transition[0], write[0]), -1)]
    for a, b in zip(transition[1:].unbind(0), F.pad(write[1:], (key_size, 0)).unbind(0), strict=True):
        prefixes.append(torch.baddbmm(b, a, prefixes[-1]))
    totals = rearrange(prefixes[-1], "(b h n) k c -> n b h k c", b=batch, h=heads)
    starts = []
    for total in totals.unbind(0):
        starts.append(state)
        state = total[..., :key_size] @ state + total[..., key_size:]
    # A query is a row: it reads the prefix first, so that no token's state is ever formed.
    rows = rearrange(q, "b (n t) h k -> t (b h n) 1 k", t=size)
    read = rearrange(rows @ torch.stack(prefixes), "t (b h n) 1 c -> b h n t c", b=batch, h=heads)
    o = read[..., :key_size] @ torch.stack(starts, 2) + read[..., key_size:]
    return rearrange(o, "b h n t v -> b (n t) h v")[:, :tokens], state


def norm_bound(a: Tensor) -> Tensor:
    """√(‖A‖₁ ‖A‖_∞) ≥ ‖A‖₂ for A [...,K,K] → [...,1,1]; 1 for permutation matrices, signed or not."""
    size = a.abs()
    return (size.sum(-1).amax(-1) * size.sum(-2).amax(-1)).sqrt()[..., None, None]


def fill_identities(bias: Tensor, size: int) -> None:
    """Make a bias [H·K·K] the identities of H heads of size K: at first a state is kept."""
    eye = torch.eye(size, dtype=bias.dtype, device=bias.device)
    fill(bias, eye.expand(bias.numel() // size**2, -1, -1).flatten())


class DenseLinearRNNState(NamedTuple):
    """What one layer carries; the history is None without the short convolution."""

    recurrent: Tensor  # [B,H,K,K]
    history: Tensor | None  # [B,conv_size−1,D]


@dataclass(frozen=True, kw_only=True)
class DenseLinearRNNOptions(MixerOptions):
    """Options of `DenseLinearRNN`."""

    name: ClassVar[str] = "dense_linear_rnn"

    num_heads: int = option(4, "H, heads", at_least=1)
    head_dim: int = option(16, "K, size of a head", at_least=1)
    use_short_conv: bool = option(True, "causal convolution on the input of the projections")
    conv_size: int = option(4, "width of that convolution", at_least=1)


class DenseLinearRNN(Mixer):
    """A linear RNN with dense input-dependent transitions, as in arXiv 2404.08819, section 5 (input-dependent S4), here
    with a matrix for a state; in the papers' table H_i = A(x_i) H_{i−1} + B(x_i) with

    A(x_t) = M_t / max(1, √(‖M_t‖₁ ‖M_t‖_∞)),  M_t = a_proj(x_t) [K,K] per head,  B(x_t) = k_t v_tᵀ.

    The divisor bounds the spectral norm: no product of transitions can grow, and permutation matrices are left as they
    are, so that one head can follow any group of permutations of K points. Every token costs 2K³ products a head.

    Args:
        hidden_size: D.
        num_heads: H.
        head_dim: K; a head's state is K×K.
        use_short_conv: a causal convolution of width conv_size, then silu, before all projections.
        norm_eps: of the RMSNorm over each head's output.

    Raises:
        UsageError: a size or norm_eps is not positive.
    """

    options: ClassVar[type[MixerOptions]] = DenseLinearRNNOptions
    about: ClassVar[About] = About(
        "a linear RNN with any matrix as its transition",
        "arXiv 2404.08819",
        "A = M_t / max(1, √(‖M_t‖₁ ‖M_t‖_∞)), B = k_t v_tᵀ",
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
        self.q_proj = nn.Linear(hidden_size, width, bias=False)
        self.k_proj = nn.Linear(hidden_size, width, bias=False)
        self.v_proj = nn.Linear(hidden_size, width, bias=False)
        self.a_proj = BiasedLinear(hidden_size, width * head_dim, bias_init=partial(fill_identities, size=head_dim))
        if use_short_conv:
            self.conv1d = ShortConvolution(hidden_size, conv_size)
        self.o_norm = RMSNorm(head_dim, norm_eps)
        self.o_proj = nn.Linear(width, hidden_size, bias=False)

    @property
    def state_size(self) -> int:
        floats = self.num_heads * self.head_dim**2
        if self.use_short_conv:
            floats += self.conv1d.state_size
        return floats

    def init_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> DenseLinearRNNState:
        dtype, device = input_options(self, dtype, device)
        shape = (batch_size, self.num_heads, self.head_dim, self.head_dim)
        recurrent = torch.zeros(shape, dtype=recurrent_dtype(dtype), device=device)
        history = self.conv1d.init_state(batch_size, dtype, device) if self.use_short_conv else None
        return DenseLinearRNNState(recurrent, history)

    def mix(
        self, x: Tensor, state: DenseLinearRNNState, cu_seqlens: Tensor | None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, DenseLinearRNNState]:
        history = None
        real = None if lengths is None else real_tokens(x, lengths)
        if self.use_short_conv:
            x, history = self.conv1d(x, state.history, cu_seqlens=cu_seqlens, lengths=lengths)
            x = F.silu(x)
        if cu_seqlens is not None:
            x, real = unpack(x, cu_seqlens)
        q, k, v = (
            rearrange(proj(x), "b t (h k) -> b t h k", h=self.num_heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        a = rearrange(self.a_proj(x), "b t (h i j) -> b t h i j", h=self.num_heads, i=self.head_dim)
        with torch.autocast(x.device.type, enabled=False):  # states are float32 at least
            dtype = compute_dtype(a)
            a = a.to(dtype)
            a = a / norm_bound(a).clamp(min=1)
            q, k, v = l2_normalise(q), l2_normalise(k), v.to(dtype)
            write = k[..., :, None] * v[..., None, :]
            if real is not None:  # what stands behind the shorter sequences leaves their states alone
                at = real[:, :, None, None, None]
                a = torch.where(at, a, torch.eye(self.head_dim, dtype=dtype, device=a.device))
                write = torch.where(at, write, 0)
            o, recurrent = matrix_scan(a, write, q, state.recurrent.to(dtype))
        o = o if cu_seqlens is None or real is None else pack(o, real)
        y = self.o_proj(rearrange(self.o_norm(o).to(x.dtype), "b t h k -> b t (h k)"))
        return y, DenseLinearRNNState(recurrent, history)

    def mix_aligned(self, x: Tensor, state: DenseLinearRNNState, lengths: Tensor) -> tuple[Tensor, DenseLinearRNNState]:
        return self.mix(x, state, None, lengths=lengths)
