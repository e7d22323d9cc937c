"""From a trained model to the automaton that it has learned.

After each symbol a model says a label; that makes it a Moore machine, if one with too many states to be of use. A model
that has learned a group or a language behaves as a small one, at least on words that are not too long; `extract` finds
that one and says on how much of other words it agrees with the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deltaproduct.analysis.active import learn_lstar
from deltaproduct.analysis.clustering import learn_clustering
from deltaproduct.analysis.moore import Moore, probing_words
from deltaproduct.analysis.teacher import Teacher, Vocabulary, vocabulary
from deltaproduct.errors import UsageError
from deltaproduct.memory import check_memory
from deltaproduct.models import SequenceModel, evaluating
from deltaproduct.tasks import Task
from deltaproduct.tasks.automata import Automaton

METHODS = {"lstar": learn_lstar, "clustering": learn_clustering}
CHECKED_WORDS = 256
_LEARNING, _CHECKING = 0, 1  # random streams of a seed


@dataclass(frozen=True)
class Extraction:
    """An automaton learned from a model, and how it compares with the model on words that it was not learned from."""

    automaton: Automaton
    outputs: tuple[int, ...]  # the model's label in each state
    agreement: float  # share of positions of the fresh words at which the model's label is the state's
    words: int  # how many of these there were; every second one visits rare states (`moore.probing_words`)
    length: int  # of each, in symbols
    learned_length: int  # of the longest words that were learned from; less than `length` where the model drifts
    queries: int  # words that the model was asked in learning
    method: str
    seed: int


def extract(
    model: SequenceModel,
    source: Task | Automaton | None = None,
    *,
    method: str = "lstar",
    max_length: int = 64,
    max_states: int = 2000,
    seed: int = 0,
) -> Extraction:
    """The automaton that a model follows on words of up to about `max_length` symbols.

    Args:
        source: what the model was trained on or compiled from, for the names of symbols and states (see
            `teacher.vocabulary`); None calls them by their numbers.
        method: "lstar" asks the model (`active.learn_lstar`, which needs AALpy), "clustering" watches its state
            (`clustering.learn_clustering`).
        max_length: symbols in a random word, for learning and for the check. Trained models drift on long ones: where
            they do, "lstar" stops at shorter ones. (It may put a word to a state in front of a part of one.)
        seed: of the words that are learned from; those of the check have a stream of their own.

    Returns:
        A minimal machine. If no two states have the same label, they are in the order of their labels and called by
        them; else in the order of discovery and numbered. Accepting are the states with the source's accepting labels;
        without any, those that say what the initial state says.

    Raises UsageError when the model needs more than `max_states` states, does not fit the source, or AALpy is missing.
    """
    if method not in METHODS:
        raise UsageError(f"There is no method {method!r}; there are {' and '.join(METHODS)}.")
    for name, value in (("max_length", max_length), ("max_states", max_states)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}.")
    if seed < 0:
        raise UsageError(f"seed must be 0 or more, not {seed}.")
    # Of words and their labels, 8 bytes each.
    what = f"A check of {CHECKED_WORDS} words of {max_length:,} symbols"
    check_memory(what, 2 * 8 * CHECKED_WORDS * max_length, "max_length")
    known = vocabulary(model.config, source)
    with evaluating(model):
        teacher = Teacher(model, known)
        learned, learned_length = METHODS[method](
            teacher, max_length=max_length, max_states=max_states, rng=np.random.default_rng([seed, _LEARNING])
        )
        machine = learned.canonical(teacher.before, counts=known.bos_counts)
        if len(machine.table) > max_states:
            raise UsageError(f"The model has {len(machine.table):,} states, more than {max_states:,}.")
        queries = teacher.asked
        words = probing_words(machine, CHECKED_WORDS, max_length, np.random.default_rng([seed, _CHECKING]))
        agreement = float((machine.outputs[machine.run(words)] == teacher.labels(words)).mean())
    return Extraction(
        automaton=_automaton(machine, known),
        outputs=tuple(machine.outputs.tolist()),
        agreement=agreement,
        words=CHECKED_WORDS,
        length=max_length,
        learned_length=learned_length,
        queries=queries,
        method=method,
        seed=seed,
    )


def _automaton(machine: Moore, known: Vocabulary) -> Automaton:
    outputs = machine.outputs.tolist()
    accepting = (outputs[machine.initial],) if known.accepting is None else known.accepting
    return Automaton(
        alphabet=known.symbols,
        states=_names([known.labels[output] for output in outputs]),
        initial=machine.initial,
        accepting=tuple(state for state, output in enumerate(outputs) if output in accepting),
        transitions=tuple(map(tuple, machine.table.tolist())),
    )


def _names(labels: Sequence[str]) -> tuple[str, ...]:
    """The labels, where all are different; else with a number behind those that are not."""
    seen: dict[str, int] = {}
    names = []
    for label in labels:
        seen[label] = seen.get(label, 0) + 1
        names.append(label if labels.count(label) == 1 else f"{label} #{seen[label]}")
    return tuple(names)
