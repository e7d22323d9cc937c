"""Groups as orthogonal matrices, of a size and kind that few Householder factors make.

A representation here gives each element g of a group of n elements a matrix R_g [d,d] with R_{g∘h} = R_g R_h. One
layer with a head per row of R_g follows the group exactly if the representations tell all elements apart (P1, Theorems
1 and 4; P2, Theorem 3).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaproduct.tasks.groups import Group, Permutation, build_group
from deltaproduct.theory.householder import Factors, from_orthogonal, no_factors, transpositions


@dataclass(frozen=True, eq=False)
class Representation:
    """Orthogonal matrices [n,d,d] float64 of a group's n elements, in its order."""

    name: str
    matrices: Tensor

    @property
    def size(self) -> int:
        """d."""
        return self.matrices.shape[1]

    def factors(self) -> list[Factors]:
        """Each element's matrix transposed, as reflections: what its token does to a state that holds R_gᵀ."""
        return [from_orthogonal(matrix.T) for matrix in self.matrices]


def representations(name: str) -> tuple[Group, list[Representation]]:
    """A group of `tasks/groups.py` by its name, and representations that together tell its elements apart.

    * Z_m: a rotation of the plane for each prime power in m, so that angles stay far apart (Z60: 90°, 120°, 72°), or a
      sign where that is 2.
    * D_m: the plane's rotations and mirrorings of the regular m-gon.
    * A_4, S_4, A_5: the rotations of tetrahedron, cube and icosahedron, products of two reflections in three
      dimensions.
    * other S_m and A_m: permutations of the m corners of a regular simplex in m − 1 dimensions.
    * direct products: those of their factors.

    Raises UsageError as `build_group`.
    """
    group = build_group(name)
    found: list[Representation] = []
    offset = 0
    for part in name.split("_x_"):
        m = int(part[1:])
        own = [tuple(x - offset for x in p[offset : offset + m]) for p in group.elements]
        found += _of_factor(part[0], m, own)
        offset += m
    return group, found


def _of_factor(family: str, m: int, elements: Sequence[Permutation]) -> list[Representation]:
    if family == "Z":
        shift = torch.tensor([p[0] for p in elements], dtype=torch.float64)
        return [Representation(f"Z{q}", _cyclic(shift % q, q)) for q in _prime_powers(m)]
    if family == "D":
        return [Representation(f"D{m}", _of_points(_polygon(m), elements))]
    if family == "A" and m == 5:
        return [Representation("A5", _icosahedron(elements))]
    matrices = _of_points(simplex(m), elements)
    if family == "S" and m == 4:  # −1 in three dimensions is no rotation: times it, odd permutations are
        matrices = matrices * torch.linalg.det(matrices).round()[:, None, None]
    return [Representation(f"{family}{m}", matrices)]


def _prime_powers(m: int) -> list[int]:
    powers, prime = [], 2
    while m > 1:
        power = 1
        while m % prime == 0:
            power, m = power * prime, m // prime
        if power > 1:
            powers.append(power)
        prime += 1
    return powers


def _cyclic(steps: Tensor, m: int) -> Tensor:
    """Rotations of the plane by so many m-ths of a turn; for m = 2 a sign is enough, and one reflection."""
    if m == 2:
        return (1 - 2 * steps)[:, None, None]
    angles = 2 * math.pi * steps / m
    c, s = angles.cos(), angles.sin()
    return torch.stack((torch.stack((c, -s), -1), torch.stack((s, c), -1)), -2)


def _polygon(m: int) -> Tensor:
    """The corners [m,2] of a regular polygon."""
    angles = 2 * math.pi * torch.arange(m, dtype=torch.float64) / m
    return torch.stack((angles.cos(), angles.sin()), 1)


def simplex(m: int) -> Tensor:
    """The corners [m,m−1] of a regular simplex, unit vectors with the products −1/(m−1)."""
    # Each corner is on the next axis as far as it is not settled by the axes before.
    corners = torch.zeros(m, m - 1, dtype=torch.float64)
    for axis in range(m - 1):
        height = math.sqrt(1 - float(corners[axis, :axis].square().sum()))
        corners[axis, axis] = height
        corners[axis + 1 :, axis] = (-1 / (m - 1) - corners[axis + 1 :, :axis] @ corners[axis, :axis]) / height
    return corners


def swaps(permutation: Permutation, corners: Tensor) -> Factors:
    """Reflections that take every corner x of a simplex to corner permutation[x], two of them at a time."""
    keys = [corners[a] - corners[b] for a, b in transpositions(permutation)]
    if not keys:
        return no_factors(corners.shape[1])
    directions = torch.nn.functional.normalize(torch.stack(keys), dim=-1)
    return Factors(directions, torch.full((len(keys),), 2.0, dtype=torch.float64))


def _of_points(points: Tensor, elements: Sequence[Permutation]) -> Tensor:
    """The isometries that permute `points` [m,d], whose outer products add up to m/d times the identity, so."""
    m, d = points.shape
    images = points[torch.tensor(elements)]  # [n,m,d]
    return torch.einsum("nmi,mj->nij", images, points) * (d / m)


def _icosahedron(elements: Sequence[Permutation]) -> Tensor:
    """A5 as rotations: it is what two generators a, b make with a² = b³ = (ab)⁵ = 1.

    And so do half a turn and a third of one about axes whose angle makes their product a fifth of a turn.
    """
    identity = tuple(range(5))

    def compose(p: Permutation, q: Permutation) -> Permutation:
        return tuple(p[x] for x in q)

    a = (1, 0, 3, 2, 4)
    cosine = math.cos(math.pi / 5) / math.sin(math.pi / 3)
    half = torch.diag(torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64))
    third = _turn(torch.tensor([math.sqrt(1 - cosine**2), 0, cosine], dtype=torch.float64), 2 * math.pi / 3)
    b = next(p for p in elements if compose(p, compose(p, p)) == identity != p and _order(compose(a, p), compose) == 5)
    matrices = {identity: torch.eye(3, dtype=torch.float64)}
    fresh = [identity]
    while fresh:
        p = fresh.pop()
        for generator, matrix in ((a, half), (b, third)):
            product = compose(p, generator)
            if product not in matrices:
                matrices[product] = matrices[p] @ matrix
                fresh.append(product)
    return torch.stack([matrices[p] for p in elements])


def _order(p: Permutation, compose: Callable[[Permutation, Permutation], Permutation]) -> int:
    power, order = p, 1
    while power != tuple(range(len(p))):
        power, order = compose(p, power), order + 1
    return order


def _turn(axis: Tensor, angle: float) -> Tensor:
    """Rodrigues' rotation about a unit vector."""
    x, y, z = axis.tolist()
    cross = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    return torch.eye(3, dtype=torch.float64) + math.sin(angle) * cross + (1 - math.cos(angle)) * (cross @ cross)
