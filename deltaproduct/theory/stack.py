"""An automaton's cascade (cascade.py) as a stack of layers: for L levels 2L − 1, so at most 2n − 3 for n states.

Level i with m labels is a layer with m heads. Each holds the label as a corner u of a regular simplex, and reads the
sign of its own corner's product with it; the signs together are a one-hot code of the label. Permutations of labels are
products of reflections that swap two corners, resets overwrite one axis after the other. A level that is only ever
reset is one head, whose single key holds the code itself. The layer's MLP looks up the next level's context.

Between two levels a layer delays that context by one token, and its MLP looks up what the symbol, the context before
and the one after it let the next level do. So every level knows its action by the time that its layer is reached.

One level alone needs no look-up: an automaton whose symbols permute its states, or take all to one, is one layer (P2,
Theorem 3).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaproduct.models import ModelConfig, SequenceModel
from deltaproduct.theory.cascade import Action, Cascade, Context, Level, the_state
from deltaproduct.theory.circuit import Circuit, Unit, Write, plain_config
from deltaproduct.theory.householder import Factors, no_factors, transpositions
from deltaproduct.theory.representations import simplex, swaps


@dataclass(frozen=True)
class _Place:
    """Where a level's codes begin in the residual stream; the first level has no context and no action to look up."""

    level: Level
    actions: list[Action]  # different ones
    labels: int  # signs, or one-hot where the level is only ever reset
    context: int = -1  # one-hot, as of this token
    past: int = -1  # and of the one before, with one more slot for the time before BOS
    action: int = -1  # one-hot, with one more slot for BOS

    @property
    def power(self) -> float:
        """Σ x² of the label's code."""
        return 1 if self.level.only_resets else self.level.size

    def is_label(self, label: int) -> tuple[dict[int, float], float]:
        """What a unit of an MLP weighs to know the label, and its threshold: ½ below where it is, ½ above elsewhere."""
        slot = self.labels + label
        return ({slot: 1.0}, 0.5) if self.level.only_resets else ({slot: 0.5}, 0.0)


@dataclass(frozen=True)
class Stack:
    """What a cascade's model will be, before its weights are written."""

    cascade: Cascade
    config: ModelConfig
    places: list[_Place]
    look_ups: list[list[Unit]]
    answer: int  # the first slot of what is scored

    def model(self) -> SequenceModel:
        """The model; its labels are the automaton's states."""
        n, bos = len(self.cascade.automaton.states), len(self.cascade.automaton.alphabet)
        circuit = Circuit(self.config)
        if not self.places:
            return circuit.read(0, torch.zeros(1, bos + 1, dtype=torch.float64))
        for i, place in enumerate(self.places):
            level = place.level
            if i > 0:
                past = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
                delay = _delay(range(place.context, place.past), bos)
                circuit.mixer(2 * i - 1, past, [delay], place.past, power=1)
                circuit.mlp(2 * i - 1, self.look_ups[2 * i - 1], power=1)
                slots = {place.action + number: action for number, action in enumerate(place.actions)}
            else:
                slots = {step.symbol: action for step, action in level.actions.items()}
            queries, heads = _heads(level, slots, bos)
            circuit.mixer(2 * i, queries, heads, place.labels, place.power)
            if self.look_ups[2 * i]:
                circuit.mlp(2 * i, self.look_ups[2 * i], power=1)
        if len(self.places) > 1:
            return circuit.read(self.answer, torch.eye(n, dtype=torch.float64))
        # One level: its labels are the states.
        codes = torch.zeros(n, level.size, dtype=torch.float64)
        for (_, label), context in level.following.items():
            codes[the_state(context), label] = 1.0
        return circuit.read(self.answer, codes)


def plan(cascade: Cascade) -> Stack:
    """Slots, look-ups and sizes of a cascade's model."""
    automaton, levels = cascade.automaton, cascade.levels
    n, bos = len(automaton.states), len(automaton.alphabet)
    end = bos + 1
    if not levels:  # one state: a layer that does nothing, since a model has at least one
        config = plain_config(vocab_size=end, num_labels=1, hidden_size=end, intermediate_size=0, num_heads=1,
                              head_dim=1, num_householder=1)  # fmt: skip
        return Stack(cascade, config, [], [], 0)

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
            contexts, own = len(level.contexts), len(actions)
            place = _Place(
                level, actions, place.labels, context=take(contexts), past=take(contexts + 1), action=take(own + 1)
            )
        places.append(place)
    alone = len(places) == 1 and levels[0].selects
    answer = places[0].labels if alone else take(n)
    look_ups: list[list[Unit]] = []
    overrides: dict[str, dict[str, Any]] = {}
    for i, place in enumerate(places):
        overrides[str(2 * i)] = _sizes(place.level)
        if i + 1 < len(places):
            following = places[i + 1]
            look_ups.append(_next_context(place, following.level.contexts, following.context))
            kept = len(following.level.contexts) + 1
            overrides[str(2 * i + 1)] = {"num_heads": 1, "head_dim": 2, "expand_v": kept / 2, "num_householder": 2}
            look_ups.append(_next_action(following, bos))
        else:
            look_ups.append([] if alone else _next_context(place, [((state,),) for state in range(n)], answer))
    for layer, units in enumerate(look_ups):
        overrides[str(layer)]["intermediate_size"] = len(units)
    config = plain_config(
        vocab_size=bos + 1,
        num_labels=n,
        hidden_size=end,
        num_hidden_layers=len(look_ups),
        num_householder=max(sizes["num_householder"] for sizes in overrides.values()),
        layer_overrides=overrides,
    )
    return Stack(cascade, config, places, look_ups, answer)


def _sizes(level: Level) -> dict[str, Any]:
    m = level.size
    if level.only_resets:
        return {"num_heads": 1, "head_dim": 1, "expand_v": m, "num_householder": 1}
    steps = [m - 1 if a.permutation is None else len(transpositions(a.permutation)) for a in level.actions.values()]
    return {"num_heads": m, "head_dim": m - 1, "expand_v": 1 / (m - 1), "num_householder": max(1, *steps)}


def _heads(level: Level, actions: dict[int, Action], bos: int) -> tuple[Tensor, list[dict[int, Write]]]:
    """Each head's query, and what it does when the slot of an action, or of BOS, is active."""
    one = torch.ones(1, dtype=torch.float64)
    if level.only_resets:
        codes = torch.eye(level.size, dtype=torch.float64)
        key, stay = Factors(one[None], one), Write(no_factors(1))
        labels = {slot: action.reset for slot, action in actions.items()} | {bos: level.initial_label}
        writes = {slot: stay if label is None else Write(key, codes[label, None]) for slot, label in labels.items()}
        return one[None], [writes]
    corners = simplex(level.size)
    # BOS finds an empty state: one factor, whose key is the corner, writes it.
    start = Write(Factors(corners[level.initial_label, None], one), one[None])
    writes = {slot: _move(action, corners) for slot, action in actions.items()} | {bos: start}
    return corners, [writes] * level.size


def _next_context(place: _Place, contexts: Sequence[Context], slot: int) -> list[Unit]:
    """From a level's context and its label to the next level's context, one-hot from `slot` on."""
    own = place.level.contexts
    units: list[Unit] = []
    for (context, label), following in place.level.following.items():
        known = {} if place.context < 0 else {place.context + own.index(context): 1.0}
        is_label, threshold = place.is_label(label)
        units.append((known | is_label, len(known) + threshold, slot + contexts.index(following)))
    return units


def _next_action(place: _Place, bos: int) -> list[Unit]:
    """From the symbol and a level's context before and after it to its action.

    At BOS a slot that stands for its own action is filled, so that as many are active as ever.
    """
    number = {context: i for i, context in enumerate(place.level.contexts)}
    actions = {action: i for i, action in enumerate(place.actions)}
    units: list[Unit] = [({bos: 1.0}, 0.5, place.action + len(actions))]
    for step, action in place.level.actions.items():
        slots = (step.symbol, place.past + number[step.before], place.context + number[step.after])
        units.append((dict.fromkeys(slots, 1.0), 2.5, place.action + actions[action]))
    return units


def _move(action: Action, corners: Tensor) -> Write:
    """A level's action on a corner of the simplex: swaps of two corners, or one axis after the other overwritten."""
    d = corners.shape[1]
    if action.permutation is None:
        factors = Factors(torch.eye(d, dtype=torch.float64), torch.ones(d, dtype=torch.float64))
        return Write(factors, corners[action.reset][:, None])
    return Write(swaps(action.permutation, corners))


def _delay(slots: Sequence[int], bos: int) -> dict[int, Write]:
    """Keep the code in `slots` for one token: what was current becomes the past, and is then overwritten.

    At BOS the past is one code more, which stands for there being none.
    """
    swap, past, current = [math.sqrt(0.5), -math.sqrt(0.5)], [0.0, 1.0], [1.0, 0.0]
    codes = torch.eye(len(slots) + 1, dtype=torch.float64)
    nothing = torch.zeros_like(codes[0])

    def factors(first: list[float], beta: float) -> Factors:
        return Factors(
            torch.tensor([first, current], dtype=torch.float64), torch.tensor([beta, 1.0], dtype=torch.float64)
        )

    start = Write(factors(past, 1.0), torch.stack((codes[-1], nothing)))
    written = {slot: Write(values=torch.stack((nothing, code))) for slot, code in zip(slots, codes[:-1], strict=True)}
    return dict.fromkeys(range(bos), Write(factors(swap, 2.0))) | {bos: start} | written
