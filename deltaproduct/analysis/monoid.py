"""Whether an automaton computes in a given group: its transition monoid beside the group's Cayley table, exactly.

n states · s symbols.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from deltaproduct.tasks.automata import Automaton
from deltaproduct.tasks.groups import Group

MAX_ELEMENTS = 10_000  # of a monoid that are counted


@dataclass(frozen=True)
class GroupVerdict:
    """What an automaton's transition monoid has to do with a group; as a string, "S3" or why it is not S3."""

    group: str
    elements: int | None  # of the transition monoid; None: more than MAX_ELEMENTS
    isomorphic: bool  # to the group, by the map that sends each symbol's element to the symbol's transition
    word_problem: bool  # and the state after each word says the product

    def __str__(self) -> str:
        if self.isomorphic:
            return self.group
        if self.elements is None:
            return f"not {self.group}: more than {MAX_ELEMENTS:,} elements"
        return f"not {self.group}: {self.elements:,} element{'s' if self.elements != 1 else ''}"


def compare_with_group(
    automaton: Automaton, group: Group, elements: Sequence[int], outputs: Sequence[int]
) -> GroupVerdict:
    """Compare what words do to an automaton's states with the products of a group.

    Args:
        elements: the number of the group's element that each symbol is.
        outputs: the number of the element that each state says; other numbers where it says none.

    Every word does something to the states and has a product. The monoid is isomorphic to the group by the map
    symbol ↦ transition if and only if these match one to one over all words, and all products occur.
    """
    table, moves, n, order = group.table.numpy(), np.asarray(elements), len(automaton.states), len(group.elements)
    maps = np.array(automaton.maps)  # [s,n]

    def followed(pairs: np.ndarray) -> np.ndarray:
        """Every (transformation, product) [m,n+1] followed by every symbol: [s·m,n+1]."""
        products = table[pairs[None, :, n:], moves[:, None, None]]
        return np.concatenate([maps[:, pairs[:, :n]], products], axis=2).reshape(-1, n + 1)

    size = monoid_size(automaton)
    identity = np.append(np.arange(n), 0)
    pairs = _generated(identity, followed, order)
    products = len(np.unique(pairs[:, n]))
    isomorphic = size == products == len(pairs) == order
    said = np.asarray(outputs)
    word_problem = isomorphic and sorted(outputs) == list(range(order)) and said[automaton.initial] == 0
    word_problem = word_problem and bool((said[maps.T] == table[said[:, None], moves]).all())
    return GroupVerdict(group.name, size, isomorphic, word_problem)


def monoid_size(automaton: Automaton) -> int | None:
    """The number of elements of the transition monoid; None if there are more than `MAX_ELEMENTS`."""
    n, maps = len(automaton.states), np.array(automaton.maps)
    found = _generated(np.arange(n), lambda f: maps[:, f].reshape(-1, n), MAX_ELEMENTS)
    return len(found) if len(found) <= MAX_ELEMENTS else None


def _generated(start: np.ndarray, followed: Callable[[np.ndarray], np.ndarray], limit: int) -> np.ndarray:
    """All rows that `followed` leads to from one [m], or some more than `limit` of them."""
    rows = [start[None].astype(np.int32)]
    seen = {rows[0].tobytes()}
    count = 1
    while len(rows[-1]) and count <= limit:
        fresh = []
        for row in np.unique(followed(rows[-1]).astype(np.int32), axis=0):
            if (key := row.tobytes()) not in seen:
                seen.add(key)
                fresh.append(row)
        rows.append(np.array(fresh, dtype=np.int32).reshape(-1, rows[0].shape[1]))
        count += len(fresh)
    return np.concatenate(rows)
