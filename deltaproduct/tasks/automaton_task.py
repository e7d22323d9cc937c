"""Any deterministic automaton as a task: after each symbol of a word its state, or whether it accepts what it has read.

Automata come from regular expressions (through automata-lib), from files, or by chance with a given number of states.
"""

import random
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deltaproduct.errors import UsageError
from deltaproduct.files import read_json, read_text
from deltaproduct.tasks.automata import Automaton, order_of_discovery
from deltaproduct.tasks.automaton_format import MAX_STATES
from deltaproduct.tasks.dot import automaton_from_dot
from deltaproduct.tasks.regex_automaton import from_regex
from deltaproduct.tasks.task import Task

ANSWERS = ("rejected", "accepted")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
MAX_FLOWS = 1_000_000  # pairs of a state and a next one in a task's automaton: `chance` goes through them 1,000 times
SETTLED = 500  # symbols after which `chance` is measured, and over which


@dataclass(frozen=True, eq=False, kw_only=True)
class AutomatonTask(Task):
    """Words over an automaton's alphabet, labelled at every position.

    Token i is symbol i and BOS is the last token; label i is state i, or, where `accept`, 0 for rejected and 1 for
    accepted. For the regular expression (ab)*, with q2 the state from which no word is accepted:

        a b a a → q1 q0 q1 q2, and rejected accepted rejected rejected

    The initial state is never a label by itself, since BOS is not scored. A uniformly drawn word of most languages soon
    ends up where nothing changes any more, so each sequence is, with probability 1/2 each, uniform, or uniform over the
    symbols that keep the most states within reach.

    `chance` is that of a guess that knows the position but not the input; it is computed from the distribution of the
    states after 500 to 1,000 symbols.

    Attributes:
        automaton: what is followed.
        accept: whether labels tell acceptance only.
    """

    automaton: Automaton = field(repr=False)
    accept: bool = False

    def token_name(self, i: int) -> str:
        return "[BOS]" if i == self.bos_id else self.automaton.alphabet[i]

    def label_name(self, i: int) -> str:
        return ANSWERS[i] if self.accept else self.automaton.states[i]

    @cached_property
    def _lively(self) -> tuple[np.ndarray, np.ndarray]:
        return lively_symbols(self.automaton)

    def _sample(self, batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        size, device = len(self.automaton.alphabet), generator.device
        tokens = torch.randint(size, (batch, length), generator=generator, device=device)
        chosen = torch.randint(2, (batch,), generator=generator, device=device) == 1
        share = torch.rand((batch, length), dtype=torch.float64, generator=generator, device=device)
        order, count = self._lively
        if (count < size).any():
            rows = share[chosen].T.cpu().numpy()
            table, state = np.array(self.automaton.transitions), np.full(rows.shape[1], self.automaton.initial)
            words = np.empty(rows.shape, dtype=np.int64)
            for t, u in enumerate(rows):
                words[t] = order[state, np.minimum((u * count[state]).astype(np.int64), count[state] - 1)]
                state = table[state, words[t]]
            tokens[chosen] = torch.from_numpy(words.T.copy()).to(device)
        labels = run_automaton(self.automaton, tokens)
        if self.accept:
            labels = torch.tensor(_accepts(self.automaton), device=device).long()[labels]
        return tokens, labels, torch.ones_like(tokens, dtype=torch.bool)


def run_automaton(automaton: Automaton, tokens: Tensor) -> Tensor:
    """The state after each symbol of words [B,T], from the initial one: int64 [B,T] on the device of `tokens`."""
    size = len(automaton.alphabet)
    table = np.array(automaton.transitions, dtype=np.int64).reshape(-1)
    words = np.ascontiguousarray(tokens.T.cpu().numpy())  # a step reads one row
    states, state = np.empty_like(words), np.full(words.shape[1], automaton.initial, dtype=np.int64)
    for t, symbols in enumerate(words):
        state = table.take(state * size + symbols, out=states[t])
    return torch.from_numpy(states.T.copy()).to(tokens.device)


def lively_symbols(automaton: Automaton) -> tuple[np.ndarray, np.ndarray]:
    """For every state, the symbols that keep the most states within reach first, [n,s]; and how many those are, [n]."""
    within = states_within_reach(automaton)
    reach = np.array([states.bit_count() for states in within])[np.array(automaton.transitions)]
    best = reach == reach.max(axis=1, keepdims=True)
    return np.argsort(~best, axis=1, kind="stable"), best.sum(axis=1)


def states_within_reach(automaton: Automaton) -> list[int]:
    """For every state, those that words lead to from it, itself with them, as the bits of a number.

    Tarjan's algorithm: states that reach each other are of one component, and a component is complete only after all
    that it leads to. So every transition is looked at once, whatever the order of the states.
    """
    n, rows = len(automaton.states), [tuple(dict.fromkeys(row)) for row in automaton.transitions]
    found, low = [-1] * n, [0] * n  # when each was found, and the earliest that is still open and within its reach
    within, is_open = [0] * n, [False] * n
    opened: list[int] = []
    count = 0
    for root in range(n):
        if found[root] >= 0:
            continue
        path = [(root, iter(rows[root]))]
        found[root] = low[root] = count
        count += 1
        opened.append(root)
        is_open[root] = True
        while path:
            state, ways = path[-1]
            for to in ways:
                if found[to] < 0:
                    found[to] = low[to] = count
                    count += 1
                    opened.append(to)
                    is_open[to] = True
                    path.append((to, iter(rows[to])))
                    break
                if is_open[to]:
                    low[state] = min(low[state], found[to])
            else:
                path.pop()
                if path:
                    low[path[-1][0]] = min(low[path[-1][0]], low[state])
                if low[state] == found[state]:
                    component: list[int] = []
                    reached = 0
                    while not component or component[-1] != state:
                        component.append(opened.pop())
                        reached |= 1 << component[-1]
                        is_open[component[-1]] = False
                    for to in {to for member in component for to in rows[member]} - set(component):
                        reached |= within[to]
                    for member in component:
                        within[member] = reached
    return within


def automaton_task(name: str, summary: str, automaton: Automaton, accept: bool = False) -> AutomatonTask:
    """The task of an automaton. Its labels are the automaton's states as they are: merge equivalent ones first.

    Raises UsageError when there is nothing to tell: one state, or, where `accept`, all states accepting or none.
    """
    reached = set(order_of_discovery(automaton.initial, lambda q: automaton.transitions[q]))
    if accept and len(reached & set(automaton.accepting)) in (0, len(reached)):
        which = "all words" if reached & set(automaton.accepting) else "no word"
        raise UsageError(f"{name} cannot be used because {which} would be accepted.")
    if len(reached) < 2:
        raise UsageError(f"{name} cannot be used because its automaton has one state only.")
    size = len(automaton.alphabet)
    labels = len(ANSWERS) if accept else len(automaton.states)
    return AutomatonTask(
        name=name, summary=summary, automaton=automaton, accept=accept, vocab_size=size + 1, bos_id=size,
        num_labels=labels, chance=_chance(automaton, accept),
    )  # fmt: skip


def _accepts(automaton: Automaton) -> list[bool]:
    accepting = set(automaton.accepting)
    return [state in accepting for state in range(len(automaton.states))]


def _chance(automaton: Automaton, accept: bool) -> float:
    """The mean, over positions 500 to 1,000, of the likeliest label's probability."""
    table, (order, count) = np.array(automaton.transitions), lively_symbols(automaton)
    n, s = table.shape
    lively = np.zeros((n, s))
    np.put_along_axis(lively, order, np.where(np.arange(s) < count[:, None], 1 / count[:, None], 0), axis=1)
    accepting, best = np.array(_accepts(automaton)), 0.0
    # Each different pair of a state and its next one once, with its share of either kind of sequence.
    pairs, which = np.unique((np.arange(n)[:, None] * n + table).ravel(), return_inverse=True)
    if len(pairs) > MAX_FLOWS:
        raise UsageError(
            f"An automaton whose states have {len(pairs):,} different next states in all is too large for a task; at "
            f"most {MAX_FLOWS:,} are possible."
        )
    source, to = pairs // n, pairs % n
    shares = [np.bincount(which.ravel(), weights.ravel()) for weights in (np.full((n, s), 1 / s), lively)]
    # The two kinds of sequences are as likely as each other, and each stays of its kind.
    at = np.zeros((2, n))
    at[:, automaton.initial] = 0.5
    for t in range(2 * SETTLED):
        at = np.stack([np.bincount(to, at_one[source] * share, minlength=n)
                       for at_one, share in zip(at, shares, strict=True)])  # fmt: skip
        if t >= SETTLED:
            state = at.sum(axis=0)
            accepted = state[accepting].sum()
            best += max(accepted, 1 - accepted) if accept else state.max()
    return best / SETTLED


def random_automaton(states: int, symbols: int, seed: int = 0) -> Automaton:
    """A random automaton of n states, all of which words lead to, with s symbols a, b, c, …

    State i > 0 is entered from a state before it, by a symbol of that state that leads nowhere yet, each such pair as
    likely as another; the transitions then left lead anywhere, uniformly. Each state accepts with probability 1/2, but
    at least one does, and of two or more not all. The same arguments give the same automaton.

    Raises UsageError when n or s is less than 1, when n is more than 10,000, or s more than 26.
    """
    if not 1 <= states <= MAX_STATES:
        raise UsageError(f"A random automaton has from 1 to {MAX_STATES:,} states, not {states:,}.")
    if not 1 <= symbols <= len(LETTERS):
        raise UsageError(f"A random automaton has from 1 to {len(LETTERS)} symbols, not {symbols:,}.")
    rng = random.Random(seed)
    table = [[-1] * symbols for _ in range(states)]
    free = [(0, symbol) for symbol in range(symbols)]
    for state in range(1, states):
        i = rng.randrange(len(free))
        free[i], free[-1] = free[-1], free[i]
        before, symbol = free.pop()
        table[before][symbol] = state
        free += [(state, symbol) for symbol in range(symbols)]
    rows = tuple(tuple(rng.randrange(states) if to < 0 else to for to in row) for row in table)
    accepting: tuple[int, ...] = ()
    while not accepting or len(accepting) == states > 1:
        accepting = tuple(q for q in range(states) if rng.random() < 0.5)
    names = tuple(f"q{i}" for i in range(states))
    return Automaton(tuple(LETTERS[:symbols]), names, 0, accepting, rows)


# ------------------------------------------------------------------------------------------- a task from a name's parts


def regex_task(name: str, accept: str | None, regex: str) -> AutomatonTask:
    """`regex:R` or `regex_accept:R`: the minimal automaton of a regular expression (`expressions.py` has the syntax).

    Raises UsageError when R is none, or its automaton has nothing to tell; or when automata-lib is not installed.
    """
    return automaton_task(name, _summary(f"the minimal automaton of {regex}", accept), from_regex(regex), bool(accept))


def random_automaton_task(name: str, accept: str | None, states: str, symbols: str, seed: str) -> AutomatonTask:
    """`random_automaton:NxS:SEED` or `random_automaton_accept:NxS:SEED` (see `random_automaton`)."""
    automaton = random_automaton(int(states), int(symbols), int(seed))
    what = f"a random automaton with {int(states):,} states and {symbols} symbols"
    return automaton_task(name, _summary(what, accept), automaton, bool(accept))


def file_task(name: str, accept: str | None, file: str) -> AutomatonTask:
    """`automaton:FILE` or `automaton_accept:FILE`: an automaton from a file (see `read_automaton`); states that no word
    leads to are left out.

    Raises UsageError when the file cannot be read, is no automaton, or its automaton has nothing to tell.
    """
    automaton = read_automaton(Path(file))
    return automaton_task(name, _summary(f"the automaton in {file}", accept), automaton.reachable(), bool(accept))


def read_automaton(path: Path) -> Automaton:
    """The automaton in a file: DOT if its name ends in .dot or .gv or it begins as DOT does, else JSON as
    `Automaton.from_dict` takes it.

    Raises UsageError when the file cannot be read or is no automaton.
    """
    text = read_text(path)
    if path.suffix.lower() in (".dot", ".gv") or re.match(r"\s*(strict\s+)?digraph\b", text):
        return automaton_from_dot(text)
    return Automaton.from_dict(read_json(path))


def _summary(what: str, accept: str | None) -> str:
    return f"whether {what} accepts what it has read" if accept else f"the state of {what}"
