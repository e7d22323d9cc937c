"""theory/householder.py: matrices taken apart are put together again, with as few factors as the theorems say."""

import itertools
import math

import pytest
import torch

from deltaproduct.errors import UsageError
from deltaproduct.ops import delta_product
from deltaproduct.theory import (
    Factors,
    from_contraction,
    from_orthogonal,
    from_permutation,
    from_rotation,
    pair_is_complex,
    spectrum,
    transpositions,
)
from deltaproduct.theory.householder import no_factors

pytestmark = pytest.mark.numerical

EXACT = 1e-12  # a few dozen products of float64 matrices of size ≤ 9


def random_orthogonal(n: int, rng: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=torch.float64)).Q


def assert_makes(factors: Factors, matrix: torch.Tensor, tolerance: float = EXACT) -> None:
    assert factors.keys.dtype == factors.betas.dtype == torch.float64
    assert factors.keys.shape == (len(factors.betas), len(matrix))
    assert ((factors.keys.norm(dim=1) - 1).abs() < EXACT).all()
    assert ((factors.betas >= 0) & (factors.betas <= 2)).all()
    torch.testing.assert_close(factors.matrix(), matrix.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("seed", range(3))
def test_orthogonal_matrices_take_rank_many_reflections(n, seed):
    """Full matrices, and those that leave a subspace of every dimension in place."""
    rng = torch.Generator().manual_seed(seed)
    basis = random_orthogonal(n, rng)
    for moved in range(n + 1):
        matrix = torch.eye(n, dtype=torch.float64)
        matrix[:moved, :moved] = random_orthogonal(moved, rng)
        matrix = basis @ matrix @ basis.T
        factors = from_orthogonal(matrix)
        assert_makes(factors, matrix)
        assert (factors.betas == 2).all()
        assert len(factors.betas) == torch.linalg.matrix_rank(matrix - torch.eye(n), atol=1e-9) <= n


def test_special_orthogonal_matrices():
    for n in (1, 2, 5):
        assert len(from_orthogonal(torch.eye(n)).betas) == 0
        assert_makes(from_orthogonal(-torch.eye(n)), -torch.eye(n))
        assert len(from_orthogonal(-torch.eye(n)).betas) == n
    assert from_orthogonal(torch.zeros(0, 0)).matrix().shape == (0, 0)
    small = torch.tensor([[math.cos(1e-3), -math.sin(1e-3)], [math.sin(1e-3), math.cos(1e-3)]], dtype=torch.float64)
    assert_makes(from_orthogonal(small), small)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_every_permutation(n):
    for permutation in itertools.permutations(range(n)):
        place = list(range(n))
        for a, b in transpositions(permutation):
            place = [b if x == a else a if x == b else x for x in place]
        assert tuple(place) == permutation
        matrix = torch.zeros(n, n, dtype=torch.float64)
        matrix[list(permutation), list(range(n))] = 1  # column x is e_permutation[x]
        factors = from_permutation(permutation)
        assert_makes(factors, matrix)
        moved = sum(x != y for x, y in enumerate(permutation))
        assert len(factors.betas) == len(from_orthogonal(matrix).betas) <= max(0, moved - 1)


def test_rotations_take_two_reflections():
    for angle in (0.0, 0.1, math.pi / 3, math.pi, 5.0, -2 * math.pi / 7):
        c, s = math.cos(angle), math.sin(angle)
        assert_makes(from_rotation(angle), torch.tensor([[c, -s], [s, c]], dtype=torch.float64))
        assert len(from_rotation(angle).betas) == 2


@pytest.mark.parametrize("n", range(1, 9))
def test_contractions_take_at_most_three_times_their_size(n):
    rng = torch.Generator().manual_seed(n)
    for sigma in (torch.rand(n, generator=rng), torch.ones(n), torch.zeros(n), torch.linspace(0, 1, n)):
        matrix = random_orthogonal(n, rng) @ torch.diag(sigma.double()) @ random_orthogonal(n, rng)
        factors = from_contraction(matrix)
        assert_makes(factors, matrix)
        assert len(factors.betas) <= (n if (sigma == 1).all() else 3 * n)


def test_factors_are_what_the_operator_applies():
    """A token with these keys and β takes the state S to matrix · S."""
    rng = torch.Generator().manual_seed(0)
    matrix = 0.9 * random_orthogonal(4, rng)
    factors = from_contraction(matrix).padded(14)
    state = torch.randn(1, 1, 4, 3, generator=rng, dtype=torch.float64)
    _, final = delta_product(
        torch.zeros(1, 1, 1, 4, dtype=torch.float64), factors.keys[None, None, :, None],
        torch.zeros(1, 1, 14, 1, 3, dtype=torch.float64), factors.betas[None, None, :, None],
        initial_state=state, output_final_state=True, backend="reference",
    )  # fmt: skip
    torch.testing.assert_close(final[0, 0], matrix @ state[0, 0], rtol=0, atol=EXACT)


def test_composition_and_padding():
    one, other = from_rotation(0.3), from_rotation(0.5)
    assert_makes(one.then(other), from_rotation(0.8).matrix())
    assert_makes(one.padded(5), one.matrix())
    assert no_factors(3).padded(2).matrix().equal(torch.eye(3, dtype=torch.float64))
    with pytest.raises(UsageError, match="2 Householder factors do not fit into 1"):
        one.padded(1)


def test_spectrum_of_a_rotation():
    values = spectrum(from_rotation(0.7))
    assert sorted(values.imag.tolist()) == pytest.approx([-math.sin(0.7), math.sin(0.7)])
    shrunk = spectrum(from_contraction(torch.diag(torch.tensor([0.5, -1.0, 0.1]))))
    assert shrunk.real.tolist() == pytest.approx([-1, 0.5, 0.1])


def test_spectrum_of_many_equal_eigenvalues():
    """One direction many times, and one of two opposite ones: what LAPACK sees has no eigenvalue twice."""
    rng = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(2, 40, generator=rng, dtype=torch.float64), dim=-1)
    same = Factors(directions[:1].expand(7, -1), torch.full((7,), 2.0, dtype=torch.float64))
    assert_spectrum(same, [-1] + [1] * 39)
    shrinking = Factors(torch.cat((directions[:1], -directions[:1])), torch.tensor([1.5, 1.5], dtype=torch.float64))
    assert_spectrum(shrinking, [1] * 39 + [0.25])
    turn = Factors(directions, torch.full((2,), 2.0, dtype=torch.float64))
    angle = 2 * math.acos(float(directions[0] @ directions[1]))
    values = spectrum(turn)
    assert (values == 1).sum() == 38
    assert sorted(values[values != 1].angle().abs().tolist()) == pytest.approx([2 * math.pi - angle] * 2, abs=1e-9)
    assert_spectrum(no_factors(3), [1] * 3)
    assert_spectrum(no_factors(3).padded(2), [1] * 3)


def assert_spectrum(factors, wanted):
    values = spectrum(factors)
    assert values.dtype == torch.complex128 and len(values) == len(wanted)
    assert sorted(values.real.tolist()) == pytest.approx(sorted(wanted), abs=1e-12)
    assert values.imag.abs().max() < 1e-12


def test_a_pair_is_complex_exactly_where_the_condition_says():
    rng, seen = torch.Generator().manual_seed(0), set()
    draws = torch.rand(4000, 3, generator=rng, dtype=torch.float64)
    for beta1, beta2, cosine in (draws * torch.tensor([2.0, 2.0, 1.0])).tolist():
        keys = torch.tensor([[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]], dtype=torch.float64)
        m = Factors(keys, torch.tensor([beta1, beta2], dtype=torch.float64)).matrix()
        discriminant = float(m.trace() ** 2 - 4 * torch.linalg.det(m))
        if abs(discriminant) > 1e-9:  # on the boundary the eigenvalues meet, and rounding decides
            assert pair_is_complex(beta1, beta2, cosine) == (discriminant < 0), (beta1, beta2, cosine)
            seen.add((discriminant < 0, beta1 > 1 and beta2 > 1))
    assert seen == {(True, True), (False, True), (False, False)}


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: from_orthogonal(torch.ones(2, 2)),
        lambda: from_orthogonal(torch.ones(2, 3)),
        lambda: from_orthogonal(torch.full((2, 2), math.nan)),
        lambda: from_contraction(1.01 * torch.eye(3)),
        lambda: from_contraction(torch.ones(3)),
        lambda: from_permutation([0, 0, 1]),
        lambda: from_permutation([1, 2, 3]),
    ],
)
def test_mistakes_are_one_clear_line(mistake):
    with pytest.raises(UsageError) as e:
        mistake()
    assert str(e.value).endswith(".") and "\n" not in str(e.value)
