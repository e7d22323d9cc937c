"""Any automaton as a cascade of levels that only permute and reset: what a stack of DeltaProduct layers can carry out.

Krohn and Rhodes' theorem in a form that is stronger than P1's Theorem 4 needs: n states take n − 1 levels, the i-th of
which has m = n − i + 1 labels. Level i looks at a set R of m states that the automaton's state is known to be in, and
keeps a state e of R that it is *not*: what remains, R without e, is the next level's set. After the last level one
state is left.

A symbol takes R to a set R′ that holds all images of R. Where it maps R onto R′ one to one, e moves along (a
permutation of labels, which are places in R and R′). Otherwise some state of R′ is no image; it becomes the new e,
whatever e was (a reset). Which of the two, and how, is decided by the symbol, R and R′ alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from deltaproduct.errors import UsageError
from deltaproduct.tasks.automata import Automaton

MAX_CASCADE_STATES = 12  # subsets are listed, of which there are up to 2ⁿ

Subset = tuple[int, ...]  # states in increasing order; a state's label is its place


class Action(NamedTuple):
    """What a symbol does to a level's label: label → permutation[label], or, where that is None, to `reset`."""

    permutation: tuple[int, ...] | None
    reset: int | None

    def __call__(self, label: int) -> int:
        if self.permutation is None:
            assert self.reset is not None
            return self.reset
        return self.permutation[label]


class Step(NamedTuple):
    """What decides an action: a symbol, and the level's set before and after it."""

    symbol: int
    before: Subset
    after: Subset


@dataclass(frozen=True)
class Level:
    """One level.

    Attributes:
        size: m, the number of labels.
        initial_set, initial_label: R and the label of e before the first symbol.
        sets: every R that can occur.
        actions: for every step that can occur.
    """

    size: int
    initial_set: Subset
    initial_label: int
    sets: tuple[Subset, ...]
    actions: dict[Step, Action]

    @property
    def permutes(self) -> bool:
        """Whether no symbol ever resets it."""
        return all(action.permutation is not None for action in self.actions.values())


@dataclass(frozen=True)
class Cascade:
    """The levels of an automaton, the first one on the whole set of states."""

    automaton: Automaton
    levels: tuple[Level, ...]

    def trace(self, symbols: Iterable[int]) -> list[int]:
        """The automaton's state after each symbol, found by the levels alone.

        Each looks up its action by the symbol and its set before and after, and hands on its set without its label.
        """
        sets = [level.initial_set for level in self.levels]
        labels = [level.initial_label for level in self.levels]
        whole = tuple(range(len(self.automaton.states)))
        states = []
        for symbol in symbols:
            after = whole
            for i, level in enumerate(self.levels):
                labels[i] = level.actions[Step(symbol, sets[i], after)](labels[i])
                sets[i] = after
                after = without(after, labels[i])
            (state,) = after
            states.append(state)
        return states


def without(states: Subset, label: int) -> Subset:
    """The set without the state of this label."""
    return states[:label] + states[label + 1 :]


def decompose(automaton: Automaton) -> Cascade:
    """The cascade of an automaton with n states, in n − 1 levels.

    Raises UsageError when there are more than 12 states.
    """
    n = len(automaton.states)
    if n > MAX_CASCADE_STATES:
        raise UsageError(f"A cascade of {n} states would have {n - 1} levels; at most {MAX_CASCADE_STATES} states.")
    whole, state = tuple(range(n)), automaton.initial
    levels = []
    steps = {Step(symbol, whole, whole) for symbol in range(len(automaton.alphabet))}
    initial_set = whole
    while len(initial_set) > 1:
        # Any label but the state's own: the first.
        level = _level(automaton, initial_set, 0 if initial_set[0] != state else 1, steps)
        levels.append(level)
        steps = _next_steps(level, steps)
        initial_set = without(initial_set, level.initial_label)
    return Cascade(automaton, tuple(levels))


def _level(automaton: Automaton, initial_set: Subset, initial_label: int, steps: set[Step]) -> Level:
    return Level(
        size=len(initial_set),
        initial_set=initial_set,
        initial_label=initial_label,
        sets=tuple(sorted({initial_set} | {step.after for step in steps})),
        actions={step: _action(automaton, step) for step in sorted(steps)},
    )


def _action(automaton: Automaton, step: Step) -> Action:
    images = [automaton.transitions[state][step.symbol] for state in step.before]
    missed = [label for label, state in enumerate(step.after) if state not in images]
    if not missed:
        return Action(tuple(step.after.index(image) for image in images), None)
    return Action(None, missed[0])


def _next_steps(level: Level, steps: set[Step]) -> set[Step]:
    """The steps of the next level: from every set and label that this level can be at, by every symbol."""
    by_set: dict[Subset, list[Step]] = {}
    for step in steps:
        by_set.setdefault(step.before, []).append(step)
    found = {(level.initial_set, level.initial_label)}
    fresh, result = list(found), set()
    while fresh:
        states, label = fresh.pop()
        for step in by_set.get(states, []):
            new = level.actions[step](label)
            result.add(Step(step.symbol, without(states, label), without(step.after, new)))
            if (step.after, new) not in found:
                found.add((step.after, new))
                fresh.append((step.after, new))
    return result
