"""The small parts that mixers and blocks share: norms, linear maps to gates, the short convolution, the MLP.

B batch · T tokens · D width · S packed sequences · w convolution width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltaproduct.errors import UsageError
from deltaproduct.layers.states import input_options
from deltaproduct.ops.engine_program import EngineProgram
from deltaproduct.ops.inputs import compute_dtype, num_sequences
from deltaproduct.ops.norm import rms_norm

ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "identity": lambda x: x}


def emit_linear(program: EngineProgram, linear: nn.Linear, x: Tensor, onto: Tensor | None = None) -> Tensor:
    """Record a projection, and its bias if there is one, for native decoding; it is added to `onto` if given."""
    return program.product(x, linear.weight, bias=linear.bias, onto=onto)


class RMSNorm(nn.Module):
    """x / √(mean x² + eps) · weight over the last dimension, computed in float32 or better."""

    def __init__(self, size: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to ones."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            if torch.is_grad_enabled():
                return rms_norm(x, self.weight, self.eps)
            dtype = compute_dtype(x)  # PyTorch's own forward is the better one, by far where a single token is decoded
            return F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps).to(x.dtype)

    def emit(self, program: EngineProgram, x: Tensor) -> Tensor:
        """Record this for native decoding."""
        return program.norm(x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """(x − mean x) / √(var x + eps) · weight + bias over the last dimension, computed in float32 or better."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            dtype = compute_dtype(x)
            weight, bias = (None if p is None else p.to(dtype) for p in (self.weight, self.bias))
            return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class BiasedLinear(nn.Linear):
    """`nn.Linear` whose bias begins where a mixer wants it to: `bias_init` fills it in place, after PyTorch's draw."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        bias_init: Callable[[Tensor], object] | None = None,
    ):
        self.bias_init = bias_init  # before nn.Linear draws
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        """Draw the weight, then the bias."""
        super().reset_parameters()
        if self.bias_init is not None:
            with torch.no_grad():
                self.bias_init(self.bias)


class GateProjection(BiasedLinear):
    """A linear map to what goes through exp, softplus, sigmoid or their like: computed in float32 or better, whatever
    the precision of the weights, and under autocast. Beside the other maps of a mixer it is small.

    In bfloat16 a sum near 4 has steps of 1/64, and its exponential is 1.6% off; near 2 a sigmoid's steps are 1/128.
    (Not `nn.Linear` itself, so that `quantize_dynamic` of that type leaves it as it is.)
    """

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x, self.weight)
        if x.dtype == self.weight.dtype == dtype and not torch.is_autocast_enabled(x.device.type):
            return super().forward(x)  # a third of the time where a single token is decoded
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


def biased_silu(x: Tensor, bias: Tensor) -> Tensor:
    """silu(x + bias) for x [...,D] and bias [D], in float32 or better, rounded once to x's dtype."""
    dtype = compute_dtype(x)
    return F.silu(x.to(dtype) + bias.to(dtype)).to(x.dtype)


class ShortConvolution(nn.Module):
    """A causal convolution along time, one filter of width w per channel, whose history is carried as a state.

    forward(x [B,T,D], history [B,w−1,D]) → (y [B,T,D], history); with cu_seqlens [S+1], B is 1 and histories [S,w−1,D].
    With lengths [B], only so many first tokens of a row are real, and its history is the one after them.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        if width < 1:
            raise UsageError(f"conv_size must be at least 1, not {width}.")
        self.channels, self.width = channels, width
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the filters as PyTorch's convolutions draw theirs: uniform within ±1/√w."""
        nn.init.uniform_(self.weight, -(self.width**-0.5), self.width**-0.5)

    @property
    def state_size(self) -> int:
        """Floats of history carried per sequence."""
        return (self.width - 1) * self.channels

    def init_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Zeros [B,w−1,D] of x's dtype on x's device; None means the weight's (`states.input_options`)."""
        dtype, device = input_options(self, dtype, device)
        return torch.zeros(batch_size, self.width - 1, self.channels, dtype=dtype, device=device)

    def forward(
        self, x: Tensor, history: Tensor, *, cu_seqlens: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        past = self.width - 1
        if not past:  # every token by itself
            return self._filter(x), history
        history = history.to(x.dtype)
        if cu_seqlens is None:
            extended = torch.cat((history, x), dim=1)
            if lengths is None:
                # A copy: the slice would keep the projections of all tokens in memory.
                return self._filter(extended), extended[:, extended.shape[1] - past :].clone()
            last = (lengths[:, None] + torch.arange(past, device=x.device))[..., None]
            return self._filter(extended), extended.gather(1, last.expand(-1, -1, x.shape[2]))
        # Every packed sequence gets its history in front of it, so that one filter pass never looks into a neighbour.
        sequences = torch.arange(num_sequences(x.shape[0], cu_seqlens), device=x.device)
        owner = torch.searchsorted(cu_seqlens[1:].contiguous(), torch.arange(x.shape[1], device=x.device), right=True)
        token_at = torch.arange(x.shape[1], device=x.device) + (owner + 1) * past
        back = torch.arange(past, device=x.device)
        history_at = (cu_seqlens[:-1] + sequences * past)[:, None] + back
        extended = x.new_zeros(x.shape[1] + history.shape[0] * past, x.shape[2])
        extended = extended.index_copy(0, history_at.flatten().long(), history.flatten(0, 1))
        extended = extended.index_copy(0, token_at, x[0])
        y = F.pad(self._filter(extended[None])[0], (0, 0, past, 0))[token_at]
        return y[None], extended[(cu_seqlens[1:] + sequences * past)[:, None] + back]

    def _filter(self, x: Tensor) -> Tensor:
        """x [B,w−1+T,D] → y [B,T,D]."""
        if x.shape[1] < self.width:  # no tokens, which conv1d refuses
            return x[:, :0]
        if x.shape[1] == self.width:  # one token, on which conv1d spends ten times the time of the products
            return torch.linalg.vecdot(x.mT, self.weight[:, 0].to(x.dtype)).unsqueeze(1)
        weight = self.weight.to(x.dtype)
        if x.is_cpu:  # the same with a height of 1, which finds the kernel for channels that lie last: 2 to 4 × as fast
            return F.conv2d(x.mT.unsqueeze(2), weight.unsqueeze(2), groups=x.shape[-1]).squeeze(2).mT
        return F.conv1d(x.mT, weight, groups=x.shape[-1]).mT


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)): the MLP of a block."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def emit(self, program: EngineProgram, x: Tensor, onto: Tensor) -> None:
        """Record this for native decoding: the output is added to `onto`."""
        with program.independent():
            gate, up = emit_linear(program, self.gate_proj, x), emit_linear(program, self.up_proj, x)
        emit_linear(program, self.down_proj, program.silu_times(gate, up), onto)
