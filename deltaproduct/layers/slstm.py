"""The xLSTM's sLSTM: exponential gates, a normaliser, and recurrent weights inside each head.

B batch · T tokens · D hidden size · H heads · K head size, cells per head · S packed sequences.
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
from deltaproduct.layers.parts import ShortConvolution
from deltaproduct.layers.sizes import require_positive
from deltaproduct.layers.states import input_options, recurrent_dtype
from deltaproduct.ops.inputs import compute_dtype

EMPTY = -1e30  # log of the largest weight in a memory that holds nothing; finite, so that differences are


class SLSTMState(NamedTuple):
    """What one layer carries; the history is None without the short convolution."""

    cell: Tensor  # c [B,H,K], times exp(−m)
    normaliser: Tensor  # n [B,H,K], times exp(−m)
    hidden: Tensor  # h [B,H,K]
    stabiliser: Tensor  # m [B,H,K]
    history: Tensor | None  # [B,conv_size−1,D]


@dataclass(frozen=True, kw_only=True)
class SLSTMOptions(MixerOptions):
    """Options of `SLSTM`."""

    name: ClassVar[str] = "slstm"

    num_heads: int = option(4, "H, heads", at_least=1)
    head_dim: int = option(16, "K, size of a head", at_least=1)
    use_short_conv: bool = option(True, "causal convolution on the input of the input and forget gates")
    conv_size: int = option(4, "width of that convolution", at_least=1)


class SLSTM(Mixer):
    """The sLSTM (arXiv 2405.04517, section 2.2; stabilised as in equations 15–17 and appendix A.1), in H heads of K:

    c_t = f_t c_{t−1} + i_t z_t,  n_t = f_t n_{t−1} + i_t,  h_t = o_t c_t / n_t,  with z = tanh(z̃), i = exp(ĩ),
    f = σ(f̃), o = σ(õ) and each of z̃, ĩ, f̃, õ = W x_t + R h_{t−1} + b, where R is block-diagonal: a K×K block per head.
    Then y_t = o_proj(groupnorm(h_t)), one group a head. As in the paper's block, the short convolution feeds only i, f.

    It has no row in the papers' table H_i = A(x_i) H_{i−1} + B(x_i): the gates see h_{t−1}, so that the step is not
    linear in the state and time cannot be parallelised. With R = 0 it would be diagonal.

    Args:
        hidden_size: D.
        num_heads: H.
        head_dim: K.
        use_short_conv: a causal convolution of width conv_size, then silu, before the input and forget gates.
        norm_eps: of the group norm.

    Raises:
        UsageError: a size or norm_eps is not positive.
    """

    options: ClassVar[type[MixerOptions]] = SLSTMOptions
    about: ClassVar[About] = About(
        "xLSTM's sLSTM: exponential gates and recurrent weights inside each head",
        "arXiv 2405.04517",
        "none: the gates see the last output, so that the step is not linear in the state",
        "-",
    )
    drawn_after: ClassVar[str | None] = "if_proj"

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
        self.num_heads, self.head_dim = num_heads, head_dim
        self.use_short_conv, self.norm_eps = use_short_conv, norm_eps
        width = num_heads * head_dim
        self.zo_proj = nn.Linear(hidden_size, 2 * width, bias=False)
        self.if_proj = nn.Linear(hidden_size, 2 * width, bias=False)
        self.recurrent = nn.Parameter(torch.empty(num_heads, head_dim, 4 * head_dim))  # R, transposed; z, o, i, f
        self.bias = nn.Parameter(torch.empty(num_heads, 4 * head_dim))
        self.norm_weight = nn.Parameter(torch.empty(num_heads, head_dim))
        self.reset_parameters()
        if use_short_conv:
            self.conv1d = ShortConvolution(hidden_size, conv_size)
        self.o_proj = nn.Linear(width, hidden_size, bias=False)

    def reset_parameters(self) -> None:
        """Draw R uniformly within ±1/√K; the forget gates are spread over σ(5) … σ(−7), as in the authors' code."""
        size, bias = self.head_dim, self.bias
        nn.init.uniform_(self.recurrent, -(size**-0.5), size**-0.5)
        # In their code the spacing also depends on the block. Some cells remember for a hundred tokens, some forget at
        # once. Without the latter a cell can count, but parity, which overwrites at every token, is not learnt within
        # thousands of steps (docs/LOG.md).
        # (The device is named because transformers, which builds models on "meta", moves linspace alone to the CPU.)
        forget = torch.linspace(5, -7, size, dtype=bias.dtype, device=bias.device)
        fill(bias, torch.cat((forget.new_zeros(3 * size), forget)).repeat(self.num_heads, 1))
        nn.init.ones_(self.norm_weight)

    @property
    def state_size(self) -> int:
        floats = 4 * self.num_heads * self.head_dim
        if self.use_short_conv:
            floats += self.conv1d.state_size
        return floats

    def init_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> SLSTMState:
        dtype, device = input_options(self, dtype, device)
        shape = (batch_size, self.num_heads, self.head_dim)
        cell, normaliser, hidden = (torch.zeros(shape, dtype=recurrent_dtype(dtype), device=device) for _ in range(3))
        history = self.conv1d.init_state(batch_size, dtype, device) if self.use_short_conv else None
        return SLSTMState(cell, normaliser, hidden, torch.full_like(cell, EMPTY), history)

    def mix(
        self, x: Tensor, state: SLSTMState, cu_seqlens: Tensor | None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, SLSTMState]:
        conv, history = x, None
        if self.use_short_conv:
            conv, history = self.conv1d(x, state.history, cu_seqlens=cu_seqlens, lengths=lengths)
            conv = F.silu(conv)
        inputs = torch.cat((self.zo_proj(x), self.if_proj(conv)), -1)
        inputs = rearrange(inputs, "b t (g h k) -> b t h (g k)", g=4, h=self.num_heads)
        real = None if lengths is None else real_tokens(x, lengths)
        if cu_seqlens is not None:
            inputs, real = unpack(inputs, cu_seqlens)
        with torch.autocast(x.device.type, enabled=False):  # in float32: rounding would add up from token to token
            dtype = compute_dtype(x)
            h, state = self.run(inputs.to(dtype) + self.bias.to(dtype), state, real)
            h = h if cu_seqlens is None or real is None else pack(h, real)
            h = F.layer_norm(h, (self.head_dim,), eps=self.norm_eps) * self.norm_weight  # a group a head
        y = self.o_proj(rearrange(h, "b t h k -> b t (h k)").to(x.dtype))
        return y, state._replace(history=history)

    def mix_aligned(self, x: Tensor, state: SLSTMState, lengths: Tensor) -> tuple[Tensor, SLSTMState]:
        return self.mix(x, state, None, lengths=lengths)

    def run(self, inputs: Tensor, state: SLSTMState, real: Tensor | None = None) -> tuple[Tensor, SLSTMState]:
        """W x + b as inputs [B,T,H,4K] → h [B,T,H,K] and the state; where real [B,T] is False, it stays as it is."""
        c, n, h, m = (s.to(inputs.dtype) for s in state[:4])
        recurrent, outputs = self.recurrent.to(inputs.dtype), []
        h = h.transpose(0, 1)  # [H,B,K], as bmm wants it
        c, n, m = c.transpose(0, 1), n.transpose(0, 1), m.transpose(0, 1)
        for t, now in enumerate(inputs.permute(1, 2, 0, 3).unbind(0)):
            z, o, i, f = torch.baddbmm(now, h, recurrent).chunk(4, -1)
            log_f = F.logsigmoid(f) + m
            new_m = torch.maximum(log_f, i)
            forget, write = torch.exp(log_f - new_m), torch.exp(i - new_m)
            new_c = forget * c + write * torch.tanh(z)
            new_n = forget * n + write
            new_h = torch.sigmoid(o) * new_c / new_n
            if real is None:
                c, n, h, m = new_c, new_n, new_h, new_m
            else:
                keep = real[:, t, None]
                pairs = ((new_c, c), (new_n, n), (new_h, h), (new_m, m))
                c, n, h, m = (torch.where(keep, new, old) for new, old in pairs)
            outputs.append(h)
        if not outputs:
            return inputs.new_zeros(*inputs.shape[:3], self.head_dim), state
        h, c, n, m = (s.transpose(0, 1) for s in (h, c, n, m))
        return torch.stack(outputs).permute(2, 0, 1, 3), SLSTMState(c, n, h, m, None)
