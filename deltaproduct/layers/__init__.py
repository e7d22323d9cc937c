"""Sequence mixers: DeltaProduct, its presets DeltaNet and Gated DeltaNet, and their peers."""

from typing import TYPE_CHECKING

from deltaproduct.late import late

if TYPE_CHECKING:
    from deltaproduct.layers.attention import Attention, AttentionState
    from deltaproduct.layers.deltaproduct import DeltaNet, DeltaProduct, DeltaProductState, GatedDeltaNet
    from deltaproduct.layers.dense_rnn import DenseLinearRNN, DenseLinearRNNState
    from deltaproduct.layers.gla import GatedLinearAttention
    from deltaproduct.layers.linear_attention import LinearAttention
    from deltaproduct.layers.mamba import Mamba
    from deltaproduct.layers.mamba2 import Mamba2
    from deltaproduct.layers.mixer import Mixer
    from deltaproduct.layers.mlstm import MLSTM
    from deltaproduct.layers.registry import MIXERS, get_mixer
    from deltaproduct.layers.rnn import GRU, LSTM, RNNState
    from deltaproduct.layers.rwkv7 import RWKV7, RWKV7State
    from deltaproduct.layers.slstm import SLSTM, SLSTMState
    from deltaproduct.layers.titans import Titans, TitansState
    from deltaproduct.layers.ttt import TTTLinear, TTTLinearState

__all__ = [
    "GRU",
    "LSTM",
    "MIXERS",
    "MLSTM",
    "RWKV7",
    "SLSTM",
    "Attention",
    "AttentionState",
    "DeltaNet",
    "DeltaProduct",
    "DeltaProductState",
    "DenseLinearRNN",
    "DenseLinearRNNState",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "LinearAttention",
    "Mamba",
    "Mamba2",
    "Mixer",
    "RNNState",
    "RWKV7State",
    "SLSTMState",
    "TTTLinear",
    "TTTLinearState",
    "Titans",
    "TitansState",
    "get_mixer",
]

__getattr__, __dir__ = late(
    __name__,
    {
        "attention": ("Attention", "AttentionState"),
        "deltaproduct": ("DeltaNet", "DeltaProduct", "DeltaProductState", "GatedDeltaNet"),
        "dense_rnn": ("DenseLinearRNN", "DenseLinearRNNState"),
        "gla": ("GatedLinearAttention",),
        "linear_attention": ("LinearAttention",),
        "mamba": ("Mamba",),
        "mamba2": ("Mamba2",),
        "mixer": ("Mixer",),
        "mlstm": ("MLSTM",),
        "registry": ("MIXERS", "get_mixer"),
        "rnn": ("GRU", "LSTM", "RNNState"),
        "rwkv7": ("RWKV7", "RWKV7State"),
        "slstm": ("SLSTM", "SLSTMState"),
        "titans": ("Titans", "TitansState"),
        "ttt": ("TTTLinear", "TTTLinearState"),
    },
)
