"""Any group that is small enough with any number N of Householder factors: clock, buffer, look-up (P1, Theorem 1).

With too few factors for a symbol, a product of m symbols is carried out during the m tokens that follow it. Time is cut
into blocks of m tokens, where N·m swaps of points make any product:

* the clock, one layer (two if N = 1), counts tokens modulo 2m: what place in which of two alternating blocks this is;
* the buffer, one layer, keeps the last 2m symbols, each on the axis of its place. Its MLP looks up, by the block that
  is complete, which m-th part of its product this token is to carry out, and which element is then still missing; and
  by the block that is not, the product so far;
* the last layer follows the images of a few points as corners of a regular simplex. Its MLP looks up the label by
  them, by the element that is missing, and by the product so far.

So it is 3 layers for N > 1 and 4 for N = 1, whatever the group. The look-ups are what limits it: of sᵐ words, for s
symbols, and of up to n³ triples for n elements.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor

from deltaproduct.errors import UsageError
from deltaproduct.tasks.automata import Automaton
from deltaproduct.tasks.groups import Group, Permutation
from deltaproduct.theory.constructions.circle import CORNER, FLIP, lines, points
from deltaproduct.theory.constructions.circuit import MAX_UNITS, Circuit, Unit, Write, all_of
from deltaproduct.theory.householder import Factors, from_orthogonal, from_rotation, transpositions
from deltaproduct.theory.limits import Plan
from deltaproduct.theory.representations import inverse, require_permutations, simplex, swap_factors
from deltaproduct.theory.rotations import compose

MAX_GROUP = 1_000  # elements

ONE = torch.ones(1, 1, dtype=torch.float64)


@dataclass(frozen=True)
class Action:
    """A group that acts on points, and what is asked of its products f_t ∘ … ∘ f_1.

    Attributes:
        symbols: the permutation p of k points, x ↦ p[x], that each symbol is.
        tracked: points of which the images decide the label.
        label: of every tuple of their images that can occur.
        num_labels: how many there are, with those that cannot occur.
    """

    symbols: tuple[Permutation, ...]
    tracked: tuple[int, ...]
    label: dict[tuple[int, ...], int]
    num_labels: int

    @classmethod
    def of_group(cls, group: Group) -> "Action":
        """Of x_1 ∘ … ∘ x_t, whose inverse is the product of inverses the other way round."""
        inverses = [inverse(p) for p in group.elements]
        tracked: list[int] = []
        for point in range(len(inverses[0])):
            if len({tuple(p[x] for x in tracked) for p in inverses}) < len(inverses):
                tracked.append(point)
        label = {tuple(p[x] for x in tracked): i for i, p in enumerate(inverses)}
        return cls(tuple(inverses), tuple(tracked), label, len(label))

    @classmethod
    def of_automaton(cls, automaton: Automaton) -> "Action":
        """Of the state. Raises UsageError when some symbol is no permutation of the states."""
        require_permutations(automaton)
        n = len(automaton.states)
        return cls(automaton.maps, (automaton.initial,), {(q,): q for q in range(n)}, n)

    def elements(self) -> list[Permutation]:
        """All products. Raises UsageError when there are more than 1,000."""
        found = {tuple(range(len(self.symbols[0]))): None}
        for p in (fresh := list(found)):  # grows while it is gone through
            after = itemgetter(*p)  # `compose` many times over
            for symbol in self.symbols:
                product = after(symbol)
                if product not in found:
                    found[product] = None
                    fresh.append(product)
            if len(found) > MAX_GROUP:
                raise UsageError(f"its symbols make a group of more than {MAX_GROUP:,} elements")
        return list(found)


def shallow(action: Action, num_householder: int, strategy: str) -> Plan:
    """The plan, with at most so many Householder factors per token.

    Raises UsageError when some look-up would be too large, with its size; or there is one point only.
    """
    if len(action.symbols[0]) == 1:
        raise UsageError("it has one state only, and nothing to follow")
    elements = action.elements()
    swapped = max(len(transpositions(p)) for p in elements)
    m = max(1, math.ceil(swapped / num_householder))
    words = len(action.symbols) ** m
    need = f"blocks of {m} tokens, for {swapped} swaps with {num_householder} Householder factors each, need"
    _limit(max(2 * m * (words + 1), len(elements) ** 2), need)
    bos = len(action.symbols)
    circuit = Circuit(bos + 1)
    place = _clock(circuit, 2 * m, num_householder, bos)
    kept = _buffer(circuit, 2 * m, place, bos)
    work = _next_work(circuit, action, m, num_householder, place, kept)
    return _track(circuit, action, elements, work, strategy)


def _limit(units: int, need: str) -> None:
    if units > MAX_UNITS:
        size = f"{units:,}" if units < 10**12 else "more than 10¹²"
        raise UsageError(f"{need} a look-up of {size} units; at most {MAX_UNITS:,} are possible")


def _clock(circuit: Circuit, period: int, steps: int, bos: int) -> int:
    """Layers that count tokens; the first of `period` slots, of which token i after BOS fills (i − 1) mod period.

    With single reflections as in two_layers.py: every token is the same rotation.
    """
    turn = from_rotation(2 * math.pi / period)
    begin = Write(Factors(CORNER, ONE[0]), ONE)
    normals = lines(period)
    if steps > 1:
        moves = {bos: begin} | {x: Write(turn) for x in range(bos)}
        parities: list[tuple[dict[int, float], Tensor]] = [({}, torch.eye(2, dtype=torch.float64))]
    else:
        flip = {bos: Write(Factors(ONE, ONE[0]), ONE)} | {x: Write(Factors(ONE, 2 * ONE[0])) for x in range(bos)}
        parity = circuit.mixer(ONE, [flip], power=1)
        ticks = circuit.take(3)
        units = [Unit({parity: 0.5 - odd, bos: -1.0}, 0.0, (ticks + odd,)) for odd in (0, 1)]
        circuit.look_up([*units, all_of([bos], ticks + 2)])
        matrix = turn.matrix()
        moves = {
            bos: begin,
            ticks: Write(from_orthogonal(matrix @ FLIP)),
            ticks + 1: Write(from_orthogonal(FLIP @ matrix)),
        }
        parities = [({parity: 0.5}, torch.eye(2, dtype=torch.float64)), ({parity: -0.5}, FLIP)]
    sides = circuit.mixer(normals, [moves] * len(normals), power=len(normals))
    place = circuit.take(period + 1)  # the last of them at BOS
    units = [all_of([bos], place + period)]
    for known, flipped in parities:
        for i, row in enumerate((points(period) @ flipped @ normals.T).sign().tolist()):
            seen = {sides + j: side / 2 for j, side in enumerate(row)}
            threshold = (len(known) + len(normals)) / 2 - 0.5
            units.append(Unit({bos: -1.0} | known | seen, threshold, (place + (i - 1) % period,)))
    circuit.look_up(units)
    return place


def _buffer(circuit: Circuit, period: int, place: int, bos: int) -> int:
    """A layer that keeps the last symbols; the first of its slots, period × (symbols + 1), one-hot for every place.

    The one more is what BOS writes everywhere: nothing yet.
    """
    axes, codes = torch.eye(period, dtype=torch.float64), torch.eye(bos + 1, dtype=torch.float64)
    everywhere = torch.full((1, period), 1 / math.sqrt(period), dtype=torch.float64)
    writes = {place + i: Write(Factors(axes[i, None], ONE[0])) for i in range(period)}
    writes |= {x: Write(values=codes[x, None]) for x in range(bos)}
    writes[bos] = Write(Factors(everywhere, ONE[0]), math.sqrt(period) * codes[bos, None])
    return circuit.mixer(axes, [writes] * period, power=period)


@dataclass(frozen=True)
class _Work:
    """Slots, one-hot: what a token carries out, what is then missing of the last block, and the product of this one."""

    parts: dict[tuple[tuple[int, int], ...], int]  # swaps of points
    missing: dict[Permutation, int]
    so_far: dict[Permutation, int]


def _next_work(circuit: Circuit, action: Action, m: int, steps: int, place: int, kept: int) -> _Work:
    """The buffer's look-up."""
    symbols, bos = action.symbols, len(action.symbols)
    identity = tuple(range(len(symbols[0])))
    work = _Work({}, {}, {})

    def slot(known: dict, key: object) -> int:
        if key not in known:
            known[key] = circuit.take(1)
        return known[key]

    def read(half: int, word: Sequence[int]) -> list[int]:
        """Slots of the buffer that are active when a half begins with `word`."""
        return [kept + j * (bos + 1) + x for j, x in enumerate(word, start=half * m)]

    units = [all_of([bos], *(circuit.take(1) for _ in range(3)))]
    for word in [(bos,) * m, *itertools.product(range(bos), repeat=m)]:
        todo = transpositions(_product(symbols, word))
        for i, half in itertools.product(range(m), (0, 1)):
            part, rest = tuple(todo[i * steps : (i + 1) * steps]), identity
            for a, b in todo[(i + 1) * steps :]:
                rest = compose(_swap(a, b, len(rest)), rest)
            known = [place + half * m + i, *read(1 - half, word)]
            units.append(all_of(known, slot(work.parts, part), slot(work.missing, rest)))
    for length in range(1, m + 1):
        for word in itertools.product(range(bos), repeat=length):
            so_far = slot(work.so_far, _product(symbols, word))
            units += [all_of([place + half * m + length - 1, *read(half, word)], so_far) for half in (0, 1)]
    circuit.look_up(units, power=3)
    return work


def _track(circuit: Circuit, action: Action, elements: Sequence[Permutation], work: _Work, strategy: str) -> Plan:
    """The last layer."""
    k, bos = len(elements[0]), len(action.symbols)
    _limit(len(elements) * len(work.missing) * len(work.so_far), "the last layer needs")
    corners = simplex(k)
    moves = {slot: Write(swap_factors(part, corners)) for part, slot in work.parts.items()}
    writes: list[dict[int, Write]] = []
    for point in action.tracked:
        writes += [moves | {bos: Write(Factors(corners[point, None], ONE[0]), ONE)}] * k
    images = circuit.mixer(corners.repeat(len(action.tracked), 1), writes, power=len(writes))
    answer = circuit.take(action.num_labels)
    units = []
    whole = sorted({tuple(p[x] for x in action.tracked) for p in elements})  # images when nothing is missing
    for (rest, missing), (made, so_far) in itertools.product(work.missing.items(), work.so_far.items()):
        back = inverse(rest)
        for known in whole:
            signs = {images + i * k + back[x]: 0.5 for i, x in enumerate(known)}
            label = action.label[tuple(made[x] for x in known)]
            units.append(Unit(signs | {missing: 1.0, so_far: 1.0}, len(signs) / 2 + 1.5, (answer + label,)))
    circuit.look_up(units)
    return circuit.plan(strategy, answer, torch.eye(action.num_labels, dtype=torch.float64))


def _product(symbols: Sequence[Permutation], word: Sequence[int]) -> Permutation:
    """Of a word, its first symbol first; what is no symbol does nothing."""
    product = tuple(range(len(symbols[0])))
    for x in word:
        product = compose(symbols[x], product) if x < len(symbols) else product
    return product


def _swap(a: int, b: int, k: int) -> Permutation:
    return tuple(b if x == a else a if x == b else x for x in range(k))
