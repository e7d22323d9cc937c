"""Automata as tasks: labels against automata-lib and Python's `re`, the words that are drawn, names and files."""

import json
import re

import pytest
import torch

from deltaproduct.errors import UsageError
from deltaproduct.tasks import get_task
from deltaproduct.tasks.automata import Automaton
from deltaproduct.tasks.automaton_task import automaton_task, lively_symbols, random_automaton, run_automaton
from deltaproduct.tasks.dot import automaton_to_dot

REGEXES = ["(ab)*", "(a|b)*abb", "(b*ab*a)*b*", "a{2,4}b?", "((a|b)(a|b)(a|b))*", "a*b*c*"]
TRAP = Automaton(("a", "b"), ("start", "on", "dead"), 0, (1,), ((1, 2), (1, 2), (2, 2)))  # a b leads nowhere


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def library(automaton: Automaton):
    dfa = pytest.importorskip("automata.fa.dfa")
    return dfa.DFA(
        states=set(automaton.states),
        input_symbols=set(automaton.alphabet),
        transitions={
            name: {a: automaton.states[to] for a, to in zip(automaton.alphabet, row, strict=True)}
            for name, row in zip(automaton.states, automaton.transitions, strict=True)
        },
        initial_state=automaton.states[automaton.initial],
        final_states={automaton.states[q] for q in automaton.accepting},
    )


# --------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("name", ["random_automaton:6x3:0", "random_automaton:1000x2:5", "random_automaton:2x1:7",
                                  "random_automaton:30x26:1", "regex:(ab)*", "regex:a*b*c*"])  # fmt: skip
def test_states_are_the_librarys(name):
    pytest.importorskip("automata")
    task = get_task(name)
    dfa = library(task.automaton)
    tokens, labels, mask = task.sample(20, 60, generator=seeded())
    assert mask[:, 1:].all() and not mask[:, 0].any() and (tokens[:, 0] == task.bos_id).all()
    for word, answer in zip(tokens[:, 1:].tolist(), labels[:, 1:].tolist(), strict=True):
        states = list(dfa.read_input_stepwise([task.token_name(i) for i in word], ignore_rejection=True))
        assert [task.label_name(i) for i in answer] == states[1:]


@pytest.mark.parametrize("regex", REGEXES)
def test_acceptance_is_pythons(regex):
    pytest.importorskip("automata")
    task = get_task(f"regex_accept:{regex}")
    tokens, labels, _ = task.sample(30, 40, generator=seeded(1))
    both = set()
    for word, answer in zip(tokens[:, 1:].tolist(), labels[:, 1:].tolist(), strict=True):
        text = "".join(task.token_name(i) for i in word)
        wanted = [bool(re.fullmatch(regex, text[:t])) for t in range(1, 41)]
        assert [task.label_name(i) for i in answer] == [("rejected", "accepted")[w] for w in wanted]
        both |= set(wanted)
    assert both == {False, True}
    states = get_task(f"regex:{regex}")
    assert torch.equal(states.sample(30, 40, generator=seeded(1))[0], tokens)  # the same words for both kinds of labels


def test_the_docstrings_example():
    pytest.importorskip("automata")
    task, accept = get_task("regex:(ab)*"), get_task("regex_accept:(ab)*")
    states = run_automaton(task.automaton, torch.tensor([[0, 1, 0, 0]]))[0].tolist()
    assert [task.label_name(q) for q in states] == ["q1", "q0", "q1", "q2"]
    assert [q in task.automaton.accepting for q in states] == [False, True, False, False]
    assert [accept.label_name(i) for i in (0, 1)] == ["rejected", "accepted"]
    assert (task.vocab_size, task.num_labels, task.bos_id, accept.num_labels) == (3, 3, 2, 2)


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (7, 33)])
def test_runs_are_the_trace(shape):
    automaton = random_automaton(9, 4, seed=3)
    words = torch.randint(4, shape, generator=seeded())
    before = words.clone()
    states = run_automaton(automaton, words)
    assert states.dtype == torch.int64 and states.shape == shape and torch.equal(words, before)
    assert states.tolist() == [automaton.trace(word) for word in words.tolist()]


# ---------------------------------------------------------------------------------------------------------------- words


def test_half_of_the_words_stay_where_something_can_still_happen():
    task = automaton_task("trap", "a trap", TRAP)
    tokens, labels, _ = task.sample(4000, 30, generator=seeded())
    alive = (labels[:, 1:] != 2).all(dim=1)
    # The lively ones, and of the uniform ones 2^-30; six standard deviations of a coin thrown 4,000 times are 190.
    assert abs(int(alive.sum()) - 2000) < 190
    dead = tokens[~alive][:, 1:]
    share = dead[:, 10:].double().mean()  # uniform to its end, also in the trap
    assert abs(float(share) - 0.5) < 6 * 0.5 / dead[:, 10:].numel() ** 0.5


def test_words_are_uniform_where_nothing_is_lost():
    task = get_task("random_automaton:6x3:0")  # from every state all others can be reached
    order, count = lively_symbols(task.automaton)
    assert count.tolist() == [3] * 6 and sorted(order[0].tolist()) == [0, 1, 2]
    tokens, _, _ = task.sample(500, 60, generator=seeded())
    share = tokens[:, 1:].flatten().bincount().double() / 30_000
    assert len(share) == 3 and ((share - 1 / 3).abs() < 6 * (2 / 9 / 30_000) ** 0.5).all()


def test_lively_symbols_by_hand():
    order, count = lively_symbols(TRAP)
    assert count.tolist() == [1, 1, 2] and order[:2, 0].tolist() == [0, 0]
    #  0 → 1 → 2 → 1 (two states in reach), 0 → 3 → 3 (one): from 0, symbol b leads to 1, with more of them
    ring = Automaton(("a", "b"), ("0", "1", "2", "3"), 0, (1,), ((3, 1), (2, 2), (1, 1), (3, 3)))
    order, count = lively_symbols(ring)
    assert count.tolist() == [1, 2, 2, 2] and order[0, 0] == 1


@pytest.mark.parametrize("name", ["random_automaton:6x3:0", "random_automaton_accept:6x3:0", "random_automaton:5x1:2",
                                  "regex:(ab)*", "regex_accept:(ab)*", "regex:a{2,4}b?"])  # fmt: skip
def test_chance_is_the_best_blind_guess(name):
    pytest.importorskip("automata")
    task = get_task(name)
    _, labels, _ = task.sample(1500, 600, generator=seeded(2))
    best = 0.0
    for column in labels[:, 501:].unbind(1):
        best += float(column.bincount().max()) / 1500 / 100
    # The largest of a few frequencies, each off by at most .5/sqrt(1500) = .013, is a little too large on average.
    assert task.chance - 0.02 < best < task.chance + 0.04


def test_the_generator_is_the_only_source_of_randomness():
    task = automaton_task("trap", "a trap", TRAP)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = task.sample(6, 50, generator=seeded(7))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, task.sample(6, 50, generator=seeded(7)), strict=True))
    assert not torch.equal(first[0], task.sample(6, 50, generator=seeded(8))[0])


# ------------------------------------------------------------------------------------------------------ random automata


@pytest.mark.parametrize(("states", "symbols"), [(1, 1), (2, 1), (6, 3), (40, 1), (300, 2), (10_000, 2)])
def test_random_automata_have_all_their_states(states, symbols):
    for seed in range(3):
        automaton = random_automaton(states, symbols, seed)
        assert len(automaton.states) == states and len(automaton.alphabet) == symbols
        assert automaton.reachable() == automaton
        assert 0 < len(automaton.accepting) < max(2, states)
        assert automaton == random_automaton(states, symbols, seed)
    if states > 2:
        assert random_automaton(states, symbols, 0) != random_automaton(states, symbols, 1)


def test_random_transitions_lead_everywhere():
    """By chance: of 26 symbols of state 0 in 500 automata, 4 or fewer each time belong to the tree."""
    counts = [0] * 5
    for seed in range(500):
        for to in random_automaton(5, 26, seed).transitions[4]:  # the last state has no tree transition
            counts[to] += 1
    expected = 500 * 26 / 5
    assert sum((c - expected) ** 2 / expected for c in counts) < 4 + 6 * 8**0.5


# ------------------------------------------------------------------------------------------------------ names and files


def test_automata_from_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lost = Automaton(("a", "b"), ("start", "on", "dead", "lost"), 0, (1,), (*TRAP.transitions, (0, 0)))
    (tmp_path / "trap.json").write_text(json.dumps(lost.to_dict()))
    assert get_task("automaton:trap.json").automaton == TRAP  # without the state that no word leads to
    accept = get_task(f"automaton_accept:{tmp_path}/trap.json")
    assert accept.num_labels == 2 and accept.label_name(1) == "accepted" and accept.automaton == TRAP
    (tmp_path / "trap.json").write_text(json.dumps(random_automaton(5, 2, 0).to_dict()))
    assert get_task("automaton:trap.json").automaton == random_automaton(5, 2, 0)  # a changed file is read again
    pytest.importorskip("pydot")
    (tmp_path / "trap.dot").write_text(automaton_to_dot(TRAP))
    assert get_task("automaton:trap.dot").automaton == TRAP


BAD = {
    "automaton:nothing.json": "cannot be read",
    "automaton:bad.json": "is not valid JSON",
    "automaton:list.json": "An automaton is a JSON object",
    "automaton:one.json": "one state only",
    "automaton_accept:none.json": "no word would be accepted",
    "regex:(ab": "is no regular expression",
    "regex_accept:(a|b)*": "all words would be accepted",
    "regex:(a|b)*": "one state only",
    "regex:": "unknown task",
    "Regex:ab": "upper and lower case matter",
    "random_automaton:0x3:0": "from 1 to 10,000 states, not 0",
    "random_automaton:10001x3:0": "from 1 to 10,000 states",
    "random_automaton:6x27:0": "from 1 to 26 symbols, not 27",
    "random_automaton:1x3:0": "one state only",
    "random_automaton:6x3": "unknown task",
    "random_automaton:6x3:-1": "unknown task",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_names(name, tmp_path, monkeypatch):
    pytest.importorskip("automata")
    monkeypatch.chdir(tmp_path)
    one = {"alphabet": ["a"], "states": ["q"], "initial": 0, "accepting": [0], "transitions": [[0]]}
    none = TRAP.to_dict() | {"accepting": []}
    for file, text in {"bad": "{", "list": "[]", "one": json.dumps(one), "none": json.dumps(none)}.items():
        (tmp_path / f"{file}.json").write_text(text)
    with pytest.raises(UsageError) as error:
        get_task(name)
    assert BAD[name] in str(error.value) and "\n" not in str(error.value)
