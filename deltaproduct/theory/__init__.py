"""What products of Householder reflections can do: exact constructions, and what is impossible."""

from deltaproduct.theory.cascade import Cascade, decompose
from deltaproduct.theory.compiler import STRATEGIES, Compiled, compile_automaton, compile_group
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
from deltaproduct.theory.validate import Limits
from deltaproduct.theory.verification import Verification, load, verify

__all__ = [
    "STRATEGIES",
    "Cascade",
    "Compiled",
    "Factors",
    "Limits",
    "Verification",
    "compile_automaton",
    "compile_group",
    "decompose",
    "from_contraction",
    "from_orthogonal",
    "from_permutation",
    "from_rotation",
    "load",
    "pair_is_complex",
    "spectrum",
    "transpositions",
    "verify",
]
