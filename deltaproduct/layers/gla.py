"""Gated linear attention: a decay for every key channel, which depends on the token.

B batch · T tokens · D hidden size · H heads · K, V key and value dimension of a head.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from deltaproduct.layers.mixer import About, Mixer
from deltaproduct.layers.options import MixerOptions, option
from deltaproduct.layers.packing import real_tokens
from deltaproduct.layers.parts import GateProjection, RMSNorm
from deltaproduct.layers.sizes import require_positive, value_dim
from deltaproduct.layers.states import input_options, recurrent_dtype
from deltaproduct.ops.inputs import compute_dtype
from deltaproduct.ops.scan import gated_linear_attention


class GatedLinearAttentionState(NamedTuple):
    """What one layer carries from token to token."""

    recurrent: Tensor  # [B,H,K,V]


@dataclass(frozen=True, kw_only=True)
class GatedLinearAttentionOptions(MixerOptions):
    """Options of `GatedLinearAttention`."""

    name: ClassVar[str] = "gla"

    num_heads: int = option(4, "H, heads", at_least=1)
    head_dim: int = option(16, "K, key dimension of a head", at_least=1)
    expand_v: float = option(1.0, "V/K, value over key dimension", positive=True)
    gate_low_rank_dim: int = option(16, "rank of the gate's projection", at_least=1)
    gate_logit_normalizer: int = option(16, "root that is taken of the gate", at_least=1)


class GatedLinearAttention(Mixer):
    """GLA (arXiv 2312.06635, section 4.4).

    Per head S_t = diag(α_t) S_{t−1} + k_t v_tᵀ with α_t = sigmoid(W₂ W₁ x_t + b)^(1/16), o_t = K^-½ S_tᵀ q_t, and the
    output W_o (silu(W_g x_t) ⊙ norm(o_t)). In the papers' table H_i = A(x_i) H_{i−1} + B(x_i): A = diag(α) with
    entries in (0,1), B = k vᵀ.

    Args:
        hidden_size: D.
        num_heads: H.
        head_dim: K; V = head_dim · expand_v.
        expand_v: V / K.
        gate_low_rank_dim: rank of the gate's projection W₂ W₁.
        gate_logit_normalizer: 16 in α's root: the larger, the closer α is to 1.
        norm_eps: of the RMSNorm over each head's output.

    Raises:
        UsageError: a size is not positive.
    """

    options: ClassVar[type[MixerOptions]] = GatedLinearAttentionOptions
    about: ClassVar[About] = About(
        "gated linear attention: a decay for every key channel",
        "arXiv 2312.06635",
        "A = diag(α_t) with entries in (0,1), B = k_t v_tᵀ",
        "no",
    )

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        expand_v: float = 1.0,
        gate_low_rank_dim: int = 16,
        gate_logit_normalizer: int = 16,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        require_positive(
            hidden_size=hidden_size, num_heads=num_heads, head_dim=head_dim, gate_low_rank_dim=gate_low_rank_dim,
            gate_logit_normalizer=gate_logit_normalizer, norm_eps=norm_eps,
        )  # fmt: skip
        self.num_heads, self.head_dim, self.head_v_dim = num_heads, head_dim, value_dim(head_dim, expand_v)
        self.gate_logit_normalizer = gate_logit_normalizer
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_heads * self.head_v_dim, bias=False)
        self.gk_proj = nn.Sequential(
            GateProjection(hidden_size, gate_low_rank_dim, bias=False),
            GateProjection(gate_low_rank_dim, num_heads * head_dim),
        )
        self.g_proj = nn.Linear(hidden_size, num_heads * self.head_v_dim, bias=False)
        self.o_norm = RMSNorm(self.head_v_dim, norm_eps)
        self.o_proj = nn.Linear(num_heads * self.head_v_dim, hidden_size, bias=False)

    @property
    def state_size(self) -> int:
        return self.num_heads * self.head_dim * self.head_v_dim

    def init_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> GatedLinearAttentionState:
        dtype, device = input_options(self, dtype, device)
        shape = (batch_size, self.num_heads, self.head_dim, self.head_v_dim)
        return GatedLinearAttentionState(torch.zeros(shape, dtype=recurrent_dtype(dtype), device=device))

    def mix(
        self, x: Tensor, state: GatedLinearAttentionState, cu_seqlens: Tensor | None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, GatedLinearAttentionState]:
        q, k, v, gate, logits = (
            rearrange(proj(x), "b t (h k) -> b t h k", h=self.num_heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.gk_proj)
        )
        # In float32 even under autocast: α is so near 1 that bfloat16 would round most of its range to 1.
        g = F.logsigmoid(logits.to(compute_dtype(logits))) / self.gate_logit_normalizer
        if lengths is not None:  # neither a decay nor a key
            behind = ~real_tokens(x, lengths)[..., None, None]
            k, g = k.masked_fill(behind, 0), g.masked_fill(behind, 0)
        o, recurrent = gated_linear_attention(q, k, v, g, initial_state=state.recurrent, cu_seqlens=cu_seqlens)
        o = self.o_norm(o) * F.silu(gate)
        return self.o_proj(rearrange(o, "b t h v -> b t (h v)")), GatedLinearAttentionState(recurrent)

    def mix_aligned(
        self, x: Tensor, state: GatedLinearAttentionState, lengths: Tensor
    ) -> tuple[Tensor, GatedLinearAttentionState]:
        return self.mix(x, state, None, lengths=lengths)
