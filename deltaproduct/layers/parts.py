"""The small parts that mixers and blocks share: normalisation, the short convolution, the MLP.

B batch · T tokens · D width · S packed sequences · w convolution width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltaproduct.errors import UsageError
from deltaproduct.ops.inputs import compute_dtype
from deltaproduct.ops.norm import rms_norm
from deltaproduct.ops.tape import Tape

ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "identity": lambda x: x}


def record_linear(tape: Tape, linear: nn.Linear, x: Tensor, onto: Tensor | None = None) -> Tensor:
    """Record a projection, and its bias if there is one, for native decoding; it is added to `onto` if given."""
    return tape.product(x, linear.weight, bias=linear.bias, onto=onto)


class RMSNorm(nn.Module):
    """x / √(mean x² + eps) · weight over the last dimension, computed in float32 or better."""

    def __init__(self, size: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            if torch.is_grad_enabled():
                return rms_norm(x, self.weight, self.eps)
            dtype = compute_dtype(x)  # PyTorch's own forward is the better one, by far where a single token is decoded
            return F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps).to(x.dtype)

    def record(self, tape: Tape, x: Tensor) -> Tensor:
        """Record this for native decoding."""
        return tape.norm(x, self.weight, self.eps)


class ShortConvolution(nn.Module):
    """A causal convolution along time, one filter of width w per channel, whose history is carried as a state.

    forward(x [B,T,D], history [B,w−1,D]) → (y [B,T,D], history); with cu_seqlens [S+1], B is 1 and histories [S,w−1,D].
    With lengths [B], only so many first tokens of a row are real, and its history is the one after them.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        if width < 1:
            raise UsageError(f"conv_size must be at least 1, not {width}.")
        self.width = width
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)

    @property
    def state_size(self) -> int:
        """Floats of history carried per sequence."""
        return (self.width - 1) * self.weight.shape[0]

    def init_state(self, batch_size: int) -> Tensor:
        return self.weight.new_zeros(batch_size, self.width - 1, self.weight.shape[0])

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
                return self._filter(extended), extended[:, extended.shape[1] - past :]
            last = (lengths[:, None] + torch.arange(past, device=x.device))[..., None]
            return self._filter(extended), extended.gather(1, last.expand(-1, -1, x.shape[2]))
        # Every packed sequence gets its history in front of it, so that one filter pass never looks into a neighbour.
        sequences = torch.arange(cu_seqlens.shape[0] - 1, device=x.device)
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

    def record(self, tape: Tape, x: Tensor, onto: Tensor) -> None:
        """Record this for native decoding: the output is added to `onto`."""
        with tape.together():
            gate, up = record_linear(tape, self.gate_proj, x), record_linear(tape, self.up_proj, x)
        record_linear(tape, self.down_proj, tape.silu_times(gate, up), onto)
