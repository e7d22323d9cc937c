"""Cyclic and dihedral groups with single reflections, in two layers (P2, Theorem 6; P1, Theorem 7).

A rotation R is no single reflection. But let F be a fixed one, and c_t the parity of how many rotations there were so
far. If U_t = R_{x_t}ᵀ U_{t−1} is what is to be followed, then W_t = F^{c_t} U_t obeys

    W_t = F^{c_t} R_{x_t}ᵀ F^{c_{t−1}} W_{t−1}

and the matrix here is a reflection whatever x_t is: with a rotation c changes, and one of the two powers is F; with a
mirroring it does not, and F is there twice or not at all. So the first layer follows c (and the parity of mirrorings,
and other signs, each a head whose state changes its sign), its MLP looks up the reflection by (x_t, c_t), and the
second layer follows a corner of a polygon, W_t (1,0)ᵀ. An MLP looks up the product by both parities and the corner.

This departs from P1's proof, which has the angles of two of its cases exchanged, by not needing any cases.
"""

import torch
from torch import Tensor

from deltaproduct.errors import UsageError
from deltaproduct.theory.constructions.circle import CORNER, FLIP, lines
from deltaproduct.theory.constructions.circuit import Circuit, Unit, Write
from deltaproduct.theory.constructions.plan import Plan
from deltaproduct.theory.householder import Factors, from_orthogonal, no_factors
from deltaproduct.theory.representations import WordProblem

ONE = torch.ones(1, 1, dtype=torch.float64)


def two_layers(problem: WordProblem, strategy: str) -> Plan:
    """The plan. Raises UsageError for what is no product in Z_m or D_m."""
    planes, rotates, signs = _parts(problem)
    tokens, labels = len(problem.tokens), problem.num_labels
    bos = tokens
    circuit = Circuit(tokens + 1)

    changes = [rotates, *(sign < 0 for sign in signs)]
    start = {bos: Write(Factors(ONE, ONE[0]), ONE)}
    change, stay = Write(Factors(ONE, 2 * ONE[0])), Write(no_factors(1))
    writes = [start | {x: change if by[g] else stay for x, g in enumerate(problem.tokens)} for by in changes]
    parity = circuit.mixer(ONE.expand(len(changes), 1), writes, power=len(changes))
    reflections, begin = circuit.take(2 * tokens), circuit.take(1)
    units = [Unit({bos: 1.0}, 0.5, (begin,))]
    for odd in (0, 1):
        units += [Unit({x: 1.0, parity: 0.5 - odd}, 1.0, (reflections + odd * tokens + x,)) for x in range(tokens)]
    circuit.look_up(units)

    start = {bos: Write(Factors(CORNER, ONE[0]), ONE)}
    queries: list[Tensor] = []
    corners: list[Tensor] = []  # that go with each query
    writes = []
    for plane in planes:
        moves = dict(start)
        for odd in (0, 1):
            for x, g in enumerate(problem.tokens):
                before = odd ^ int(rotates[g])
                matrix = _flips(odd) @ plane[g].T @ _flips(before)
                moves[reflections + odd * tokens + x] = Write(from_orthogonal(matrix))
        normals = lines(_different(plane[:, :, 0]))
        queries += normals
        corners += [plane.mT[:, :, 0]] * len(normals)
        writes += [moves] * len(normals)
    sides = circuit.mixer(torch.stack(queries), writes, power=len(queries))
    answer = circuit.take(labels)
    units = []
    for odd in (0, 1):
        read = [corner @ _flips(odd) @ query for corner, query in zip(corners, queries, strict=True)]  # [n] each
        seen = torch.stack([torch.full((len(problem.labels),), 1.0 - 2 * odd), *signs, *read]).sign()
        slots = [*range(parity, parity + len(changes)), *range(sides, sides + len(queries))]
        for label, row in zip(problem.labels, seen.T.tolist(), strict=True):
            weights = {slot: sign / 2 for slot, sign in zip(slots, row, strict=True)}
            units.append(Unit(weights, len(slots) / 2 - 0.5, (answer + label,)))
    circuit.look_up(units)
    return circuit.plan(strategy, answer, torch.eye(labels, dtype=torch.float64))


def _parts(problem: WordProblem) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Representations in the plane, [n,2,2] each; whether an element is a rotation there [n]; all signs, [n] each."""
    planes = [r.matrices for r in problem.representations if r.size == 2]
    signs = [r.matrices[:, 0, 0] for r in problem.representations if r.size == 1]
    if len(planes) + len(signs) < len(problem.representations):
        raise UsageError("its symbols are not among the rotations and mirrorings of a polygon")
    if not planes:
        raise UsageError("its symbols are reflections already, and one layer of them does")
    determinants = [torch.linalg.det(plane).round() for plane in planes]
    if any(not torch.equal(d, determinants[0]) for d in determinants):
        raise UsageError("it is a product of groups whose rotations and mirrorings do not come together")
    if (determinants[0] < 0).any():
        signs.append(determinants[0])
    return planes, determinants[0] > 0, signs


def _flips(power: int) -> Tensor:
    return torch.linalg.matrix_power(FLIP, power)


def _different(places: Tensor) -> int:
    """How many places [n,2] there are: the polygon's corners."""
    return len((places.round(decimals=9) + 0.0).unique(dim=0))
