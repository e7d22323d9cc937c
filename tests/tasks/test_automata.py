"""Automata (tasks/automata.py) against automata-lib, an independent implementation, and against Python's own `re`."""

import itertools
import json
import random
import re

import pytest
from automaton_cases import PARITY, library, random_automaton

from deltaproduct.errors import UsageError
from deltaproduct.tasks.automata import Automaton
from deltaproduct.tasks.regex_automaton import from_regex


@pytest.mark.parametrize("seed", range(40))
def test_runs_and_minimal_automata_are_the_librarys(seed):
    rng = random.Random(seed)
    automaton = random_automaton(rng, rng.randint(1, 8), rng.randint(1, 4))
    theirs, minimal = library(automaton), automaton.minimal()
    assert len(minimal.states) == len(theirs.minify().states)
    assert len(automaton.reachable().states) <= len(automaton.states)
    for _ in range(20):
        word = [rng.randrange(len(automaton.alphabet)) for _ in range(rng.randint(0, 30))]
        wanted = theirs.accepts_input([automaton.alphabet[i] for i in word])
        assert automaton.accepts(word) == automaton.reachable().accepts(word) == minimal.accepts(word) == wanted
        states = list(theirs.read_input_stepwise([automaton.alphabet[i] for i in word], ignore_rejection=True))
        assert automaton.trace(word) == states[1:]
    assert minimal.minimal() == minimal


@pytest.mark.parametrize(
    ("regex", "states"),
    [("(ab)*", 3), ("a*", 2), ("(a|b)*abb", 4), ("((a|b)(a|b)(a|b))*", 3), ("(b*ab*a)*b*", 2), ("a{2,4}b?", 7)],
)
def test_regular_expressions_are_pythons(regex, states):
    pytest.importorskip("automata")
    automaton = from_regex(regex, "ab")
    assert automaton.alphabet == ("a", "b") and len(automaton.states) == states and automaton.initial == 0
    for length in range(8):
        for word in itertools.product((0, 1), repeat=length):
            text = "".join("ab"[i] for i in word)
            assert automaton.accepts(word) == bool(re.fullmatch(regex, text)), text


def test_the_alphabet_is_the_expressions_own_unless_given():
    pytest.importorskip("automata")
    assert from_regex("ca*").alphabet == ("a", "c")
    assert from_regex("a*", "abc").alphabet == ("a", "b", "c")


def test_monoids():
    """Parity's is Z2, that of three points under a swap and a cycle S3, with a constant added all 27 maps."""
    assert len(PARITY.monoid()) == 2
    rows = ((1, 1, 0), (0, 2, 0), (2, 0, 2))
    three = Automaton(("swap", "cycle", "join"), ("0", "1", "2"), 0, (0,), rows)
    assert len(three.monoid()) == 27 and three.monoid()[0] == (0, 1, 2)
    group = Automaton(("swap", "cycle"), ("0", "1", "2"), 0, (0,), tuple(row[:2] for row in rows))
    assert sorted(group.monoid()) == sorted(itertools.permutations(range(3)))


@pytest.mark.parametrize("seed", range(10))
def test_the_monoids_automaton_accepts_the_same_language(seed):
    """And its states are what words do: two words end in one state if and only if they do the same to all states."""
    rng = random.Random(seed)
    automaton = random_automaton(rng, rng.randint(1, 4), rng.randint(1, 3))
    monoid = automaton.of_monoid()
    assert len(monoid.states) == len(automaton.monoid())
    ends = {}
    for _ in range(200):
        word = [rng.randrange(len(automaton.alphabet)) for _ in range(rng.randint(0, 12))]
        assert monoid.accepts(word) == automaton.accepts(word)
        end = ([monoid.initial, *monoid.trace(word)])[-1]
        effect = []
        for state in range(len(automaton.states)):
            for symbol in word:
                state = automaton.transitions[state][symbol]
            effect.append(state)
        assert ends.setdefault(tuple(effect), end) == end
        assert len(monoid.states[end]) <= max(len(word), len("(empty word)"))  # it is called by a shortest one
    assert len(set(ends.values())) == len(ends)


def test_json_and_back():
    value = PARITY.to_dict()
    assert Automaton.from_dict(json.loads(json.dumps(value))) == PARITY
    assert list(value) == ["alphabet", "states", "initial", "accepting", "transitions"]


GOOD = PARITY.to_dict()


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: Automaton.from_dict([]),
        lambda: Automaton.from_dict({}),
        lambda: Automaton.from_dict(GOOD | {"colour": 1}),
        lambda: Automaton.from_dict(GOOD | {"alphabet": "01"}),
        lambda: Automaton.from_dict(GOOD | {"alphabet": ["0", "0"]}),
        lambda: Automaton.from_dict(GOOD | {"alphabet": []}),
        lambda: Automaton.from_dict(GOOD | {"states": ["even"]}),
        lambda: Automaton.from_dict(GOOD | {"initial": "neither"}),
        lambda: Automaton.from_dict(GOOD | {"initial": True}),
        lambda: Automaton.from_dict(GOOD | {"initial": 2}),
        lambda: Automaton.from_dict(GOOD | {"accepting": [-1]}),
        lambda: Automaton.from_dict(GOOD | {"accepting": 0}),
        lambda: Automaton.from_dict(GOOD | {"transitions": [[0, 1]]}),
        lambda: Automaton.from_dict(GOOD | {"transitions": [[0, 1], [1]]}),
        lambda: Automaton.from_dict(GOOD | {"transitions": [[0, 1], [1, 2]]}),
        lambda: Automaton.from_dict(GOOD | {"transitions": [[0, 1], [1, 0.0]]}),
        lambda: Automaton.from_dict(GOOD | {"transitions": None}),
        lambda: from_regex("a("),
        lambda: from_regex("*"),
        lambda: from_regex(""),
        lambda: from_regex("abc", "ab"),
        lambda: from_regex("a{2,1}"),
        lambda: from_regex("a{1,100000}"),
    ],
)
def test_mistakes_are_one_clear_line(mistake):
    pytest.importorskip("automata")
    with pytest.raises(UsageError) as e:
        mistake()
    assert str(e.value).endswith(".") and "\n" not in str(e.value)


def test_expressions_at_random_end_in_an_automaton_or_in_one_line():
    pytest.importorskip("automata")
    rng, made = random.Random(0), 0
    for _ in range(1000):
        regex = "".join(rng.choice("ab()|*+?{}1,2&^.[] \\") for _ in range(rng.randint(0, 10)))
        try:
            automaton = from_regex(regex)
        except UsageError as e:
            assert "\n" not in str(e)
        else:
            made += automaton == automaton.minimal()
    assert made > 50
