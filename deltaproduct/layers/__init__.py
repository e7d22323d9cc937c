"""Sequence mixers: DeltaProduct and, as its presets, DeltaNet and Gated DeltaNet."""

from deltaproduct.layers.deltaproduct import DeltaNet, DeltaProduct, DeltaProductState, GatedDeltaNet
from deltaproduct.layers.mixer import Mixer
from deltaproduct.layers.registry import MIXERS, get_mixer

__all__ = ["MIXERS", "DeltaNet", "DeltaProduct", "DeltaProductState", "GatedDeltaNet", "Mixer", "get_mixer"]
