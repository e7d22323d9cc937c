"""Deterministic finite automata: from a table or a JSON object; minimal, and as a monoid.

Letters: n states, s symbols.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any

import numpy as np

from deltaproduct.errors import UsageError, quoted
from deltaproduct.renamed import renamed_names
from deltaproduct.tasks.automaton_format import JSON_EXAMPLE, MAX_STATES, FormatError, fields
from deltaproduct.tasks.minimization import coarsest

MAX_ELEMENTS = 50_000  # of a transition monoid
MAX_IMAGES = 40_000_000  # of states under its elements that are kept, 320 MB of them, and
MAX_COMPOSED = 400_000_000  # that are looked at, a few seconds


@dataclass(frozen=True)
class Automaton:
    """A complete deterministic automaton.

    Attributes:
        alphabet: s different names of symbols; symbol i is alphabet[i].
        states: n different names of states.
        initial: the number of the state before the first symbol.
        accepting: numbers of states, in increasing order.
        transitions: transitions[state][symbol] is the next state's number.

    Raises UsageError when any of these do not fit together.
    """

    alphabet: tuple[str, ...]
    states: tuple[str, ...]
    initial: int
    accepting: tuple[int, ...]
    transitions: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        n = len(self.states)
        if n > MAX_STATES:
            raise UsageError(f"{n:,} states are more than {MAX_STATES:,}.")
        for what, names in (("symbol", self.alphabet), ("state", self.states)):
            if not names:
                raise UsageError(f"An automaton needs at least one {what}.")
            if len(set(names)) < len(names):
                first: dict[str, int] = {}
                twice = next(name for i, name in enumerate(names) if first.setdefault(name, i) != i)
                raise UsageError(f"The {what} {quoted(twice)} is named twice.")
        if len(self.transitions) != n or any(len(row) != len(self.alphabet) for row in self.transitions):
            raise UsageError(f"The transitions must be a table of {n} states by {len(self.alphabet)} symbols.")
        for number in (self.initial, *self.accepting, *itertools.chain(*self.transitions)):
            if not 0 <= number < n:
                raise UsageError(f"There is no state number {number}; they go from 0 to {n - 1}.")
        if list(self.accepting) != sorted(set(self.accepting)):
            raise UsageError("The accepting states must be different and in increasing order.")

    @cached_property
    def maps(self) -> tuple[tuple[int, ...], ...]:
        """What each symbol does to all states: maps[symbol][state] is the next one."""
        return tuple(zip(*self.transitions, strict=True))

    def trace(self, symbols: Iterable[int]) -> list[int]:
        """The state after each symbol of a word, by number."""
        state, after = self.initial, []
        for symbol in symbols:
            state = self.transitions[state][symbol]
            after.append(state)
        return after

    def accepts(self, symbols: Iterable[int]) -> bool:
        """Whether the word ends in an accepting state."""
        return ([self.initial, *self.trace(symbols)])[-1] in self.accepting

    def reachable(self) -> "Automaton":
        """Without the states that no word leads to; the others keep their order."""
        return self._merged({state: state for state in self._found()})

    def minimal(self) -> "Automaton":
        """The smallest automaton of the same language (`coarsest`).

        A state's name is that of the first of those that it stands for.
        """
        block = np.zeros(len(self.states), dtype=np.int64)
        block[list(self.accepting)] = 1
        block = coarsest(np.array(self.transitions, dtype=np.int64), block)
        first: dict[int, int] = {}
        found = self._found()
        for state in found:
            first.setdefault(int(block[state]), state)
        return self._merged({state: first[int(block[state])] for state in found})

    def monoid(self) -> list[tuple[int, ...]]:
        """The transition monoid: what words do to all states, the empty word first; of a minimal automaton the
        syntactic monoid of its language.

        Raises UsageError when there are more than 50,000 elements, or fewer that are too large: more than 40,000,000
        images of states in all, or 400,000,000 to be looked at.
        """
        n, maps = len(self.states), tuple(dict.fromkeys(self.maps))
        if n == 1:
            return [(0,)]
        most = min(MAX_ELEMENTS, MAX_IMAGES // n, MAX_COMPOSED // (n * len(maps)))
        identity = tuple(range(n))
        elements = {identity: None}
        queue = [identity]
        for element in queue:  # grows while it is gone through
            of_element = itemgetter(*element)
            for images in maps:
                product = of_element(images)
                if product not in elements:
                    elements[product] = None
                    queue.append(product)
            if len(elements) > most:
                raise UsageError(f"The transition monoid has more than {most:,} elements"
                                 f"{f' of {n:,} states each' if most < MAX_ELEMENTS else ''}.")  # fmt: skip
        return queue

    def of_monoid(self) -> "Automaton":
        """The automaton of the transition monoid: its states are what words do to all states, each named by a shortest
        word that does it, and it accepts the same language.

        Raises UsageError as `monoid`.
        """
        elements = self.monoid()
        if len(elements) > MAX_STATES:
            raise UsageError(f"The transition monoid has {len(elements):,} elements, more than {MAX_STATES:,} states.")
        number = {element: i for i, element in enumerate(elements)}
        rows: tuple[tuple[int, ...], ...] = ((0,) * len(self.alphabet),)  # of one state
        if len(self.states) > 1:
            rows = tuple(
                tuple(number[of_element(f)] for f in self.maps)
                for of_element in itertools.starmap(itemgetter, elements)
            )
        between = "" if all(len(symbol) == 1 for symbol in self.alphabet) else " "
        words: dict[int, tuple[str, ...]] = {0: ()}
        for i in order_of_discovery(0, lambda i: rows[i]):
            for symbol, to in zip(self.alphabet, rows[i], strict=True):
                words.setdefault(to, (*words[i], symbol))
        return Automaton(
            alphabet=self.alphabet,
            states=tuple(between.join(word) or "(empty word)" for _, word in sorted(words.items())),
            initial=0,
            accepting=tuple(i for i, e in enumerate(elements) if e[self.initial] in self.accepting),
            transitions=rows,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `from_dict` takes them."""
        return {
            "alphabet": list(self.alphabet),
            "states": list(self.states),
            "initial": self.initial,
            "accepting": list(self.accepting),
            "transitions": [list(row) for row in self.transitions],
        }

    @classmethod
    def from_dict(cls, value: Any) -> "Automaton":
        """From what JSON gives: an object with the fields of this class, and no others.

        Whatever is the number of a state may be its name. Transitions may be {state: {symbol: state}} or a list of
        [state, symbol, state], which also say what states and symbols there are; those that are missing there lead to
        one more state, "sink", which nothing leaves. Numbers serve as names of symbols, and 0, 1, … of states.
        automata-lib's names of the fields are known.

        Raises UsageError, in one line with an example, for anything else.
        """
        try:
            return cls(**fields(value))
        except FormatError as e:
            raise UsageError(f"{e}. For example: {JSON_EXAMPLE}.") from e

    def _found(self) -> list[int]:
        """The states that words lead to, in order."""
        return sorted(order_of_discovery(self.initial, lambda state: self.transitions[state]))

    def _merged(self, stands_for: dict[int, int]) -> "Automaton":
        """Of the states in `stands_for` only, each replaced by the one given for it."""
        kept, accepting = sorted(set(stands_for.values())), set(self.accepting)
        number = {state: i for i, state in enumerate(kept)}
        return Automaton(
            alphabet=self.alphabet,
            states=tuple(self.states[state] for state in kept),
            initial=number[stands_for[self.initial]],
            accepting=tuple(number[state] for state in kept if state in accepting),
            transitions=tuple(tuple(number[stands_for[to]] for to in self.transitions[state]) for state in kept),
        )


def order_of_discovery(start: Any, next_ones: Callable[[Any], Iterable[Any]]) -> list[Any]:
    """Whatever `next_ones` leads to from `start`, breadth first; None leads nowhere."""
    found = [start]
    seen = {start}
    for node in found:  # grows while it is gone through
        for other in next_ones(node):
            if other is not None and other not in seen:
                seen.add(other)
                found.append(other)
    return found


__getattr__ = renamed_names(
    __name__,
    {
        "check_table": "deltaproduct.tasks.automaton_format.check_table",
        "from_regex": "deltaproduct.tasks.regex_automaton.from_regex",
        "new_name": "deltaproduct.tasks.automaton_format.new_name",
    },
)
