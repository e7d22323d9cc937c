"""Moore machines as tables (analysis/moore.py), and what groups they compute in (analysis/monoid.py)."""

from dataclasses import replace

import numpy as np

from deltaproduct.analysis import compare_with_group, monoid, monoid_size
from deltaproduct.analysis.moore import UNKNOWN, Moore, probing_words
from deltaproduct.tasks.automata import Automaton
from deltaproduct.tasks.groups import build_group
from deltaproduct.theory.compiler import group_automaton


def test_monoids_are_counted_and_held_against_a_group(monkeypatch):
    group = build_group("S3")
    table = group_automaton(group)
    for elements, right in (([1, 2], True), ([1, 3], True), ([1], False), ([3, 4], False)):
        part = replace(
            table,
            alphabet=tuple(table.alphabet[i] for i in elements),
            transitions=tuple(tuple(row[i] for i in elements) for row in table.transitions),
        )
        compared = compare_with_group(part, group, elements, range(6))
        assert compared.isomorphic == compared.word_problem == right
        assert compared.elements == len(part.monoid()) == monoid_size(part)
    assert compare_with_group(table, group, range(6), range(6)).word_problem
    assert not compare_with_group(table, group, range(6), [0, 1, 2, 3, 4, 6]).word_problem  # a label of no element
    assert not compare_with_group(table, group, range(6), group.table[1].tolist()).word_problem  # it starts elsewhere
    acting = Automaton(("(1 2)", "(0 1)"), ("0", "1", "2"), 0, (0,), ((0, 1), (2, 0), (1, 2)))  # on three points
    compared = compare_with_group(acting, group, [1, 2], [0, 1, 2])
    assert str(compared) == "S3" and not compared.word_problem
    monkeypatch.setattr(monoid, "MAX_ELEMENTS", 5)
    assert monoid_size(acting) is None
    assert str(compare_with_group(acting, build_group("Z2"), [1, 1], [0, 1, 1])) == "not Z2: more than 5 elements"


def test_probing_words_reach_what_uniform_ones_do_not():
    """A lock of nine digits: one digit leads on, any other back."""
    table = np.array([[q + 1 if symbol == q % 4 and q < 8 else 0 for symbol in range(4)] for q in range(9)])
    lock = Moore(table, np.arange(9))
    words = probing_words(lock, 400, 20, np.random.default_rng(0))
    states = lock.run(words)
    assert words.shape == (400, 20) and set(np.unique(words)) == {0, 1, 2, 3}
    assert set(np.unique(states[1::2])) == set(range(9)) and 8 not in states[0::2]


def test_a_canonical_machine_is_minimal_reachable_and_in_order():
    # 0 → 1, 2; 1 and 3 are alike; 4 is out of reach; 2 goes on as 0 does
    table = np.array([[1, 2], [3, 0], [1, 2], [1, 0], [4, 4]])
    outputs = np.array([UNKNOWN, 1, 0, 1, 2])
    machine = Moore(table, outputs).canonical(7, counts=False)
    # 0 is led back to from 1 and 3, and is one with 2 all the same: both are before the first symbol, for all one sees
    assert machine.table.tolist() == [[1, 0], [1, 0]] and machine.outputs.tolist() == [0, 1] and machine.initial == 0
    counted = Moore(table, outputs).canonical(7, counts=True)
    assert counted.outputs.tolist() == [0, 1, 7] and counted.initial == 2
    assert counted.table.tolist() == [[1, 0], [1, 2], [1, 0]]
    # 1 and 2 both go on as the start does
    alike = Moore(np.array([[1, 2], [1, 2], [1, 2]]), np.array([UNKNOWN, 5, 7]))
    for before in (5, 7):
        assert alike.canonical(before, counts=False).outputs.tolist() == [5, 7]
        assert alike.canonical(before, counts=False).initial == (before == 7)
