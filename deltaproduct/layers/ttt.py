"""Test-time training: the state is a small linear model, which takes gradient steps on the tokens as they come.

B batch · T tokens · D hidden size · H heads · K head size · C tokens in a mini-batch · S sequences.
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
from deltaproduct.layers.parts import GateProjection, LayerNorm, ShortConvolution
from deltaproduct.layers.sizes import require_positive
from deltaproduct.layers.states import input_options, recurrent_dtype
from deltaproduct.ops.inputs import compute_dtype


class TTTLinearState(NamedTuple):
    """What one layer carries; the history is None without the short convolution."""

    weights: Tensor  # [B,H,K+1,K]: Wᵀ over b, as they were where the mini-batch began
    gradients: Tensor  # [B,H,K+1,K]: Σ η_s ∂ℓ_s over the mini-batch's tokens so far
    position: Tensor  # [B] ints: how many those are, less than C
    history: Tensor | None  # [B,conv_size−1,D]


@dataclass(frozen=True, kw_only=True)
class TTTLinearOptions(MixerOptions):
    """Options of `TTTLinear`."""

    name: ClassVar[str] = "ttt_linear"

    num_heads: int = option(4, "H, heads", at_least=1)
    head_dim: int = option(16, "K, size of a head", at_least=1)
    ttt_chunk_size: int = option(16, "tokens in an inner mini-batch", at_least=1)
    ttt_base_lr: float = option(1.0, "largest inner step size, times K", positive=True)
    use_short_conv: bool = option(True, "causal convolution on the input of the projections")
    conv_size: int = option(4, "width of that convolution", at_least=1)
    use_output_gate: bool = option(False, "gate the normalised output")


class TTTLinear(Mixer):
    """TTT-Linear (arXiv 2407.04620, sections 2.3–2.7, with what the authors' code adds), per head:

    f(x) = x + LN(W x + b),  ℓ_t(W, b) = ½ ‖f(k_t) − v_t‖²,  o_t = f(q_t) with the W and b of token t.

    k, v, q are the three views θ_K x, θ_V x, θ_Q x. Tokens come in mini-batches of C. All gradients of a mini-batch are
    taken where it began, at W', and token i = 1 … C of it has made a step on those up to its own:

    W_i = W' − c_i Σ_{s≤i} η_s ∂ℓ_s(W'),  η_t = ttt_base_lr · σ(lr_proj(x_t)) / K,  c_i = max(0, 1/i + offset_i)

    and b likewise, with a learned offset; the next mini-batch begins at W_C. In the dual form no W_i is formed: ∂ℓ_s is
    a product e_s k_sᵀ, so that W_i q_i = W' q_i − c_i Σ_{s≤i} η_s (k_s · q_i) e_s is attention inside the mini-batch.
    Only mini-batches are a loop. The first W and b are learned, and so are LN's scale and shift. Then y_t =
    o_proj(norm(o_t)), a LayerNorm over all heads. Of the paper's backbones, the Transformer's has neither convolution
    nor gate, Mamba's has both. The code's rotary positions inside a mini-batch are left out.

    It has no row in the papers' table H_i = A(x_i) H_{i−1} + B(x_i): through LN, e_s depends on W' nonlinearly. Without
    LN and residual it has one, and with C = 1 and c = 1 it is DeltaNet's with β = η: A(x_i) = I − η_i k_i k_iᵀ,
    B(x_i) = η_i k_i v_iᵀ (H is W's transpose). With C = T and W' = 0 it is linear attention with β = η: A = I.

    Args:
        hidden_size: D.
        num_heads: H.
        head_dim: K.
        ttt_chunk_size: C, counted from each sequence's first token.
        ttt_base_lr: the largest η times K.
        use_short_conv: a causal convolution of width conv_size, then silu, before the three views and the step sizes.
        use_output_gate: y_t = o_proj(gelu(g_proj(x_t)) ⊙ norm(o_t)).
        norm_eps: of both norms.

    Raises:
        UsageError: a size, ttt_base_lr or norm_eps is not positive.
    """

    options: ClassVar[type[MixerOptions]] = TTTLinearOptions
    about: ClassVar[About] = About(
        "test-time training: a small linear model that learns from the tokens",
        "arXiv 2407.04620",
        "none: through the inner norm, the step is not linear in the state",
        "-",
    )
    drawn_after: ClassVar[str | None] = "lr_proj"

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        ttt_chunk_size: int = 16,
        ttt_base_lr: float = 1.0,
        use_short_conv: bool = True,
        conv_size: int = 4,
        use_output_gate: bool = False,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        require_positive(
            hidden_size=hidden_size, num_heads=num_heads, head_dim=head_dim, ttt_chunk_size=ttt_chunk_size,
            ttt_base_lr=ttt_base_lr, norm_eps=norm_eps,
        )  # fmt: skip
        self.num_heads, self.head_dim, self.chunk_size, self.base_lr = num_heads, head_dim, ttt_chunk_size, ttt_base_lr
        self.use_short_conv, self.use_output_gate, self.norm_eps = use_short_conv, use_output_gate, norm_eps
        width = num_heads * head_dim
        self.q_proj = nn.Linear(hidden_size, width, bias=False)
        self.k_proj = nn.Linear(hidden_size, width, bias=False)
        self.v_proj = nn.Linear(hidden_size, width, bias=False)
        self.lr_proj = GateProjection(hidden_size, num_heads, bias_init=nn.init.zeros_)
        self.offset = nn.Parameter(torch.empty(ttt_chunk_size))
        self.first_weight = nn.Parameter(torch.empty(num_heads, head_dim, head_dim))  # the transpose of W
        self.first_bias = nn.Parameter(torch.empty(num_heads, 1, head_dim))
        self.inner_weight = nn.Parameter(torch.empty(num_heads, 1, head_dim))  # of LN
        self.inner_bias = nn.Parameter(torch.empty(num_heads, 1, head_dim))
        self.reset_parameters()
        if use_short_conv:
            self.conv1d = ShortConvolution(hidden_size, conv_size)
        if use_output_gate:
            self.g_proj = nn.Linear(hidden_size, width, bias=False)
        self.o_norm = LayerNorm(width, eps=norm_eps)
        self.o_proj = nn.Linear(width, hidden_size, bias=False)

    def reset_parameters(self) -> None:
        """Draw the first W from N(0, 0.02²); the first b, the offsets and LN's shift are 0, its scale 1."""
        nn.init.normal_(self.first_weight, std=0.02)
        for zeros in (self.offset, self.first_bias, self.inner_bias):
            nn.init.zeros_(zeros)
        nn.init.ones_(self.inner_weight)

    @property
    def state_size(self) -> int:
        floats = 2 * self.num_heads * (self.head_dim + 1) * self.head_dim
        if self.use_short_conv:
            floats += self.conv1d.state_size
        return floats

    def init_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> TTTLinearState:
        dtype, device = input_options(self, dtype, device)
        if self.first_weight.is_meta and device.type != "meta":
            raise UsageError(
                'The first state of TTTLinear is learned, and its weights are not here (they are on "meta"): leave the '
                "state out in the first call, which brings them."
            )
        first = torch.cat((self.first_weight, self.first_bias), 1).to(device, recurrent_dtype(dtype))
        weights = first.repeat(batch_size, 1, 1, 1)
        position = torch.zeros(batch_size, dtype=torch.long, device=device)
        history = self.conv1d.init_state(batch_size, dtype, device) if self.use_short_conv else None
        return TTTLinearState(weights, torch.zeros_like(weights), position, history)

    def mix(self, x: Tensor, state: TTTLinearState, cu_seqlens: Tensor | None) -> tuple[Tensor, TTTLinearState]:
        if x.numel() == 0:
            return x, state
        fed, history = x, None
        if self.use_short_conv:
            fed, history = self.conv1d(x, state.history, cu_seqlens=cu_seqlens)
            fed = F.silu(fed)
        inputs = torch.cat([proj(fed) for proj in (self.q_proj, self.k_proj, self.v_proj, self.lr_proj)], -1)
        start = state.position
        end = start + (x.shape[1] if cu_seqlens is None else cu_seqlens.diff())
        # Mini-batches lie side by side: slot i holds the token that is the i-th since its sequence's mini-batch began.
        slots = torch.arange(int(start.min()), int(end.max()), device=x.device)
        filled = (slots >= start[:, None]) & (slots < end[:, None])
        whole = bool(filled.all())
        if whole:
            inputs = inputs.view(*filled.shape, -1)
        else:  # sequences that begin or end at different places
            inputs = inputs.new_zeros(*filled.shape, inputs.shape[-1]).masked_scatter(filled[..., None], inputs)
        with torch.autocast(x.device.type, enabled=False):  # states are float32 at least
            o, state = self.learn(inputs.to(compute_dtype(x)), state, filled, int(slots[0]))
        o = self.o_norm((o if whole else o[filled]).reshape(*x.shape[:2], -1)).to(x.dtype)
        if self.use_output_gate:
            o = o * F.gelu(self.g_proj(x), approximate="tanh")
        return self.o_proj(o), state._replace(history=history)

    def learn(self, inputs: Tensor, state: TTTLinearState, filled: Tensor, slot: int) -> tuple[Tensor, TTTLinearState]:
        """q, k, v and η's logits [S,L,3·H·K+H] in slots from `slot` on, filled [S,L] → (o [S,L,H·K], state)."""
        length, dtype, (size, heads) = inputs.shape[1], inputs.dtype, (self.chunk_size, self.num_heads)
        qkv, logits = inputs.split((inputs.shape[-1] - heads, heads), -1)
        q, k, v = rearrange(qkv, "s l (i h k) -> i s h l k", i=3, h=heads)
        lr = torch.sigmoid(logits) * filled[..., None] * (self.base_lr / self.head_dim)  # an empty slot teaches nothing
        places = torch.arange(1, size + 1, device=q.device, dtype=dtype)
        scale = (1 / places + self.offset.to(dtype)).clamp(min=0).unsqueeze(-1)
        gain, shift = self.inner_weight.to(dtype), self.inner_bias.to(dtype)
        weights, gradients, counts = state.weights.to(dtype), state.gradients.to(dtype), filled.sum(1)
        end = state.position + counts

        sizes = [min(size - slot, length)]
        sizes += [min(size, length - done) for done in range(sizes[0], length, size)]
        q_one, k_one = (F.pad(x, (0, 1), value=1) for x in (q, k))  # the 1 is b's
        pieces = (x.split(sizes, 2) for x in (q_one, k_one, v - k, lr.mT.unsqueeze(-1)))
        outputs, within = [], slot
        for i, (q_, k_, target, lr_) in enumerate(zip(*pieces, strict=True)):
            error = norm_gradient(k_ @ weights, target, gain, shift, self.norm_eps) * lr_
            learned = (q_ @ k_.mT).tril() @ error
            if i == 0:  # only here can there be tokens of the same mini-batch from an earlier call
                learned = learned + q_ @ gradients
            outputs.append(q_ @ weights - scale[within : within + q_.shape[2]] * learned)
            gradients, slot, within = gradients + k_.mT @ error, slot + q_.shape[2], 0
            if slot % size == 0:
                over = (end >= slot)[:, None, None, None]  # of the sequences whose mini-batch this fills
                weights = torch.where(over, weights - scale[-1] * gradients, weights)
                gradients = torch.where(over, 0, gradients)
        if weights is state.weights:  # no mini-batch has ended; the result is not to share them with the state before
            weights = weights.clone()
        z = torch.cat(outputs, 2)
        o = q + F.layer_norm(z, z.shape[-1:], eps=self.norm_eps) * gain + shift
        return rearrange(o, "s h l k -> s l (h k)"), TTTLinearState(weights, gradients, end % size, None)


def norm_gradient(z: Tensor, target: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
    """The gradient of ½ ‖LN(z) · gain + shift − target‖² in z; all [...,K]."""
    centred = z - z.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    normal = centred * scale
    slope = (normal * gain + shift - target) * gain
    along = normal * (slope * normal).mean(-1, keepdim=True)
    return (slope - slope.mean(-1, keepdim=True) - along) * scale
