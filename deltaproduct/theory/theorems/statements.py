"""What theorems allow and forbid: can a class of linear RNNs follow a group's word problem at every length?

"P1" is DeltaProduct (arXiv 2502.10297), "P2" Unlocking State-Tracking (arXiv 2411.12537); "here" marks what this
library adds to a proof of theirs. N = n_h factors per token, L layers, m the order of a group or of an element.

A statement that allows says that weights exist: any width and number of heads, any look-up in the MLP, an initial
state written by BOS, β = 0, 1 and 2 reached (in float32, 2·sigmoid does from a logit of 17 on). It says nothing of what
training finds. A statement that forbids holds for any width, initial state and decoder, for inputs of arbitrary length,
and in finite precision as P2 means it: powers of transitions are exact and then rounded to a finite set of numbers.

P2's impossibilities are about words of ones. They reach a group so: feed a model of it one element g of order m again
and again, or g and the identity. What it says after k of them is g^k, which determines k mod m. So it has counted mod m
or, where m is even, found the parity of k.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil, log10
from typing import Literal

from deltaproduct.theory.theorems.group_facts import GroupFacts, is_power_of_two
from deltaproduct.theory.theorems.model_class import ModelClass, layers_in_words


@dataclass(frozen=True)
class Statement:
    """What one theorem says of a group and a model class.

    effect: allows, forbids, or bounds (it is about the case and decides nothing). source: such as "P1, Theorem 4".
    reason: a sentence or two, with this group's numbers.
    """

    effect: Literal["allows", "forbids", "bounds"]
    source: str
    reason: str


def lookup_rows(facts: GroupFacts, num_householder: int) -> int:
    """Rows 2μ · |G|^(2μ) of the table in P1's Theorem 1, (ii) and (iii), with μ = ⌈(points − 1)/N⌉."""
    block = 2 * ceil((facts.points - 1) / num_householder)
    return block * facts.size**block


def _in_words(rows: int) -> str:
    return f"{rows:,}" if rows < 10**6 else f"about 10^{log10(rows):.0f}"


def _element(facts: GroupFacts, number: int) -> str:
    return f"The element {facts.names[number]} has order {facts.orders[number]}"


def applicable(facts: GroupFacts, model: ModelClass) -> tuple[Statement, ...]:
    """All statements about a group and a model class: those that allow first; those that bound it if none decides."""
    rules = ALLOW + FORBID if model.allow_neg_eigval else FORBID  # every construction reflects
    found = [statement for rule in rules for statement in rule(facts, model)]
    return tuple(found or [statement for rule in OPEN for statement in rule(facts, model)])


# ------------------------------------------------------------------------------------------------------------- allowed


def _swaps(facts: GroupFacts, model: ModelClass) -> Iterator[Statement]:
    """P2, Theorem 3: one layer with N = k − 1 for symbols that move at most k points; Z_2 with a scalar ±1.

    k is counted on the points of S_n that the group is embedded in, as the proof does. (The statement counts states
    that a symbol changes; with the group's elements for states that would be all of them.)
    """
    factors = facts.moved - 1
    if not model.diagonal and model.num_householder >= factors:
        yield Statement("allows", "P2, Theorem 3",
                        f"A symbol moves at most {facts.moved} of {facts.points} points, which takes {factors} "
                        f"swap{'s' * (factors > 1)} at most, each a reflection: one layer with n_h = {factors}.",
                        )  # fmt: skip
    if not model.diagonal and facts.cyclic and facts.cyclic > 2 and model.num_householder >= 2:
        yield Statement("allows", "P2, Theorem 3",
                        f"{facts.name} is cyclic: a rotation of the plane by a multiple of 1/{facts.cyclic} of a turn, "
                        "two reflections, adds a number modulo that.")  # fmt: skip


def _orthogonal(facts: GroupFacts, model: ModelClass) -> Iterator[Statement]:
    """P1, Theorem 4: one layer for finite subgroups of O(N), and of SO(N + 1) where N is even.

    A direct product needs no more than its factors, each with heads of its own (P1, appendix B.1).
    """
    needed = max(space.num_householder for space in facts.spaces)
    if not model.diagonal and model.num_householder >= needed:
        yield Statement("allows", "P1, Theorem 4", f"{facts.shape}: one layer with n_h = {needed}.")


def _symmetric_group(facts: GroupFacts, model: ModelClass) -> Iterator[Statement]:
    """P1, Theorem 1, for S_n and so for every subgroup of it: one layer with N = n − 1, 3 with N > 1, 4 with N = 1.

    With gates the same follows from P1's Theorem 2: Lemma 4 in its proof gives automata of permutations these numbers
    of layers.
    """
    if model.diagonal:
        return
    n, given = facts.points, model.num_householder
    within = f"{facts.name} permutes {n} points"
    if given >= n - 1:
        yield Statement("allows", "P1, Theorem 1 (i)", f"{within}: one layer with n_h = {n - 1}.")
    clause, least = ("(ii)", 3) if given > 1 else ("(iii)", 4)
    if model.layers >= least:
        rows = lookup_rows(facts, given)
        yield Statement("allows", f"P1, Theorem 1 {clause}",
                        f"{within}: {least} layers are enough with n_h {'> 1' if given > 1 else '= 1'}, if the MLP of "
                        f"the last but one looks up a table of {_in_words(rows)} rows.")  # fmt: skip
        if model.gated:
            yield Statement("allows", "P1, Theorem 2 (Lemma 4)",
                            f"Gated layers follow every regular language; all symbols of a group's automaton permute "
                            f"its states, for which {least} layers are enough.")  # fmt: skip


def _two_layers(facts: GroupFacts, model: ModelClass) -> Iterator[Statement]:
    """P2, Theorem 6 (Z_m) and P1, Theorem 7 (D_m): two layers of single reflections; products in separate heads.

    As printed, P1's Theorem 7 has the two angles of the mirrorings exchanged (tests/theory/test_theorems.py).
    """
    if model.diagonal:
        return
    if facts.dihedral and model.num_householder >= 2:
        yield Statement("allows", "P1, Theorem 7 (ii)",
                        f"{facts.name} is the dihedral group D{facts.dihedral}: one layer with n_h = 2.")  # fmt: skip
    if model.layers < 2:
        return
    if facts.cyclic:
        yield Statement("allows", "P2, Theorem 6",
                        f"{facts.name} is addition modulo {facts.cyclic}: two layers with n_h = 1, the first of which "
                        "tells odd positions from even ones.")  # fmt: skip
    elif facts.dihedral:
        yield Statement("allows", "P1, Theorem 7 (i)",
                        f"{facts.name} is the dihedral group D{facts.dihedral}: two layers with n_h = 1 and two heads "
                        "in the first, which count rotations and mirrorings modulo 2 (but two of the angles are "
                        "exchanged in print).")  # fmt: skip
    elif facts.factors and all(part.cyclic or part.dihedral for part in facts.factors):
        both = {"P2, Theorem 6" if part.cyclic else "P1, Theorem 7 (i)" for part in facts.factors}
        yield Statement("allows", " and ".join(sorted(both, reverse=True)),
                        "Every factor is cyclic or dihedral, and each has heads of its own: two layers with n_h = 1.",
                        )  # fmt: skip


def _parities(facts: GroupFacts, model: ModelClass) -> Iterator[Statement]:
    """Groups of 2^p elements by signs: P2, Theorem 3 (a scalar ±1 is parity), one such layer upon another.

    Let N be a normal subgroup such that G/N is a product of copies of Z_2, and write each g as n·t with n in N and t
    one of its cosets' representatives. Signs follow the coset. With t x = n'(t,x) t', the product g x is n n'(t,x) t':
    the rest is a word problem of N, whose symbols n'(t,x) the next layer reads off x and the coset after x.
    """
    needed = facts.parity_layers
    if not needed or model.layers < needed:
        return
    if needed == 1:
        yield Statement("allows", "P2, Theorem 3",
                        f"{facts.name} is Z2 or a product of copies of it: an eigenvalue of -1 for each is its parity.",
                        )  # fmt: skip
    else:
        yield Statement("allows", "here, from P2, Theorem 3",
                        f"{facts.name} has {facts.size} elements, and squares upon squares leave only the identity "
                        f"after {needed} steps: {needed} layers of parities, each reading those below.")  # fmt: skip


def _krohn_rhodes(facts: GroupFacts, model: ModelClass) -> Iterator[Statement]:
    """P2, Theorem 4: any automaton of |Q| states in at most 2^|Q| layers with N = |Q|."""
    if not model.diagonal and model.num_householder >= facts.size and model.layers.bit_length() > facts.size:
        yield Statement("allows", "P2, Theorem 4",
                        f"2^{facts.size} layers with n_h = {facts.size} follow any automaton of {facts.size} states.",
                        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- forbidden


def _parity(facts: GroupFacts, model: ModelClass) -> Iterator[Statement]:
    """P2, Theorem 1: no parity if all eigenvalues are real and ≥ 0, in any number of layers.

    Its proof shows more: on a repeated symbol every layer's state is constant from some length on. That also forbids
    groups of odd order.
    """
    if model.allow_neg_eigval or not (model.diagonal or model.num_householder <= 2):
        return
    kind = ("The entries of the diagonal" if model.diagonal else "The eigenvalues of a factor"
            if model.num_householder == 1 else "The eigenvalues of a product of two factors in [0,1]")  # fmt: skip
    real = f"{kind}{', times a gate,' if model.gated else ''} are real and not negative"
    if (even := facts.find(lambda m: m % 2 == 0, among_inputs=True)) is not None:
        yield Statement("forbids", "P2, Theorem 1",
                        f"{real}. {_element(facts, even)}: over a word of it and the identity, the product says "
                        "whether it came an even number of times, and no number of layers has that parity.",
                        )  # fmt: skip
    elif (odd := facts.find(lambda m: m > 1, among_inputs=True)) is not None:
        yield Statement("forbids", "P2, proof of Theorem 1",
                        f"{real}, so that every layer's state stays the same from some length on when a symbol is "
                        f"repeated. {_element(facts, odd)}: its powers never do.")  # fmt: skip


def _counting(facts: GroupFacts, model: ModelClass) -> Iterator[Statement]:
    """P2, Theorem 2: no counting mod m, m no power of two, if products of 2^(i−1) transitions in layer i are real.

    And its proof: then what L layers say on a repeated symbol has a period that divides 2^L, so that mod 2^p needs
    p ≤ L. For diagonal transitions a repeated word does as well as a symbol, for any product of them is diagonal.
    """
    if not model.only_real:
        return
    if model.diagonal:
        real = "Diagonal matrices and their products have no eigenvalue that is not real"
    elif model.num_householder == 2:
        real = "A product of two factors in [0,1] has no eigenvalue that is not real"
    elif model.layers == 2:
        real = "Neither a factor nor, in the second layer, a product of two in [0,1] has an eigenvalue that is not real"
    else:
        real = "A single generalised Householder factor has no eigenvalue that is not real"
    for condition, why, source in (
        (lambda m: not is_power_of_two(m), "not a power of two; counting modulo it needs such an eigenvalue",
         "Theorem 2"),
        (lambda m: is_power_of_two(m) and m.bit_length() - 1 > model.layers,
         f"and without such eigenvalues the answers of {layers_in_words(model.layers)} to a repeated symbol have a "
         f"period that divides {2 ** min(model.layers, 64)}", "proof of Theorem 2"),
    ):  # fmt: skip
        found = facts.find(condition, among_inputs=True)
        spelt = ""
        if found is None and model.diagonal:
            found = facts.find(condition, among_inputs=False)
            spelt, source = " It is no symbol here, but a word of symbols spells it.", "proof of Theorem 2"
        if found is not None:
            yield Statement("forbids", f"P2, {source}", f"{real}. {_element(facts, found)}, {why}.{spelt}")


# ------------------------------------------------------------------------------- what is known where nothing is decided


def _converges(facts: GroupFacts, model: ModelClass) -> Iterator[Statement]:
    """P2, Proposition 1, on three and more factors in [0,1], and what follows for the scores.

    On a repeated symbol a layer has S_k = A S_{k−1} + B, and B is in the span of the keys. A shrinks that span, which
    it maps into itself, and is the identity orthogonally to it: S_k converges geometrically. With it do the next
    layer's A and B, and so its states, if all maps between are Lipschitz. P2's rounding could still tell apart the two
    sides from which a limit is approached for ever, so that this forbids nothing in its sense.
    """
    if not model.allow_neg_eigval:
        yield Statement("bounds", "P2, Proposition 1",
                        f"A product of {model.num_householder} factors in [0,1] may have eigenvalues that are negative "
                        "or not real, so Theorems 1 and 2 do not apply. But all eigenvalues other than 1 are inside "
                        "the unit circle.")  # fmt: skip
        yield Statement("bounds", "here, from P2, Proposition 1",
                        "So the states converge when a symbol is repeated, in every layer, and the labels' scores with "
                        "them: whatever margin a model has between labels shrinks to 0 as words grow.")  # fmt: skip


def _rotates(facts: GroupFacts, model: ModelClass) -> Iterator[Statement]:
    if model.allow_neg_eigval and not model.only_real:
        where = "One transition" if model.num_householder > 1 else "The product of two transitions in the second layer"
        yield Statement("bounds", "P1, section 4",
                        f"{where} can be a rotation, so P2's Theorems 1 and 2 do not apply; and none of the "
                        "constructions that are known has so few factors and layers.")  # fmt: skip


def _regular(facts: GroupFacts, model: ModelClass) -> Iterator[Statement]:
    if model.allow_neg_eigval and model.gated:
        yield Statement("bounds", "P1, Theorem 2",
                        "Some number of gated layers follows every regular language; for a group 3 are enough, or 4 "
                        "with n_h = 1, and about fewer it says nothing.")  # fmt: skip


Rule = Callable[[GroupFacts, ModelClass], Iterator[Statement]]
ALLOW: tuple[Rule, ...] = (_swaps, _orthogonal, _symmetric_group, _two_layers, _parities, _krohn_rhodes)
FORBID: tuple[Rule, ...] = (_parity, _counting)
OPEN: tuple[Rule, ...] = (_converges, _rotates, _regular)
