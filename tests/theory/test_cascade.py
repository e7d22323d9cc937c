"""Cascades (theory/cascade.py, theory/congruences.py) carry out their automata, with the levels that are promised."""

import random

import pytest
from automaton_cases import PARITY, from_maps, random_automaton

from deltaproduct.errors import UsageError
from deltaproduct.tasks.automata import Automaton
from deltaproduct.theory.cascade import decompose
from deltaproduct.theory.congruences import Stage, congruences, is_direct, shortest_chain


def whole(automaton):
    """The chain without any congruence in between."""
    states = tuple(range(len(automaton.states)))
    return [Stage({states: tuple((q,) for q in states)}, direct=False)] if len(states) > 1 else []


def assert_follows(cascade, rng, words=3, length=400):
    automaton = cascade.automaton
    for level in cascade.levels:
        for step, action in level.actions.items():
            assert len(step.before) == len(step.after) == level.size
            if action.permutation is None:
                assert 0 <= action.reset < level.size
            else:
                assert sorted(action.permutation) == list(range(level.size)) and action.reset is None
    for _ in range(words):
        word = [rng.randrange(len(automaton.alphabet)) for _ in range(length)]
        assert cascade.trace(word) == automaton.trace(word)


@pytest.mark.parametrize("seed", range(60))
def test_a_cascade_follows_its_automaton(seed):
    """n − 1 levels of n, n − 1, … 2 labels, or fewer along a chain of congruences; each permutes or resets."""
    rng = random.Random(seed)
    n, s = rng.randint(1, 7), rng.randint(1, 5)
    automaton = random_automaton(rng, n, s)
    cascade = decompose(automaton, whole(automaton))
    assert [level.size for level in cascade.levels] == list(range(n, 1, -1))
    assert_follows(cascade, rng)
    shorter = decompose(automaton)
    assert len(shorter.levels) <= n - 1
    assert_follows(shorter, rng)


@pytest.mark.parametrize("seed", range(20))
def test_products_of_automata_come_apart(seed):
    """A cascade made on purpose: a small automaton, and permutations of three labels that its state selects."""
    rng = random.Random(seed)
    n = rng.randint(2, 4)
    first = random_automaton(rng, n, 3)
    turns = [[rng.sample(range(3), 3) for _ in range(3)] for _ in range(n)]
    names = tuple(f"{p}{label}" for p in range(n) for label in range(3))
    rows = tuple(
        tuple(3 * first.transitions[p][a] + turns[p][a][label] for a in range(3))
        for p in range(n)
        for label in range(3)
    )
    automaton = Automaton(("a", "b", "c"), names, 3 * first.initial, (0,), rows).reachable()
    cascade = decompose(automaton)
    assert len(cascade.levels) <= n - 1 + 1
    assert_follows(cascade, rng)


def test_congruences_are_respected_by_every_symbol():
    rng = random.Random(0)
    automaton = from_maps((1, 2, 3, 4, 5, 0), (0, 5, 4, 3, 2, 1))  # the hexagon's: mod 2, mod 3, opposite corners
    found = congruences(automaton)
    assert (0, 1, 0, 1, 0, 1) in found and (0, 1, 2, 0, 1, 2) in found
    for other in [automaton] + [random_automaton(rng, 6, 2) for _ in range(30)]:
        for partition in congruences(other):
            for images in other.maps:
                after = {}
                for state, block in enumerate(partition):
                    assert after.setdefault(block, partition[images[state]]) == partition[images[state]]


def test_congruences_are_joined():
    """Where nothing happens every partition is one; of the fifteen of four states only the finest joins no two."""
    found = congruences(from_maps((0, 1, 2, 3)))
    assert len(set(found)) == len(found) == 14 and (0, 0, 1, 1) in found and (0, 1, 1, 0) in found


def test_permutations_and_constants_take_one_level():
    """It selects; constants alone make what is only ever reset."""
    rng = random.Random(0)
    cycles = [rng.sample(range(6), 6) for _ in range(3)]
    (level,) = decompose(from_maps(*cycles, initial=2)).levels
    assert level.selects and level.permutes and not level.only_resets
    (level,) = decompose(from_maps(*cycles, [4] * 6)).levels
    assert level.selects and not level.permutes and not level.only_resets
    (level,) = decompose(from_maps([1] * 6, [4] * 6, range(6))).levels
    assert level.selects and not level.permutes and level.only_resets
    assert len(decompose(PARITY).levels) == 1


def test_a_symbol_that_joins_only_some_states_takes_more():
    automaton = from_maps((1, 2, 0), (0, 0, 1))
    top, bottom = (0, 0, 0), (0, 1, 2)
    assert not is_direct(automaton, top, bottom) and is_direct(from_maps((1, 2, 0)), top, bottom)
    assert [(level.size, level.selects) for level in decompose(automaton).levels] == [(3, False), (2, False)]


def test_flip_flop():
    flip_flop = Automaton(("set", "clear"), ("0", "1"), 0, (1,), ((1, 0), (1, 0)))
    assert decompose(flip_flop).trace([0, 0, 1, 0]) == [1, 1, 0, 1]


def test_one_state_needs_no_level():
    one = Automaton(("a",), ("only",), 0, (0,), ((0,),))
    assert decompose(one).levels == () and decompose(one).trace([0, 0]) == [0, 0]


def test_many_states_are_refused_unless_they_come_apart():
    many = from_maps([(i + 1) % 13 for i in range(13)], [max(i, 1) for i in range(13)])  # no congruence: 13 is prime
    assert [stage.size for stage in shortest_chain(many)] == [13]
    with pytest.raises(UsageError, match="would list subsets of"):
        decompose(many)
    counter = from_maps([(i + 1) % 60 for i in range(60)])
    assert len(decompose(counter).levels) == 1
