"""Cascades (theory/cascade.py) carry out their automata, with the levels and actions that the construction promises."""

import random

import pytest
from test_automata import PARITY, random_automaton

from deltaproduct.errors import UsageError
from deltaproduct.tasks.automata import Automaton
from deltaproduct.theory.cascade import decompose


@pytest.mark.parametrize("seed", range(60))
def test_a_cascade_follows_its_automaton(seed):
    """n − 1 levels of n, n − 1, … 2 labels; every action is a permutation of its labels or a reset to one of them."""
    rng = random.Random(seed)
    n, s = rng.randint(1, 7), rng.randint(1, 5)
    automaton = random_automaton(rng, n, s)
    cascade = decompose(automaton)
    assert [level.size for level in cascade.levels] == list(range(n, 1, -1))
    for level in cascade.levels:
        for step, action in level.actions.items():
            assert len(step.before) == len(step.after) == level.size
            if action.permutation is None:
                assert 0 <= action.reset < level.size
            else:
                assert sorted(action.permutation) == list(range(level.size)) and action.reset is None
    for _ in range(3):
        word = [rng.randrange(s) for _ in range(400)]
        assert cascade.trace(word) == automaton.trace(word)


def test_permutations_only_ever_permute():
    """Of an automaton whose symbols are permutations no level is ever reset."""
    rng = random.Random(0)
    columns = [rng.sample(range(6), 6) for _ in range(3)]
    automaton = Automaton(tuple("abc"), tuple("012345"), 2, (), tuple(zip(*columns, strict=True)))
    assert all(level.permutes for level in decompose(automaton).levels)
    assert [len(level.sets) for level in decompose(PARITY).levels] == [1]


def test_constant_maps_only_ever_reset():
    flip_flop = Automaton(("set", "clear"), ("0", "1"), 0, (1,), ((1, 0), (1, 0)))
    (level,) = decompose(flip_flop).levels
    assert all(action.permutation is None for action in level.actions.values()) and not level.permutes
    assert decompose(flip_flop).trace([0, 0, 1, 0]) == [1, 1, 0, 1]


def test_one_state_needs_no_level():
    one = Automaton(("a",), ("only",), 0, (0,), ((0,),))
    assert decompose(one).levels == () and decompose(one).trace([0, 0]) == [0, 0]


def test_too_many_states_are_refused():
    many = random_automaton(random.Random(0), 13, 2)
    with pytest.raises(UsageError, match="13 states would have 12 levels"):
        decompose(many)
