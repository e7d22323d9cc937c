"""States whose futures agree may share a situation: automata of the last symbols, and others with equal rows."""

import copy
import itertools
import random
from dataclasses import replace

import pytest
import torch
from automaton_cases import PARITY
from commands import run
from libraries import assert_agrees_with_library

from deltaproduct.tasks.automata import Automaton
from deltaproduct.tasks.regex_automaton import from_regex
from deltaproduct.theory.certificate import certificates, certify
from deltaproduct.theory.compiler import compile_automaton
from deltaproduct.theory.exploration import explore
from deltaproduct.theory.verification import load


def last_symbols(k: int, s: int) -> Automaton:
    """What the last k of s symbols were, beginning as if after the first symbol only: sᵏ states, in one of each other's
    futures from the k-th symbol on."""
    words = list(itertools.product(range(s), repeat=k))
    number = {word: i for i, word in enumerate(words)}
    rows = tuple(tuple(number[*word[1:], symbol] for symbol in range(s)) for word in words)
    return Automaton(tuple("abc"[:s]), tuple("".join("abc"[i] for i in word) for word in words), 0, (0,), rows)


def random_language(rng: random.Random) -> Automaton:
    """The minimal automaton of a language that depends on the last k symbols: which words of these are in it is
    drawn."""
    s = rng.randint(2, 3)
    k = rng.randint(1, 4)
    automaton = last_symbols(k, s)
    accepting = tuple(q for q in range(s**k) if rng.random() < 0.5) or (0,)
    return replace(automaton, accepting=accepting).minimal()


def with_equal_rows(rng: random.Random) -> Automaton:
    """A random automaton of up to six states, of which every one has its own row or that of a state before it."""
    n, s = rng.randint(2, 6), rng.randint(1, 4)
    rows = [tuple(rng.randrange(n) for _ in range(s)) for _ in range(n)]
    for q in range(1, n):
        if q == 1 or rng.random() < 0.6:  # at least one pair
            rows[q] = rows[rng.randrange(q)]
    order = rng.sample(range(n), n)
    names = tuple(map(str, range(n)))
    return Automaton(tuple("abcd"[:s]), names, rng.randrange(n), (0,), tuple(rows[i] for i in order))


def assert_certain(automaton: Automaton, words: int, length: int, seed: int) -> None:
    """Compiled it agrees with automata-lib, and every label of every case is right in float32."""
    assert_agrees_with_library(automaton, words, length, seed)
    model = compile_automaton(automaton).model
    found = explore(model, automaton)
    reached = automaton.reachable()
    assert found.complete and found.wrong == 0 and found.pairs == len(reached.states) * len(reached.alphabet)
    certificate = certify(model, automaton, found)
    assert certificate.complete and certificate.wrong == 0
    assert certificate.guaranteed is None or certificate.guaranteed > 1000


LAST = [(k, s) for s in (2, 3) for k in (1, 2, 3, 4)]


@pytest.mark.parametrize(("k", "s"), LAST)
def test_the_last_symbols(k, s):
    automaton = last_symbols(k, s)
    assert_certain(automaton, 4, 200, seed=0)
    # One level for each of the k symbols, by the congruences of the last k − 1, k − 2, … of them.
    assert compile_automaton(automaton).model.config.num_hidden_layers == 2 * k - 1


def test_one_situation_goes_with_every_state():
    """[[0, 1], [0, 1]]: nothing is ever held, and the label is the last symbol."""
    automaton = last_symbols(1, 2)
    found = explore(compile_automaton(automaton).model, automaton)
    assert found.situations == 1 and found.state_of.tolist() == [0, 1]
    assert sorted(zip(found.before.tolist(), found.symbols.tolist(), found.after.tolist())) == [
        (0, 0, 0), (0, 1, 1), (1, 0, 0), (1, 1, 1)]  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_random_languages_of_the_last_symbols(seed):
    assert_certain(random_language(random.Random(seed)), 4, 200, seed)


@pytest.mark.parametrize("seed", range(8))
def test_random_automata_with_equal_rows(seed):
    assert_certain(with_equal_rows(random.Random(seed)), 4, 200, seed)


@pytest.mark.slow("exhaustive")
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("draw", [random_language, with_equal_rows])
def test_two_hundred_that_share_situations(draw):
    for seed in range(1000, 1200):
        assert_certain(draw(random.Random(seed)), 20, 1000, seed)


def test_a_situation_that_is_shared_for_no_reason_is_found_wrong():
    """A model that holds nothing stands in one situation for both states of the parity, whose futures differ."""
    compiled = compile_automaton(last_symbols(1, 2))
    assert certificates(compiled.model, compiled.automaton)[0].wrong == 0
    parity = replace(PARITY, alphabet=("a", "b"))
    found = explore(compiled.model, parity)
    # The label is the last symbol: wrong in the odd state, after both symbols.
    assert found.complete and found.situations == 1 and found.pairs == 4 and found.wrong == 2
    certificate = certify(compiled.model, parity, found)
    assert certificate.wrong == 4 and certificate.guaranteed == 0  # found twice


def test_labels_are_checked_in_every_state_that_shares_a_situation():
    """Two labels exchanged: the last of two symbols decides which of four, and every try that leads to these is
    wrong, from whatever state."""
    automaton = last_symbols(2, 2)
    model = copy.deepcopy(compile_automaton(automaton).model)
    with torch.no_grad():
        model.head.weight[:] = model.head.weight[[1, 0, 2, 3]]
    found = explore(model, automaton)
    assert found.situations == 2 and found.pairs == 8 and found.wrong == 4
    assert certify(model, automaton, found).wrong == 8


@pytest.mark.parametrize("regex", ["(a|b)*a(a|b)", "(0|1)*1", "(a|b|c)*c"])
def test_expressions_of_the_last_symbols_on_the_command_line(capsys, tmp_path, regex):
    pytest.importorskip("automata")
    status, out, err = run(capsys, "compile", "--regex", regex, "--out", tmp_path / "x")
    assert status == 0, err
    assert "no label was wrong" in out and "float32: guaranteed to every length" in out
    assert load(tmp_path / "x").automaton == from_regex(regex)


def test_a_learned_one_on_the_command_line(capsys, tmp_path):
    pytest.importorskip("aalpy")
    compile_automaton(last_symbols(1, 2)).save(tmp_path / "run")
    status, out, err = run(capsys, "compile", "--from-run", tmp_path / "run", "--out", tmp_path / "x")
    assert status == 0, err
    assert "2 states, agreement 1.0000" in out and "guaranteed to every length" in out
