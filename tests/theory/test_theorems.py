"""theory/theorems/: verdicts and citations, beside what the constructions can really make."""

import itertools

import pytest
import torch
from theorem_cases import COUNTING, COUNTING_PROOF, DIAGONAL, SMALL, TASKS, classes

from deltaproduct.errors import UsageError
from deltaproduct.tasks.groups import build_group
from deltaproduct.theory.compiler import compile_group
from deltaproduct.theory.limits import Limits
from deltaproduct.theory.theorems.explanation import explain, verdict_of
from deltaproduct.theory.theorems.group_facts import generated, group_facts
from deltaproduct.theory.theorems.model_class import ModelClass
from deltaproduct.theory.theorems.statements import Statement, applicable
from deltaproduct.theory.verification import verify

ZERO_ONE = {"allow_neg_eigval": False}

T4, T1_I, T1_II, T1_III = "P1, Theorem 4", "P1, Theorem 1 (i)", "P1, Theorem 1 (ii)", "P1, Theorem 1 (iii)"
T7_I, T7_II, SWAPS, Z_M = "P1, Theorem 7 (i)", "P1, Theorem 7 (ii)", "P2, Theorem 3", "P2, Theorem 6"
PARITY, PARITY_PROOF = "P2, Theorem 1", "P2, proof of Theorem 1"
LEMMA_4, CHAIN, ANY = "P1, Theorem 2 (Lemma 4)", "here, from P2, Theorem 3", "P2, Theorem 4"
INSIDE, CONVERGES, ROTATES = "P2, Proposition 1", "here, from P2, Proposition 1", "P1, section 4"
REGULAR = "P1, Theorem 2"


def sources(found):
    return [statement.source for statement in found.statements]


@pytest.mark.parametrize(
    ("task", "n", "layers", "other", "verdict", "cited"),
    [
        # one layer: the papers' own examples
        ("A5", 2, 1, {}, "possible", [T4]),
        ("A5", 4, 1, {}, "possible", [SWAPS, T4, T1_I]),
        ("S4", 2, 1, {}, "possible", [T4]),
        ("S4", 3, 1, {}, "possible", [SWAPS, T4, T1_I]),
        ("A4", 2, 1, {}, "possible", [T4]),
        ("A6", 4, 1, {}, "possible", [T4]),
        ("A6", 3, 1, {}, "undecided", [ROTATES]),
        ("S5", 4, 1, {}, "possible", [SWAPS, T4, T1_I]),
        ("S5", 3, 1, {}, "undecided", [ROTATES]),
        ("S5", 3, 1, {"gated": True}, "undecided", [ROTATES, REGULAR]),
        ("S5", 1, 1, {}, "impossible", [COUNTING, COUNTING_PROOF]),
        ("S3", 2, 1, {}, "possible", [SWAPS, T4, T1_I, T7_II]),
        ("S3", 1, 1, {}, "impossible", [COUNTING]),
        ("Z2", 1, 1, {}, "possible", [SWAPS, T4, T1_I, SWAPS]),
        ("Z2_x_Z2", 1, 1, {}, "possible", [T4, SWAPS]),
        ("Z3", 1, 1, {}, "impossible", [COUNTING]),
        ("Z4", 1, 1, {}, "impossible", [COUNTING_PROOF]),
        ("Z60", 2, 1, {}, "possible", [SWAPS, T4]),
        ("D12", 2, 1, {}, "possible", [T4, T7_II]),
        ("D4", 1, 1, {}, "impossible", [COUNTING_PROOF]),
        ("S3_x_S4", 2, 1, {}, "possible", [T4]),
        # more layers
        ("Z60", 1, 2, {}, "possible", [Z_M]),
        ("S3", 1, 2, {}, "possible", [T7_I]),
        ("D4", 1, 2, {}, "possible", [T7_I, CHAIN]),
        ("Z2_x_Z4", 1, 2, {}, "possible", [Z_M, CHAIN]),
        ("S3_x_D4", 1, 2, {}, "possible", [T7_I]),
        ("Z60_x_Z2", 1, 2, {}, "possible", [Z_M]),
        ("A5", 1, 2, {}, "undecided", [ROTATES]),
        ("A4_x_Z2", 1, 2, {}, "undecided", [ROTATES]),
        ("A5", 1, 3, {}, "undecided", [ROTATES]),
        ("A5", 1, 4, {}, "possible", [T1_III]),
        ("A5", 1, 4, {"gated": True}, "possible", [T1_III, LEMMA_4]),
        ("S5", 2, 3, {}, "possible", [T1_II]),
        ("S5", 3, 2, {}, "undecided", [ROTATES]),
        ("Z2", 2, 4, {}, "possible", [SWAPS, T4, T1_I, T1_II, Z_M, SWAPS, ANY]),
        # eigenvalues in [0,1]
        ("S3", 1, 1, ZERO_ONE, "impossible", [PARITY, COUNTING]),
        ("S3", 1, 2, ZERO_ONE, "impossible", [PARITY, COUNTING]),
        ("S3", 1, 9, ZERO_ONE, "impossible", [PARITY]),
        ("S3", 2, 1, ZERO_ONE, "impossible", [PARITY, COUNTING]),
        ("S3", 2, 2, ZERO_ONE | {"gated": True}, "impossible", [PARITY]),
        ("S3", 3, 1, ZERO_ONE, "undecided", [INSIDE, CONVERGES]),
        ("Z3", 2, 5, ZERO_ONE, "impossible", [PARITY_PROOF]),
        ("Z4", 2, 1, ZERO_ONE, "impossible", [PARITY, COUNTING_PROOF]),
        # diagonal
        ("Z2", 1, 1, DIAGONAL, "possible", [SWAPS]),
        ("Z2", 1, 9, DIAGONAL | ZERO_ONE, "impossible", [PARITY]),
        ("Z3", 1, 9, DIAGONAL, "impossible", [COUNTING]),
        ("Z4", 1, 1, DIAGONAL, "impossible", [COUNTING_PROOF]),
        ("Z4", 1, 2, DIAGONAL, "possible", [CHAIN]),
        ("Z8", 1, 2, DIAGONAL, "impossible", [COUNTING_PROOF]),
        ("D8", 1, 3, DIAGONAL, "possible", [CHAIN]),
        ("S5", 1, 2, DIAGONAL, "impossible", [COUNTING]),
        ("S5", 1, 1, DIAGONAL, "impossible", [COUNTING, COUNTING_PROOF]),
        # few symbols
        ("S5/2", 1, 1, {}, "possible", [SWAPS]),
        ("S5/3", 1, 1, {}, "impossible", [COUNTING]),
        ("S5/3", 2, 1, {}, "possible", [SWAPS]),
        ("S5/4", 2, 1, {}, "undecided", [ROTATES]),
        ("S5/2", 1, 1, ZERO_ONE, "impossible", [PARITY]),
        ("S5/2", 1, 4, DIAGONAL, "impossible", [COUNTING_PROOF]),
    ],
)
def test_verdict_and_citations(task, n, layers, other, verdict, cited):
    name, _, moves = task.partition("/")
    found = explain(name, ModelClass(n, layers, **other), moves=int(moves) if moves else None)
    assert (found.verdict, sources(found)) == (verdict, cited)


def test_reasons_have_the_groups_numbers():
    def reason(group, source, model, moves=None):
        return next(s.reason for s in explain(group, model, moves=moves).statements if s.source == source)

    assert "rotation group of the icosahedron, a subgroup of SO(3)" in reason("A5", T4, ModelClass(2))
    assert "rotation group of the cube" in reason("S4", T4, ModelClass(2))
    assert "rotation group of the tetrahedron" in reason("A4", T4, ModelClass(2))
    assert "5 dimensions, a subgroup of SO(5): one layer with n_h = 4" in reason("A6", T4, ModelClass(4))
    assert "at most 3 of 5 points, which takes 2 swaps" in reason("S5", SWAPS, ModelClass(2), moves=3)
    assert "(2 3 4) has order 3" in reason("S5", COUNTING, ModelClass())
    assert "order 4, and" in reason("D4", COUNTING_PROOF, ModelClass())
    assert "D3" in reason("S3", T7_II, ModelClass(2)) and "D6" in reason("S3_x_Z2", T7_II, ModelClass(2))
    assert "table of 5,184 rows" in reason("S3", T1_III, ModelClass(1, 4))  # 2·2 · 6^(2·2)
    assert "about 10^9 rows" in reason("S5", T1_II, ModelClass(2, 3))  # 2·2 · 120^(2·2)
    assert "about 10^4545 rows" in reason("D720", T1_III, ModelClass(1, 4))  # more digits than Python prints


def test_nothing_is_allowed_and_forbidden():
    seen = set()
    for (name, moves), model in itertools.product(TASKS, classes()):
        statements = applicable(group_facts(name, moves), model)
        seen.add(verdict_of(statements))  # raises where they contradict each other
        assert len(set(statements)) == len(statements)
        assert statements, f"nothing is said of {model} and {name}"
    assert seen == {"possible", "impossible", "undecided"}


def test_a_contradiction_would_be_found():
    with pytest.raises(AssertionError, match="contradict"):
        verdict_of((Statement("allows", "a", ""), Statement("forbids", "b", "")))


@pytest.mark.parametrize(("name", "moves"), TASKS)
def test_more_factors_and_layers_lose_nothing(name, moves):
    """With eigenvalues in [-1,1] a factor can be the identity, and a layer can pass on what it reads."""
    facts = group_facts(name, moves)
    rank = {"impossible": 0, "undecided": 1, "possible": 2}

    def verdict(model):
        return rank[verdict_of(applicable(facts, model))]

    for n, layers in itertools.product(range(1, 7), range(1, 5)):
        here = verdict(ModelClass(n, layers))
        assert here <= verdict(ModelClass(n + 1, layers)) and here <= verdict(ModelClass(n, layers + 1))
        assert here == verdict(ModelClass(n, layers, gated=True)) >= verdict(ModelClass(n, layers, False))
        if moves is not None:
            assert here >= rank[explain(name, ModelClass(n, layers)).verdict]


@pytest.mark.parametrize("name", SMALL)
def test_one_layer_is_possible_exactly_where_it_can_be_made(name):
    needed = group_facts(name).one_layer_householder
    assert group_facts(name).size <= 120
    for n in range(1, needed + 2):
        limits = Limits(num_householder=n, layers=1)
        assert (explain(name, ModelClass(n)).verdict == "possible") == (n >= needed)
        if n < needed:
            with pytest.raises(UsageError, match="cannot be compiled"):
                compile_group(name, limits=limits)
    compiled = compile_group(name, limits=Limits(num_householder=needed, layers=1))
    assert compiled.model.config.num_hidden_layers == 1 and verify(compiled, length=64, words=2).wrong == 0


@pytest.mark.parametrize("name", [name for name in SMALL if group_facts(name).one_layer_householder > 1])
def test_what_two_layers_of_single_factors_can_be_made_of_is_possible(name):
    found = explain(name, ModelClass(1, 2))
    try:
        compiled = compile_group(name, limits=Limits(num_householder=1, layers=2))
    except UsageError:
        assert found.weights is None
    else:
        assert found.verdict == "possible" and "--strategy two-layer" in found.weights
        assert verify(compiled, length=64, words=2).wrong == 0


def test_isomorphic_groups_get_one_answer():
    for one, other in (("S3", "D3"), ("A3", "Z3"), ("S2", "Z2"), ("Z2_x_Z3", "Z6"), ("S3_x_Z2", "D6")):
        for model in classes(3, 3):
            assert explain(one, model).verdict == explain(other, model).verdict, (one, other, model)
    assert (group_facts("Z2_x_Z3").cyclic, group_facts("S3_x_Z2").dihedral) == (6, 6)
    assert (group_facts("Z2_x_Z4").cyclic, group_facts("D4_x_Z2").dihedral) == (None, None)


def test_what_generates_a_group():
    s4 = group_facts("S4")
    table, names = build_group("S4").table, list(s4.names)
    found = [len(generated(table, torch.tensor([names.index(name) for name in some], dtype=torch.int64)))
             for some in ([], ["(0 1)"], ["(0 1)(2 3)", "(0 2)(1 3)"], ["(0 1)", "(0 1 2 3)"])]  # fmt: skip
    assert found == [1, 2, 4, 24]
    assert s4.orders[names.index("(0 1 2 3)")] == 4 and s4.find(lambda m: m > 4, among_inputs=True) is None


def test_what_is_nearest_is_possible_and_least():
    found = explain("S5", ModelClass(1))
    assert found.nearest == (ModelClass(4), ModelClass(1, 4))
    assert explain("S3", ModelClass(4, 1, False)).nearest == (ModelClass(2),)
    assert explain("Z8", ModelClass(transition="diagonal")).nearest == (ModelClass(layers=3, transition="diagonal"),)
    assert explain("Z3", ModelClass(transition="diagonal")).nearest == ()
    for (name, moves), model in itertools.product(TASKS, classes(5, 3)):
        facts = group_facts(name, moves)
        if verdict_of(applicable(facts, model)) != "possible":
            near = explain(name, model, moves=moves).nearest
            assert near or model.diagonal
            assert all(verdict_of(applicable(facts, c)) == "possible" for c in near)
