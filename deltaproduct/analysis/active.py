"""Learning a Moore machine by asking: L*, with the model as the teacher.

Angluin's L* (1987) in the form of Kearns and Vazirani (1994), which keeps a tree in place of a table and so asks less;
a wrong guess is mended by Rivest and Schapire's binary search (1993). All of it is AALpy's. Recurrent networks as the
teacher: Weiss, Goldberg and Yahav, arXiv 1711.09576.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from deltaproduct.analysis.moore import UNKNOWN, Moore, probing_words
from deltaproduct.analysis.teacher import Teacher
from deltaproduct.errors import UsageError

FEW_WORDS, MANY_WORDS = 32, 512  # random words that look for a difference; the first are enough while there are many
FIRST_LENGTH = 8  # of words; then twice as long, and so on
MOST_GROWTH, ALWAYS_ALLOWED = 8, 64  # from one length to the next, in times as many states, and in states


class _Drift(Exception):
    """On words of the length that was just begun the model has many times as many states as on those before."""


def learn_lstar(teacher: Teacher, *, max_length: int, max_states: int, rng: np.random.Generator) -> tuple[Moore, int]:
    """The machine whose outputs are the teacher's labels on all words that were tried, and how long these were.

    They are all short words, up to 512 of one length, and 512 random ones (see `probing_words`) each of 8, 16, …,
    `max_length` symbols. A difference that a share ε of the random ones shows is missed with probability (1−ε)⁵¹².
    A model that drifts is a small machine on short words only: where twice the length would make more than 8 times the
    states (and more than 64), the result is what was found before. The machine's start has the output `UNKNOWN`.

    Raises UsageError when it would have more than `max_states` states, or AALpy is not installed.
    """
    try:
        from aalpy import SUL, Oracle, run_KV
    except ImportError as e:
        raise UsageError("Learning by asking needs AALpy: pip install 'deltaproduct[formal]'.") from e

    symbols = list(range(teacher.symbols))
    short = _all_words(len(symbols), max_length)
    known: dict[tuple[int, ...], int] = {(): UNKNOWN}

    class Model(SUL):
        """The system under learning: only whole words are asked of it."""

        def query(self, word: tuple[int, ...]) -> list[int]:
            if word not in known:
                # With it all that differ in the last symbol: a batch costs little more than one, and in a large
                # alphabet these are what comes next.
                siblings = [(*word[:-1], symbol) for symbol in symbols]
                labels = teacher.labels(np.array(siblings))[:, -1]
                known.update(zip(siblings, labels.tolist(), strict=True))
            return [known[word]]  # of a word's outputs the algorithm looks at the last only

        def pre(self) -> None: ...

        def post(self) -> None: ...

        def step(self, letter: Any) -> Any:
            raise NotImplementedError("words are asked whole")

    class Words(Oracle):
        """Looks for a word on which the machine and the teacher differ."""

        length = min(FIRST_LENGTH, max_length)
        accepted: tuple[Moore, int] | None = None  # the last machine without a difference, and the length of words

        def find_cex(self, hypothesis: Any) -> tuple[int, ...] | None:
            machine = _table(hypothesis)
            states = len(machine.table) - 1  # without the start, which is often a state of its own until the end
            if states > max_states:
                raise UsageError(
                    f"The model has more than {max_states:,} states on words of {self.length} symbols: it has not "
                    "learned a small automaton, or only on shorter words (max_length)."
                )
            if self.accepted and states > max(ALWAYS_ALLOWED, MOST_GROWTH * len(self.accepted[0].table)):
                raise _Drift
            while True:
                for words in self.trials(machine):
                    for word, output in machine.mistakes(words, teacher.labels(words)):
                        # Asked again: near a tie the label may depend on which words share a batch, and the algorithm
                        # relies on one answer to each word.
                        if self.sul.query(word) != [output]:
                            return word
                self.accepted = machine, self.length
                if self.length == max_length:
                    return None
                self.length = min(2 * self.length, max_length)

        def trials(self, machine: Moore) -> Iterator[np.ndarray]:
            yield rng.integers(len(symbols), size=(FEW_WORDS, self.length))
            yield short
            yield probing_words(machine, MANY_WORDS, self.length, rng)

    model = Model()
    oracle = Words(symbols, model)
    with contextlib.suppress(_Drift):
        run_KV(symbols, model, oracle, "moore", cache_and_non_det_check=False, print_level=0)
    assert oracle.accepted is not None  # without a difference the algorithm ends, with one it goes on
    return oracle.accepted


def _all_words(symbols: int, max_length: int) -> np.ndarray:
    """All words [B,T] of the greatest length of which there are at most 512, but of one symbol at least."""
    if symbols == 1:
        return np.zeros((1, max_length), dtype=np.int64)
    longest = min(max_length, MANY_WORDS.bit_length())
    length = max((t for t in range(1, longest + 1) if symbols**t <= MANY_WORDS), default=1)
    return np.indices((symbols,) * length).reshape(length, -1).T


def _table(hypothesis: Any) -> Moore:
    """AALpy's machine as a table."""
    states = [hypothesis.initial_state, *(q for q in hypothesis.states if q is not hypothesis.initial_state)]
    number = {id(q): i for i, q in enumerate(states)}
    symbols = range(len(hypothesis.initial_state.transitions))
    table = np.array([[number[id(q.transitions[symbol])] for symbol in symbols] for q in states])
    return Moore(table, np.array([q.output for q in states]))
