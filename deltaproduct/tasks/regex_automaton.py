"""From a regular expression to its minimal automaton, by automata-lib, whose answer is compared with derivatives.

The library does not get the expression as it stands, because it takes what is inside { } and [ ] for symbols, and a{0}
for a. It gets the parsed one, with a character of its own for every symbol and without what it misreads.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from deltaproduct.errors import UsageError, quoted
from deltaproduct.tasks.automata import Automaton, order_of_discovery
from deltaproduct.tasks.automaton_format import MAX_TRANSITIONS
from deltaproduct.tasks.derivatives import first_difference
from deltaproduct.tasks.expressions import NoExpression, language_of, symbols_of, tokens_of
from deltaproduct.tasks.languages import EMPTY, NOTHING, Language
from deltaproduct.tasks.minimization import coarsest

MAX_SUBSETS = 100_000  # states of a regular expression's automaton before equivalent ones are merged, and
MAX_VISITED = 10_000_000  # states of the nondeterministic one that are gone through for them, a few seconds
FIRST_PRIVATE = 0xF0000  # of Unicode's private use, with room for 65,000 symbols
REGEX_ADVICE = "it may have symbols of one character, ( ), |, *, +, ?, {m,n}, [a-c], . and &, as in '(a|b)*abb'"

Transition = Callable[[Any, str], Any]  # from a state by a symbol to the next state


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
        raise UsageError(f"{quoted(regex)} is no regular expression that can be used ({e}); {REGEX_ADVICE}.") from e
    if not letters:
        raise UsageError(f"The regular expression {quoted(regex)} has no symbols; an alphabet has to be given with it.")
    return _numbered(*_by_library(regex, language, letters), letters)


def _by_library(
    regex: str, language: Language, letters: tuple[str, ...]
) -> tuple[Any, Transition, Callable[[Any], bool]]:
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
            f"automata-lib reads {quoted(regex)} wrongly, for instance for the word {quoted(word)}. "
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
                f"The automaton of the regular expression {quoted(regex)} is too large: on the way to it there are "
                f"{what} to go through. A choice that is remembered over many symbols doubles them with each, as in "
                "(a|b)*a(a|b){20}; a smaller number of repetitions makes it smaller."
            )
    return np.array(rows, dtype=np.int64), np.array(accepting, dtype=np.int64)


def _numbered(initial: Any, step: Transition, accepts: Callable[[Any], bool], letters: tuple[str, ...]) -> Automaton:
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


def private(alphabet: Sequence[str]) -> dict[str, str]:
    """A character for each symbol that means nothing to the library."""
    return {symbol: chr(FIRST_PRIVATE + i) for i, symbol in enumerate(alphabet)}


def for_library(language: Language, names: dict[str, str]) -> str:
    """An expression of the language, which is not NOTHING, in what automata-lib reads rightly."""
    if language.kind == "one":
        return "(" + "|".join(sorted(names[symbol] for symbol in language.symbols)) + ")"
    parts = [for_library(part, names) for part in language.parts]
    if language.kind == "chain":
        return "(" + "".join(parts) + ")"
    if language.kind == "repeat":
        if language.least == 0 and language.most is None:
            return f"({parts[0]})*"
        return f"({parts[0]}){{{language.least},{'' if language.most is None else language.most}}}"
    return "(" + {"any": "|", "all": "&", "shuffle": "^"}[language.kind].join(sorted(parts)) + ")"
