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

import torch
from torch import Tensor

from deltaproduct.theory.cascade import Action, Cascade, Context, Level, the_state
from deltaproduct.theory.constructions.circuit import Circuit, Unit, Write, all_of, check_weights
from deltaproduct.theory.householder import Factors, no_factors, transpositions
from deltaproduct.theory.limits import Plan
from deltaproduct.theory.representations import simplex, swaps


def stack(cascade: Cascade, strategy: str) -> Plan:
    """The plan; its labels are the automaton's states."""
    levels, n, bos = cascade.levels, len(cascade.automaton.states), len(cascade.automaton.alphabet)
    circuit = Circuit(bos + 1)
    if not levels:  # one state: a layer that does nothing, since a model has at least one
        circuit.mixer(torch.zeros(1, 1, dtype=torch.float64), [{}], power=0)
        return circuit.plan(strategy, 0, torch.zeros(1, bos + 1, dtype=torch.float64))
    context = -1  # the first slot of the level's context; the first level has but one, and no slots
    for i, level in enumerate(levels):
        if i == 0:
            actions = {step.symbol: action for step, action in level.actions.items()}
        else:
            actions = _known_actions(circuit, level, context, bos)
        labels = circuit.mixer(*_heads(level, actions, bos), power=1 if level.only_resets else level.size)
        if len(levels) == 1 and level.selects:
            codes = torch.zeros(n, level.size, dtype=torch.float64)
            for (_, label), state in level.following.items():
                codes[the_state(state), label] = 1.0
            return circuit.plan(strategy, labels, codes)
        following: list[Context] = [((state,),) for state in range(n)]
        if i + 1 < len(levels):
            following = levels[i + 1].contexts
        answer = circuit.take(len(following))
        circuit.look_up(_next_context(level, context, labels, following, answer))
        context = answer
    return circuit.plan(strategy, context, torch.eye(n, dtype=torch.float64))


def _known_actions(circuit: Circuit, level: Level, context: int, bos: int) -> dict[int, Action]:
    """A layer that keeps a level's context for one token and looks up its action; the slots of all actions."""
    contexts, actions = level.contexts, sorted(set(level.actions.values()), key=str)
    number = {states: i for i, states in enumerate(contexts)}
    read = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    past = circuit.mixer(read, [_delay(range(context, context + len(contexts)), bos)], power=1)
    slot = circuit.take(len(actions) + 1)  # one more at BOS, so that as many are active as ever
    units = [all_of([bos], slot + len(actions))]
    for step, action in level.actions.items():
        known = (step.symbol, past + number[step.before], context + number[step.after])
        units.append(all_of(known, slot + actions.index(action)))
    circuit.look_up(units)
    return dict(enumerate(actions, start=slot))


def _heads(level: Level, actions: dict[int, Action], bos: int) -> tuple[Tensor, list[dict[int, Write]]]:
    """Each head's query, and what it does when the slot of an action, or of BOS, is active."""
    one = torch.ones(1, dtype=torch.float64)
    if level.only_resets:
        codes = torch.eye(level.size, dtype=torch.float64)
        key, stay = Factors(one[None], one), Write(no_factors(1))
        resets = {slot: action.reset for slot, action in actions.items()} | {bos: level.initial_label}
        writes = {slot: stay if label is None else Write(key, codes[label, None]) for slot, label in resets.items()}
        return one[None], [writes]
    width = bos + 1 + level.size  # at least
    check_weights(max(_steps(action) for action in actions.values()), level.size, level.size - 1, width)
    corners = simplex(level.size)
    # BOS finds an empty state: one factor, whose key is the corner, writes it.
    start = Write(Factors(corners[level.initial_label, None], one), one[None])
    writes = {slot: _move(action, corners) for slot, action in actions.items()} | {bos: start}
    return corners, [writes] * level.size


def _next_context(level: Level, context: int, labels: int, following: Sequence[Context], answer: int) -> list[Unit]:
    """From a level's context and its label to the next level's context, one-hot from `answer` on."""
    own = level.contexts
    units = []
    for (states, label), after in level.following.items():
        known = {} if context < 0 else {context + own.index(states): 1.0}
        # A label is one-hot; or it is a sign, which half of makes as much of a difference.
        weight, enough = (1.0, 0.5) if level.only_resets else (0.5, 0.0)
        threshold = len(known) + enough
        units.append(Unit(known | {labels + label: weight}, threshold, (answer + following.index(after),)))
    return units


def _move(action: Action, corners: Tensor) -> Write:
    """A level's action on a corner of the simplex: swaps of two corners, or one axis after the other overwritten."""
    d = corners.shape[1]
    if action.permutation is None:
        factors = Factors(torch.eye(d, dtype=torch.float64), torch.ones(d, dtype=torch.float64))
        return Write(factors, corners[action.reset][:, None])
    return Write(swaps(action.permutation, corners))


def _steps(action: Action) -> int:
    """How many factors `_move` takes, at least."""
    return 1 if action.permutation is None else len(transpositions(action.permutation))


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
