"""The mixers by the name that a configuration gives them. A new one takes its own file and one line here."""

from deltaproduct.errors import UsageError
from deltaproduct.layers.deltaproduct import DeltaNet, DeltaProduct, GatedDeltaNet
from deltaproduct.layers.mixer import Mixer

MIXERS: dict[str, type[Mixer]] = {
    "deltaproduct": DeltaProduct,
    "deltanet": DeltaNet,
    "gated_deltanet": GatedDeltaNet,
}


def get_mixer(name: str) -> type[Mixer]:
    """The class of a mixer; `UsageError` if there is none of that name."""
    if name not in MIXERS:
        raise UsageError(f"There is no mixer {name!r}; choose from {', '.join(sorted(MIXERS))}.")
    return MIXERS[name]
