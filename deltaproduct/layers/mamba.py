"""Mamba (S6): a diagonal state per channel; its step size, input and output direction depend on the token.

B batch · T tokens · D hidden size · I = expand · D inner size · N state size · R rank of the step sizes' projection.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltaproduct.layers.mamba2 import MambaState, initial_time_steps
from deltaproduct.layers.mixer import Mixer
from deltaproduct.layers.packing import real_tokens
from deltaproduct.layers.parts import ShortConvolution
from deltaproduct.layers.sizes import require_positive
from deltaproduct.ops.inputs import compute_dtype
from deltaproduct.ops.selective_scan import selective_scan


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
        self.conv_bias = nn.Parameter(torch.zeros(self.inner))
        self.x_proj = nn.Linear(self.inner, rank + 2 * ssm_state_size, bias=False)  # Δ, B, C
        self.dt_proj = nn.Linear(rank, self.inner)
        with torch.no_grad():
            self.dt_proj.bias.copy_(initial_time_steps(self.inner))
        self.A_log = nn.Parameter(torch.arange(1.0, ssm_state_size + 1).log().repeat(self.inner, 1))
        self.D = nn.Parameter(torch.ones(self.inner))
        self.out_proj = nn.Linear(self.inner, hidden_size, bias=False)

    @property
    def state_size(self) -> int:
        return self.inner * (self.ssm_state_size + self.conv1d.width - 1)

    def init_state(self, batch_size: int) -> MambaState:
        weight = self.in_proj.weight
        shape = (batch_size, self.inner, self.ssm_state_size)
        recurrent = torch.zeros(shape, dtype=compute_dtype(weight), device=weight.device)
        return MambaState(recurrent, self.conv1d.init_state(batch_size))

    def mix(
        self, x: Tensor, state: MambaState, cu_seqlens: Tensor | None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, MambaState]:
        n = self.ssm_state_size
        x, z = self.in_proj(x).chunk(2, -1)
        x, history = self.conv1d(x, state.history, cu_seqlens=cu_seqlens, lengths=lengths)
        x = F.silu(x + self.conv_bias)
        dt, b, c = self.x_proj(x).split((self.rank, n, n), -1)
        dtype = compute_dtype(x)
        # In float32 even under autocast: decays near 1 or −1 are what carries a state far.
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.dt_proj.weight.to(dtype), self.dt_proj.bias.to(dtype)
            dt = F.softplus(F.linear(dt.to(dtype), weight, bias))
            if lengths is not None:  # in no time nothing decays and nothing is written
                dt = dt.masked_fill(~real_tokens(x, lengths)[..., None], 0)
            x, a, b, c = x.to(dtype), -self.A_log.to(dtype).exp(), b.to(dtype), c.to(dtype)
            y, recurrent = selective_scan(
                x, dt, a, b, c, allow_neg_eigval=self.allow_neg_eigval, initial_state=state.recurrent,
                cu_seqlens=cu_seqlens,
            )  # fmt: skip
            y = y + self.D * x
        return self.out_proj(y.to(z.dtype) * F.silu(z)), MambaState(recurrent, history)

    def mix_aligned(self, x: Tensor, state: MambaState, lengths: Tensor) -> tuple[Tensor, MambaState]:
        return self.mix(x, state, None, lengths=lengths)
