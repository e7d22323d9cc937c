"""Classes of linear RNNs that theorems speak of."""

from dataclasses import dataclass

from deltaproduct.errors import UsageError


@dataclass(frozen=True)
class ModelClass:
    """Linear RNNs of L layers with one kind of transition.

    "deltaproduct" is a product of N factors I − β k kᵀ, times a gate in [0,1] if `gated`; "diagonal" a real diagonal
    matrix, as in Mamba, GLA or mLSTM. `allow_neg_eigval`: the eigenvalues of each factor, or the diagonal's entries,
    are in [-1,1], else in [0,1].

    Raises:
        UsageError: a value is impossible; the message names the field.
    """

    num_householder: int = 1
    layers: int = 1
    allow_neg_eigval: bool = True
    gated: bool = False
    transition: str = "deltaproduct"

    def __post_init__(self) -> None:
        for name in ("num_householder", "layers"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.transition not in ("deltaproduct", "diagonal"):
            raise UsageError(f"transition must be deltaproduct or diagonal, not {self.transition!r}.")
        if self.diagonal and self.num_householder > 1:
            raise UsageError("num_householder is the deltaproduct transition's; a diagonal one has no such factors.")

    @property
    def diagonal(self) -> bool:
        """Whether the transitions are diagonal."""
        return self.transition == "diagonal"

    @property
    def only_real(self) -> bool:
        """Whether P2's Theorem 2 applies: in layer i, products of 2^(i−1) transitions have real eigenvalues only.

        Real diagonal matrices always have. One factor is symmetric, and of two with eigenvalues in [0,1] the product
        is similar to a symmetric one (P2, Proposition 1); a product of two reflections is a rotation, and three
        projections can make one that shrinks (tests/theory/test_theorems.py). A gate changes nothing of that.
        """
        most = 1 if self.allow_neg_eigval else 2
        return self.diagonal or (self.layers <= 2 and self.num_householder * 2 ** (self.layers - 1) <= most)

    def __str__(self) -> str:
        kind = "diagonal linear RNN" if self.diagonal else f"DeltaProduct_{self.num_householder}"
        gated = "gated " if self.gated and not self.diagonal else ""
        return f"{gated}{kind}{'[-1,1]' if self.allow_neg_eigval else '[0,1]'} with {layers_in_words(self.layers)}"


def layers_in_words(layers: int) -> str:
    """ "1 layer", "2 layers"."""
    return f"{layers} layer{'s' * (layers > 1)}"
