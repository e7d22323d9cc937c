"""What products of Householder reflections can do: exact constructions, and what is impossible."""

from deltaproduct.theory.cascade import Cascade, decompose
from deltaproduct.theory.householder import (
    Factors,
    from_contraction,
    from_orthogonal,
    from_permutation,
    from_rotation,
    pair_is_complex,
    spectrum,
    transpositions,
)

__all__ = [
    "Cascade",
    "Factors",
    "decompose",
    "from_contraction",
    "from_orthogonal",
    "from_permutation",
    "from_rotation",
    "pair_is_complex",
    "spectrum",
    "transpositions",
]
