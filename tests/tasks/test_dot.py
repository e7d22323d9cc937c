"""Automata as DOT (tasks/dot.py): there and back, the conventions found in the wild, and mistakes."""

import random

import pytest

from deltaproduct.errors import UsageError
from deltaproduct.tasks.automata import Automaton
from deltaproduct.tasks.dot import automaton_from_dot, automaton_to_dot

pytest.importorskip("pydot")
PARITY = Automaton(("0", "1"), ("even", "odd"), 0, (0,), ((0, 1), (1, 0)))


def test_there_and_back():
    text = automaton_to_dot(PARITY)
    assert automaton_from_dot(text) == PARITY
    assert '"even" [shape=doublecircle];' in text and '"even" -> "odd" [label="1"];' in text
    merged = Automaton(("b", "a", "c"), ("x", "y"), 1, (), ((1, 0, 1), (0, 0, 0)))
    assert '"x" -> "y" [label="b, c"]' in automaton_to_dot(merged)
    assert automaton_from_dot(automaton_to_dot(merged)) == merged  # the symbols in their order


def test_any_names_survive():
    rng = random.Random(0)

    def names(count):
        found = set()
        while len(found) < count:
            found.add("".join(rng.choice("ab\",\\\n\r\t ->;:/#{}[]=<&é…'") for _ in range(rng.randint(0, 5))))
        return tuple(sorted(found, key=lambda _: rng.random()))

    for _ in range(60):
        n, s = rng.randint(1, 4), rng.randint(1, 3)
        rows = tuple(tuple(rng.randrange(n) for _ in range(s)) for _ in range(n))
        accepting = tuple(q for q in range(n) if rng.random() < 0.4)
        automaton = Automaton(names(s), names(n), rng.randrange(n), accepting, rows)
        assert automaton_from_dot(automaton_to_dot(automaton)) == automaton
    known = Automaton(("node", "edge"), ("graph", "node", "__start0", "init", "sink"), 2, (0,), ((0, 1),) * 5)
    assert automaton_from_dot(automaton_to_dot(known)) == known


WRITTEN = {
    "defaults": """digraph finite_state_machine {
        rankdir=LR; size="8,5"
        node [shape = doublecircle]; even;
        node [shape = circle];  // from here on
        secret [style=invis, shape=point]; secret -> even
        even -> odd [label = "1"]; odd -> even [label = 1];
        even -> even [label = "0"]; odd -> odd [label = "0"]; odd [label = <<b>odd</b>>];
    }""",
    "aalpy": """digraph learned {
        even [label="even", shape=doublecircle]; odd [label="odd"];
        even -> even [label="0"]; even -> odd [label="1"]; odd -> odd [label="0"]; odd -> even [label="1"];
        __start0 [label="", shape=none]; __start0 -> even [label=""];
    }""",
    "nameless": """digraph { "" [shape=none]; "" -> even; even [peripheries=2]
        even -> even [label="0"]; even -> odd -> even [label="1"]; odd -> odd [label="0"] }""",
    "init": 'digraph { init -> even; even [shape=doublecircle]; even->odd:n->even [label=" 1 "]; odd->odd '
    "[label=0]; even:s -> even [label=0]; }",
    "clusters": """strict digraph { p [shape=point]; p -> even [label="any"]; even [shape=doublecircle]
        edge [label="0"]; subgraph cluster_a { even -> even; odd -> odd }
        { edge [label="1"]; even -> odd; odd -> even } }""",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_the_fields_ways_of_writing(name):
    assert automaton_from_dot(WRITTEN[name]) == PARITY


def test_labels_hold_symbols_between_commas_and_line_breaks():
    text = r'digraph { s [shape=point]; s -> a; a -> a [label="x,y , z\nu"]; a -> a [label="\"p, q\", \"\\\"\""] }'
    assert automaton_from_dot(text).alphabet == ('"', "p, q", "u", "x", "y", "z")


def test_missing_transitions_lead_to_a_sink_and_no_more_than_that():
    text = 'digraph { p [shape=point]; p -> a; a -> b [label="x"]; b -> a [label="y"]; b [shape=doublecircle] %s }'
    found = automaton_from_dot(text % "")
    assert found == Automaton(("x", "y"), ("a", "b", "sink"), 0, (1,), ((1, 2), (2, 0), (2, 2)))
    found = automaton_from_dot(text % '; sink -> sink [label="x, y"]')
    assert found.states == ("a", "b", "sink", "sink1") and found.transitions[2] == (2, 2)
    complete = automaton_from_dot(text % '; a -> a [label="y"]; b -> b [label="x"]')
    assert complete.states == ("a", "b")
    wide = automaton_from_dot(text.replace("digraph {", 'digraph { alphabet="z, y, x";') % "")
    assert wide.alphabet == ("z", "y", "x") and wide.transitions == ((2, 2, 1), (2, 0, 2), (2, 2, 2))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "not DOT"),
        ("no dot at all", "not DOT"),
        ("digraph { a -> ", "line:1, col:13"),
        ("digraph {" + "{" * 5000, "not DOT"),
        ("graph { a -- b }", "directed"),
        ("digraph { a -> a } digraph { b -> b }", "2 graphs"),
        ('digraph { a -> b [label="x"] }', "no initial state"),
        ("digraph { }", "no initial state"),
        ('digraph { p [shape=point]; p -> a; p -> b; a -> b [label="x"] }', "2 initial states: 'a' and 'b'"),
        ('digraph { p [shape=point]; p -> a; a -> p [label="x"] }', "'p'"),
        ('digraph { p [shape=point]; p -> a; a -> b [label="x"]; a -> a [label="x"] }', "not deterministic"),
        ("digraph { p [shape=point]; p -> a; a -> b }", "no symbols"),
        ("digraph { p [shape=point]; p -> a }", "at least one symbol"),
        ('digraph { p [shape=point]; p -> a; a [shape=hexagon]; a -> a [label="x"] }', "hexagon"),
        ('digraph { p [shape=point]; p -> {a b}; a -> b [label="x"] }', "group"),
        ("digraph { p [shape=point]; p -> a; a -> a [label=<x>] }", "HTML"),
        ('digraph { p [shape=point]; p -> a; alphabet="x"; a -> a [label="y"] }', "'y'"),
        (r'digraph { p [shape=point]; p -> a; a -> a [label="\"\\q\""] }', "JSON"),
    ],
)
def test_mistakes_are_one_clear_line_and_nothing_is_printed(text, word, capsys):
    with pytest.raises(UsageError) as e:
        automaton_from_dot(text)
    assert word in str(e.value) and "\n" not in str(e.value) and str(e.value).endswith(".")
    assert capsys.readouterr() == ("", "")


def test_texts_at_random_end_in_an_automaton_or_in_one_line(capsys):
    rng, made = random.Random(0), 0
    pieces = ["a", "b", "->", "->", "[label=x]", "[shape=point]", ";", "{", "}", '"', "node", "subgraph", "[", ",", "<"]
    for _ in range(150):
        body = " ".join(rng.choice(pieces) for _ in range(rng.randint(0, 8)))
        try:
            automaton_from_dot("digraph { p [shape=point]; p -> a; a -> a [label=x]; " + body + " }")
            made += 1
        except UsageError as e:
            assert "\n" not in str(e)
    assert 10 < made < 140 and capsys.readouterr() == ("", "")
