"""Writing weights by hand into an unmodified `SequenceModel`: slots of the residual stream, tracking heads, AND units.

The residual stream is a set of slots that hold codes: one-hot numbers, or signs ±1. How many of them are active does
not depend on the token, so that a norm in front of a layer is a known factor, the gain. The tokens' slots come first.

What makes the weights exact in float32: 2·sigmoid saturates to exactly 2 and 0, and is exactly 1 at 0; keys are scaled
up so that the 1e-6 in their normalisation is invisible, and written values so that the output norm's eps is.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaproduct.errors import UsageError
from deltaproduct.layers import DeltaProductOptions
from deltaproduct.memory import check_memory
from deltaproduct.models import ModelConfig, SequenceModel
from deltaproduct.models.size import model_bytes
from deltaproduct.theory.householder import Factors
from deltaproduct.theory.limits import Plan

LARGE = 1e3  # of keys and values before their normalisation: its eps is then below float32's rounding
ON, OFF = 40.0, -200.0  # logits of β = 2 and 0; sigmoid is 1 and below 1e-86 there, float64 included
STEEPNESS = 80.0  # of an AND: at half of it silu is x on one side of 0, and 1e-16 on the other
SHARPNESS = 10.0  # of the logits
MAX_UNITS = 20_000  # of an MLP
MAX_WEIGHTS = 1_000_000_000  # of a projection: 8 GB as it is written, in float64


@dataclass(frozen=True, eq=False)
class Write:
    """What a head does when a slot is active: `factors` on its state, and `values` [N,V] written by each of them.

    β is 0, 1 or 2; with β = 1 a factor erases what its key holds, and writes its value there. Factors and values add up
    over the active slots, so that one slot may give the ones and another the others.
    """

    factors: Factors | None = None
    values: Tensor | None = None


@dataclass(frozen=True)
class Unit:
    """An AND of an MLP: where Σ weight·slot over `inputs` is ½ above the threshold, it adds 1 to the slots `outputs`;
    where it is ½ or more below, nothing."""

    inputs: dict[int, float]
    threshold: float
    outputs: tuple[int, ...]


def all_of(slots: Iterable[int], *outputs: int) -> Unit:
    """The AND of one-hot slots."""
    inputs = dict.fromkeys(slots, 1.0)
    return Unit(inputs, len(inputs) - 0.5, outputs)


def check_weights(steps: int, heads: int, dim: int, width: int) -> None:
    """UsageError if a projection to the keys or values of so many factors, heads and dimensions would be too large."""
    if (weights := steps * heads * dim * width) > MAX_WEIGHTS:
        raise UsageError(f"a projection has {weights:,} weights, at most {MAX_WEIGHTS:,}")


@dataclass(eq=False)
class _Layer:
    """A mixer and its MLP, as they are to be."""

    queries: Tensor  # [H,K]
    writes: Sequence[dict[int, Write]]
    out: int
    power: float
    value_dim: int
    steps: int
    units: Sequence[Unit] = ()
    units_power: float = 0

    def options(self) -> DeltaProductOptions:
        """The mixer's. Nothing is between the projections and the recurrence."""
        heads, key_dim = self.queries.shape
        return DeltaProductOptions(
            num_heads=heads, head_dim=key_dim, num_householder=self.steps, expand_v=self.value_dim / key_dim,
            allow_neg_eigval=True, use_short_conv=False, qkv_activation="identity",
        )  # fmt: skip


class Circuit:
    """Layers to be, in the order in which a token passes through them.

    Args:
        vocab_size: tokens with BOS, which is the last of them; token i is slot i.
    """

    def __init__(self, vocab_size: int):
        self.vocab_size = self.width = vocab_size
        self.layers: list[_Layer] = []

    def take(self, count: int) -> int:
        """The first of so many fresh slots."""
        self.width += count
        return self.width - count

    def mixer(self, queries: Tensor, writes: Sequence[dict[int, Write]], *, power: float) -> int:
        """A new layer: head h reads its state with queries[h] [K], and does writes[h][slot] when that slot is active.

        What a head reads [V] is normalised to √V, and divided by that. Returns the first of H·V fresh slots that hold
        it; `power` is Σ x² over them.
        """
        all_of_them = [write for by_slot in writes for write in by_slot.values()]
        value_dim = max([1, *(w.values.shape[1] for w in all_of_them if w.values is not None)])
        steps = max([1, *(len(w.factors.betas) for w in all_of_them if w.factors is not None)])
        check_weights(steps, len(queries), max(queries.shape[1], value_dim), self.width)
        out = self.take(len(queries) * value_dim)
        self.layers.append(_Layer(queries, writes, out, power, value_dim, steps))
        return out

    def look_up(self, units: Sequence[Unit], *, power: float = 1) -> None:
        """Give the last layer an MLP; `power` is Σ x² over all that it writes."""
        layer = self.layers[-1]
        layer.units, layer.units_power = units, power

    def plan(self, strategy: str, slot: int, codes: Tensor) -> Plan:
        """The whole: it scores label i by codes[i] [c] times the slots from `slot` on."""
        config = ModelConfig(
            vocab_size=self.vocab_size,
            num_labels=len(codes),
            hidden_size=self.width,
            num_hidden_layers=len(self.layers),
            intermediate_size=tuple(len(layer.units) for layer in self.layers),
            mixer=tuple(layer.options() for layer in self.layers),
        )
        return Plan(strategy, config, lambda: _Weights(config).write(self.layers, slot, codes))


class _Weights:
    """A model of zeros (float64), filled layer by layer."""

    def __init__(self, config: ModelConfig):
        check_memory("The compiled model", model_bytes(config, per_parameter=8), "max_width or max_layers")
        self.config, self.tokens = config, config.vocab_size
        self.model = SequenceModel(config).double()
        self.weights = dict(self.model.named_parameters())
        self.power = 1.0  # Σ x² over the residual stream as it is so far

    @property
    def gain(self) -> float:
        """What a norm at this point multiplies by."""
        return 1 / math.sqrt(self.power / self.config.hidden_size + self.config.norm_eps)

    @torch.no_grad()
    def write(self, layers: Sequence[_Layer], slot: int, codes: Tensor) -> SequenceModel:
        for name, weight in self.weights.items():
            if "norm" not in name:
                weight.zero_()
        self.weights["embedding.weight"][:, : self.tokens] = torch.eye(self.tokens)
        for i, layer in enumerate(layers):
            self._mixer(f"blocks.{i}.mixer.", layer)
            self.power += layer.power
            if layer.units:
                self._mlp(f"blocks.{i}.mlp.", layer.units)
                self.power += layer.units_power
        self.weights["head.weight"][:, slot : slot + codes.shape[1]] = SHARPNESS * codes
        return self.model.float().eval()

    def _mixer(self, name: str, layer: _Layer) -> None:
        heads, key_dim = layer.queries.shape
        width = self.config.hidden_size
        k = torch.zeros(layer.steps, heads, key_dim, width, dtype=torch.float64)
        v = torch.zeros(layer.steps, heads, layer.value_dim, width, dtype=torch.float64)
        beta = torch.zeros(layer.steps, heads, width, dtype=torch.float64)
        for h, by_slot in enumerate(layer.writes):
            for slot, write in by_slot.items():
                if write.factors is not None:
                    padded = write.factors.padded(layer.steps)
                    k[:, h, :, slot] = padded.keys
                    beta[:, h, slot] = torch.where(padded.betas == 2, ON, torch.where(padded.betas == 1, 0.0, OFF))
                if write.values is not None:
                    v[: len(write.values), h, : write.values.shape[1], slot] = write.values
        # Queries are the same for every token, and exactly one token's slot is active.
        self.weights[name + "q_proj.weight"][:, : self.tokens] = LARGE * layer.queries.flatten()[:, None]
        self.weights[name + "k_proj.weight"][:] = LARGE * k.flatten(0, 2)
        self.weights[name + "v_proj.weight"][:] = LARGE * v.flatten(0, 2)
        self.weights[name + "b_proj.weight"][:] = beta.flatten(0, 1) / self.gain
        room = heads * layer.value_dim
        self.weights[name + "o_proj.weight"][layer.out : layer.out + room] = torch.eye(room) / math.sqrt(
            layer.value_dim
        )

    def _mlp(self, name: str, units: Sequence[Unit]) -> None:
        gate = torch.zeros(len(units), self.config.hidden_size, dtype=torch.float64)
        for u, unit in enumerate(units):
            gate[u, : self.tokens] = -unit.threshold  # one of them is active: a constant
            for slot, weight in unit.inputs.items():
                gate[u, slot] += weight
            self.weights[name + "down_proj.weight"][list(unit.outputs), u] += 2 / STEEPNESS
        self.weights[name + "gate_proj.weight"][:] = gate * STEEPNESS / self.gain
        self.weights[name + "up_proj.weight"][:, : self.tokens] = 1 / self.gain
