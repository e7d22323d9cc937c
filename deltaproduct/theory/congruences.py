"""Congruences of an automaton, and the chain of them along which it comes apart into the fewest levels.

A congruence is a partition of the states that every symbol respects: what is in one block before it is in one block
after it. The blocks are then the states of a smaller automaton, and which part of its block the state is in is a
second one, driven by the symbol and the blocks before and after (Hartmanis and Stearns, Algebraic Structure Theory of
Sequential Machines, 1966). A chain goes from one block through ever finer congruences to single states.
"""

import heapq
import itertools
import math
from dataclasses import dataclass

from deltaproduct.errors import UsageError
from deltaproduct.tasks.automata import Automaton

MAX_PARTS = 12  # of a stage that takes a level for each part but one: subsets of them are listed, of which 2ᵐ
MAX_SEARCHED = 100  # states of an automaton whose congruences are looked for
MAX_CONGRUENCES = 64
MAX_LOOKED_AT = 50_000_000  # transitions in a search for congruences, or for the chain of them: some ten seconds

Partition = tuple[int, ...]  # the block of each state; blocks are numbered as they appear
Subset = tuple[int, ...]  # states in increasing order


@dataclass(frozen=True)
class Stage:
    """A step of a chain: the state's block is known, and the part of it is to be found.

    Attributes:
        parts: for every block its parts, the blocks of the finer congruence.
        direct: whether every symbol permutes the parts, or takes all of a block's into one: then one level does.
    """

    parts: dict[Subset, tuple[Subset, ...]]
    direct: bool

    @property
    def size(self) -> int:
        """m, how many parts a block has at most."""
        return max(map(len, self.parts.values()))

    @property
    def levels(self) -> int:
        """How many levels of a cascade (cascade.py) it takes."""
        return 1 if self.direct else self.size - 1


def shortest_chain(automaton: Automaton) -> list[Stage]:
    """Stages from one block to single states, with the fewest levels, and then the fewest labels, among those found.

    Without any congruence in between, the only stage is the whole automaton. There may be one of more than 12 parts
    that is not direct, and then there is no chain without one.

    Raises UsageError when there are so many congruences that looking at them would go beyond 50,000,000 transitions.
    """
    n = len(automaton.states)
    if n == 1:
        return []
    top, bottom = (0,) * n, tuple(range(n))
    between: list[Partition] = []
    if not takes_one_level(automaton):
        table = n * len(set(automaton.maps))
        most = math.isqrt(MAX_LOOKED_AT // table)  # each of them is held against every other
        between = forgotten(automaton, most)
        if n <= MAX_SEARCHED and n * n // 2 * table <= MAX_LOOKED_AT:
            between += congruences(automaton)
    nodes = sorted({top, bottom, *between}, key=lambda p: (max(p), p))
    # Dijkstra's algorithm, from coarse to fine.
    order = itertools.count()  # among equal costs, whatever was found first
    waiting: list[tuple[tuple[int, ...], int, Partition, list[Stage]]] = [((0, 0, 0), next(order), top, [])]
    done = set()
    while True:
        cost, _, coarse, path = heapq.heappop(waiting)
        if coarse == bottom:
            return path
        if coarse in done:
            continue
        done.add(coarse)
        for fine in nodes:
            if fine not in done and _refines(fine, coarse):
                stage = Stage(_parts(coarse, fine), is_direct(automaton, coarse, fine))
                excess = 0 if stage.direct else max(0, stage.size - MAX_PARTS)
                total = tuple(a + b for a, b in zip(cost, (excess, stage.levels, stage.size), strict=True))
                heapq.heappush(waiting, (total, next(order), fine, [*path, stage]))


def congruences(automaton: Automaton) -> list[Partition]:
    """At most 64 congruences: those that joining two states makes necessary, and joins of these."""
    n = len(automaton.states)
    found = {_closure(automaton, [pair]): None for pair in itertools.combinations(range(n), 2)}
    basic = sorted(found, key=lambda p: (-max(p), p))
    for p in basic:
        for q in list(found):
            if len(found) >= MAX_CONGRUENCES:
                return list(found)[:MAX_CONGRUENCES]
            found[_join(p, q)] = None
    return list(found)


def forgotten(automaton: Automaton, most: int | None = None) -> list[Partition]:
    """States that become one within ever more symbols, whatever these are: the chain of congruences from equal rows of
    transitions up to where it ends. Of an automaton that knows the last k symbols, by the last k − 1, k − 2, …, 1.

    Raises UsageError when there are more than `most`.
    """
    chain: list[Partition] = [tuple(range(len(automaton.states)))]
    while True:
        kinds: dict[tuple[int, ...], int] = {}
        rows = (tuple(chain[-1][to] for to in row) for row in automaton.transitions)
        coarser = tuple(kinds.setdefault(row, len(kinds)) for row in rows)
        if coarser == chain[-1]:
            return chain[1:]
        chain.append(coarser)
        if most is not None and len(chain) > most:
            raise UsageError(
                f"The automaton's {len(automaton.states):,} states become one within ever more symbols, in more than "
                f"{most:,} stages"
            )


def takes_one_level(automaton: Automaton) -> bool:
    """Whether every symbol permutes the states, or takes all of them to one."""
    n = len(automaton.states)
    return is_direct(automaton, (0,) * n, tuple(range(n)))


def is_direct(automaton: Automaton, coarse: Partition, fine: Partition) -> bool:
    """Whether every symbol takes the fine blocks within a coarse one to as many, or all of them to one."""
    for images in set(automaton.maps):
        reached: dict[int, set[int]] = {}
        parts: dict[int, set[int]] = {}
        for state, block in enumerate(coarse):
            parts.setdefault(block, set()).add(fine[state])
            reached.setdefault(block, set()).add(fine[images[state]])
        if any(len(reached[block]) not in (1, len(parts[block])) for block in parts):
            return False
    return True


def _closure(automaton: Automaton, pairs: list[tuple[int, int]]) -> Partition:
    """The finest congruence in which these pairs are together."""
    parent = list(range(len(automaton.states)))

    def root(state: int) -> int:
        while parent[state] != state:
            parent[state] = parent[parent[state]]
            state = parent[state]
        return state

    pairs = list(pairs)
    while pairs:
        p, q = map(root, pairs.pop())
        if p != q:
            parent[q] = p
            # Whoever is joined goes on joining: it is enough to look at the two that stand for their blocks.
            pairs += zip(automaton.transitions[p], automaton.transitions[q], strict=True)
    return _numbered([root(state) for state in range(len(parent))])


def _join(p: Partition, q: Partition) -> Partition:
    """The finest partition coarser than both: a congruence where both are."""
    blocks: dict[tuple[int, int], set[int]] = {}
    for state, (a, b) in enumerate(zip(p, q, strict=True)):
        both = blocks.get((0, a), {state}) | blocks.get((1, b), {state}) | {state}
        for other in both:
            blocks[0, p[other]] = blocks[1, q[other]] = both
    return _numbered([min(blocks[0, a]) for a in p])


def _numbered(blocks: list[int]) -> Partition:
    number: dict[int, int] = {}
    return tuple(number.setdefault(block, len(number)) for block in blocks)


def _refines(fine: Partition, coarse: Partition) -> bool:
    return fine != coarse and len(set(zip(fine, coarse, strict=True))) == max(fine) + 1


def _parts(coarse: Partition, fine: Partition) -> dict[Subset, tuple[Subset, ...]]:
    blocks: dict[int, dict[int, list[int]]] = {}
    for state, (a, b) in enumerate(zip(coarse, fine, strict=True)):
        blocks.setdefault(a, {}).setdefault(b, []).append(state)
    result = {}
    for parts in blocks.values():
        own = tuple(sorted(map(tuple, parts.values())))
        result[tuple(sorted(itertools.chain(*own)))] = own
    return result
