"""Mamba (S6): a diagonal state per channel; its step size, input and output direction depend on the token.

B batch · T tokens · D hidden size · I = expand · D inner size · N state size · R rank of the step sizes' projection.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltaproduct.layers.initialization import draw_time_steps, fill
from deltaproduct.layers.mamba2 import MambaState
from deltaproduct.layers.mixer import About, Mixer
from deltaproduct.layers.options import MixerOptions, option
from deltaproduct.layers.packing import real_tokens
from deltaproduct.layers.parts import GateProjection, ShortConvolution, biased_silu
from deltaproduct.layers.sizes import require_positive
from deltaproduct.layers.states import input_options, recurrent_dtype
from deltaproduct.ops.inputs import compute_dtype
from deltaproduct.ops.selective_scan import selective_scan


@dataclass(frozen=True, kw_only=True)
class MambaOptions(MixerOptions):
    """Options of `Mamba`."""

    name: ClassVar[str] = "mamba"

    expand: int = option(2, "inner size over D", at_least=1)
    ssm_state_size: int = option(16, "N, states per channel", at_least=1)
    time_step_rank: int | None = option(None, "rank of the step sizes' projection; None: D/16, rounded up", at_least=1)
    conv_size: int = option(4, "width of the causal convolution", at_least=1)
    allow_neg_eigval: bool = option(True, "decays in [-1,1], in place of [0,1]")


class Mamba(Mixer):
    """Mamba's selective state space layer (arXiv 2312.00752, section 3, algorithm 2).

    Per channel h_t = a_t ⊙ h_{t−1} + Δ_t x_t B_t, y_t = C_t · h_t + d x_t, with h in R^N, a = exp(−Δ exp(A_log)) and
    Δ = softplus(W_Δ W_x x + bias); x passes through a short convolution and silu; the output is W_out (y ⊙ silu(z)).
    In the papers' table H_i = A(x_i) H_{i−1} + B(x_i): A = diag(a) with entries in (0,1), B = Δ x B_t. With
    `allow_neg_eigval`, a = 2 exp(−Δ exp(A_log)) − 1 (arXiv 2411.12537, section 4).

    Args:
        hidden_size: D.
        expand: I / D.
        ssm_state_size: N.
        time_step_rank: R; None means D / 16, rounded up.
        conv_size: width of the convolution.
        allow_neg_eigval: decays in [−1,1] in place of [0,1].

    Raises:
        UsageError: a size is not positive.
    """

    options: ClassVar[type[MixerOptions]] = MambaOptions
    about: ClassVar[About] = About(
        "selective state spaces: a diagonal state per channel",
        "arXiv 2312.00752",
        "A = diag(a_t), B = Δ_t x_t B_t, for each channel",
        "allow_neg_eigval",
    )
    takes_norm_eps: ClassVar[bool] = False

    def __init__(
        self,
        hidden_size: int,
        expand: int = 2,
        ssm_state_size: int = 16,
        time_step_rank: int | None = None,
        conv_size: int = 4,
        allow_neg_eigval: bool = True,
    ):
        super().__init__()
        rank = math.ceil(hidden_size / 16) if time_step_rank is None else time_step_rank
        require_positive(hidden_size=hidden_size, expand=expand, ssm_state_size=ssm_state_size, time_step_rank=rank)
        self.inner, self.rank, self.ssm_state_size = expand * hidden_size, rank, ssm_state_size
        self.allow_neg_eigval = allow_neg_eigval
        self.in_proj = nn.Linear(hidden_size, 2 * self.inner, bias=False)  # x, z
        self.conv1d = ShortConvolution(self.inner, conv_size)
        self.conv_bias = nn.Parameter(torch.empty(self.inner))
        self.x_proj = nn.Linear(self.inner, rank + 2 * ssm_state_size, bias=False)  # Δ, B, C
        self.dt_proj = GateProjection(rank, self.inner, bias_init=draw_time_steps)
        self.A_log = nn.Parameter(torch.empty(self.inner, ssm_state_size))
        self.D = nn.Parameter(torch.empty(self.inner))
        self.out_proj = nn.Linear(self.inner, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Rates 1 … N in every channel, as in the paper; no bias, and the input passed on as it is."""
        nn.init.zeros_(self.conv_bias)
        rates = torch.arange(1, self.ssm_state_size + 1, dtype=self.A_log.dtype, device=self.A_log.device)
        fill(self.A_log, rates.log().repeat(self.inner, 1))
        nn.init.ones_(self.D)

    @property
    def state_size(self) -> int:
        return self.inner * (self.ssm_state_size + self.conv1d.width - 1)

    def init_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> MambaState:
        dtype, device = input_options(self, dtype, device)
        shape = (batch_size, self.inner, self.ssm_state_size)
        recurrent = torch.zeros(shape, dtype=recurrent_dtype(dtype), device=device)
        return MambaState(recurrent, self.conv1d.init_state(batch_size, dtype, device))

    def mix(
        self, x: Tensor, state: MambaState, cu_seqlens: Tensor | None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, MambaState]:
        n = self.ssm_state_size
        x, z = self.in_proj(x).chunk(2, -1)
        x, history = self.conv1d(x, state.history, cu_seqlens=cu_seqlens, lengths=lengths)
        x = biased_silu(x, self.conv_bias)
        dt, b, c = self.x_proj(x).split((self.rank, n, n), -1)
        dtype, dt = compute_dtype(x), self.dt_proj(dt)
        # In float32 even under autocast: decays near 1 or −1 are what carries a state far.
        with torch.autocast(x.device.type, enabled=False):
            dt = F.softplus(dt.to(dtype))
            if lengths is not None:  # in no time nothing decays and nothing is written
                dt = dt.masked_fill(~real_tokens(x, lengths)[..., None], 0)
            x, a, b, c = x.to(dtype), -self.A_log.to(dtype).exp(), b.to(dtype), c.to(dtype)
            y, recurrent = selective_scan(
                x, dt, a, b, c, allow_neg_eigval=self.allow_neg_eigval, initial_state=state.recurrent,
                cu_seqlens=cu_seqlens,
            )  # fmt: skip
            if x.shape[1] > 1:
                recurrent = recurrent.clone()  # off the engine it is a slice of the states of all tokens
            y = y + self.D * x
        return self.out_proj(y.to(z.dtype) * F.silu(z)), MambaState(recurrent, history)

    def mix_aligned(self, x: Tensor, state: MambaState, lengths: Tensor) -> tuple[Tensor, MambaState]:
        return self.mix(x, state, None, lengths=lengths)
