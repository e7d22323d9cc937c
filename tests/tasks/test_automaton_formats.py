"""Automata as people write them, in JSON and DOT: what can mean one thing only is taken, the rest refused in a line
with an example."""

import json

import pytest
from commands import run

from deltaproduct.errors import UsageError
from deltaproduct.tasks import get_task
from deltaproduct.tasks.automata import Automaton
from deltaproduct.tasks.automaton_format import JSON_EXAMPLE
from deltaproduct.tasks.dot import DOT_EXAMPLE, automaton_from_dot
from deltaproduct.theory.verification import load

PARITY = Automaton(("0", "1"), ("even", "odd"), 0, (0,), ((0, 1), (1, 0)))
NAMED = json.loads(JSON_EXAMPLE)
ROWS = [["even", "odd"], ["odd", "even"]]
LIST = [["even", "0", "even"], ["even", "1", "odd"], ["odd", "0", "odd"], ["odd", "1", "even"]]


def without(*names):
    return {name: value for name, value in NAMED.items() if name not in names}


SAME = {
    "the example": NAMED,
    "numbers": PARITY.to_dict(),
    "names in a table": NAMED | {"transitions": ROWS},
    "names and numbers": NAMED | {"transitions": [[0, "odd"], [1, "even"]], "accepting": [0]},
    "a name to begin with": PARITY.to_dict() | {"initial": "even"},
    "states from the transitions": without("states"),
    "symbols from the transitions": without("alphabet"),
    "both from the transitions": without("states", "alphabet"),
    "a list": NAMED | {"transitions": LIST},
    "a list, and nothing else": without("states", "alphabet") | {"transitions": LIST},
    "numbers as symbols": NAMED | {"alphabet": [0, 1]},
    "a state is accepting once": NAMED | {"accepting": ["even", "even", 0]},
    "automata-lib's names": without("alphabet", "initial", "accepting")
    | {"input_symbols": ["0", "1"], "initial_state": "even", "final_states": ["even"]},
    "start and final": without("initial", "accepting") | {"start": "even", "final": ["even"]},
}


@pytest.mark.parametrize("name", SAME)
def test_ways_to_write_the_parity(name):
    assert Automaton.from_dict(SAME[name]) == PARITY


def test_numbers_as_states():
    value = PARITY.to_dict() | {"states": [0, 1], "initial": 1}
    assert Automaton.from_dict(value) == Automaton(("0", "1"), ("0", "1"), 1, (0,), ((0, 1), (1, 0)))
    # Where names are digits in another order, a string is a name and a number a number.
    turned = PARITY.to_dict() | {"states": ["1", "0"]}
    assert Automaton.from_dict(turned | {"initial": "1"}).initial == 0 == Automaton.from_dict(turned).initial
    assert Automaton.from_dict(turned | {"initial": 1}).initial == 1


def test_a_table_of_three_symbols_is_no_list():
    names = ["0", "1", "2"]
    value = {"alphabet": names, "states": names, "initial": "0", "accepting": ["1"], "transitions": [names] * 3}
    assert Automaton.from_dict(value).transitions == ((0, 1, 2),) * 3


def test_missing_transitions_lead_to_a_sink():
    value = {"initial": "s", "accepting": ["t"], "transitions": {"s": {"a": "t"}, "t": {"b": "sink"}}}
    found = Automaton.from_dict(value)
    assert found.alphabet == ("a", "b") and found.states == ("s", "t", "sink", "sink1")
    assert found.transitions == ((1, 3), (3, 2), (3, 3), (3, 3)) and found.accepting == (1,)
    # A state that is named elsewhere is one, and all are complete.
    loop = {"initial": "s", "accepting": [], "transitions": {"s": {"a": "s"}}}
    assert Automaton.from_dict(loop) == Automaton(("a",), ("s",), 0, (), ((0,),))


BAD = {
    "no automaton": ([], "is a JSON object"),
    "nothing": ({}, "lacks alphabet and states and initial and accepting and transitions"),
    "an unknown field": (NAMED | {"colour": 1}, 'has no "colour"'),
    "a field twice": (NAMED | {"start": "even"}, "has its initial twice"),
    "an unknown state": (NAMED | {"initial": "neither"}, 'initial names "neither", which is none of its states'),
    "no state": (NAMED | {"initial": None}, "initial must be a state's name or number"),
    "a truth value": (PARITY.to_dict() | {"initial": True}, "initial must be a state's name or number, not true"),
    "an unknown accepting state": (NAMED | {"accepting": ["neither"]}, 'accepting names "neither"'),
    "one accepting state": (NAMED | {"accepting": "even"}, 'must be a list of states, not "even"'),
    "an unknown next state": (NAMED | {"transitions": [["even", "off"], ["odd", "even"]]}, 'transitions names "off"'),
    "another's transitions": (NAMED | {"transitions": {"off": {"0": "even"}}}, 'transitions from "off"'),
    "another symbol": (NAMED | {"transitions": {"even": {"2": "even"}}}, 'by "2", which is not in the alphabet'),
    "a list in it": (NAMED | {"transitions": {"even": ["even"]}}, 'from "even" must be {symbol: state}'),
    "a list that says two things": (NAMED | {"transitions": [*LIST, ["odd", "1", "odd"]]}, "is not deterministic"),
    "no list": (NAMED | {"transitions": "0->1"}, "must be a list of lists of states"),
    "other numbers as states": (PARITY.to_dict() | {"states": [1, 2]}, "must be 0, 1, 2"),
    "an alphabet in one piece": (NAMED | {"alphabet": "01"}, 'alphabet must be a list of names, not "01"'),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_in_json_come_with_an_example(name):
    value, word = BAD[name]
    with pytest.raises(UsageError) as e:
        Automaton.from_dict(value)
    assert word in str(e.value) and str(e.value).endswith(f"For example: {JSON_EXAMPLE}.") and "\n" not in str(e.value)


EDGES = 'even -> even [label="0"]; even -> odd -> even [label="1"]; odd -> odd [label="0"]'
DRAWN = {
    "the example": DOT_EXAMPLE,
    "an attribute": f"digraph {{ even [initial=true, shape=doublecircle]; {EDGES} }}",
    "another attribute": f'digraph {{ even [start="True" peripheries=2]; {EDGES} }}',
    "Moore": f'digraph {{ even [label="even|1", shape=record, style=rounded]; odd [label="odd|0", shape=record]; '
    f'{EDGES}; __start0 [label="", shape=none]; __start0 -> even [label=""] }}',
    "Moore in words": f'digraph {{ node [shape=Mrecord]; even [label="q0 | True" initial=true]; '
    f'odd [label="q1 | False"]; {EDGES} }}',
    "HTML is only how it looks": f"digraph {{ even [label=<<b>even</b>>, initial=true, peripheries=2]; {EDGES} }}",
}


@pytest.mark.parametrize("name", DRAWN)
def test_ways_to_draw_the_parity(name):
    pytest.importorskip("pydot")
    assert automaton_from_dot(DRAWN[name]) == PARITY


@pytest.mark.parametrize("name", ["start", "init", "Initial"])
def test_a_state_that_is_called_so_is_the_initial_one(name):
    pytest.importorskip("pydot")
    found = automaton_from_dot(
        f'digraph {{ b -> {name} [label="x"]; {name} -> b [label="x"]; b [shape=doublecircle] }}'
    )
    assert found == Automaton(("x",), ("b", name), 1, (0,), ((1,), (0,)))
    # An edge without a label says more.
    marked = automaton_from_dot(f'digraph {{ p [shape=point]; p -> b; b -> {name} -> b [label="x"] }}')
    assert marked.states[marked.initial] == "b"


def test_the_only_state_is_the_initial_one():
    pytest.importorskip("pydot")
    assert automaton_from_dot('digraph { a -> a [label="x"] }') == Automaton(("x",), ("a",), 0, (), ((0,),))


NOT_DRAWN = {
    "no start": (f"digraph {{ {EDGES} }}", "There is no initial state", True),
    "two that are called so": ('digraph { start -> init -> start [label="x"] }', "2 initial states", False),
    "two marks": (f"digraph {{ even [initial=true]; odd [start=true]; {EDGES} }}", "2 initial states", False),
    "no label": ("digraph { p [shape=point]; p -> a; a -> b }", "no symbols", True),
    "no directions": ("graph { a -- b }", "digraph", True),
    "no DOT": ("no dot at all", "not DOT", True),
    "other outputs": ('digraph { a [label="a|x", shape=record, initial=true]; a -> a [label="0"] }', "output", True),
    "some records": (f'digraph {{ even [label="even|1", shape=record, initial=true]; {EDGES} }}', "output", True),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_DRAWN)
def test_mistakes_in_dot_come_with_an_example(name):
    pytest.importorskip("pydot")
    text, word, example = NOT_DRAWN[name]
    with pytest.raises(UsageError) as e:
        automaton_from_dot(text)
    assert word in str(e.value) and "\n" not in str(e.value)
    assert str(e.value).endswith(f"For example: {DOT_EXAMPLE}.") == example


def test_files_and_help(capsys, tmp_path, monkeypatch):
    """A file is read by what is in it; and help shows what may be."""
    pytest.importorskip("pydot")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "named.json").write_text(JSON_EXAMPLE)
    (tmp_path / "drawn.txt").write_text("  " + DOT_EXAMPLE)
    (tmp_path / "DRAWN.DOT").write_text(DOT_EXAMPLE)
    for i, name in enumerate(["named.json", "drawn.txt", "DRAWN.DOT"]):
        assert get_task(f"automaton:{name}").automaton == PARITY
        status, _, err = run(capsys, "compile", "--automaton", name, "--out", f"out{i}")
        assert status == 0, err
        assert load(f"out{i}").automaton == PARITY
    (tmp_path / "bad.json").write_text(json.dumps(NAMED | {"initial": "neither"}))
    for command in (["compile", "--automaton", "bad.json", "--out", "no"], ["tasks", "show", "automaton:bad.json"]):
        status, _, err = run(capsys, *command)
        assert status == 2 and JSON_EXAMPLE in err and err.count("\n") == 1
    assert not (tmp_path / "no").exists()
    status, out, _ = run(capsys, "compile", "--help")
    text = "".join(line.strip("│ ") for line in out.splitlines())
    assert status == 0
    for example in (JSON_EXAMPLE, DOT_EXAMPLE):
        assert example.replace(" ", "") in text.replace(" ", "")
