"""mLSTM: xLSTM's matrix memory, with an exponential input gate.

B batch · T tokens · D hidden size · H heads · K, V key and value dimension of a head.
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
from deltaproduct.layers.packing import real_tokens
from deltaproduct.layers.parts import GateProjection, LayerNorm
from deltaproduct.layers.sizes import require_positive, value_dim
from deltaproduct.layers.states import input_options, recurrent_dtype
from deltaproduct.ops.inputs import compute_dtype
from deltaproduct.ops.scan import gated_linear_attention, running_max

MAX_EXPONENT = 80.0  # exp of it is finite in float32; a lower bound beyond it makes the output 0 either way
NEVER = -1e30  # log of an input gate that is closed; finite, so that differences are


class MLSTMState(NamedTuple):
    """What one layer carries from token to token: C and n divided by exp(m)."""

    recurrent: Tensor  # [B,H,K,V], C
    normalizer: Tensor  # [B,H,K], n
    stabilizer: Tensor  # [B,H], m


def fill_forget(bias: Tensor) -> None:
    """Forget gates of H heads, all of which remember at first, as in the authors' code."""
    fill(bias, torch.linspace(3, 6, bias.numel(), dtype=bias.dtype, device=bias.device))


@dataclass(frozen=True, kw_only=True)
class MLSTMOptions(MixerOptions):
    """Options of `MLSTM`."""

    name: ClassVar[str] = "mlstm"

    num_heads: int = option(4, "H, heads", at_least=1)
    head_dim: int = option(16, "K, key dimension of a head", at_least=1)
    expand_v: float = option(1.0, "V/K, value over key dimension", positive=True)


class MLSTM(Mixer):
    """mLSTM (arXiv 2405.04517, equations 19–27, with the stabiliser of equations 15–17).

    Per head C_t = f_t C_{t−1} + i_t k_t v_tᵀ, n_t = f_t n_{t−1} + i_t k_t, h̃_t = C_tᵀ q_t / max(|n_tᵀ q_t|, 1), with
    i = exp(w_iᵀ x + b_i), f = sigmoid(w_fᵀ x + b_f) and k scaled by K^-½; the output is
    W_out (sigmoid(W_o x + b_o) ⊙ norm(h̃)). In the papers' table H_i = A(x_i) H_{i−1} + B(x_i): A = f I with f in (0,1),
    B = i k vᵀ. C and n are carried divided by exp(m), m_t = max(log f_t + m_{t−1}, log i_t), so that no gate overflows;
    outputs do not depend on m, which starts at 0.

    Args:
        hidden_size: D.
        num_heads: H.
        head_dim: K; V = head_dim · expand_v.
        expand_v: V / K.
        norm_eps: of the LayerNorm over each head's output.

    Raises:
        UsageError: a size is not positive.
    """

    options: ClassVar[type[MixerOptions]] = MLSTMOptions
    about: ClassVar[About] = About(
        "xLSTM's matrix memory, with an exponential input gate",
        "arXiv 2405.04517",
        "A = f_t I with f_t in (0,1), B = i_t k_t v_tᵀ",
        "no",
    )

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, expand_v: float = 1.0, norm_eps: float = 1e-5):
        super().__init__()
        require_positive(hidden_size=hidden_size, num_heads=num_heads, head_dim=head_dim, norm_eps=norm_eps)
        self.num_heads, self.head_dim, self.head_v_dim = num_heads, head_dim, value_dim(head_dim, expand_v)
        value_size = num_heads * self.head_v_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, value_size, bias=False)
        self.i_proj = GateProjection(hidden_size, num_heads, bias_init=nn.init.zeros_)
        self.f_proj = GateProjection(hidden_size, num_heads, bias_init=fill_forget)
        self.g_proj = nn.Linear(hidden_size, value_size)  # the paper's output gate o
        self.o_norm = LayerNorm(self.head_v_dim, norm_eps, bias=False)
        self.o_proj = nn.Linear(value_size, hidden_size, bias=False)

    @property
    def state_size(self) -> int:
        return self.num_heads * (self.head_dim * (self.head_v_dim + 1) + 1)

    def init_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> MLSTMState:
        dtype, device = input_options(self, dtype, device)
        shape = (batch_size, self.num_heads, self.head_dim, self.head_v_dim)
        recurrent = torch.zeros(shape, dtype=recurrent_dtype(dtype), device=device)
        return MLSTMState(recurrent, recurrent.new_zeros(shape[:3]), recurrent.new_zeros(shape[:2]))

    def mix(
        self, x: Tensor, state: MLSTMState, cu_seqlens: Tensor | None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, MLSTMState]:
        q, k, v, gate = (
            rearrange(proj(x), "b t (h k) -> b t h k", h=self.num_heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj, self.g_proj)
        )
        i, f = self.i_proj(x), self.f_proj(x)
        dtype = compute_dtype(i)
        log_i, log_f = i.to(dtype), F.logsigmoid(f.to(dtype))
        if lengths is not None:  # the forget gate is 1 and the input gate 0
            behind = ~real_tokens(x, lengths)[..., None]
            log_i, log_f = log_i.masked_fill(behind, NEVER), log_f.masked_fill(behind, 0)
        before, m = running_max(log_f, log_i, state.stabilizer, cu_seqlens)
        k = k.to(dtype) * (self.head_dim**-0.5 * (log_i - m).exp().unsqueeze(-1))
        v = F.pad(v.to(dtype), (0, 1), value=1.0)  # n is C's column for a value that is always 1
        start = torch.cat((state.recurrent, state.normalizer.unsqueeze(-1)), -1)
        o, end = gated_linear_attention(
            q, k, v, log_f + before - m, initial_state=start, cu_seqlens=cu_seqlens, scale=1.0
        )
        bound = (-m).clamp(max=MAX_EXPONENT).exp().unsqueeze(-1)  # the 1 of max(|nᵀq|, 1), divided by exp(m) too
        o = o[..., :-1] / torch.maximum(o[..., -1:].abs(), bound)
        o = (self.o_norm(o) * gate.to(dtype).sigmoid()).to(gate.dtype)
        if cu_seqlens is None:
            last = m[:, -1].clone() if x.shape[1] else state.stabilizer
        else:
            full = cu_seqlens[1:] > cu_seqlens[:-1]
            last = state.stabilizer.index_copy(0, full.nonzero()[:, 0], m[0, cu_seqlens[1:][full].long() - 1])
        y = self.o_proj(rearrange(o, "b t h v -> b t (h v)"))
        return y, MLSTMState(end[..., :-1].clone(), end[..., -1].clone(), last)

    def mix_aligned(self, x: Tensor, state: MLSTMState, lengths: Tensor) -> tuple[Tensor, MLSTMState]:
        return self.mix(x, state, None, lengths=lengths)
