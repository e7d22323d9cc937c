"""The mixers by the name that a configuration gives them. A new one takes its own file and one line here."""

from deltaproduct.errors import UsageError, did_you_mean
from deltaproduct.layers.attention import Attention
from deltaproduct.layers.deltaproduct import DeltaNet, DeltaProduct, GatedDeltaNet
from deltaproduct.layers.dense_rnn import DenseLinearRNN
from deltaproduct.layers.gla import GatedLinearAttention
from deltaproduct.layers.linear_attention import LinearAttention
from deltaproduct.layers.mamba import Mamba
from deltaproduct.layers.mamba2 import Mamba2
from deltaproduct.layers.mixer import Mixer
from deltaproduct.layers.mlstm import MLSTM
from deltaproduct.layers.rnn import GRU, LSTM
from deltaproduct.layers.rwkv7 import RWKV7
from deltaproduct.layers.slstm import SLSTM
from deltaproduct.layers.titans import Titans
from deltaproduct.layers.ttt import TTTLinear

MIXERS: dict[str, type[Mixer]] = {
    "deltaproduct": DeltaProduct,
    "deltanet": DeltaNet,
    "gated_deltanet": GatedDeltaNet,
    "linear_attention": LinearAttention,
    "gla": GatedLinearAttention,
    "mlstm": MLSTM,
    "mamba2": Mamba2,
    "mamba": Mamba,
    "rwkv7": RWKV7,
    "titans": Titans,
    "ttt_linear": TTTLinear,
    "dense_linear_rnn": DenseLinearRNN,
    "lstm": LSTM,
    "gru": GRU,
    "slstm": SLSTM,
    "attention": Attention,
}


def get_mixer(name: str) -> type[Mixer]:
    """The class of a mixer; `UsageError` if there is none of that name."""
    if name not in MIXERS:
        near = did_you_mean(name, MIXERS)
        raise UsageError(f"There is no mixer {name!r}{near}; choose from {', '.join(sorted(MIXERS))}.")
    return MIXERS[name]
