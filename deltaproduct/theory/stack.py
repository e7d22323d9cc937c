"""An automaton's cascade (cascade.py) as a stack of layers: for n states at most 2n − 3.

Level i with m labels is a layer with m heads. Each holds the excluded label e as a corner u_e of a regular simplex, and
reads the sign of its own corner's product with it; the signs together are a one-hot code of e. Permutations of labels
are products of reflections that swap two corners, resets overwrite one axis after the other. The layer's MLP looks up
which set of states remains without e.

Between two levels a layer delays that set by one token, and its MLP looks up what the symbol, the set before and the
set after it let the next level do. So every level knows its action by the time that its layer is reached.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaproduct.models import SequenceModel
from deltaproduct.theory.cascade import Action, Cascade, Level, Subset, without
from deltaproduct.theory.circuit import Circuit, Unit, Write, plain_config
from deltaproduct.theory.householder import Factors
from deltaproduct.theory.representations import simplex, swaps


@dataclass(frozen=True)
class _Place:
    """Where a level's codes begin in the residual stream; the first level has no set and no action to be looked up."""

    level: Level
    actions: list[Action]  # different ones
    signs: int  # one a label
    set: int = -1  # one-hot, as of this token
    past: int = -1  # and of the one before, with one more slot for the time before BOS
    action: int = -1  # one-hot, with one more slot for BOS


def stack(cascade: Cascade) -> SequenceModel:
    """The model; its labels are the automaton's states."""
    automaton, levels = cascade.automaton, cascade.levels
    n, bos = len(automaton.states), len(automaton.alphabet)
    end = bos + 1
    if not levels:  # one state: a layer that does nothing, since a model has at least one
        config = plain_config(vocab_size=end, num_labels=1, hidden_size=end, intermediate_size=0, num_heads=1,
                              head_dim=1, num_householder=1)  # fmt: skip
        return Circuit(config).read(0, torch.zeros(1, end, dtype=torch.float64))

    def take(count: int) -> int:
        """The first of so many fresh slots."""
        nonlocal end
        end += count
        return end - count

    places: list[_Place] = []
    for level in levels:
        actions = sorted(set(level.actions.values()), key=str)
        place = _Place(level, actions, take(level.size))
        if places:
            sets, own = len(level.sets), len(actions)
            place = _Place(level, actions, place.signs, set=take(sets), past=take(sets + 1), action=take(own + 1))
        places.append(place)
    answer = take(n)

    look_ups: list[list[Unit]] = []
    overrides: dict[str, dict[str, Any]] = {}
    for i, place in enumerate(places):
        m = place.level.size
        overrides[str(2 * i)] = {"num_heads": m, "head_dim": m - 1, "expand_v": 1 / (m - 1)}
        if i + 1 == len(places):
            look_ups.append(_remaining(place, [(state,) for state in range(n)], answer))
        else:
            following = places[i + 1]
            look_ups.append(_remaining(place, following.level.sets, following.set))
            overrides[str(2 * i + 1)] = {"num_heads": 1, "head_dim": 2, "expand_v": len(following.level.sets) / 2}
            look_ups.append(_next_action(following, bos))
    for layer, units in enumerate(look_ups):
        overrides[str(layer)]["intermediate_size"] = len(units)
    config = plain_config(
        vocab_size=bos + 1,
        num_labels=n,
        hidden_size=end,
        num_hidden_layers=len(look_ups),
        num_householder=max(n - 1, 2) if len(places) > 1 else n - 1,
        layer_overrides=overrides,
    )
    circuit = Circuit(config)
    for i, place in enumerate(places):
        level, corners = place.level, simplex(place.level.size)
        if i > 0:
            past = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
            delay = _delay(range(bos + 1), range(place.set, place.set + len(level.sets)))
            circuit.mixer(2 * i - 1, past, [delay], place.past, power=1)
            circuit.mlp(2 * i - 1, look_ups[2 * i - 1], power=1)
            moves = {place.action + number: _move(action, corners) for number, action in enumerate(place.actions)}
        else:
            moves = {step.symbol: _move(action, corners) for step, action in level.actions.items()}
        start = _move(Action(None, level.initial_label), corners)
        circuit.mixer(2 * i, corners, [moves | {bos: start}] * level.size, place.signs, power=level.size)
        circuit.mlp(2 * i, look_ups[2 * i], power=1)
    return circuit.read(answer, torch.eye(n, dtype=torch.float64))


def _remaining(place: _Place, sets: Sequence[Subset], slot: int) -> list[Unit]:
    """From a level's set and its excluded label to the set that remains, one-hot from `slot` on."""
    units: list[Unit] = []
    for number, states in enumerate(place.level.sets):
        known = {} if place.set < 0 else {place.set + number: 1.0}
        for label in range(place.level.size):
            rest = without(states, label)
            if rest in sets:  # else this label never is excluded there
                # The sign adds ±½ to the set's 1.
                units.append((known | {place.signs + label: 0.5}, len(known), slot + sets.index(rest)))
    return units


def _next_action(place: _Place, bos: int) -> list[Unit]:
    """From the symbol and a level's set before and after it to its action.

    At BOS, before which there was no set, slots that stand for that are filled, so that as many are active as ever.
    """
    sets = place.level.sets
    none_before, start = place.past + len(sets), place.action + len(place.actions)
    units: list[Unit] = [({bos: 1.0}, 0.5, none_before), ({bos: 1.0}, 0.5, start)]
    for step, action in place.level.actions.items():
        slots = (step.symbol, place.past + sets.index(step.before), place.set + sets.index(step.after))
        units.append((dict.fromkeys(slots, 1.0), 2.5, place.action + place.actions.index(action)))
    return units


def _move(action: Action, corners: Tensor) -> Write:
    """A level's action on a corner of the simplex: swaps of two corners, or one axis after the other overwritten."""
    d = corners.shape[1]
    if action.permutation is None:
        factors = Factors(torch.eye(d, dtype=torch.float64), torch.ones(d, dtype=torch.float64))
        return Write(factors, corners[action.reset][:, None])
    return Write(swaps(action.permutation, corners))


def _delay(tokens: Iterable[int], slots: Sequence[int]) -> dict[int, Write]:
    """Keep the code in `slots` for one token: what was current becomes the past, and is then overwritten."""
    swap, current = [math.sqrt(0.5), -math.sqrt(0.5)], [1.0, 0.0]
    keys = torch.tensor([swap, current], dtype=torch.float64)
    every_token = Write(Factors(keys, torch.tensor([2.0, 1.0], dtype=torch.float64)))
    codes = torch.eye(len(slots), dtype=torch.float64)
    nothing = torch.zeros_like(codes[0])
    written = {slot: Write(values=torch.stack((nothing, code))) for slot, code in zip(slots, codes, strict=True)}
    return dict.fromkeys(tokens, every_token) | written
