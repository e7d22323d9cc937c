"""Moore machines as tables: run on many words at once, brought to one form, and words that try them out.

n states · s symbols · B words · T symbols in each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deltaproduct.tasks.automata import order_of_discovery

UNKNOWN = -1  # the output of a start that no label is known of


@dataclass(frozen=True, eq=False)
class Moore:
    """A complete deterministic machine that gives an output in each state."""

    table: np.ndarray  # [n,s] the next state
    outputs: np.ndarray  # [n]
    initial: int = 0

    def run(self, words: np.ndarray) -> np.ndarray:
        """The state after each symbol of words [B,T]: [B,T]."""
        state, states = np.full(len(words), self.initial), np.empty_like(words)
        for t in range(words.shape[1]):
            states[:, t] = state = self.table[state, words[:, t]]
        return states

    def mistakes(self, words: np.ndarray, labels: np.ndarray) -> list[tuple[tuple[int, ...], int]]:
        """The beginnings of words [B,T] after which the output is not the label [B,T], with the output, shortest first.

        Of each word only the shortest such beginning.
        """
        outputs = self.outputs[self.run(words)]
        wrong = outputs != labels
        ends = [(int(wrong[row].argmax()), row) for row in np.flatnonzero(wrong.any(1)).tolist()]
        return [(tuple(words[row, : end + 1].tolist()), int(outputs[row, end])) for end, row in sorted(ends)]

    def canonical(self, before: int, *, counts: bool) -> "Moore":
        """The smallest machine that gives the same outputs, by Moore's refinement of partitions.

        Its states are in the order of their outputs if these are all different, else in that of discovery.

        Args:
            before: the output before the first symbol.
            counts: whether that output matters. If not, a start that nothing leads back to is one with any state that
                goes on as it does, one with this output first.
        """
        outputs = self.outputs.copy()
        outputs[self.initial] = before if counts else UNKNOWN
        table, outputs, initial = _reduced(self.table, outputs, self.initial)
        if not counts:
            alike = [q for q in np.flatnonzero((table == table[initial]).all(1)).tolist() if q != initial]
            if alike:
                stand_in = next((q for q in alike if outputs[q] == before), alike[0])
                outputs[initial] = outputs[stand_in]  # now the same in everything
            else:
                outputs[initial] = before
            table, outputs, initial = _reduced(table, outputs, initial)
        if len(set(outputs.tolist())) == len(outputs):
            table, outputs, initial = _ordered(table, outputs, initial, np.argsort(outputs).tolist())
        return Moore(table, outputs, initial)


def probing_words(machine: Moore, words: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """Random words [words,length] that visit all of a machine.

    The first of every two is uniform. The other begins with a shortest word to some state, each as likely, and then
    with any symbol: where a uniform word soon ends in a state that nothing leaves, these still reach the rest.
    """
    drawn = rng.integers(machine.table.shape[1], size=(words, length))
    goals = rng.integers(len(machine.table), size=words // 2)
    access = _access(machine)
    for row, goal in zip(range(1, words, 2), goals.tolist(), strict=True):
        start = access.get(goal, ())[:length]
        drawn[row, : len(start)] = start
    return drawn


def _access(machine: Moore) -> dict[int, tuple[int, ...]]:
    """A shortest word to each state that there is one to."""
    rows = machine.table.tolist()
    found: dict[int, tuple[int, ...]] = {machine.initial: ()}
    queue = [machine.initial]
    for state in queue:  # grows while it is gone through
        for symbol, to in enumerate(rows[state]):
            if to not in found:
                found[to] = (*found[state], symbol)
                queue.append(to)
    return found


def _reduced(table: np.ndarray, outputs: np.ndarray, initial: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The states that words lead to, those that no word tells apart made one, in the order of discovery."""
    rows = table.tolist()
    table, outputs, initial = _ordered(table, outputs, initial, order_of_discovery(initial, lambda q: rows[q]))
    block = np.unique(outputs, return_inverse=True)[1]
    while True:
        kinds = np.column_stack([block, block[table]])
        finer = np.unique(kinds, axis=0, return_inverse=True)[1].reshape(-1)
        if finer.max() == block.max():
            break
        block = finer
    first: dict[int, int] = {}
    for state, b in enumerate(block.tolist()):
        first.setdefault(b, state)
    stands_for = np.array([first[b] for b in block.tolist()])
    return _ordered(stands_for[table], outputs, initial, list(first.values()))


def _ordered(
    table: np.ndarray, outputs: np.ndarray, initial: int, order: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, int]:
    """Of the states in `order` only, which nothing leaves, and numbered so."""
    number = np.full(len(table), UNKNOWN)
    number[list(order)] = np.arange(len(order))
    return number[table[list(order)]], outputs[list(order)], int(number[initial])
