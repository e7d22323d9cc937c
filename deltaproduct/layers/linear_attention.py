"""Linear attention: softmax's exponential replaced by a product of features, so that the past fits into one matrix.

B batch · T tokens · D hidden size · H heads · K, V key and value dimension of a head.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from deltaproduct.errors import UsageError
from deltaproduct.layers.mixer import About, Mixer
from deltaproduct.layers.options import MixerOptions, option
from deltaproduct.layers.packing import real_tokens
from deltaproduct.layers.parts import RMSNorm
from deltaproduct.layers.sizes import require_positive, value_dim
from deltaproduct.layers.states import input_options, recurrent_dtype
from deltaproduct.ops.inputs import compute_dtype
from deltaproduct.ops.scan import gated_linear_attention

FEATURE_MAPS = {"elu": lambda x: F.elu(x) + 1, "identity": lambda x: x}
NORMALIZER_EPS = 1e-6  # as in the authors' code: features of very negative keys are 0


class LinearAttentionState(NamedTuple):
    """What one layer carries from token to token; no normaliser with the identity."""

    recurrent: Tensor  # [B,H,K,V]
    normalizer: Tensor | None  # [B,H,K]


@dataclass(frozen=True, kw_only=True)
class LinearAttentionOptions(MixerOptions):
    """Options of `LinearAttention`."""

    name: ClassVar[str] = "linear_attention"

    num_heads: int = option(4, "H, heads", at_least=1)
    head_dim: int = option(16, "K, key dimension of a head", at_least=1)
    expand_v: float = option(1.0, "V/K, value over key dimension", positive=True)
    feature_map: str = option("elu", "φ of queries and keys: elu or identity", one_of=("elu", "identity"))


class LinearAttention(Mixer):
    """Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236, equations 18–20).

    Per head S_t = S_{t−1} + φ(k_t) v_tᵀ, z_t = z_{t−1} + φ(k_t), o_t = S_tᵀ φ(q_t) / z_tᵀ φ(q_t). In the papers' table
    H_i = A(x_i) H_{i−1} + B(x_i): A = I and B = φ(k) vᵀ, so that nothing is ever forgotten or turned.

    Args:
        hidden_size: D.
        num_heads: H.
        head_dim: K; V = head_dim · expand_v.
        expand_v: V / K.
        feature_map: "elu" for φ(x) = elu(x) + 1, normalised as above; or "identity", whose sums may be 0 and which has
            an RMSNorm over each head's output in place of the normaliser.
        norm_eps: of that RMSNorm.

    Raises:
        UsageError: a size is not positive, or there is no such feature map.
    """

    options: ClassVar[type[MixerOptions]] = LinearAttentionOptions
    about: ClassVar[About] = About(
        "sums of φ(k) vᵀ: nothing is ever forgotten or turned",
        "arXiv 2006.16236",
        "A = I, B = φ(k_t) v_tᵀ",
        "no",
    )

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        expand_v: float = 1.0,
        feature_map: str = "elu",
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        require_positive(hidden_size=hidden_size, num_heads=num_heads, head_dim=head_dim, norm_eps=norm_eps)
        if feature_map not in FEATURE_MAPS:
            raise UsageError(f"feature_map must be one of {', '.join(FEATURE_MAPS)}, not {feature_map!r}.")
        self.num_heads, self.head_dim, self.head_v_dim = num_heads, head_dim, value_dim(head_dim, expand_v)
        self.feature_map = feature_map
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_heads * self.head_v_dim, bias=False)
        if feature_map == "identity":
            self.o_norm = RMSNorm(self.head_v_dim, norm_eps)
        self.o_proj = nn.Linear(num_heads * self.head_v_dim, hidden_size, bias=False)

    @property
    def state_size(self) -> int:
        return self.num_heads * self.head_dim * (self.head_v_dim + (self.feature_map == "elu"))

    def init_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> LinearAttentionState:
        dtype, device = input_options(self, dtype, device)
        shape, dtype = (batch_size, self.num_heads, self.head_dim), recurrent_dtype(dtype)
        recurrent = torch.zeros(*shape, self.head_v_dim, dtype=dtype, device=device)
        normalizer = torch.zeros(shape, dtype=dtype, device=device) if self.feature_map == "elu" else None
        return LinearAttentionState(recurrent, normalizer)

    def mix(
        self, x: Tensor, state: LinearAttentionState, cu_seqlens: Tensor | None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, LinearAttentionState]:
        q, k, v = (
            rearrange(proj(x), "b t (h k) -> b t h k", h=self.num_heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        dtype, phi = compute_dtype(q), FEATURE_MAPS[self.feature_map]
        q, k = phi(q.to(dtype)), phi(k.to(dtype))
        if lengths is not None:  # a key of zeros adds nothing, to the normaliser neither
            k = k.masked_fill(~real_tokens(x, lengths)[..., None, None], 0)
        start = state.recurrent
        if state.normalizer is not None:  # z is the state's column for a value that is always 1
            v = F.pad(v, (0, 1), value=1.0)
            start = torch.cat((start, state.normalizer.unsqueeze(-1)), -1)
        scale = 1.0 if state.normalizer is not None else None  # a scale would cancel but for the eps
        o, end = gated_linear_attention(q, k, v.to(dtype), initial_state=start, cu_seqlens=cu_seqlens, scale=scale)
        if state.normalizer is None:
            o, new = self.o_norm(o), LinearAttentionState(end, None)
        else:
            o, total = o[..., :-1], o[..., -1:]
            o = o / (total + NORMALIZER_EPS)
            new = LinearAttentionState(end[..., :-1].clone(), end[..., -1].clone())
        return self.o_proj(rearrange(o, "b t h v -> b t (h v)").to(x.dtype)), new

    def mix_aligned(
        self, x: Tensor, state: LinearAttentionState, lengths: Tensor
    ) -> tuple[Tensor, LinearAttentionState]:
        return self.mix(x, state, None, lengths=lengths)
