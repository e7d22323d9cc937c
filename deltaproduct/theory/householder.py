"""Matrices as products of generalised Householder factors I − β k kᵀ, and what such products can be.

"P1" is DeltaProduct (arXiv 2502.10297), "P2" Unlocking State-Tracking (arXiv 2411.12537). n is the size of a matrix,
N a number of factors. All arithmetic is float64.

A factor with |k| = 1 and β in [0,2] is symmetric with the eigenvalue 1 − β in the direction of k and 1 in all others:
the identity at β = 0, a projection at 1, a reflection at 2.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltaproduct.errors import UsageError

TOLERANCE = 1e-9  # how far a matrix may be from orthogonal, or its norm above 1, and still be meant so


class Factors(NamedTuple):
    """N factors in the order in which a token applies them: the first acts on the state first.

    keys [N,n] float64 of unit length; betas [N] float64 in [0,2].
    """

    keys: Tensor
    betas: Tensor

    def matrix(self) -> Tensor:
        """The product [n,n] (I − β_N k_N k_Nᵀ) … (I − β_1 k_1 k_1ᵀ)."""
        product = torch.eye(self.keys.shape[1], dtype=torch.float64)
        for k, beta in zip(self.keys, self.betas, strict=True):
            product = product - beta * torch.outer(k, k @ product)
        return product

    def then(self, *others: "Factors") -> "Factors":
        """These, and after them the others: as a matrix, …·others·these."""
        all_of_them = (self, *others)
        return Factors(torch.cat([f.keys for f in all_of_them]), torch.cat([f.betas for f in all_of_them]))

    def widened(self, n: int) -> "Factors":
        """The same on the first dimensions of n, and nothing on the others."""
        return Factors(torch.nn.functional.pad(self.keys, (0, n - self.keys.shape[1])), self.betas)

    def padded(self, count: int) -> "Factors":
        """So many factors, with identities (β = 0) after these.

        Raises UsageError where there are more of them already.
        """
        missing = count - self.betas.shape[0]
        if missing < 0:
            raise UsageError(f"{self.betas.shape[0]} Householder factors do not fit into {count} per token.")
        keys = torch.eye(self.keys.shape[1], dtype=torch.float64)[:1].expand(missing, -1)
        return self.then(Factors(keys, torch.zeros(missing, dtype=torch.float64)))


def no_factors(n: int) -> Factors:
    """The identity of size n."""
    return Factors(torch.zeros(0, n, dtype=torch.float64), torch.zeros(0, dtype=torch.float64))


def from_orthogonal(matrix: Tensor) -> Factors:
    """An orthogonal matrix [n,n] as reflections, the fewest that there are: rank(matrix − I), so at most n.

    Cartan and Dieudonné: where the matrix M moves a vector x, the reflection in the direction of Mx − x takes Mx back
    to x and leaves alone whatever M leaves alone, so that each one adds a dimension to what stays in place.

    Raises UsageError when the matrix is not square or not orthogonal.
    """
    rest = _square(matrix)
    n = rest.shape[0]
    identity = torch.eye(n, dtype=torch.float64)
    if not torch.allclose(rest.T @ rest, identity, rtol=0, atol=TOLERANCE):
        raise UsageError("The matrix is not orthogonal: its transpose is not its inverse.")
    keys: list[Tensor] = []
    while True:
        moved = rest - identity
        by = moved.norm(dim=0)
        furthest = int(by.argmax()) if n else 0
        if n == 0 or by[furthest] <= 1e-7:  # a reflection's own part is at least of this order unless it is rounding
            break
        if len(keys) == n:
            raise UsageError("The matrix is too far from orthogonal to be taken apart into reflections.")
        k = moved[:, furthest] / by[furthest]
        rest = rest - 2 * torch.outer(k, k @ rest)
        keys.append(k)
    # H_r … H_1 M = I, so that M = H_1 … H_r: the last one found acts first.
    return _reflections(keys[::-1], n)


def transpositions(permutation: Sequence[int]) -> list[tuple[int, int]]:
    """Swaps of two points that, one after the other, make x ↦ permutation[x]: for each cycle one fewer than its length.

    Raises UsageError when some point is missing.
    """
    if sorted(permutation) != list(range(len(permutation))):
        raise UsageError(f"{list(permutation)} is no permutation of 0 … {len(permutation) - 1}.")
    swaps, seen = [], set()
    for start in range(len(permutation)):
        point = permutation[start]
        seen.add(start)
        # In the cycle start → a → b → … → z → start, the swaps (start a), (start b), …, (start z) follow each other: b
        # stays until the second takes it to start, and the third from there to its successor.
        cycle = []
        while point not in seen:
            seen.add(point)
            cycle.append(point)
            point = permutation[point]
        swaps += [(start, other) for other in cycle]
    return swaps


def from_permutation(permutation: Sequence[int]) -> Factors:
    """The matrix of x ↦ permutation[x], which takes e_x to e_permutation[x], as reflections that swap two points each.

    Moving k points takes k − (number of cycles) reflections (P2, Proposition 1). Raises UsageError as `transpositions`.
    """
    n = len(permutation)
    keys = []
    for a, b in transpositions(permutation):
        k = torch.zeros(n, dtype=torch.float64)
        k[a], k[b] = math.sqrt(0.5), -math.sqrt(0.5)
        keys.append(k)
    return _reflections(keys, n)


def from_rotation(angle: float) -> Factors:
    """The rotation of the plane by `angle` (radians, counter-clockwise) as two reflections."""
    half = angle / 2
    directions = [[1.0, 0.0], [math.cos(half), math.sin(half)]]
    return _reflections([torch.tensor(k, dtype=torch.float64) for k in directions], 2)


def from_contraction(matrix: Tensor) -> Factors:
    """A matrix [n,n] of norm ≤ 1 as at most 3n factors (P2, Proposition 1), by its singular values.

    U Σ Vᵀ: reflections for Vᵀ, a factor with β = 1 − σ for each singular value σ < 1, reflections for U. An orthogonal
    matrix takes at most n.

    Raises UsageError when the matrix is not square or its norm is above 1: factors with β in [0,2] cannot make it.
    """
    matrix = _square(matrix)
    n = matrix.shape[0]
    u, sigma, v = torch.linalg.svd(matrix)
    if n and sigma[0] > 1 + TOLERANCE:
        raise UsageError(f"The matrix has norm {sigma[0]:.6g}; products of factors with β in [0,2] have norm ≤ 1.")
    if n == 0 or sigma[-1] >= 1 - TOLERANCE:
        return from_orthogonal(u @ v)
    smaller = sigma < 1
    shrinking = Factors(torch.eye(n, dtype=torch.float64)[smaller], (1 - sigma)[smaller])
    return from_orthogonal(v).then(shrinking, from_orthogonal(u))


def spectrum(factors: Factors) -> Tensor:
    """The eigenvalues [n] of the product, complex128, the largest modulus first.

    The product moves vectors within the span of its keys only: 1 is an eigenvalue once for every dimension outside, and
    the others are those of the product inside. LAPACK is asked for these alone, since whether its iteration converges
    on an eigenvalue that is there many times depends on the processor's order of summation.
    """
    directions, sizes, _ = torch.linalg.svd(factors.keys[factors.betas != 0].mT, full_matrices=False)
    inside = directions[:, sizes > TOLERANCE]  # [n,r], orthonormal
    outside = torch.ones(factors.keys.shape[1] - inside.shape[1], dtype=torch.complex128)
    values = torch.cat((torch.linalg.eigvals(inside.mT @ factors.matrix() @ inside), outside))
    return values[values.abs().argsort(descending=True)]


def pair_is_complex(beta1: float, beta2: float, cosine: float) -> bool:
    """Whether (I − β2 k2 k2ᵀ)(I − β1 k1 k1ᵀ) with |k| = 1 and k1·k2 = cosine has an eigenvalue that is not real.

    P1, section 4: exactly if β1, β2 > 1 and (√(β1−1) − √(β2−1))² < β1 β2 cos² θ < (√(β1−1) + √(β2−1))². Neither a
    projection nor a factor with eigenvalues in [0,1] is ever part of a rotation.
    """
    if beta1 <= 1 or beta2 <= 1:
        return False
    a, b = math.sqrt(beta1 - 1), math.sqrt(beta2 - 1)
    return (a - b) ** 2 < beta1 * beta2 * cosine**2 < (a + b) ** 2


def _square(matrix: Tensor) -> Tensor:
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise UsageError(f"A square matrix is needed, not one of shape {list(matrix.shape)}.")
    matrix = matrix.detach().to("cpu", torch.float64)
    if not matrix.isfinite().all():
        raise UsageError("The matrix has entries that are not finite.")
    return matrix


def _reflections(keys: Sequence[Tensor], n: int) -> Factors:
    if not keys:
        return no_factors(n)
    return Factors(torch.stack(list(keys)), torch.full((len(keys),), 2.0, dtype=torch.float64))
