"""How many dimensions a head's state uses: its effective rank, by position (arXiv 2502.10297; the measure is Roy and
Vetterli's, EUSIPCO 2007).

T tokens · N Householder steps per token · HV value heads · K, V sizes of a head.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deltaproduct.analysis.trace import trace, traced_layers
from deltaproduct.evaluation.windows import Text, TokensDone, check_length
from deltaproduct.models import SequenceModel

PAPERS_LENGTH = 16_384  # tokens over which the papers record it
THRESHOLD = 2.2e-16  # singular values up to this one count as 0


@dataclass(frozen=True)
class EffectiveRanks:
    """The effective rank of every head's state while a model reads one window of a text."""

    ranks: dict[int, Tensor]  # by layer: [T,N,HV] float64, after each Householder step
    document_starts: list[int]  # the window's tokens that begin a document

    def means(self, start: int = 0, stop: int | None = None) -> dict[int, list[float]]:
        """By layer, each head's mean over tokens start … stop − 1; NaN where there are none."""
        return {layer: ranks[start:stop].mean((0, 1)).tolist() for layer, ranks in self.ranks.items()}


def effective_rank(states: Tensor) -> Tensor:
    """exp(−Σ p ln p) with p = σ/Σσ, over the singular values σ of matrices [...,K,V] that are above 2.2e-16 → [...].

    It lies between 1, when one singular value outweighs all others, and min(K,V), when all are equal; a matrix without
    any has rank 0, one that is not finite NaN. float64, in which the singular values are computed: what rounding leaves
    beside them in a float32 state, 1e-7 of the largest, adds some 1e-6 each. Where everything was erased, this is the
    rank of what rounding left.
    """
    states = states.double()
    finite = states.isfinite().all(-1).all(-1)
    sigma = torch.linalg.svdvals(states.where(finite[..., None, None], 0))
    sigma = sigma.where(sigma > THRESHOLD, 0)
    total = sigma.sum(-1)
    p = sigma / total.where(total > 0, 1)[..., None]
    return torch.special.entr(p).sum(-1).exp().where(total > 0, 0).where(finite, torch.nan)


def effective_ranks(
    model: SequenceModel,
    text: Text,
    *,
    length: int = PAPERS_LENGTH,
    piece: int | None = None,
    progress: TokensDone | None = None,
) -> EffectiveRanks:
    """Follow the effective rank of every DeltaProduct head's state over the first T tokens of a text.

    Args:
        text: whose tokens the model's vocabulary has (`evaluation.windows.check_vocabulary`).
        length: T.
        piece: tokens whose states are held at once; None: see `analysis.trace.trace`.
        progress: is told how many tokens are done.

    Raises:
        UsageError: no layer of the model has a trace, or the text is too short.
    """
    layers = traced_layers(model)
    check_length(text, length)
    ranks = {
        layer: torch.empty(length, mixer.num_householder, mixer.num_v_heads, dtype=torch.float64)
        for layer, mixer in layers.items()
    }
    for layer, start, states in trace(model, text.tokens(0, length)[None], piece=piece):
        found = effective_rank(states[0]).cpu()  # [t,N,HV]
        ranks[layer][start : start + len(found)] = found
        if progress is not None and layer == max(layers):
            progress(start + len(found))
    starts = text.document_offsets[: np.searchsorted(text.document_offsets, length)]
    return EffectiveRanks(ranks, starts.tolist())
