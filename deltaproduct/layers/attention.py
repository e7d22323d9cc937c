"""The Transformer's causal softmax attention with rotary positions, and the cache of keys and values that it carries.

B batch · T tokens · D hidden size · L cached tokens · H query heads · G key/value heads · K head size · S sequences.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from deltaproduct.errors import UsageError
from deltaproduct.layers.mixer import About, Mixer
from deltaproduct.layers.options import MixerOptions, option
from deltaproduct.layers.packing import pack, unpack
from deltaproduct.layers.sizes import require_positive
from deltaproduct.layers.states import input_options
from deltaproduct.ops.inputs import compute_dtype, expand_heads


class AttentionState(NamedTuple):
    """The cache: what every earlier token left. A row with fewer tokens than the others ends in zeros."""

    keys: Tensor  # [B,L,G,K], already rotated
    values: Tensor  # [B,L,G,K]
    lengths: Tensor  # [B] int64, tokens of each sequence

    def trimmed(self) -> Self:
        """Without the columns that no sequence reaches, as they are left when rows are taken from a batch."""
        longest = int(self.lengths.max()) if self.lengths.numel() else 0
        if longest == self.keys.shape[1]:
            return self
        # Copies: slices would keep the columns in memory.
        return self._replace(keys=self.keys[:, :longest].clone(), values=self.values[:, :longest].clone())


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864): x [B,T,H,K] at positions [B,T].

    Channels i and i + K/2 turn together, by position · theta^(−2i/K): the pairing of Llama's checkpoints.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    # In float64, because a float32 product is off by a tenth of a turn after a few million tokens.
    angles = (positions[..., None] * frequencies)[:, :, None]
    dtype = compute_dtype(x)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    first, second = x[..., :half].to(dtype), x[..., half:].to(dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class AttentionOptions(MixerOptions):
    """Options of `Attention`."""

    name: ClassVar[str] = "attention"

    num_heads: int = option(4, "H, query/key heads", at_least=1)
    head_dim: int = option(16, "K, key dimension of a head", at_least=1)
    num_kv_heads: int | None = option(None, "key/value heads; None: as many as query heads", at_least=1)
    rope_theta: float | None = option(10_000.0, "base of the rotary positions; None: no positions", positive=True)


class Attention(Mixer):
    """Causal softmax attention (arXiv 1706.03762, section 3.2) with rotary positions and grouped key/value heads
    (arXiv 2305.13245): o_t = Σ_{s≤t} softmax_s(k_s · q_t / √K) v_s.

    It has no row in the papers' table H_i = A(x_i) H_{i−1} + B(x_i): the softmax's denominator depends on the query and
    on all keys at once, so no state of fixed size holds what later tokens need. Its state is the cache and grows.

    Args:
        hidden_size: D.
        num_heads: H, query heads.
        head_dim: K; even where there are rotary positions.
        num_kv_heads: G, a divisor of num_heads; None means num_heads.
        rope_theta: base of the rotary positions; None means that there are none.

    Raises:
        UsageError: a size is not positive, num_kv_heads does not divide num_heads, or head_dim cannot be rotated.
    """

    options: ClassVar[type[MixerOptions]] = AttentionOptions
    about: ClassVar[About] = About(
        "causal softmax attention with rotary positions",
        "arXiv 1706.03762",
        "none: the softmax looks at all keys at once, and no state of fixed size holds them",
        "-",
    )
    takes_norm_eps: ClassVar[bool] = False

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        rope_theta: float | None = 10_000.0,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        require_positive(hidden_size=hidden_size, num_heads=num_heads, head_dim=head_dim, num_kv_heads=num_kv_heads)
        if num_heads % num_kv_heads:
            raise UsageError(f"num_kv_heads={num_kv_heads} must divide num_heads={num_heads}.")
        if rope_theta is not None and not rope_theta > 0:
            raise UsageError(f"rope_theta must be positive or None, not {rope_theta}.")
        if rope_theta is not None and head_dim % 2:
            raise UsageError(f"Rotary positions need an even head_dim, not {head_dim}; rope_theta=None drops them.")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.rope_theta = rope_theta
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    @property
    def state_size(self) -> int:
        return 0

    def state_size_after(self, tokens: int) -> int:
        return 2 * self.num_kv_heads * self.head_dim * tokens

    def init_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> AttentionState:
        dtype, device = input_options(self, dtype, device)
        shape = (batch_size, 0, self.num_kv_heads, self.head_dim)
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return AttentionState(keys, values, torch.zeros(batch_size, dtype=torch.long, device=device))

    def check_state(self, state: AttentionState, sequences: int, device: torch.device | None = None) -> None:
        super().check_state(state, sequences, device)
        if state.keys.shape[1] != state.values.shape[1]:
            raise UsageError(
                f"This state's cache has keys of {state.keys.shape[1]} tokens and values of {state.values.shape[1]}."
            )

    def mix(self, x: Tensor, state: AttentionState, cu_seqlens: Tensor | None) -> tuple[Tensor, AttentionState]:
        q = rearrange(self.q_proj(x), "b t (h k) -> b t h k", h=self.num_heads)
        k = rearrange(self.k_proj(x), "b t (g k) -> b t g k", g=self.num_kv_heads)
        v = rearrange(self.v_proj(x), "b t (g k) -> b t g k", g=self.num_kv_heads)
        if cu_seqlens is None:
            o, state = self.attend(q, k, v, state)
        else:
            # Zeros behind the shorter sequences: causality hides them from every real query.
            (q, real), (k, _), (v, _) = unpack(q, cu_seqlens), unpack(k, cu_seqlens), unpack(v, cu_seqlens)
            before = state.lengths
            o, state = self.attend(q, k, v, state)
            o, state = pack(o, real), state._replace(lengths=before + real.sum(1)).trimmed()
        return self.o_proj(rearrange(o, "b t h k -> b t (h k)")), state

    def attend(self, q: Tensor, k: Tensor, v: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        """q [B,T,H,K], k and v [B,T,G,K] before rotation, and the cache → o [B,T,H,K] and the cache with them."""
        tokens, cached = q.shape[1], state.keys.shape[1]
        positions = state.lengths[:, None] + torch.arange(tokens, device=q.device)  # [B,T]
        if self.rope_theta is not None:
            q, k = rotate(q, positions, self.rope_theta), rotate(k, positions, self.rope_theta)
        if cached == 0:
            keys, values, mask = k, v, None
        elif bool((state.lengths == cached).all()):
            keys, values = torch.cat((state.keys.to(k.dtype), k), 1), torch.cat((state.values.to(v.dtype), v), 1)
            mask = torch.ones(tokens, cached + tokens, dtype=torch.bool, device=q.device).tril(cached)
        else:  # every row's new tokens go right behind its own old ones
            at = positions[:, :, None, None].expand_as(k)
            keys = F.pad(state.keys.to(k.dtype), (0, 0, 0, 0, 0, tokens)).scatter(1, at, k)
            values = F.pad(state.values.to(v.dtype), (0, 0, 0, 0, 0, tokens)).scatter(1, at, v)
            mask = (torch.arange(cached + tokens, device=q.device) <= positions[..., None])[:, None]
        o = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            expand_heads(keys, self.num_heads).transpose(1, 2),
            expand_heads(values, self.num_heads).transpose(1, 2),
            attn_mask=None if tokens == 1 and mask is not None and mask.dim() == 2 else mask,  # it hides nothing
            is_causal=mask is None,
        )
        return o.transpose(1, 2), AttentionState(keys, values, state.lengths + tokens)
