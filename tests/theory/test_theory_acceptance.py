"""What compiled models promise, at full size: beside an independent library, over all that was asked for.

The sample in `make test` is small; `make test-all` (or `-m slow`) runs the whole.
"""

import random
import time
from dataclasses import replace

import pytest
import torch
from automaton_cases import library, random_automaton, wrong_labels
from compiled_sizes import most_steps
from libraries import assert_agrees_with_library

from deltaproduct.errors import UsageError
from deltaproduct.tasks.regex_automaton import from_regex
from deltaproduct.tasks.regular import modular_arithmetic
from deltaproduct.theory.certificate import certificates
from deltaproduct.theory.compiler import Compiled, compile_automaton, compile_group
from deltaproduct.theory.verification import draw_words, verify

# Fifty regular expressions over a and b, those that the project promises by name first
REGEXES = [
    "(ab)*", "(b*ab*a)*b*", "((a|b)(a|b)a)*((a|b)(a|b)?)?",
    "a*", "b*", "a*b*", "a*b*a*", "(a|b)*", "(a|b)*a", "(a|b)*abb", "(a|b)*abb(a|b)*", "a(a|b)*b", "(aa)*", "(aaa)*",
    "(aa|bb)*", "(ab|ba)*", "(a|b)(a|b)", "((a|b)(a|b))*", "((a|b)(a|b)(a|b))*", "((a|b)(a|b)(a|b)(a|b))*",
    "a(ba)*", "(ab|aab)*", "(a|ba)*", "(a|ba)*b?", "b*(ab*ab*)*", "(b*ab*ab*a)*b*", "(b|ab*a)*", "(a|bb*ab)*",
    "(a|b)*a(a|b)", "(a|b)*a(a|b)(a|b)", "a{2,4}b?", "a{3}", "(ab){2,3}", "a+b+", "(a+b)+", "(ab+)*", "a?b?a?b?",
    "(a|b)*aa(a|b)*", "(a|b)*(aa|bb)(a|b)*", "(b|ab)*(a|b)?", "(aab)*", "(aba)*", "(abab)*", "(aabb)*", "(abb|ba)*",
    "a(a|b)*a|b(a|b)*b|a|b", "(a(a|b))*", "((a|b)a)*", "(a|b)*ab(a|b)*ab", "(bba*(ab)*)*",
]  # fmt: skip


def accepted_prefixes(dfa, word):
    """Whether each non-empty prefix is accepted, by automata-lib."""
    states = list(dfa.read_input_stepwise(word, ignore_rejection=True))
    return [state in dfa.final_states for state in states[1:]]


def assert_regex_is_the_librarys(regex: str, words: int, length: int) -> Compiled:
    """The library's own automaton of the expression, not ours, says what is accepted."""
    dfa, nfa = pytest.importorskip("automata.fa.dfa"), pytest.importorskip("automata.fa.nfa")
    theirs = dfa.DFA.from_nfa(nfa.NFA.from_regex(regex, input_symbols={"a", "b"})).to_complete()
    automaton = from_regex(regex, "ab")
    compiled, n = compile_automaton(automaton), len(automaton.states)
    config = compiled.model.config
    assert config.num_hidden_layers <= max(1, 2 * n - 3) and most_steps(config) <= max(n - 1, 2)
    drawn = draw_words(automaton, words, length, seed=0)
    with torch.no_grad():
        logits, _ = compiled.model(torch.cat((torch.full((words, 1), 2), torch.from_numpy(drawn)), 1))
    ours = torch.isin(logits.argmax(-1)[:, 1:], torch.tensor(automaton.accepting))
    assert ours.tolist() == [accepted_prefixes(theirs, "".join("ab"[i] for i in word)) for word in drawn]
    return compiled


@pytest.mark.parametrize("seed", range(10))
def test_random_automata_agree_with_the_library(seed):
    rng = random.Random(seed)
    assert_agrees_with_library(random_automaton(rng, rng.randint(2, 6), rng.randint(2, 5)), 4, 300, seed)


@pytest.mark.slow("exhaustive")
@pytest.mark.timeout(1200)
def test_two_hundred_random_automata_agree_with_the_library():
    for seed in range(1000, 1200):
        rng = random.Random(seed)
        assert_agrees_with_library(random_automaton(rng, rng.randint(2, 6), rng.randint(2, 5)), 20, 1000, seed)


@pytest.mark.parametrize(
    "name", ["S3", "Z60", pytest.param("S5", marks=[pytest.mark.slow("exhaustive"), pytest.mark.ci]), "S4", "A5", "D12"]
)
def test_groups_agree_with_the_library(name):
    """The library's automaton of the Cayley table, on 20 words of length 1,000."""
    compiled = compile_group(name)
    theirs, names = library(compiled.automaton), compiled.automaton.alphabet
    drawn = draw_words(compiled.automaton, 20, 1000, seed=0)
    with torch.no_grad():
        logits, _ = compiled.model(torch.cat((torch.full((20, 1), len(names)), torch.from_numpy(drawn)), 1))
    want = [list(theirs.read_input_stepwise([names[i] for i in word], ignore_rejection=True))[1:] for word in drawn]
    assert logits.argmax(-1)[:, 1:].tolist() == want


@pytest.mark.parametrize("regex", REGEXES[:12])
def test_expressions_agree_with_the_library(regex):
    assert_regex_is_the_librarys(regex, 4, 200)


@pytest.mark.slow("exhaustive")
@pytest.mark.timeout(1200)
def test_fifty_expressions_agree_with_the_library():
    assert len(set(REGEXES)) == 50
    for regex in REGEXES:
        compiled = assert_regex_is_the_librarys(regex, 20, 1000)
        certificate = certificates(compiled.model, compiled.automaton)[0]
        assert certificate.complete and certificate.wrong == 0, regex
        assert certificate.guaranteed is None or certificate.guaranteed > 1000, regex


def test_every_third_symbol_is_a():
    automaton = from_regex("((a|b)(a|b)a)*((a|b)(a|b)?)?", "ab")
    rng = random.Random(0)
    for _ in range(200):
        word = [rng.random() < 0.1 for _ in range(rng.randrange(20))]
        assert automaton.accepts([int(b) for b in word]) == (not any(word[2::3]))


def expression(rng: random.Random, digits: int, modulus: int, operators: str) -> str:
    text = str(rng.randrange(modulus))
    for _ in range(digits - 1):
        text += rng.choice(operators) + str(rng.randrange(modulus))
    return text + "="


@pytest.mark.parametrize("operators", ["+-*", "+-", "*"])
def test_modular_arithmetic_is_pythons(operators):
    automaton = modular_arithmetic(5, operators)
    rng, number = random.Random(0), {a: i for i, a in enumerate(automaton.alphabet)}
    for _ in range(200):
        text = expression(rng, rng.randint(1, 12), 5, operators)
        state = automaton.trace([number[c] for c in text])[-1]
        assert automaton.states[state] == f"={eval(text[:-1]) % 5}"
    for text in ("", "+", "1+", "12", "1=+", "1==", "*2"):
        if set(text) <= set(number):
            states = [automaton.initial, *automaton.trace([number[c] for c in text])]
            assert not automaton.states[states[-1]].startswith("="), text


def test_modular_arithmetic_comes_apart():
    """56 states in 5 levels: what kind of symbol comes next (3), the running term (1), the sum (1); so 9 layers."""
    automaton = modular_arithmetic(5)
    assert len(automaton.states) == 56
    compiled = compile_automaton(automaton)
    assert (compiled.model.config.num_hidden_layers, most_steps(compiled.model.config)) == (9, 4)
    rng, number = random.Random(1), {a: i for i, a in enumerate(automaton.alphabet)}
    words = [[number[c] for c in expression(rng, 250, 5, "+-*")] for _ in range(4)]
    assert wrong_labels(compiled.model, automaton, words) == 0
    with torch.no_grad():
        logits, _ = compiled.model(torch.tensor([[len(automaton.alphabet), *words[0]]]))
    text = "".join(automaton.alphabet[i] for i in words[0])
    assert automaton.states[int(logits[0, -1].argmax())] == f"={eval(text[:-1]) % 5}"


@pytest.mark.parametrize("mistake", [lambda: modular_arithmetic(11), lambda: modular_arithmetic(5, "/")])
def test_arithmetic_that_is_refused(mistake):
    with pytest.raises(UsageError, match="must be"):
        mistake()


@pytest.mark.slow("exhaustive")
@pytest.mark.timeout(600)
def test_modular_arithmetic_is_right_on_long_expressions():
    compiled = compile_automaton(modular_arithmetic(5))
    assert verify(compiled, length=100_000, words=8).wrong == 0
    first, second = certificates(compiled.model, compiled.automaton)
    assert first.complete and first.pairs == 56 * 9 and first.guaranteed > 10_000
    lower = replace(compiled, model=compiled.model.bfloat16())
    assert verify(lower, length=max(1, second.guaranteed), words=64).wrong == 0


@pytest.mark.slow("exhaustive")
@pytest.mark.timeout(1200)
def test_six_states_and_eight_symbols_take_ten_seconds_at_most():
    """With the certificate, the largest of twenty."""
    for seed in range(20):
        automaton = random_automaton(random.Random(seed), 6, 8)
        begun = time.perf_counter()
        compiled = compile_automaton(automaton)
        found = certificates(compiled.model, automaton)
        assert time.perf_counter() - begun < 10
        assert found[0].complete and found[0].pairs == 48 and found[0].wrong == 0


@pytest.mark.slow("exhaustive")
@pytest.mark.timeout(1200)
def test_ten_thousand_expressions_at_random_end_in_an_automaton_or_in_one_line():
    pytest.importorskip("automata")
    rng, made, compiled = random.Random(1), 0, 0
    for number in range(10_000):
        regex = "".join(rng.choice("ab()|*+?{}1,2&^.[] \\") for _ in range(rng.randint(0, 12)))
        try:
            automaton = from_regex(regex)
            made += 1
            if number % 10 == 0:
                compile_automaton(automaton)
                compiled += 1
        except UsageError as e:
            assert "\n" not in str(e)
    assert made > 500 and compiled > 50
