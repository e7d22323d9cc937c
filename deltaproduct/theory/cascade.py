"""Any automaton as a cascade of levels that only permute and reset: what a stack of DeltaProduct layers can carry out.

Krohn and Rhodes' theorem in a form that is stronger than P1's Theorem 4 needs: n states take at most n − 1 levels.
What is known of the automaton's state before a level is its context: m sets of states (parts), in one of which the
state is. A level keeps one label, the place of a part in the context:

* it excludes, as a rule: the label is of a part that the state is *not* in, and the m − 1 others are the next level's
  context. A symbol takes the parts of one context into those of another. Where it does so one to one, the label moves
  along (a permutation of the m labels). Otherwise it misses a part, whose label is the new one, whatever the old one
  was (a reset). So it takes m − 1 levels until one part is left.
* it selects, where each symbol takes all parts one to one, or all to one: the label is of the part that the state is
  in, and one level does.

The first context is all states, one by one, and if they are permuted or reset there is but one level. Else congruences
(congruences.py) may offer a chain of stages with fewer levels: first which block of the coarsest the state is in, last
which state it is.

Which of the two a symbol does, and how, is decided by the symbol, the context before it and the one after it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from deltaproduct.errors import UsageError
from deltaproduct.tasks.automata import Automaton, order_of_discovery
from deltaproduct.theory.congruences import MAX_PARTS, Stage, Subset, shortest_chain

MAX_STEPS = 200_000  # of a level: each is a unit of an MLP


class Parts(tuple[Subset, ...]):
    """Parts, which remember their hash: steps are looked up by long ones again and again."""

    def __hash__(self) -> int:
        found = self.__dict__.get("hashed")
        if found is None:
            found = self.__dict__["hashed"] = super().__hash__()
        return found


Context = tuple[Subset, ...]  # parts, some of them perhaps empty so that all contexts of a level are equally long


class Action(NamedTuple):
    """What a symbol does to a level's label: label → permutation[label], or, where that is None, to `reset`."""

    permutation: tuple[int, ...] | None
    reset: int | None

    def __call__(self, label: int) -> int:
        if self.permutation is None:
            assert self.reset is not None
            return self.reset
        return self.permutation[label]

    @property
    def is_identity(self) -> bool:
        """Whether every label stays as it is."""
        return self.permutation is not None and all(x == y for x, y in enumerate(self.permutation))


class Step(NamedTuple):
    """What decides an action: a symbol, and the level's context before and after it."""

    symbol: int
    before: Context
    after: Context


@dataclass(frozen=True)
class Level:
    """One level.

    Attributes:
        size: m, the number of labels.
        selects: whether the label is of the part that the state is in, and not of one that it is not in.
        initial_context, initial_label: before the first symbol.
        actions: for every step that can occur.
        following: the next level's context, for every context and label that can occur; after the last level, the state
            alone.
    """

    size: int
    selects: bool
    initial_context: Context
    initial_label: int
    actions: dict[Step, Action]
    following: dict[tuple[Context, int], Context]

    @property
    def contexts(self) -> list[Context]:
        """Every one that can occur."""
        return sorted({context for context, _ in self.following})

    @property
    def permutes(self) -> bool:
        """Whether no symbol ever resets it."""
        return all(action.permutation is not None for action in self.actions.values())

    @property
    def only_resets(self) -> bool:
        """Whether no symbol ever does anything else, but to leave all labels as they are."""
        return all(action.permutation is None or action.is_identity for action in self.actions.values())


@dataclass(frozen=True)
class Cascade:
    """The levels of an automaton."""

    automaton: Automaton
    levels: tuple[Level, ...]

    def trace(self, symbols: Iterable[int]) -> list[int]:
        """The automaton's state after each symbol, found by the levels alone.

        Each looks up its action by the symbol and its context before and after, and the next level's context by its
        own and its label.
        """
        contexts = [level.initial_context for level in self.levels]
        labels = [level.initial_label for level in self.levels]
        states = []
        for symbol in symbols:
            after = contexts[0] if contexts else ((self.automaton.initial,),)
            for i, level in enumerate(self.levels):
                labels[i] = level.actions[Step(symbol, contexts[i], after)](labels[i])
                contexts[i] = after
                after = level.following[after, labels[i]]
            states.append(the_state(after))
        return states


def the_state(context: Context) -> int:
    """The only state of a context that has one part of one state."""
    ((state,),) = context
    return state


def decompose(automaton: Automaton, stages: Sequence[Stage] | None = None) -> Cascade:
    """The cascade of an automaton along a chain of stages; None means the shortest that is found.

    Raises UsageError when a stage that takes more than one level has more than 12 parts.
    """
    stages = shortest_chain(automaton) if stages is None else stages
    if too_many := [stage.size for stage in stages if not stage.direct and stage.size > MAX_PARTS]:
        n = len(automaton.states)
        raise UsageError(
            f"A cascade of the {n} states would list subsets of {max(too_many)} parts, and at most {MAX_PARTS} are "
            f"possible; no congruences were found that take it apart further."
        )
    if not stages:
        return Cascade(automaton, ())

    known: list[dict[Subset, Context]] = [{} for _ in stages]

    def split(part: Subset, number: int) -> Context:
        """The context in which stage `number` begins when the state is in `part`."""
        if number == len(stages):
            return Parts((part,))
        if part not in known[number]:
            parts = stages[number].parts[part]
            known[number][part] = Parts(parts + ((),) * (stages[number].size - len(parts)))
        return known[number][part]

    context = split(tuple(range(len(automaton.states))), 0)
    steps = {Step(symbol, context, context) for symbol in range(len(automaton.alphabet))}
    levels = []
    for number, stage in enumerate(stages):
        for _ in range(stage.levels):
            state_in = [automaton.initial in part for part in context]
            label = state_in.index(True) if stage.direct else state_in.index(False)
            actions = {step: _action(automaton, step, stage.direct) for step in sorted(steps)}
            following = {}
            for parts, place in _labelled(context, label, actions):
                rest = parts[place : place + 1] if stage.direct else parts[:place] + parts[place + 1 :]
                following[parts, place] = Parts(rest) if len(rest) > 1 else split(rest[0], number + 1)
            level = Level(len(context), stage.direct, context, label, actions, following)
            levels.append(level)
            steps = _next_steps(level)
            context = following[context, label]
    return Cascade(automaton, tuple(levels))


def _action(automaton: Automaton, step: Step, selects: bool) -> Action:
    """Of a step on labels. Empty parts are where no state is: their labels go where they do no harm."""
    place = {state: label for label, part in enumerate(step.after) for state in part}
    images = {
        label: place[automaton.transitions[part[0]][step.symbol]] for label, part in enumerate(step.before) if part
    }
    reached = set(images.values())
    if selects and len(reached) == 1 and any(x != y for x, y in images.items()):
        return Action(None, reached.pop())
    if len(reached) < len(images):
        return Action(None, next(label for label in range(len(step.after)) if label not in reached))
    # One to one: the other labels keep their places where those are free, and fill up what is left.
    free = [label for label in range(len(step.after)) if label not in reached]
    others = [label for label in range(len(step.before)) if label not in images]
    for label in [label for label in others if label in free]:
        images[label] = label
        others.remove(label)
        free.remove(label)
    images.update(zip(others, free, strict=True))
    return Action(tuple(images[label] for label in range(len(step.before))), None)


def _labelled(context: Context, label: int, actions: dict[Step, Action]) -> list[tuple[Context, int]]:
    """Every context and label that a level can be at."""
    by_context: dict[Context, list[Step]] = {}
    for step in actions:
        by_context.setdefault(step.before, []).append(step)

    def next_ones(at: tuple[Context, int]) -> list[tuple[Context, int]]:
        return [(step.after, actions[step](at[1])) for step in by_context.get(at[0], [])]

    return sorted(order_of_discovery((context, label), next_ones))


def _next_steps(level: Level) -> set[Step]:
    """The steps of the next level: from every context and label that this level can be at, by every symbol."""
    by_context: dict[Context, list[int]] = {}
    for context, label in level.following:
        by_context.setdefault(context, []).append(label)
    result = set()
    for step, action in level.actions.items():
        for label in by_context.get(step.before, []):
            after = level.following[step.after, action(label)]
            result.add(Step(step.symbol, level.following[step.before, label], after))
    if len(result) > MAX_STEPS:
        raise UsageError(f"A cascade needs a look-up of more than {MAX_STEPS:,} steps.")
    return result
