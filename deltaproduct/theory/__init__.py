"""What products of Householder reflections can do: exact constructions, and what is impossible."""

from typing import TYPE_CHECKING

from deltaproduct.late import late

if TYPE_CHECKING:
    from deltaproduct.theory.cascade import Cascade, decompose
    from deltaproduct.theory.certificate import Certificate, certificates
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
    from deltaproduct.theory.limits import Limits
    from deltaproduct.theory.theorems.explanation import Explanation, explain
    from deltaproduct.theory.theorems.model_class import ModelClass
    from deltaproduct.theory.verification import Verification, load, verify

__all__ = [
    "STRATEGIES",
    "Cascade",
    "Certificate",
    "Compiled",
    "Explanation",
    "Factors",
    "Limits",
    "ModelClass",
    "Verification",
    "certificates",
    "compile_automaton",
    "compile_group",
    "decompose",
    "explain",
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

__getattr__, __dir__ = late(
    __name__,
    {
        "cascade": ("Cascade", "decompose"),
        "certificate": ("Certificate", "certificates"),
        "compiler": ("STRATEGIES", "Compiled", "compile_automaton", "compile_group"),
        "householder": (
            "Factors",
            "from_contraction",
            "from_orthogonal",
            "from_permutation",
            "from_rotation",
            "pair_is_complex",
            "spectrum",
            "transpositions",
        ),
        "theorems": ("Explanation", "ModelClass", "explain"),
        "limits": ("Limits",),
        "verification": ("Verification", "load", "verify"),
    },
)
