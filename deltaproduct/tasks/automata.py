"""Deterministic finite automata: from a table, a JSON object or a regular expression; minimal, and as a monoid.

Letters: n states, s symbols.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any

import numpy as np

from deltaproduct.errors import UsageError
from deltaproduct.tasks.expressions import (
    EMPTY,
    NOTHING,
    Language,
    NoExpression,
    first_difference,
    for_library,
    language_of,
    private,
    symbols_of,
    tokens_of,
)
from deltaproduct.tasks.names import shortened

MAX_STATES = 10_000
MAX_TRANSITIONS = 4_000_000  # of what is read or built: states times symbols, a second or two to go through
MAX_ELEMENTS = 50_000  # of a transition monoid
MAX_IMAGES = 40_000_000  # of states under its elements that are kept, 320 MB of them, and
MAX_COMPOSED = 400_000_000  # that are looked at, a few seconds
MAX_SUBSETS = 100_000  # states of a regular expression's automaton before equivalent ones are merged, and
MAX_VISITED = 10_000_000  # states of the nondeterministic one that are gone through for them, a few seconds
ROUNDS = 32  # of Moore's refinement: most machines need fewer than ten, chains as many as they have states
REGEX_ADVICE = "it may have symbols of one character, ( ), |, *, +, ?, {m,n}, [a-c], . and &, as in '(a|b)*abb'"

JSON_EXAMPLE = (
    '{"alphabet": ["0", "1"], "states": ["even", "odd"], "initial": "even", "accepting": ["even"], '
    '"transitions": {"even": {"0": "even", "1": "odd"}, "odd": {"0": "odd", "1": "even"}}}'
)
FIELDS = ("alphabet", "states", "initial", "accepting", "transitions")
ALSO_CALLED = {
    "input_symbols": "alphabet", "symbols": "alphabet", "initial_state": "initial", "start": "initial",
    "final_states": "accepting", "final": "accepting",
}  # fmt: skip
SINK = "sink"

Step = Callable[[Any, str], Any]  # from a state by a symbol to the next state


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
                raise UsageError(f"The {what} {shortened(twice)} is named twice.")
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
            return cls(**_fields(value))
        except _FormatError as e:
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


def from_regex(regex: str, alphabet: Sequence[str] | None = None) -> Automaton:
    """The minimal automaton of a regular expression (expressions.py has the syntax), by automata-lib.

    Args:
        regex: a symbol is one character.
        alphabet: all symbols; None means those that the expression names.

    Raises UsageError when the expression is malformed or too large, has no symbols, or has one that is not in the
    alphabet; when automata-lib is not installed, or its automaton is not the expression's.
    """
    try:
        tokens = tokens_of(regex)
        letters = tuple(sorted(set(alphabet) if alphabet is not None else symbols_of(tokens)))
        language = language_of(tokens, letters) if tokens else EMPTY
    except NoExpression as e:
        raise UsageError(f"{shortened(regex)} is no regular expression that can be used ({e}); {REGEX_ADVICE}.") from e
    if not letters:
        raise UsageError(
            f"The regular expression {shortened(regex)} has no symbols; an alphabet has to be given with it."
        )
    return _numbered(*_by_library(regex, language, letters), letters)


def _by_library(regex: str, language: Language, letters: tuple[str, ...]) -> tuple[Any, Step, Callable[[Any], bool]]:
    """The deterministic automaton of automata-lib's nondeterministic one: the initial state, transitions (to None,
    where nothing follows any more), and what accepts. Raises UsageError where it is wrong, or too large."""
    try:
        from automata.fa.nfa import NFA
    except ImportError as e:
        raise UsageError("Regular expressions need automata-lib: pip install 'deltaproduct[formal]'.") from e
    names = private(letters)
    if language == NOTHING:
        table, accepting = np.zeros((1, len(letters)), dtype=np.int64), np.zeros(1, dtype=np.int64)
    else:
        nfa = NFA.from_regex(for_library(language, names), input_symbols=set(names.values()))
        table, accepting = _subsets(regex, nfa, [names[letter] for letter in letters])
    block = coarsest(table, accepting)
    number = {letter: i for i, letter in enumerate(letters)}
    # The state from which no word is accepted, if there is one, goes on only to itself.
    stay = (block[table] == block[:, None]).all(axis=1) & (accepting == 0)
    dead = set(block[stay].tolist())
    first = dict(zip(*(x.tolist() for x in np.unique(block, return_index=True)), strict=True))
    rows = {b: block[table[i]].tolist() for b, i in first.items()}
    start = int(block[0])
    dead.discard(start)

    def step(state: Any, symbol: str) -> Any:
        to = None if state is None else rows[state][number[symbol]]
        return None if to in dead else to

    def accepts(state: Any) -> bool:
        return state is not None and bool(accepting[first[state]])

    word = first_difference(language, letters, start, step, accepts)
    if word is not None:
        raise UsageError(
            f"automata-lib reads {shortened(regex)} wrongly, for instance for the word {shortened(word)}. "
            "Write it in another way."
        )
    return start, step, accepts


def _subsets(regex: str, nfa: Any, symbols: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The subset construction of a nondeterministic automaton, within limits: the table [n,s] of next states, 0 being
    the initial one, and whether each accepts [n].

    Raises UsageError where it would go beyond `MAX_SUBSETS`, `MAX_VISITED` or `MAX_TRANSITIONS`.
    """
    number = {state: i for i, state in enumerate(nfa.states)}
    number_of = {symbol: i for i, symbol in enumerate(symbols)}
    free: list[list[int]] = [[] for _ in number]  # where no symbol leads
    steps: list[list[tuple[int, int]]] = [[] for _ in number]
    for state, row in nfa.transitions.items():
        for symbol, ends in row.items():
            if symbol == "":
                free[number[state]] += map(number.__getitem__, ends)
            else:
                steps[number[state]] += ((number_of[symbol], number[end]) for end in ends)
    final = {number[state] for state in nfa.final_states}
    start = (number[nfa.initial_state],)
    known: dict[tuple[int, ...], int] = {start: 0}  # by where symbols led, before what is free from there
    queue: list[tuple[int, ...]] = [start]
    rows: list[list[int]] = []
    accepting: list[int] = []
    visited = 0
    for entered in queue:  # grows while it is gone through
        seen, waiting = set(entered), list(entered)
        reached: list[set[int] | None] = [None] * len(symbols)
        for state in waiting:  # grows as well
            visited += 1 + len(steps[state])
            for to in free[state]:
                if to not in seen:
                    seen.add(to)
                    waiting.append(to)
            for symbol, to in steps[state]:
                ends = reached[symbol]
                if ends is None:
                    reached[symbol] = {to}
                else:
                    ends.add(to)
            if visited > MAX_VISITED:
                break
        accepting.append(int(not final.isdisjoint(seen)))
        row = []
        for ends in reached:
            key = tuple(sorted(ends)) if ends else ()
            to = known.setdefault(key, len(known))
            if to == len(queue):
                queue.append(key)
            row.append(to)
        rows.append(row)
        most = min(MAX_SUBSETS, MAX_TRANSITIONS // len(symbols))
        if len(queue) > most or visited > MAX_VISITED:
            what = f"more than {most:,} states" if len(queue) > most else f"subsets of more than {MAX_VISITED:,} states"
            raise UsageError(
                f"The automaton of the regular expression {shortened(regex)} is too large: on the way to it there are "
                f"{what} to go through. A choice that is remembered over many symbols doubles them with each, as in "
                "(a|b)*a(a|b){20}; a smaller number of repetitions makes it smaller."
            )
    return np.array(rows, dtype=np.int64), np.array(accepting, dtype=np.int64)


def _numbered(initial: Any, step: Step, accepts: Callable[[Any], bool], letters: tuple[str, ...]) -> Automaton:
    """Numbered in the order in which words in alphabetical order find the states, whatever names they have."""
    found = order_of_discovery(initial, lambda q: [step(q, a) for a in letters])
    order, sink = {q: i for i, q in enumerate(found)}, len(found)
    rows = [tuple(order.get(step(q, a), sink) for a in letters) for q in found]
    if any(sink in row for row in rows):  # a partial automaton's missing transitions lead to where nothing is accepted
        rows.append((sink,) * len(letters))
    return Automaton(
        alphabet=letters,
        states=tuple(f"q{i}" for i in range(len(rows))),
        initial=0,
        accepting=tuple(i for i, q in enumerate(found) if accepts(q)),
        transitions=tuple(rows),
    )


def coarsest(table: np.ndarray, block: np.ndarray) -> np.ndarray:
    """The coarsest partition that every symbol respects and that is finer than one which is given: in the states of a
    block, all words go on alike.

    Rounds of Moore's refinement, which are fast, and after a few of them Hopcroft's (1971), whose time is n·s·log n
    where rounds would take n²·s.

    Args:
        table: [n,s] the next state.
        block: [n] the block of each state.

    Returns:
        [n] the number of each state's block, from 0 on.
    """
    table = np.unique(table, axis=1) if table.shape[1] > 1 else table  # the partition does not depend on names
    count, rounds = len(np.unique(block)), 0
    while True:
        kinds: dict[bytes, int] = {}
        seen = np.column_stack([block, block[table]]).astype(np.int32)
        finer = np.array([kinds.setdefault(row.tobytes(), len(kinds)) for row in seen])
        if len(kinds) in (count, len(table)):
            return finer
        block, count, rounds = finer, len(kinds), rounds + 1
        if rounds == ROUNDS:
            return _hopcroft(table, block)


def _hopcroft(table: np.ndarray, block: np.ndarray) -> np.ndarray:
    """`coarsest`, by splitting blocks by what leads into a block, and of two halves going on with the smaller."""
    n, s = table.shape
    order = np.argsort(table.reshape(-1), kind="stable")
    begin = np.searchsorted(table.reshape(-1)[order], np.arange(n + 1)).tolist()
    sources, symbols = (order // s).tolist(), (order % s).tolist()
    block_of = block.tolist()
    members: list[set[int]] = [set() for _ in range(max(block_of) + 1)]
    for state, b in enumerate(block_of):
        members[b].add(state)
    largest = max(range(len(members)), key=lambda b: len(members[b]))
    waiting = set(range(len(members))) - {largest}
    while waiting:
        into: dict[int, list[int]] = {}
        for state in members[waiting.pop()]:
            for edge in range(begin[state], begin[state + 1]):
                into.setdefault(symbols[edge], []).append(sources[edge])
        for ones in into.values():
            touched: dict[int, list[int]] = {}
            for state in ones:
                touched.setdefault(block_of[state], []).append(state)
            for b, part in touched.items():
                if len(part) == len(members[b]):
                    continue
                new = len(members)
                members.append(set(part))
                members[b].difference_update(part)
                for state in part:
                    block_of[state] = new
                waiting.add(new if b in waiting or len(part) <= len(members[b]) else b)
    return np.array(block_of)


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


# --- From JSON ------------------------------------------------------------------------------------------------------


class _FormatError(Exception):
    """What is wrong with a JSON value, without a full stop."""


def _fields(value: Any) -> dict[str, Any]:
    """The fields of an automaton. Raises _FormatError."""
    if not isinstance(value, dict):
        raise _FormatError(f"An automaton is a JSON object, not {_short(value)}")
    given: dict[str, Any] = {}
    for name, content in value.items():
        field = ALSO_CALLED.get(name, name)
        if field not in FIELDS:
            raise _FormatError(f"An automaton has no {_short(name)}; it has {', '.join(FIELDS)}")
        if field in given:
            raise _FormatError(f"The automaton has its {field} twice")
        given[field] = content
    if (listed := _listed(given)) is not None:
        given["transitions"] = listed
    named = isinstance(given.get("transitions"), dict)  # by which states and symbols are known
    if missing := [name for name in FIELDS if name not in given and not (named and name in ("states", "alphabet"))]:
        raise _FormatError(f"The automaton lacks {' and '.join(missing)}")
    if named:
        _name_all(given)
    states = _names("states", given["states"])
    if any(type(name) is int for name in given["states"]) and states != tuple(map(str, range(len(states)))):
        raise _FormatError(
            "States that are numbers must be 0, 1, 2, … in this order, so that a number means one of them"
        )
    alphabet = _names("alphabet", given["alphabet"])
    check_table(len(states), len(alphabet))
    number = {name: i for i, name in enumerate(states)}

    def numbered(what: str, state: Any) -> int:
        if type(state) is int:
            return state
        if type(state) is str and state in number:
            return number[state]
        if type(state) is str:
            raise _FormatError(f"The automaton's {what} names {_short(state)}, which is none of its states")
        raise _FormatError(f"The automaton's {what} must be a state's name or number, not {_short(state)}")

    if not isinstance(given["accepting"], list):
        raise _FormatError(f"The automaton's accepting must be a list of states, not {_short(given['accepting'])}")
    rows = given["transitions"]
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise _FormatError(f"The automaton's transitions must be a list of lists of states, not {_short(rows)}")
    return {
        "alphabet": alphabet,
        "states": states,
        "initial": numbered("initial", given["initial"]),
        "accepting": tuple(sorted({numbered("accepting", state) for state in given["accepting"]})),
        "transitions": tuple(tuple(numbered("transitions", to) for to in row) for row in rows),
    }


def _listed(given: dict[str, Any]) -> dict[str, dict[str, str]] | None:
    """Transitions in a list of [state, symbol, state], as {state: {symbol: state}}; None where they are no such list.
    What is a table by its size is a table."""
    rows = given.get("transitions")
    if not isinstance(rows, list) or not rows:
        return None
    if not all(isinstance(row, list) and len(row) == 3 and all(isinstance(name, str) for name in row) for row in rows):
        return None
    sizes = [len(given[name]) if isinstance(given.get(name), list) else None for name in ("states", "alphabet")]
    if sizes == [len(rows), 3]:
        return None
    table: dict[str, dict[str, str]] = {}
    for state, symbol, to in rows:
        if table.setdefault(state, {}).setdefault(symbol, to) != to:
            raise _FormatError(f"The automaton is not deterministic: from {_short(state)}, {_short(symbol)} leads to "
                               f"{_short(table[state][symbol])} and to {_short(to)}")  # fmt: skip
    return table


def _name_all(given: dict[str, Any]) -> None:
    """Turn {state: {symbol: state}} into a table, with states and symbols where they are not said."""
    table = given["transitions"]
    for state, row in table.items():
        if not isinstance(row, dict):
            raise _FormatError(f"The automaton's transitions from {_short(state)} must be {{symbol: state}}, not "
                               f"{_short(row)}")  # fmt: skip
    if "states" not in given:
        everywhere = [*table, *(to for row in table.values() for to in row.values()), given["initial"]]
        more = given["accepting"] if isinstance(given["accepting"], list) else []
        given["states"] = list(dict.fromkeys(name for name in (*everywhere, *more) if isinstance(name, str)))
    if "alphabet" not in given:
        given["alphabet"] = sorted({symbol for row in table.values() for symbol in row})
    states, alphabet = _names("states", given["states"]), _names("alphabet", given["alphabet"])
    check_table(len(states), len(alphabet))
    known_states, known_symbols = set(states), set(alphabet)
    for state, row in table.items():
        if state not in known_states:
            raise _FormatError(f"There are transitions from {_short(state)}, which is none of the states")
        if unknown := [symbol for symbol in row if symbol not in known_symbols]:
            raise _FormatError(f"There is a transition by {_short(unknown[0])}, which is not in the alphabet")
    sink = new_name(SINK, states)
    rows = [[table.get(state, {}).get(symbol, sink) for symbol in alphabet] for state in states]
    if any(to == sink for row in rows for to in row):
        given["states"], rows = [*states, sink], [*rows, [sink] * len(alphabet)]
    given["transitions"] = rows


def new_name(name: str, taken: Sequence[str]) -> str:
    """The name, or with a number after it if there is one already."""
    names = set(taken)
    return next(new for i in range(len(names) + 1) if (new := f"{name}{i or ''}") not in names)


def check_table(states: int, symbols: int) -> None:
    """UsageError if a table of so many states and symbols is larger than what is read."""
    if states > MAX_STATES:
        raise UsageError(f"{states:,} states are more than {MAX_STATES:,}.")
    if states * symbols > MAX_TRANSITIONS:
        raise UsageError(
            f"{states:,} states by {symbols:,} symbols are more than {MAX_TRANSITIONS:,} transitions; name fewer."
        )


def _names(what: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(type(name) in (str, int) for name in value):
        raise _FormatError(f"The automaton's {what} must be a list of names, not {_short(value)}")
    return tuple(map(str, value))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."
