"""RWKV-7's time mixing: token shift, decay per channel, and a removal key apart from the one that writes.

B batch · T tokens · D hidden size · H heads · K head size · R low rank · S packed sequences.
"""

import math
from collections.abc import Callable
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
from deltaproduct.layers.parts import GateProjection
from deltaproduct.layers.sizes import require_positive
from deltaproduct.layers.states import input_options, recurrent_dtype
from deltaproduct.ops.generalised_delta import generalised_delta_rule
from deltaproduct.ops.inputs import compute_dtype, l2_normalise

SLOWEST = math.exp(-0.5)  # −log of the strongest decay, exp(−e^(−½)) = 0.545
HEAD_EPS = 64e-5  # of the norm over a head's output, as in the paper


class RWKV7State(NamedTuple):
    """What one layer carries."""

    recurrent: Tensor  # [B,H,K,K], the transpose of the paper's wkv: rows are keys
    previous: Tensor  # [B,D], the last token's input


class LowRank(nn.Module):
    """up(activation(down(x))) + bias: D → R → size, in float32 or better; without a bias where `bias_init` is None."""

    def __init__(
        self,
        hidden_size: int,
        rank: int,
        size: int,
        activation: nn.Module,
        bias_init: Callable[[Tensor], object] | None = None,
    ):
        super().__init__()
        self.down = GateProjection(hidden_size, rank, bias=False)
        self.activation = activation
        self.up = GateProjection(rank, size, bias=bias_init is not None, bias_init=bias_init)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.activation(self.down(x)))


def fill_decays(bias: Tensor, head_dim: int) -> None:
    """Logits of w [H·K]: a head's channels keep between nearly all and little of themselves from token to token."""
    values = torch.linspace(-6, 0, head_dim, dtype=bias.dtype, device=bias.device)
    fill(bias, values.repeat(bias.numel() // head_dim))


@dataclass(frozen=True, kw_only=True)
class RWKV7Options(MixerOptions):
    """Options of `RWKV7`."""

    name: ClassVar[str] = "rwkv7"

    num_heads: int = option(4, "H, heads", at_least=1)
    head_dim: int = option(16, "K, size of a head", at_least=1)


class RWKV7(Mixer):
    """RWKV-7's time mixing (arXiv 2503.14456, section 4); in the papers' table H_i = A(x_i) H_{i−1} + B(x_i) with

    A(x_t) = diag(w_t) − (a_t ⊙ κ̂_t) κ̂_tᵀ,  B(x_t) = k̃_t v_tᵀ  (H is the transpose of the paper's wkv), where
    w_t = exp(−e^(−½) σ(d_t)), κ̂_t = k_t ⊙ ξ of norm 1, k̃_t = k_t ⊙ (1 + (a_t − 1) ⊙ α) and a_t in [0,1]. Every input
    is x_t mixed with x_{t−1}; d, a and the gate g are low-rank. With p_t = norm(H_tᵀ r_t) + (r_t · (ρ ⊙ k̃_t)) v_t per
    head, y_t = o_proj(g_t ⊙ p_t). The value residual from the first layer is left out: a mixer sees no other layer.
    `generalised_delta_rule` runs it, in chunks.

    Args:
        hidden_size: D.
        num_heads: H.
        head_dim: K; a head's state is K×K.

    Raises:
        UsageError: a size is not positive.
    """

    options: ClassVar[type[MixerOptions]] = RWKV7Options
    about: ClassVar[About] = About(
        "a decay per channel, and a removal key apart from the one that writes",
        "arXiv 2503.14456",
        "A = diag(w_t) − (a_t ⊙ κ̂_t) κ̂_tᵀ, B = k̃_t v_tᵀ",
        "yes",
    )
    takes_norm_eps: ClassVar[bool] = False

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int):
        super().__init__()
        require_positive(hidden_size=hidden_size, num_heads=num_heads, head_dim=head_dim)
        self.num_heads, self.head_dim = num_heads, head_dim
        width = num_heads * head_dim
        rank = 32 * max(1, round(1.8 * hidden_size**0.5 / 32))  # the paper's ranks grow about as √D
        self.mix_weight = nn.Parameter(torch.empty(6, hidden_size))  # μ of r, w, k, v, a, g
        self.r_proj = nn.Linear(hidden_size, width, bias=False)
        self.k_proj = nn.Linear(hidden_size, width, bias=False)
        self.v_proj = nn.Linear(hidden_size, width, bias=False)
        self.w_lora = LowRank(hidden_size, rank, width, nn.Tanh(), bias_init=partial(fill_decays, head_dim=head_dim))
        self.a_lora = LowRank(hidden_size, rank, width, nn.Identity(), bias_init=nn.init.zeros_)
        self.g_lora = LowRank(hidden_size, rank, width, nn.Sigmoid())
        self.removal = nn.Parameter(torch.empty(num_heads, head_dim))  # ξ
        self.replacement = nn.Parameter(torch.empty(num_heads, head_dim))  # α
        self.bonus = nn.Parameter(torch.empty(num_heads, head_dim))  # ρ
        self.norm_weight = nn.Parameter(torch.empty(num_heads, head_dim))
        self.norm_bias = nn.Parameter(torch.empty(num_heads, head_dim))
        self.o_proj = nn.Linear(width, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Constants: half of every input is the last token's; keys are removed a little less than they were written."""
        nn.init.constant_(self.mix_weight, 0.5)
        nn.init.constant_(self.removal, 0.85)
        nn.init.ones_(self.replacement)
        nn.init.constant_(self.bonus, 0.1)
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)

    @property
    def state_size(self) -> int:
        return self.num_heads * self.head_dim**2 + self.mix_weight.shape[1]

    def init_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> RWKV7State:
        dtype, device = input_options(self, dtype, device)
        shape = (batch_size, self.num_heads, self.head_dim, self.head_dim)
        recurrent = torch.zeros(shape, dtype=recurrent_dtype(dtype), device=device)
        return RWKV7State(recurrent, torch.zeros(batch_size, self.mix_weight.shape[1], dtype=dtype, device=device))

    def mix(
        self, x: Tensor, state: RWKV7State, cu_seqlens: Tensor | None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, RWKV7State]:
        real = None if lengths is None else real_tokens(x, lengths)
        if cu_seqlens is not None:
            x, real = unpack(x, cu_seqlens)
        extended = torch.cat((state.previous[:, None].to(x.dtype), x), 1)
        if real is None:
            previous = extended[:, -1].clone()  # a view would keep all tokens in memory
        else:
            previous = extended[torch.arange(len(x), device=x.device), real.sum(1)]
        shift = extended[:, :-1] - x
        mixed = (x + shift * mu for mu in self.mix_weight.to(x.dtype))
        layers = (self.r_proj, self.w_lora, self.k_proj, self.v_proj, self.a_lora, self.g_lora)
        projected = [layer(part) for layer, part in zip(layers, mixed, strict=True)]
        out_dtype = projected[0].dtype
        with torch.autocast(x.device.type, enabled=False):  # states are float32 at least
            dtype = compute_dtype(x)
            r, d, k, v, a, g = (rearrange(p.to(dtype), "b t (h k) -> b t h k", h=self.num_heads) for p in projected)
            log_w, a = -SLOWEST * torch.sigmoid(d), torch.sigmoid(a)
            removal = l2_normalise(k * self.removal)
            k = k * (1 + (a - 1) * self.replacement)
            u, write = -a * removal, k
            if real is not None:  # what stands behind the shorter sequences leaves their states alone
                log_w, u, write = (torch.where(real[:, :, None, None], x, 0) for x in (log_w, u, k))
            o, recurrent = generalised_delta_rule(r, write, v, log_w, u, removal, state.recurrent.to(dtype))
            o = F.layer_norm(o, (self.head_dim,), eps=HEAD_EPS) * self.norm_weight + self.norm_bias
            p = (o + (r * self.bonus * k).sum(-1, keepdim=True) * v) * g
        p = p if cu_seqlens is None or real is None else pack(p, real)
        return self.o_proj(rearrange(p, "b t h k -> b t (h k)").to(out_dtype)), RWKV7State(recurrent, previous)

    def mix_aligned(self, x: Tensor, state: RWKV7State, lengths: Tensor) -> tuple[Tensor, RWKV7State]:
        return self.mix(x, state, None, lengths=lengths)
