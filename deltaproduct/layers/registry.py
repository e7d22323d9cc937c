"""The mixers by the name that a configuration gives them. A new one takes its own file and one line here.

Reading names needs no PyTorch: a mixer's file is imported when its class is asked for.
"""

from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING, NamedTuple

from deltaproduct.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from deltaproduct.layers.mixer import Mixer


class Place(NamedTuple):
    """Where a mixer is: its file in this folder, its class, the record of its options."""

    module: str
    mixer: str
    options: str


def _place(module: str, mixer: str) -> Place:
    return Place(module, mixer, f"{mixer}Options")


PLACES: dict[str, Place] = {
    "deltaproduct": _place("deltaproduct", "DeltaProduct"),
    "deltanet": _place("deltaproduct", "DeltaNet"),
    "gated_deltanet": _place("deltaproduct", "GatedDeltaNet"),
    "linear_attention": _place("linear_attention", "LinearAttention"),
    "gla": _place("gla", "GatedLinearAttention"),
    "mlstm": _place("mlstm", "MLSTM"),
    "mamba2": _place("mamba2", "Mamba2"),
    "mamba": _place("mamba", "Mamba"),
    "rwkv7": _place("rwkv7", "RWKV7"),
    "titans": _place("titans", "Titans"),
    "ttt_linear": _place("ttt", "TTTLinear"),
    "dense_linear_rnn": _place("dense_rnn", "DenseLinearRNN"),
    "lstm": _place("rnn", "LSTM"),
    "gru": _place("rnn", "GRU"),
    "slstm": _place("slstm", "SLSTM"),
    "attention": _place("attention", "Attention"),
}


class Mixers(MutableMapping[str, "type[Mixer]"]):
    """The classes by name. One of your own is registered by `MIXERS["name"] = MyMixer`, whose `options.name` is it."""

    def __init__(self) -> None:
        self._registered: dict[str, type[Mixer] | None] = dict.fromkeys(PLACES)

    def registered(self, name: str) -> "type[Mixer] | None":
        """The class that was put under a name; None where it is ours."""
        return self._registered.get(name)

    def __getitem__(self, name: str) -> "type[Mixer]":
        if (own := self._registered[name]) is not None:
            return own
        from deltaproduct import layers  # whose names are found when they are used

        return getattr(layers, PLACES[name].mixer)

    def __setitem__(self, name: str, mixer: "type[Mixer]") -> None:
        if mixer.options.name != name:
            raise UsageError(f"{mixer.__name__} has the options of {mixer.options.name}; they have to be of {name}.")
        ours = name in PLACES and mixer.__module__ == f"{__package__}.{PLACES[name].module}"
        self._registered[name] = None if ours else mixer

    def __delitem__(self, name: str) -> None:
        del self._registered[name]

    def __iter__(self) -> "Iterator[str]":
        return iter(self._registered)

    def __len__(self) -> int:
        return len(self._registered)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._registered


MIXERS = Mixers()


def check_mixer_name(name: str) -> None:
    """`UsageError` if there is no mixer of that name."""
    if name not in MIXERS:
        near = did_you_mean(name, MIXERS)
        raise UsageError(f"There is no mixer {name!r}{near}; choose from {', '.join(sorted(MIXERS))}.")


def get_mixer(name: str) -> "type[Mixer]":
    """The class of a mixer; `UsageError` if there is none of that name."""
    check_mixer_name(name)
    return MIXERS[name]


def place_of(name: str) -> Place:
    """Where a mixer of ours is; `UsageError` if there is none of that name."""
    check_mixer_name(name)
    return PLACES[name]
