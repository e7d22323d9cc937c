"""Mamba-2: a decay per head and token, one input and one output direction that all heads share.

B batch · T tokens · D hidden size · I = expand · D inner size · H = I / P heads of P channels · N state size.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from deltaproduct.errors import UsageError
from deltaproduct.layers.initialization import draw_rates, draw_time_steps
from deltaproduct.layers.mixer import About, Mixer
from deltaproduct.layers.options import MixerOptions, option
from deltaproduct.layers.packing import real_tokens
from deltaproduct.layers.parts import RMSNorm, ShortConvolution, biased_silu
from deltaproduct.layers.sizes import require_positive
from deltaproduct.layers.states import input_options, recurrent_dtype
from deltaproduct.ops.inputs import compute_dtype
from deltaproduct.ops.scan import gated_linear_attention


class MambaState(NamedTuple):
    """What a layer of Mamba or Mamba-2 carries from token to token."""

    recurrent: Tensor  # Mamba-2: [B,H,N,P]; Mamba: [B,I,N]
    history: Tensor  # of the convolution, [B,conv_size−1,channels]


@dataclass(frozen=True, kw_only=True)
class Mamba2Options(MixerOptions):
    """Options of `Mamba2`."""

    name: ClassVar[str] = "mamba2"

    head_dim: int = option(16, "P, channels of a head; a divisor of expand · D", at_least=1)
    expand: int = option(2, "inner size over D", at_least=1)
    ssm_state_size: int = option(16, "N, states per channel", at_least=1)
    conv_size: int = option(4, "width of the causal convolution", at_least=1)
    allow_neg_eigval: bool = option(True, "decays in [-1,1], in place of [0,1]")


class Mamba2(Mixer):
    """Mamba-2's SSD layer (arXiv 2405.21060, sections 5–7).

    Per head S_t = a_t S_{t−1} + B_t (Δ_t x_t)ᵀ, y_t = S_tᵀ C_t + d x_t, with Δ = softplus(W_Δ u + dt_bias) and
    a = exp(−Δ exp(A_log)); x, B and C pass through a short convolution and silu; the output is W_out norm(y ⊙ silu(z)).
    In the papers' table H_i = A(x_i) H_{i−1} + B(x_i): A = a I, B = B_t (Δ_t x_t)ᵀ. With `allow_neg_eigval`,
    a = 2 exp(−Δ exp(A_log)) − 1 (arXiv 2411.12537, section 4).

    Args:
        hidden_size: D.
        head_dim: P, a divisor of I.
        expand: I / D.
        ssm_state_size: N.
        conv_size: width of the convolution.
        allow_neg_eigval: decays in [−1,1] in place of [0,1].
        norm_eps: of the gated RMSNorm.

    Raises:
        UsageError: a size is not positive, or head_dim does not divide I.
    """

    options: ClassVar[type[MixerOptions]] = Mamba2Options
    about: ClassVar[About] = About(
        "a decay per head and token, directions that all heads share",
        "arXiv 2405.21060",
        "A = a_t I, B = B_t (Δ_t x_t)ᵀ",
        "allow_neg_eigval",
    )
    drawn_after: ClassVar[str | None] = "conv1d"

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        expand: int = 2,
        ssm_state_size: int = 16,
        conv_size: int = 4,
        allow_neg_eigval: bool = True,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        require_positive(
            hidden_size=hidden_size, head_dim=head_dim, expand=expand, ssm_state_size=ssm_state_size, norm_eps=norm_eps
        )
        inner = expand * hidden_size
        if inner % head_dim:
            raise UsageError(f"head_dim={head_dim} must divide expand={expand} times hidden_size={hidden_size}.")
        self.num_heads, self.head_dim, self.ssm_state_size = inner // head_dim, head_dim, ssm_state_size
        self.allow_neg_eigval = allow_neg_eigval
        self.channels = inner + 2 * ssm_state_size
        self.in_proj = nn.Linear(hidden_size, inner + self.channels + self.num_heads, bias=False)  # z; x, B, C; Δ
        self.conv1d = ShortConvolution(self.channels, conv_size)
        self.conv_bias = nn.Parameter(torch.empty(self.channels))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.reset_parameters()
        self.norm = RMSNorm(inner, norm_eps)
        self.out_proj = nn.Linear(inner, hidden_size, bias=False)

    def reset_parameters(self) -> None:
        """Draw step sizes and decays as the paper's code does; no bias, and the input passed on as it is."""
        nn.init.zeros_(self.conv_bias)
        draw_time_steps(self.dt_bias)
        draw_rates(self.A_log)
        nn.init.ones_(self.D)

    @property
    def state_size(self) -> int:
        floats = self.num_heads * self.head_dim * self.ssm_state_size
        return floats + (self.conv1d.width - 1) * self.channels

    def init_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> MambaState:
        dtype, device = input_options(self, dtype, device)
        shape = (batch_size, self.num_heads, self.ssm_state_size, self.head_dim)
        recurrent = torch.zeros(shape, dtype=recurrent_dtype(dtype), device=device)
        return MambaState(recurrent, self.conv1d.init_state(batch_size, dtype, device))

    def mix(
        self, x: Tensor, state: MambaState, cu_seqlens: Tensor | None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, MambaState]:
        inner, n = self.num_heads * self.head_dim, self.ssm_state_size
        z, xbc, dt = self.in_proj(x).split((inner, self.channels, self.num_heads), -1)
        xbc, history = self.conv1d(xbc, state.history, cu_seqlens=cu_seqlens, lengths=lengths)
        values, k, q = biased_silu(xbc, self.conv_bias).split((inner, n, n), -1)
        values = rearrange(values, "b t (h p) -> b t h p", h=self.num_heads)
        # In float32 even under autocast: decays near 1 or −1 are what carries a state far.
        dtype = compute_dtype(dt)
        dt = F.softplus(dt.to(dtype) + self.dt_bias.to(dtype))
        if lengths is not None:  # in no time nothing decays and nothing is written
            dt = dt.masked_fill(~real_tokens(x, lengths)[..., None], 0)
        a = (-dt * self.A_log.to(dtype).exp()).exp()
        if self.allow_neg_eigval:
            a = 2 * a - 1
        o, recurrent = gated_linear_attention(
            q.unsqueeze(2), k.unsqueeze(2), values * dt.unsqueeze(-1), a=a, initial_state=state.recurrent,
            cu_seqlens=cu_seqlens, scale=1.0,
        )  # fmt: skip
        o = rearrange(o + self.D[:, None] * values, "b t h p -> b t (h p)")
        return self.out_proj(self.norm(o.to(z.dtype) * F.silu(z))), MambaState(recurrent, history)

    def mix_aligned(self, x: Tensor, state: MambaState, lengths: Tensor) -> tuple[Tensor, MambaState]:
        return self.mix(x, state, None, lengths=lengths)
