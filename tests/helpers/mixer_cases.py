"""Every registered mixer with every option of its own, and how tests build one.

A new mixer is under test as soon as it is in the registry; options that it does not take are left out.
"""

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from deltaproduct.layers import MIXERS, Mixer, get_mixer
from deltaproduct.layers.options import option_names

OPTIONS: list[dict[str, Any]] = [
    {},
    {"use_forget_gate": True, "use_output_gate": True, "num_householder": 3},
    {"use_short_conv": False, "qkv_activation": "identity", "num_v_heads": 4},
    {"num_v_heads": 4, "expand_v": 2.0, "use_forget_gate": True},
    {"beta_bias_init": 1.5, "conv_size": 2, "qkv_activation": "relu", "allow_neg_eigval": False},
    {"conv_size": 1, "num_householder": 1, "use_output_gate": True, "expand_v": 1.5},
    {"feature_map": "identity", "expand_v": 2.0},
    {"gate_low_rank_dim": 3, "gate_logit_normalizer": 2, "expand_v": 1.5},
    {"expand": 4, "ssm_state_size": 3, "conv_size": 2, "allow_neg_eigval": False},
    {"time_step_rank": 2, "conv_size": 1},
    {"use_short_conv": False},
    {"num_kv_heads": 1, "rope_theta": None},
    {"ttt_chunk_size": 3, "use_output_gate": True},
    {"ttt_chunk_size": 1, "ttt_base_lr": 0.5},
]
CASES = [
    pytest.param(name, options, id="-".join([name, *(f"{k}={v}" for k, v in options.items())]))
    for name, mixer in MIXERS.items()
    for options in OPTIONS
    if set(options) <= set(option_names(mixer.options))
]


def known_options(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Of the values, those that the mixer has as options."""
    return {key: value for key, value in values.items() if key in option_names(get_mixer(name).options)}


def mixer_of(name: str, hidden_size: int, values: dict[str, Any], norm_eps: float = 1e-5) -> Mixer:
    """A mixer with those of the values that it has as options."""
    return get_mixer(name).options(**known_options(name, values)).build(hidden_size, norm_eps)


def build(name: str, options: dict, dtype: torch.dtype = torch.float64, hidden_size: int = 12, **sizes):
    torch.manual_seed(0)
    values = {"num_heads": 2, "head_dim": 4, "hidden_size": hidden_size} | sizes | options
    return mixer_of(name, values["hidden_size"], values, values.get("norm_eps", 1e-5)).to(dtype)


EXACT = 1e-11


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_same(got, want, tolerance: float = EXACT) -> None:
    """Two tensors, or two states, agree; relative to the largest entry of each tensor."""
    got, want = tree_leaves(got), tree_leaves(want)
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape
            assert b.numel() == 0 or (a - b).abs().max() <= tolerance * max(b.abs().max(), 1e-30)
