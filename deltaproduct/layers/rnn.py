"""The classical gated RNNs, as PyTorch runs them: LSTM and GRU.

B batch · T tokens · D hidden size · H heads · K head size · S packed sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from deltaproduct.layers.mixer import About, Mixer
from deltaproduct.layers.options import MixerOptions, option
from deltaproduct.layers.packing import pack, unpack
from deltaproduct.layers.sizes import require_positive
from deltaproduct.layers.states import input_options, recurrent_dtype
from deltaproduct.ops.inputs import compute_dtype


class RNNState(NamedTuple):
    """What an LSTM or a GRU carries; a GRU has no cell apart from its output."""

    hidden: Tensor  # [B,H·K]
    cell: Tensor | None  # [B,H·K]


@cache
def _skeleton(kind: Callable[..., nn.Module], input_size: int, hidden_size: int) -> nn.Module:
    """One layer of PyTorch's own that has no weights, to be called with those of another."""
    return kind(input_size, hidden_size, batch_first=True, device="meta")


def _dtype(x: Tensor | PackedSequence) -> torch.dtype:
    return x.dtype if isinstance(x, Tensor) else x.data.dtype


def _converted(rnn: nn.RNNBase, kind: Callable[..., nn.Module], x: Tensor | PackedSequence, hx: Any) -> Any:
    """What `rnn` computes, with its weights in x's precision: every gate, and the state from token to token."""
    weights = {name: p.to(_dtype(x)) for name, p in rnn.named_parameters()}
    return torch.func.functional_call(_skeleton(kind, rnn.input_size, rnn.hidden_size), weights, (x, hx))


class WideLSTM(nn.LSTM):
    """One layer of PyTorch's LSTM that computes in its input's precision, whatever that of its weights."""

    def forward(self, x: Tensor | PackedSequence, hx: Any = None) -> Any:
        own = _dtype(x) == self.weight_hh_l0.dtype
        return super().forward(x, hx) if own else _converted(self, nn.LSTM, x, hx)


class WideGRU(nn.GRU):
    """One layer of PyTorch's GRU that computes in its input's precision, whatever that of its weights."""

    def forward(self, x: Tensor | PackedSequence, hx: Any = None) -> Any:
        own = _dtype(x) == self.weight_hh_l0.dtype
        return super().forward(x, hx) if own else _converted(self, nn.GRU, x, hx)


@dataclass(frozen=True, kw_only=True)
class _RNNOptions(MixerOptions):
    """What both have: a width, as heads times their size."""

    num_heads: int = option(4, "H, heads", at_least=1)
    head_dim: int = option(16, "K, size of a head", at_least=1)


class _RNN(Mixer):
    """One layer of a `torch.nn` RNN of width H·K, and the projection back to D."""

    takes_norm_eps: ClassVar[bool] = False
    rnn_class: ClassVar[type[WideLSTM] | type[WideGRU]]
    has_cell: ClassVar[bool]

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int):
        super().__init__()
        require_positive(hidden_size=hidden_size, num_heads=num_heads, head_dim=head_dim)
        self.rnn = self.rnn_class(hidden_size, num_heads * head_dim, batch_first=True)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    @property
    def state_size(self) -> int:
        return self.rnn.hidden_size * (2 if self.has_cell else 1)

    def init_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> RNNState:
        dtype, device = input_options(self, dtype, device)
        hidden, cell = (
            torch.zeros(batch_size, self.rnn.hidden_size, dtype=recurrent_dtype(dtype), device=device) for _ in range(2)
        )
        return RNNState(hidden, cell if self.has_cell else None)

    def mix(self, x: Tensor, state: RNNState, cu_seqlens: Tensor | None) -> tuple[Tensor, RNNState]:
        if x.shape[1] == 0:  # which torch.nn's RNNs refuse
            return torch.zeros_like(x), state
        # In float32 at least, even under autocast: rounding would add up from token to token.
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(compute_dtype(x))
            o, state = self.run(wide, state) if cu_seqlens is None else self.run_packed(wide, state, cu_seqlens)
        return self.o_proj(o.to(x.dtype)), state

    def run(self, x: Tensor, state: RNNState) -> tuple[Tensor, RNNState]:
        """x [B,T,D] → o [B,T,H·K] and the states after the last token."""
        o, last = self.rnn(x, _to_torch(state, x.dtype))
        return o, _from_torch(last)

    def run_packed(self, x: Tensor, state: RNNState, cu_seqlens: Tensor) -> tuple[Tensor, RNNState]:
        """`run` for x [1,T,D] and cu_seqlens [S+1]."""
        rows, real = unpack(x, cu_seqlens)
        # torch refuses empty sequences; they keep the state that they came with.
        there = real.any(1).nonzero().flatten()
        lengths = real[there].sum(1).cpu()
        begun = RNNState(state.hidden[there], None if state.cell is None else state.cell[there])
        packed = pack_padded_sequence(rows[there], lengths, batch_first=True, enforce_sorted=False)
        o, last = self.rnn(packed, _to_torch(begun, x.dtype))
        o, _ = pad_packed_sequence(o, batch_first=True)
        new = _from_torch(last)
        hidden = state.hidden.to(new.hidden.dtype).index_copy(0, there, new.hidden)
        cell = None
        if state.cell is not None and new.cell is not None:
            cell = state.cell.to(new.cell.dtype).index_copy(0, there, new.cell)
        return pack(o, real[there]), RNNState(hidden, cell)


def _to_torch(state: RNNState, dtype: torch.dtype) -> Tensor | tuple[Tensor, ...]:
    """In torch.nn's form: [1,B,H·K], a pair of them for an LSTM."""
    parts = tuple(s[None].to(dtype) for s in state if s is not None)
    return parts if len(parts) > 1 else parts[0]


def _from_torch(last: Tensor | tuple[Tensor, Tensor]) -> RNNState:
    return RNNState(last[0], None) if isinstance(last, Tensor) else RNNState(last[0][0], last[1][0])


@dataclass(frozen=True, kw_only=True)
class LSTMOptions(_RNNOptions):
    """Options of `LSTM`."""

    name: ClassVar[str] = "lstm"


class LSTM(_RNN):
    """The LSTM (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000), of H·K units:

    c_t = f_t ⊙ c_{t−1} + i_t ⊙ tanh(W_g x_t + U_g h_{t−1} + b_g),  h_t = o_t ⊙ tanh(c_t), and y_t = o_proj(h_t).

    It has no row in the papers' table H_i = A(x_i) H_{i−1} + B(x_i): the gates i, f, o see h_{t−1}, so that the step is
    not linear in the state and time cannot be parallelised.

    Args:
        hidden_size: D.
        num_heads, head_dim: H and K. The units form no heads; H·K of them make the width comparable.

    Raises:
        UsageError: a size is not positive.
    """

    options: ClassVar[type[MixerOptions]] = LSTMOptions
    about: ClassVar[About] = About(
        "the classical LSTM",
        "Hochreiter and Schmidhuber 1997",
        "none: the gates see the last output, so that the step is not linear in the state",
        "-",
    )

    rnn_class = WideLSTM
    has_cell = True


@dataclass(frozen=True, kw_only=True)
class GRUOptions(_RNNOptions):
    """Options of `GRU`."""

    name: ClassVar[str] = "gru"


class GRU(_RNN):
    """The GRU (arXiv 1406.1078), of H·K units and in PyTorch's variant, whose reset gate follows the product:

    h_t = (1 − z_t) ⊙ tanh(W_n x_t + b_n + r_t ⊙ (U_n h_{t−1} + c_n)) + z_t ⊙ h_{t−1}, and y_t = o_proj(h_t).

    It has no row in the papers' table H_i = A(x_i) H_{i−1} + B(x_i): the gates r, z see h_{t−1}, so that the step is
    not linear in the state and time cannot be parallelised.

    Args:
        hidden_size: D.
        num_heads, head_dim: H and K. The units form no heads; H·K of them make the width comparable.

    Raises:
        UsageError: a size is not positive.
    """

    options: ClassVar[type[MixerOptions]] = GRUOptions
    about: ClassVar[About] = About(
        "the gated recurrent unit",
        "arXiv 1406.1078",
        "none: the gates see the last output, so that the step is not linear in the state",
        "-",
    )

    rnn_class = WideGRU
    has_cell = False
