"""Deterministic finite automata: from a table, a JSON object or a regular expression; minimal, and as a monoid.

Letters: n states, s symbols.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

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

MAX_STATES = 10_000
MAX_ELEMENTS = 50_000  # of a transition monoid
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
        for what, names in (("symbol", self.alphabet), ("state", self.states)):
            if not names:
                raise UsageError(f"An automaton needs at least one {what}.")
            if len(set(names)) < len(names):
                twice = next(name for i, name in enumerate(names) if name in names[:i])
                raise UsageError(f"The {what} {twice!r} is named twice.")
        if n > MAX_STATES:
            raise UsageError(f"{n:,} states are more than {MAX_STATES:,}.")
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
        """The smallest automaton of the same language, by Moore's refinement of partitions.

        A state's name is that of the first of those that it stands for.
        """
        found = self._found()
        block = {state: int(state in self.accepting) for state in found}
        while True:
            kinds: dict[tuple[int, ...], int] = {}
            finer = {
                state: kinds.setdefault((block[state], *(block[to] for to in self.transitions[state])), len(kinds))
                for state in found
            }
            if len(kinds) == len(set(block.values())):
                break
            block = finer
        first: dict[int, int] = {}
        for state in found:
            first.setdefault(block[state], state)
        return self._merged({state: first[block[state]] for state in found})

    def monoid(self) -> list[tuple[int, ...]]:
        """The transition monoid: what words do to all states, the empty word first; of a minimal automaton the
        syntactic monoid of its language.

        Raises UsageError when there are more than 50,000 elements.
        """
        identity = tuple(range(len(self.states)))
        elements = {identity: None}
        fresh = [identity]
        while fresh:
            products = [tuple(f[x] for x in e) for e in fresh for f in self.maps]
            fresh = [p for p in dict.fromkeys(products) if p not in elements]
            elements |= dict.fromkeys(fresh)
            if len(elements) > MAX_ELEMENTS:
                raise UsageError(f"The transition monoid has more than {MAX_ELEMENTS:,} elements.")
        return list(elements)

    def of_monoid(self) -> "Automaton":
        """The automaton of the transition monoid: its states are what words do to all states, each named by a shortest
        word that does it, and it accepts the same language.

        Raises UsageError as `monoid`.
        """
        elements = self.monoid()
        number = {element: i for i, element in enumerate(elements)}
        rows = tuple(tuple(number[tuple(f[x] for x in e)] for f in self.maps) for e in elements)
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
        kept = sorted(set(stands_for.values()))
        number = {state: i for i, state in enumerate(kept)}
        return Automaton(
            alphabet=self.alphabet,
            states=tuple(self.states[state] for state in kept),
            initial=number[stands_for[self.initial]],
            accepting=tuple(number[state] for state in kept if state in self.accepting),
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
        raise UsageError(f"{regex!r} is no regular expression that can be used ({e}); {REGEX_ADVICE}.") from e
    if not letters:
        raise UsageError(f"The regular expression {regex!r} has no symbols; an alphabet has to be given with it.")
    return _numbered(*_by_library(regex, language, letters), letters).minimal()


def _by_library(regex: str, language: Language, letters: tuple[str, ...]) -> tuple[Any, Step, Callable[[Any], bool]]:
    """automata-lib's deterministic automaton of a language: the initial state, transitions (to None, where nothing
    follows any more), and what accepts. Raises UsageError where it is wrong."""
    try:
        from automata.fa.dfa import DFA
        from automata.fa.nfa import NFA
    except ImportError as e:
        raise UsageError("Regular expressions need automata-lib: pip install 'deltaproduct[formal]'.") from e
    names = private(letters)
    if language == NOTHING:
        dfa = DFA.empty_language(set(names.values()))
    else:
        nfa = NFA.from_regex(for_library(language, names), input_symbols=set(names.values()))
        dfa = DFA.from_nfa(nfa, minify=True)

    def step(state: Any, symbol: str) -> Any:
        return None if state is None else dfa.transitions[state].get(names[symbol])

    word = first_difference(language, letters, dfa.initial_state, step, dfa.final_states.__contains__)
    if word is not None:
        raise UsageError(
            f"automata-lib reads {regex!r} wrongly, for instance for the word {word!r}. Write it in another way."
        )
    return dfa.initial_state, step, dfa.final_states.__contains__


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
    for state, row in table.items():
        if state not in states:
            raise _FormatError(f"There are transitions from {_short(state)}, which is none of the states")
        if unknown := [symbol for symbol in row if symbol not in alphabet]:
            raise _FormatError(f"There is a transition by {_short(unknown[0])}, which is not in the alphabet")
    sink = new_name(SINK, states)
    rows = [[table.get(state, {}).get(symbol, sink) for symbol in alphabet] for state in states]
    if any(to == sink for row in rows for to in row):
        given["states"], rows = [*states, sink], [*rows, [sink] * len(alphabet)]
    given["transitions"] = rows


def new_name(name: str, taken: Sequence[str]) -> str:
    """The name, or with a number after it if there is one already."""
    return next(new for i in range(len(taken) + 1) if (new := f"{name}{i or ''}") not in taken)


def _names(what: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(type(name) in (str, int) for name in value):
        raise _FormatError(f"The automaton's {what} must be a list of names, not {_short(value)}")
    return tuple(map(str, value))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."
