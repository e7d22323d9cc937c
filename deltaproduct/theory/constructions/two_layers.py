"""Cyclic and dihedral groups with single reflections, in two layers (P2, Theorem 6; P1, Theorem 7).

A rotation R is no single reflection. But let F be a fixed one, and c_t the parity of how many rotations there were so
far. If U_t = R_{x_t}ᵀ U_{t−1} is what is to be followed, then W_t = F^{c_t} U_t obeys

    W_t = F^{c_t} R_{x_t}ᵀ F^{c_{t−1}} W_{t−1}

and the matrix here is a reflection whatever x_t is: with a rotation c changes, and one of the two powers is F; with a
mirroring it does not, and F is there twice or not at all. So the first layer follows c (and the parity of mirrorings,
and other signs, each a head whose state changes its sign), its MLP looks up the reflection by (x_t, c_t), and the
second layer follows a corner of a polygon, W_t (1,0)ᵀ. An MLP looks up the product by both parities and the corner. In
a direct product every factor has a parity and corners of its own.

This departs from P1's proof, which has the angles of two of its cases exchanged, by not needing any cases.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaproduct.errors import UsageError
from deltaproduct.theory.constructions.circle import CORNER, FLIP, lines
from deltaproduct.theory.constructions.circuit import MAX_UNITS, Circuit, Unit, Write, all_of
from deltaproduct.theory.householder import Factors, from_orthogonal, no_factors
from deltaproduct.theory.limits import Plan
from deltaproduct.theory.representations import WordProblem

ONE = torch.ones(1, 1, dtype=torch.float64)


def two_layers(problem: WordProblem, strategy: str) -> Plan:
    """The plan. Raises UsageError for what is no product in Z_m or D_m, nor in direct products of these."""
    polygons, signs = _parts(problem)
    tokens, bos = len(problem.tokens), len(problem.tokens)
    circuit = Circuit(tokens + 1)

    changes = [*(polygon.rotates for polygon in polygons), *(sign < 0 for sign in signs)]
    start = {bos: Write(Factors(ONE, ONE[0]), ONE)}
    change, stay = Write(Factors(ONE, 2 * ONE[0])), Write(no_factors(1))
    writes = [start | {x: change if by[g] else stay for x, g in enumerate(problem.tokens)} for by in changes]
    parities = circuit.mixer(ONE.expand(len(changes), 1), writes, power=len(changes))
    reflections = circuit.take(2 * tokens * len(polygons))  # by polygon, parity and token
    units = [all_of([bos], *(circuit.take(1) for _ in polygons))]
    for i, odd, x in itertools.product(range(len(polygons)), (0, 1), range(tokens)):
        slot = reflections + (2 * i + odd) * tokens + x
        units.append(Unit({x: 1.0, parities + i: 0.5 - odd}, 1.0, (slot,)))
    circuit.look_up(units, power=len(polygons))

    start = {bos: Write(Factors(CORNER, ONE[0]), ONE)}
    queries: list[Tensor] = []
    followed: list[tuple[int, Tensor]] = []  # with each query: the polygon, and where its corner is taken to [n,2]
    writes = []
    for i, polygon in enumerate(polygons):
        for plane in polygon.planes:
            moves = dict(start)
            for odd, (x, g) in itertools.product((0, 1), enumerate(problem.tokens)):
                before = odd ^ int(polygon.rotates[g])
                matrix = _flips(odd) @ plane[g].T @ _flips(before)
                moves[reflections + (2 * i + odd) * tokens + x] = Write(from_orthogonal(matrix))
            normals = lines(_different(plane[:, :, 0]))
            queries += normals
            followed += [(i, plane.mT[:, :, 0])] * len(normals)
            writes += [moves] * len(normals)
    sides = circuit.mixer(torch.stack(queries), writes, power=len(queries))
    answer = circuit.take(problem.num_labels)
    slots = [*range(parities, parities + len(changes)), *range(sides, sides + len(queries))]
    units = []
    for odd_ones in itertools.product((0, 1), repeat=len(polygons)):
        known = [torch.full((len(problem.labels),), 1.0 - 2 * odd) for odd in odd_ones]
        read = [places @ _flips(odd_ones[i]) @ query for (i, places), query in zip(followed, queries, strict=True)]
        seen = torch.stack([*known, *signs, *read]).sign()  # [slots,n]
        for label, row in zip(problem.labels, seen.T.tolist(), strict=True):
            weights = {slot: sign / 2 for slot, sign in zip(slots, row, strict=True)}
            units.append(Unit(weights, len(slots) / 2 - 0.5, (answer + label,)))
    circuit.look_up(units)
    return circuit.plan(strategy, answer, torch.eye(problem.num_labels, dtype=torch.float64))


@dataclass(frozen=True, eq=False)
class _Polygon:
    """Representations in the plane whose rotations and mirrorings come together: those of one Z_m or D_m."""

    rotates: Tensor  # [n] whether an element is a rotation there
    planes: list[Tensor]  # [n,2,2] each


def _parts(problem: WordProblem) -> tuple[list[_Polygon], list[Tensor]]:
    """The polygons, and all that is ±1: one-dimensional representations, and where a polygon is mirrored, [n] each."""
    planes = [r.matrices for r in problem.representations if r.size == 2]
    signs = [r.matrices[:, 0, 0] for r in problem.representations if r.size == 1]
    if len(planes) + len(signs) < len(problem.representations):
        raise UsageError("its symbols are not among the rotations and mirrorings of polygons")
    if not planes:
        raise UsageError("its symbols are reflections already, and one layer of them does")
    found: list[_Polygon] = []
    for plane in planes:
        rotates = torch.linalg.det(plane) > 0
        same = [polygon for polygon in found if torch.equal(polygon.rotates, rotates)]
        if same:
            same[0].planes.append(plane)
        else:
            found.append(_Polygon(rotates, [plane]))
            if not rotates.all():
                signs.append(torch.where(rotates, 1.0, -1.0).double())
    if (units := 2 ** len(found) * len(problem.labels)) > MAX_UNITS:
        raise UsageError(f"its {len(found)} polygons need a look-up of {units:,} units, at most {MAX_UNITS:,}")
    return found, signs


def _flips(power: int) -> Tensor:
    return torch.linalg.matrix_power(FLIP, power)


def _different(places: Tensor) -> int:
    """How many places [n,2] there are: the polygon's corners."""
    return len((places.round(decimals=9) + 0.0).unique(dim=0))
