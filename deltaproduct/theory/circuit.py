"""Writing weights by hand into an unmodified `SequenceModel`: slots of the residual stream, tracking heads, AND units.

The residual stream is a set of slots that hold codes: one-hot numbers, or signs ±1. How many of them are active does
not depend on the token, so that a norm in front of a layer is a known factor, the gain. The tokens' slots come first.

What makes the weights exact in float32: 2·sigmoid saturates to exactly 2 and 0, and is exactly 1 at 0; keys are scaled
up so that the 1e-6 in their normalisation is invisible, and written values so that the output norm's eps is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaproduct.models import ModelConfig, SequenceModel
from deltaproduct.theory.householder import Factors

LARGE = 1e3  # of keys and values before their normalisation: its eps is then below float32's rounding
ON, OFF = 40.0, -200.0  # logits of β = 2 and 0; sigmoid is 1 and below 1e-86 there, float64 included
STEEPNESS = 80.0  # of an AND: at half of it silu is x on one side of 0, and 1e-16 on the other
SHARPNESS = 10.0  # of the logits

Unit = tuple[dict[int, float], float, int]  # of an MLP: what it weighs, the threshold, the slot that it adds 1 to


def plain_config(**fields: Any) -> ModelConfig:
    """A configuration whose layers have nothing between projections and recurrence, with eigenvalues in [−1,1]."""
    return ModelConfig(allow_neg_eigval=True, use_short_conv=False, qkv_activation="identity", **fields)


@dataclass(frozen=True, eq=False)
class Write:
    """What a head does when a slot is active: `factors` on its state, and `values` [N,V] written by each of them.

    β is 0, 1 or 2; with β = 1 a factor erases what its key holds, and writes its value there. Factors and values add up
    over the active slots, so that one slot may give the ones and another the others.
    """

    factors: Factors | None = None
    values: Tensor | None = None


class Circuit:
    """A model of zeros (float64) to be filled block by block, in the order in which a token passes through them.

    Args:
        config: one of `plain_config`.
    """

    def __init__(self, config: ModelConfig):
        self.config = config
        self.model = SequenceModel(config).double()
        self.weights = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, weight in self.weights.items():
                if "norm" not in name:
                    weight.zero_()
            self.weights["embedding.weight"][:, : config.vocab_size] = torch.eye(config.vocab_size)
        self.power = 1.0  # Σ x² over the residual stream as it is so far

    @property
    def gain(self) -> float:
        """What a norm at this point multiplies by."""
        return 1 / math.sqrt(self.power / self.config.hidden_size + self.config.norm_eps)

    @torch.no_grad()
    def mixer(self, layer: int, queries: Tensor, writes: Sequence[dict[int, Write]], out: int, power: float) -> None:
        """Fill a mixer: head h reads its state with queries[h] [K], and does writes[h][slot] when that slot is active.

        What head h reads is normalised to √V, divided by that, and put into slots `out` + h·V …; `power` is what all of
        it adds to the residual stream's.
        """
        own = self.config.layer(layer)
        heads, steps, tokens = own.num_heads, own.num_householder, self.config.vocab_size
        value_dim, width = round(own.head_dim * own.expand_v), own.hidden_size
        k = torch.zeros(steps, heads, own.head_dim, width, dtype=torch.float64)
        v = torch.zeros(steps, heads, value_dim, width, dtype=torch.float64)
        beta = torch.zeros(steps, heads, width, dtype=torch.float64)
        for h, by_slot in enumerate(writes):
            for slot, write in by_slot.items():
                if write.factors is not None:
                    padded = write.factors.padded(steps)
                    k[:, h, :, slot] = padded.keys
                    beta[:, h, slot] = torch.where(padded.betas == 2, ON, torch.where(padded.betas == 1, 0.0, OFF))
                if write.values is not None:
                    v[: len(write.values), h, : write.values.shape[1], slot] = write.values
        name = f"blocks.{layer}.mixer."
        # Queries are the same for every token, and exactly one token's slot is active.
        self.weights[name + "q_proj.weight"][:, :tokens] = LARGE * queries.flatten()[:, None]
        self.weights[name + "k_proj.weight"][:] = LARGE * k.flatten(0, 2)
        self.weights[name + "v_proj.weight"][:] = LARGE * v.flatten(0, 2)
        self.weights[name + "b_proj.weight"][:] = beta.flatten(0, 1) / self.gain
        room = heads * value_dim
        self.weights[name + "o_proj.weight"][out : out + room] = torch.eye(room) / math.sqrt(value_dim)
        self.power += power

    @torch.no_grad()
    def mlp(self, layer: int, units: Sequence[Unit], power: float) -> None:
        """Fill an MLP with units (inputs, threshold, output).

        Where Σ weight·slot over `inputs` is ½ above the threshold, a unit adds 1 to the slot `output`; where it is ½ or
        more below, nothing. `power` is as for `mixer`.
        """
        name, tokens = f"blocks.{layer}.mlp.", self.config.vocab_size
        for u, (inputs, threshold, output) in enumerate(units):
            gate = self.weights[name + "gate_proj.weight"][u]
            gate[:tokens] = -threshold * STEEPNESS / self.gain  # one of them is active: a constant
            for slot, weight in inputs.items():
                gate[slot] += weight * STEEPNESS / self.gain
            self.weights[name + "up_proj.weight"][u, :tokens] = 1 / self.gain
            self.weights[name + "down_proj.weight"][output, u] += 2 / STEEPNESS
        self.power += power

    @torch.no_grad()
    def read(self, slot: int, codes: Tensor) -> SequenceModel:
        """Score label i by codes[i] [c] times the slots from `slot` on; the finished model, float32."""
        self.weights["head.weight"][:, slot : slot + codes.shape[1]] = SHARPNESS * codes
        return self.model.float().eval()
