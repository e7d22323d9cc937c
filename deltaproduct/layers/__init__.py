"""Sequence mixers: DeltaProduct, its presets DeltaNet and Gated DeltaNet, and those that they are compared with."""

from typing import TYPE_CHECKING

from deltaproduct.late import late

if TYPE_CHECKING:
    from deltaproduct.layers.attention import Attention, AttentionOptions, AttentionState
    from deltaproduct.layers.deltaproduct import (
        DeltaNet,
        DeltaNetOptions,
        DeltaProduct,
        DeltaProductOptions,
        DeltaProductState,
        GatedDeltaNet,
        GatedDeltaNetOptions,
    )
    from deltaproduct.layers.dense_rnn import DenseLinearRNN, DenseLinearRNNOptions, DenseLinearRNNState
    from deltaproduct.layers.gla import GatedLinearAttention, GatedLinearAttentionOptions
    from deltaproduct.layers.linear_attention import LinearAttention, LinearAttentionOptions
    from deltaproduct.layers.mamba import Mamba, MambaOptions
    from deltaproduct.layers.mamba2 import Mamba2, Mamba2Options
    from deltaproduct.layers.mixer import Mixer
    from deltaproduct.layers.mlstm import MLSTM, MLSTMOptions
    from deltaproduct.layers.options import MixerOptions
    from deltaproduct.layers.registry import MIXERS, get_mixer
    from deltaproduct.layers.rnn import GRU, LSTM, GRUOptions, LSTMOptions, RNNState
    from deltaproduct.layers.rwkv7 import RWKV7, RWKV7Options, RWKV7State
    from deltaproduct.layers.slstm import SLSTM, SLSTMOptions, SLSTMState
    from deltaproduct.layers.titans import Titans, TitansOptions, TitansState
    from deltaproduct.layers.ttt import TTTLinear, TTTLinearOptions, TTTLinearState

__all__ = [
    "GRU",
    "LSTM",
    "MIXERS",
    "MLSTM",
    "RWKV7",
    "SLSTM",
    "Attention",
    "AttentionOptions",
    "AttentionState",
    "DeltaNet",
    "DeltaNetOptions",
    "DeltaProduct",
    "DeltaProductOptions",
    "DeltaProductState",
    "DenseLinearRNN",
    "DenseLinearRNNOptions",
    "DenseLinearRNNState",
    "GRUOptions",
    "GatedDeltaNet",
    "GatedDeltaNetOptions",
    "GatedLinearAttention",
    "GatedLinearAttentionOptions",
    "LSTMOptions",
    "LinearAttention",
    "LinearAttentionOptions",
    "MLSTMOptions",
    "Mamba",
    "Mamba2",
    "Mamba2Options",
    "MambaOptions",
    "Mixer",
    "MixerOptions",
    "RNNState",
    "RWKV7Options",
    "RWKV7State",
    "SLSTMOptions",
    "SLSTMState",
    "TTTLinear",
    "TTTLinearOptions",
    "TTTLinearState",
    "Titans",
    "TitansOptions",
    "TitansState",
    "get_mixer",
]

__getattr__, __dir__ = late(
    __name__,
    {
        "attention": (
            "Attention",
            "AttentionOptions",
            "AttentionState",
        ),
        "deltaproduct": (
            "DeltaNet",
            "DeltaNetOptions",
            "DeltaProduct",
            "DeltaProductOptions",
            "DeltaProductState",
            "GatedDeltaNet",
            "GatedDeltaNetOptions",
        ),
        "dense_rnn": (
            "DenseLinearRNN",
            "DenseLinearRNNOptions",
            "DenseLinearRNNState",
        ),
        "gla": (
            "GatedLinearAttention",
            "GatedLinearAttentionOptions",
        ),
        "linear_attention": (
            "LinearAttention",
            "LinearAttentionOptions",
        ),
        "mamba": (
            "Mamba",
            "MambaOptions",
        ),
        "mamba2": (
            "Mamba2",
            "Mamba2Options",
        ),
        "mixer": ("Mixer",),
        "mlstm": (
            "MLSTM",
            "MLSTMOptions",
        ),
        "options": ("MixerOptions",),
        "registry": ("MIXERS", "get_mixer"),
        "rnn": (
            "GRU",
            "GRUOptions",
            "LSTM",
            "LSTMOptions",
            "RNNState",
        ),
        "rwkv7": (
            "RWKV7",
            "RWKV7Options",
            "RWKV7State",
        ),
        "slstm": (
            "SLSTM",
            "SLSTMOptions",
            "SLSTMState",
        ),
        "titans": (
            "Titans",
            "TitansOptions",
            "TitansState",
        ),
        "ttt": (
            "TTTLinear",
            "TTTLinearOptions",
            "TTTLinearState",
        ),
    },
)
