"""Groups that are recognised as rotations: the cyclic and dihedral ones, and those of tetrahedron, cube, icosahedron.

These are all finite groups of rotations in three dimensions (the dihedral ones here as rotations and mirrorings of a
plane), and every one of their elements is a product of at most two reflections (P1, Theorem 4).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaproduct.tasks.groups import Permutation
from deltaproduct.theory.householder import Factors, from_orthogonal

POLYHEDRA = {12: ("A4", 3), 24: ("S4", 4), 60: ("A5", 5)}  # order → name, and the order of a product of two generators


@dataclass(frozen=True, eq=False)
class Representation:
    """Orthogonal matrices [n,d,d] float64 of a group's n elements, in its order, with R_{g∘h} = R_g R_h."""

    name: str
    matrices: Tensor

    @property
    def size(self) -> int:
        """d."""
        return self.matrices.shape[1]

    def factors(self, elements: Sequence[int] | None = None) -> list[Factors]:
        """R_gᵀ of every element, or of these, as reflections: what a token does to a state that holds R_hᵀ."""
        chosen = self.matrices if elements is None else self.matrices[list(elements)]
        known: dict[bytes, Factors] = {}  # in a direct product many elements are alike in one of its factors
        found = []
        for matrix in chosen:
            key = matrix.numpy().tobytes()
            if key not in known:
                known[key] = from_orthogonal(matrix.T)
            found.append(known[key])
        return found


def rotations(elements: Sequence[Permutation]) -> list[Representation] | None:
    """Representations that together tell a permutation group's elements apart; None if it is no group of rotations.

    Z_m and D_m have one for each prime power in m, so that angles stay far apart: Z60 turns by multiples of 90°, 120°
    and 72°. Where that power is 2, a sign is enough, which is one reflection.

    Args:
        elements: all of them, each a tuple p with x ↦ p[x]; n of them.
    """
    n = len(elements)
    generator = next((p for p in elements if _order(p) == n), None)
    if generator is not None:
        return [Representation(f"Z{q}", _spread(elements, {generator: _turn(q)})) for q in prime_powers(n)]
    return _dihedral(elements) or _polyhedral(elements)


def prime_powers(m: int) -> list[int]:
    """The powers of different primes whose product is m."""
    powers, prime = [], 2
    while m > 1:
        power = 1
        while m % prime == 0:
            power, m = power * prime, m // prime
        if power > 1:
            powers.append(power)
        prime += 1
    return powers


def _dihedral(elements: Sequence[Permutation]) -> list[Representation] | None:
    m = len(elements) // 2
    r = next((p for p in elements if _order(p) == m), None)
    if len(elements) % 2 or m < 2 or r is None:
        return None
    turned, power = set(), r
    while power not in turned:
        turned.add(power)
        power = compose(r, power)
    s = next(p for p in elements if p not in turned)
    identity = tuple(range(len(s)))
    if compose(s, s) != identity or compose(compose(r, s), compose(r, s)) != identity:
        return None
    sign = torch.ones(1, 1, dtype=torch.float64)
    found = []
    for q in prime_powers(m):
        mirror = sign if q == 2 else torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
        found.append(Representation(f"D{q}", _spread(elements, {r: _turn(q), s: mirror})))
    if m == 2:  # signs that tell r, but not yet s
        found.append(Representation("Z2", _spread(elements, {r: sign, s: -sign})))
    return found


def _polyhedral(elements: Sequence[Permutation]) -> list[Representation] | None:
    """By generators a, b with a² = b³ = (ab)ᵖ = 1, of which p tells the group.

    And so do half a turn and a third of one about axes whose angle makes their product a p-th of a turn.
    """
    if len(elements) not in POLYHEDRA:
        return None
    name, p = POLYHEDRA[len(elements)]
    halves = [a for a in elements if _order(a) == 2]
    thirds = [b for b in elements if _order(b) == 3]
    cosine = math.cos(math.pi / p) / math.sin(math.pi / 3)
    half = torch.diag(torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64))
    third = _turn_about(torch.tensor([math.sqrt(1 - cosine**2), 0, cosine], dtype=torch.float64), 2 * math.pi / 3)
    for a in halves:
        for b in thirds:
            if _order(compose(a, b)) == p and (matrices := _reached({a: half, b: third})).keys() == set(elements):
                return [Representation(name, torch.stack([matrices[g] for g in elements]))]
    return None


def _spread(elements: Sequence[Permutation], generators: dict[Permutation, Tensor]) -> Tensor:
    """The matrices [n,d,d] of all elements from those of generators."""
    reached = _reached(generators)
    return torch.stack([reached[p] for p in elements])


def _reached(generators: dict[Permutation, Tensor]) -> dict[Permutation, Tensor]:
    first, size = next((len(p), m.shape[0]) for p, m in generators.items())
    matrices = {tuple(range(first)): torch.eye(size, dtype=torch.float64)}
    fresh = list(matrices)
    for p in fresh:  # grows while it is gone through
        for generator, matrix in generators.items():
            product = compose(p, generator)
            if product not in matrices:
                matrices[product] = matrices[p] @ matrix
                fresh.append(product)
    return matrices


def compose(p: Permutation, q: Permutation) -> Permutation:
    """p ∘ q: first q, then p."""
    return tuple(p[x] for x in q)


def _order(p: Permutation) -> int:
    """The least common multiple of the lengths of its cycles."""
    lengths, seen = [], set()
    for start in range(len(p)):
        x, length = start, 0
        while x not in seen:
            seen.add(x)
            x, length = p[x], length + 1
        lengths.append(max(1, length))
    return math.lcm(*lengths)


def _turn(m: int) -> Tensor:
    """The rotation of the plane by an m-th of a turn; for m = 2 the sign −1."""
    if m == 2:
        return -torch.ones(1, 1, dtype=torch.float64)
    c, s = math.cos(2 * math.pi / m), math.sin(2 * math.pi / m)
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


def _turn_about(axis: Tensor, angle: float) -> Tensor:
    """Rodrigues' rotation about a unit vector."""
    x, y, z = axis.tolist()
    cross = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    return torch.eye(3, dtype=torch.float64) + math.sin(angle) * cross + (1 - math.cos(angle)) * (cross @ cross)
