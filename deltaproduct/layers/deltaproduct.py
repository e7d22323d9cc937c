"""The DeltaProduct layer: projections, short convolution, the recurrence, norm and output projection.

B batch · T tokens · D hidden size · N Householder steps per token · H query/key heads · HV value heads · K, V sizes.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from deltaproduct.errors import UsageError
from deltaproduct.layers.initialization import draw_rates, draw_time_steps
from deltaproduct.layers.mixer import About, Mixer
from deltaproduct.layers.options import MixerOptions, option
from deltaproduct.layers.packing import real_tokens
from deltaproduct.layers.parts import ACTIVATIONS, GateProjection, RMSNorm, ShortConvolution, emit_linear
from deltaproduct.layers.states import input_options, recurrent_dtype
from deltaproduct.ops import delta_product, delta_product_step
from deltaproduct.ops.context_parallel import ContextParallel, delta_product_context_parallel
from deltaproduct.ops.engine_program import EngineProgram
from deltaproduct.ops.inputs import compute_dtype


class DeltaProductState(NamedTuple):
    """What one layer carries from token to token; the histories are None without the short convolution."""

    recurrent: Tensor  # [B,HV,K,V]
    q_history: Tensor | None  # [B,conv_size−1,H·K]
    k_history: Tensor | None  # [B,conv_size−1,N·H·K]
    v_history: Tensor | None  # [B,conv_size−1,N·HV·V]


@dataclass(frozen=True, kw_only=True)
class _DeltaOptions(MixerOptions):
    """What DeltaProduct and its presets have in common."""

    num_heads: int = option(4, "H, query/key heads", at_least=1)
    head_dim: int = option(16, "K, key dimension of a head", at_least=1)
    expand_v: float = option(1.0, "V/K, value over key dimension", positive=True)
    num_v_heads: int | None = option(None, "HV, value heads; None: as many as query/key heads", at_least=1)
    allow_neg_eigval: bool = option(True, "β in [0,2] and eigenvalues in [-1,1], in place of [0,1]")
    use_short_conv: bool = option(True, "causal convolution on q, k and v")
    conv_size: int = option(4, "width of that convolution", at_least=1)
    qkv_activation: str = option(
        "silu", "what q, k and v pass through: silu, relu or identity", one_of=("silu", "relu", "identity")
    )
    beta_bias_init: float | None = option(None, "initial bias of β's projection; None: no bias")


@dataclass(frozen=True, kw_only=True)
class DeltaProductOptions(_DeltaOptions):
    """Options of `DeltaProduct`."""

    name: ClassVar[str] = "deltaproduct"

    num_householder: int = option(2, "N, Householder steps per token", at_least=1)
    use_forget_gate: bool = option(False, "gated recurrence")
    use_output_gate: bool = option(False, "gate the normalised output")


class DeltaProduct(Mixer):
    """(Gated) DeltaProduct as a sequence mixer (arXiv 2502.10297, section 3): H_t = A(x_t) H_{t−1} + B(x_t) with
    A(x_t) = exp(g_t) ∏_j (I − β_{t,j} k_{t,j} k_{t,j}ᵀ), a product of N generalised Householder reflections.

    Args:
        hidden_size: D.
        num_heads: H, query/key heads.
        head_dim: K; a value head has V = head_dim · expand_v.
        num_householder: N, steps per token.
        expand_v: V / K.
        num_v_heads: HV, a multiple of num_heads; None means num_heads.
        allow_neg_eigval: β in [0,2] (eigenvalues in [−1,1]) in place of [0,1].
        use_forget_gate: the gated layer, with log decay g = −exp(A_log) · softplus(a_proj(x) + dt_bias).
        use_output_gate: multiply the normalised output by silu(g_proj(x)).
        use_short_conv: a causal convolution of width conv_size on q, k and v.
        qkv_activation: what q, k and v pass through, with or without the convolution: "silu", "relu" or "identity".
        norm_eps: of the RMSNorm over each head's output.
        beta_bias_init: None means that β's projection has no bias; a number is the initial value of one.

    Raises:
        UsageError: a size is not positive, or num_v_heads is not a multiple of num_heads.
    """

    options: ClassVar[type[MixerOptions]] = DeltaProductOptions
    about: ClassVar[About] = About(
        "N generalised Householder reflections per token, gates optional",
        "arXiv 2502.10297",
        "A = exp(g_t) ∏_j P_{t,j} with P_{t,j} = I − β_{t,j} k_{t,j} k_{t,j}ᵀ, "
        "B = Σ_j (∏_{i>j} P_{t,i}) β_{t,j} k_{t,j} v_{t,j}ᵀ",
        "allow_neg_eigval",
    )
    divisible: ClassVar[bool] = True
    drawn_after: ClassVar[str | None] = "a_proj"

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        num_householder: int = 2,
        expand_v: float = 1.0,
        num_v_heads: int | None = None,
        allow_neg_eigval: bool = True,
        use_forget_gate: bool = False,
        use_output_gate: bool = False,
        use_short_conv: bool = True,
        conv_size: int = 4,
        qkv_activation: str = "silu",
        norm_eps: float = 1e-5,
        beta_bias_init: float | None = None,
    ):
        super().__init__()
        num_v_heads = num_heads if num_v_heads is None else num_v_heads
        sizes = {
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "head_dim": head_dim,
            "num_householder": num_householder,
            "num_v_heads": num_v_heads,
            "head_dim · expand_v": round(head_dim * expand_v) if math.isfinite(expand_v) else 0,
        }
        for name, size in sizes.items():
            if size < 1:
                raise UsageError(f"{name} must be at least 1, not {size}.")
        if abs(head_dim * expand_v - round(head_dim * expand_v)) > 1e-6:
            raise UsageError(f"head_dim={head_dim} times expand_v={expand_v} is not a whole number.")
        if not norm_eps > 0:
            raise UsageError(f"norm_eps must be positive, not {norm_eps}.")
        if num_v_heads % num_heads:
            raise UsageError(f"num_v_heads={num_v_heads} must be a multiple of num_heads={num_heads}.")
        if qkv_activation not in ACTIVATIONS:
            raise UsageError(f"qkv_activation must be one of {', '.join(ACTIVATIONS)}, not {qkv_activation!r}.")
        self.num_heads, self.num_v_heads, self.num_householder = num_heads, num_v_heads, num_householder
        self.head_dim, self.head_v_dim = head_dim, round(head_dim * expand_v)
        self.allow_neg_eigval, self.qkv_activation = allow_neg_eigval, qkv_activation
        self.use_forget_gate, self.use_output_gate = use_forget_gate, use_output_gate
        self.use_short_conv = use_short_conv

        key_size = num_heads * head_dim
        value_size = num_v_heads * self.head_v_dim
        self.q_proj = nn.Linear(hidden_size, key_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_householder * key_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_householder * value_size, bias=False)
        bias_init = None if beta_bias_init is None else partial(nn.init.constant_, val=beta_bias_init)
        self.b_proj = GateProjection(
            hidden_size, num_householder * num_v_heads, bias=bias_init is not None, bias_init=bias_init
        )
        if use_short_conv:
            self.q_conv1d = ShortConvolution(key_size, conv_size)
            self.k_conv1d = ShortConvolution(num_householder * key_size, conv_size)
            self.v_conv1d = ShortConvolution(num_householder * value_size, conv_size)
        if use_forget_gate:
            self.a_proj = GateProjection(hidden_size, num_v_heads, bias=False)
            self.A_log = nn.Parameter(torch.empty(num_v_heads))
            self.dt_bias = nn.Parameter(torch.empty(num_v_heads))
            self.reset_parameters()
        if use_output_gate:
            self.g_proj = nn.Linear(hidden_size, value_size, bias=False)
        self.o_norm = RMSNorm(self.head_v_dim, norm_eps)
        self.o_proj = nn.Linear(value_size, hidden_size, bias=False)

    def reset_parameters(self) -> None:
        """Draw the forget gate: at first a token forgets between 0.1% and most of a state."""
        if self.use_forget_gate:
            draw_rates(self.A_log)
            draw_time_steps(self.dt_bias)

    @property
    def state_size(self) -> int:
        floats = self.num_v_heads * self.head_dim * self.head_v_dim
        if self.use_short_conv:
            convs = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
            floats += sum(conv.state_size for conv in convs)
        return floats

    def init_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> DeltaProductState:
        dtype, device = input_options(self, dtype, device)
        shape = (batch_size, self.num_v_heads, self.head_dim, self.head_v_dim)
        recurrent = torch.zeros(shape, dtype=recurrent_dtype(dtype), device=device)
        if not self.use_short_conv:
            return DeltaProductState(recurrent, None, None, None)
        convs = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        return DeltaProductState(recurrent, *(conv.init_state(batch_size, dtype, device) for conv in convs))

    def mix(self, x: Tensor, state: DeltaProductState, cu_seqlens: Tensor | None) -> tuple[Tensor, DeltaProductState]:
        if self.context_parallel is not None:
            state = self._before_my_span(x, state, self.context_parallel)
        q, k, v, beta, g, histories = self.project(x, state, cu_seqlens)
        if self.context_parallel is not None:
            o, recurrent = delta_product_context_parallel(
                q, k, v, beta, g, context_parallel=self.context_parallel, initial_state=state.recurrent, qk_l2norm=True,
                backend=self.backend,
            )  # fmt: skip
            recurrent = recurrent.clone()  # it is a slice of the states after all spans
        elif x.shape[1] == 1 and cu_seqlens is None and not torch.is_grad_enabled():
            gate = None if g is None else g[:, 0]
            o, recurrent = delta_product_step(
                q[:, 0], k[:, 0], v[:, 0], beta[:, 0], gate, state=state.recurrent, qk_l2norm=True,
                backend=self.backend,
            )  # fmt: skip
            o = o[:, None]
        else:
            o, final = delta_product(
                q, k, v, beta, g, initial_state=state.recurrent, output_final_state=True, cu_seqlens=cu_seqlens,
                qk_l2norm=True, backend=self.backend,
            )  # fmt: skip
            assert final is not None  # it was asked for
            recurrent = final
        return self._output(o, x), DeltaProductState(recurrent, *histories)

    def mix_aligned(self, x: Tensor, state: DeltaProductState, lengths: Tensor) -> tuple[Tensor, DeltaProductState]:
        q, k, v, beta, g, histories = self.project(x, state, lengths=lengths)
        real = real_tokens(x, lengths)
        # With β = 0 and no decay a token leaves the state as it is.
        beta = beta.masked_fill(~real[..., None, None], 0)
        g = None if g is None else g.masked_fill(~real[..., None], 0)
        o, recurrent = delta_product(
            q, k, v, beta, g, initial_state=state.recurrent, output_final_state=True, qk_l2norm=True,
            backend=self.backend,
        )  # fmt: skip
        assert recurrent is not None  # it was asked for
        return self._output(o, x), DeltaProductState(recurrent, *histories)

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        """What the heads read, o [B,T,HV,V], and the layer's input → y [B,T,D]."""
        o = self.o_norm(o)
        if self.use_output_gate:
            o = o * F.silu(rearrange(self.g_proj(x), "b t (h v) -> b t h v", h=self.num_v_heads))
        return self.o_proj(rearrange(o, "b t h v -> b t (h v)"))

    def _before_my_span(
        self, x: Tensor, state: DeltaProductState, context_parallel: ContextParallel
    ) -> DeltaProductState:
        """The state with the histories that this rank's convolutions begin with: what the last tokens of the rank
        before project to. The first rank's are the state's own."""
        past = self.q_conv1d.width - 1 if self.use_short_conv else 0
        if not past:
            return state
        if x.shape[1] < past:
            raise UsageError(f"A span of {x.shape[1]} tokens is less than the {past} that a convolution looks back.")
        border = context_parallel.before(x[:, x.shape[1] - past :])
        projections = (self.q_proj, self.k_proj, self.v_proj)
        # Of no tokens, zeros, the projections are zeros too, and the state's histories are all there is.
        own = state[1:] if context_parallel.rank == 0 else (0, 0, 0)
        histories = [proj(border) + mine for proj, mine in zip(projections, own, strict=True)]
        return DeltaProductState(state.recurrent, *histories)

    def project(
        self,
        x: Tensor,
        state: DeltaProductState,
        cu_seqlens: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, list[Tensor | None]]:
        """The operator's inputs (q, k, v, beta, g) for x [B,T,D], shaped as `delta_product` takes them with
        `qk_l2norm=True`, and the convolutions' histories after the last token, or after the first `lengths` [B].

        Raises:
            UsageError: the layer's weights are offloaded, and this is no part of a call of the layer.
        """
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        histories: list[Tensor | None] = [None, None, None]
        if self.use_short_conv:
            q, histories[0] = self.q_conv1d(q, state.q_history, cu_seqlens=cu_seqlens, lengths=lengths)
            k, histories[1] = self.k_conv1d(k, state.k_history, cu_seqlens=cu_seqlens, lengths=lengths)
            v, histories[2] = self.v_conv1d(v, state.v_history, cu_seqlens=cu_seqlens, lengths=lengths)
        activation = ACTIVATIONS[self.qkv_activation]
        q, k, v = activation(q), activation(k), activation(v)
        n = self.num_householder
        q = rearrange(q, "b t (h k) -> b t h k", h=self.num_heads)
        k = rearrange(k, "b t (n h k) -> b t n h k", n=n, h=self.num_heads)
        v = rearrange(v, "b t (n h v) -> b t n h v", n=n, h=self.num_v_heads)
        # In float32 even under autocast: near 2 a bfloat16 sigmoid has steps of 1/128, and reflections need exactly 2.
        logits = self.b_proj(x)
        beta = torch.sigmoid(logits.to(compute_dtype(logits)))
        beta = rearrange(2 * beta if self.allow_neg_eigval else beta, "b t (n h) -> b t n h", n=n)
        g = None
        if self.use_forget_gate:
            if self.A_log.is_meta and not x.is_meta:
                raise UsageError(
                    'The forget gate has no weights here (they are on "meta"): offloading brings them for a call of '
                    "the layer alone. Look into a model that is not offloaded."
                )
            rate = self.a_proj(x)
            dtype = compute_dtype(rate)
            g = -self.A_log.to(dtype).exp() * F.softplus(rate.to(dtype) + self.dt_bias.to(dtype))
        return q, k, v, beta, g, histories

    def emit(self, program: EngineProgram, x: Tensor, onto: Tensor) -> DeltaProductState:
        n, heads, key_heads, batch = self.num_householder, self.num_v_heads, self.num_heads, program.batch_size
        with program.independent():
            projected = [emit_linear(program, proj, x) for proj in (self.q_proj, self.k_proj, self.v_proj)]
            logits = emit_linear(program, self.b_proj, x)
            rate = emit_linear(program, self.a_proj, x) if self.use_forget_gate else None
            output_gate = emit_linear(program, self.g_proj, x) if self.use_output_gate else None
        convs = [self.q_conv1d, self.k_conv1d, self.v_conv1d] if self.use_short_conv else [None] * 3
        with program.independent():
            qkv, histories = zip(
                *(
                    program.convolution(y, None if conv is None else conv.weight, self.qkv_activation)
                    for y, conv in zip(projected, convs, strict=True)
                ),
                strict=True,
            )
            beta = program.sigmoid(logits, 2.0 if self.allow_neg_eigval else 1.0)
            g = None if rate is None else program.gate(rate, self.A_log, self.dt_bias)
        q, k, v = qkv
        o, recurrent = program.token(
            q.view(batch, key_heads, self.head_dim),
            k.view(batch, n, key_heads, self.head_dim),
            v.view(batch, n, heads, self.head_v_dim),
            beta.view(batch, n, heads),
            g,
        )
        o = self.o_norm.emit(program, o).view(batch, -1)
        if output_gate is not None:
            o = program.silu_times(output_gate, o)
        emit_linear(program, self.o_proj, o, onto)
        return DeltaProductState(recurrent, *histories)


@dataclass(frozen=True, kw_only=True)
class DeltaNetOptions(_DeltaOptions):
    """Options of `DeltaNet`, which has one Householder step per token."""

    name: ClassVar[str] = "deltanet"

    use_forget_gate: bool = option(False, "gated recurrence")
    use_output_gate: bool = option(False, "gate the normalised output")


class DeltaNet(DeltaProduct):
    """DeltaNet (arXiv 2406.06484): DeltaProduct with one Householder step per token; the other options are its own."""

    options: ClassVar[type[MixerOptions]] = DeltaNetOptions
    about: ClassVar[About] = About(
        "one generalised Householder reflection per token, gates optional",
        "arXiv 2406.06484",
        "A = exp(g_t) (I − β_t k_t k_tᵀ), B = β_t k_t v_tᵀ",
        "allow_neg_eigval",
    )
    fixed: ClassVar[dict[str, Any]] = {"num_householder": 1}

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, **options: Any):
        super().__init__(hidden_size, num_heads, head_dim, **self.fixed, **options)


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetOptions(_DeltaOptions):
    """Options of `GatedDeltaNet`, which has one Householder step per token and both gates."""

    name: ClassVar[str] = "gated_deltanet"


class GatedDeltaNet(DeltaProduct):
    """Gated DeltaNet (arXiv 2412.06464): one Householder step per token, a forget gate and an output gate."""

    options: ClassVar[type[MixerOptions]] = GatedDeltaNetOptions
    about: ClassVar[About] = About(
        "one generalised Householder reflection per token, a forget gate and an output gate",
        "arXiv 2412.06464",
        "A = exp(g_t) (I − β_t k_t k_tᵀ), B = β_t k_t v_tᵀ",
        "allow_neg_eigval",
    )
    fixed: ClassVar[dict[str, Any]] = {"num_householder": 1, "use_forget_gate": True, "use_output_gate": True}

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, **options: Any):
        super().__init__(hidden_size, num_heads, head_dim, **self.fixed, **options)
