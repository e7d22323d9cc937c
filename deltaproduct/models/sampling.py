"""Drawing the next token from a model's logits.

V size of the vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaproduct.errors import UsageError

SEEDS = 2**32  # PyTorch's CPU generator uses no more of a seed (see seeds.py)


@dataclass(frozen=True)
class Sampling:
    """What is done to the logits before a token is drawn, in this order, and the seed of the draws.

    Args:
        temperature: the logits are divided by it; 0 takes the likeliest token.
        top_k: keep so many of the likeliest tokens; 0 keeps all.
        top_p: of those, keep the fewest whose probabilities add up to this (arXiv 1904.09751, section 3.1).
        seed: of the random numbers.

    Raises:
        UsageError: a value is impossible; the message names the field.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise UsageError(f"temperature must be 0 or more and finite, not {self.temperature}.")
        if self.top_k < 0:
            raise UsageError(f"top_k must be 0 (all tokens) or more, not {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, not {self.top_p}.")
        if not 0 <= self.seed < SEEDS:
            raise UsageError(f"seed must be from 0 to {SEEDS - 1}, not {self.seed}.")

    def generator(self) -> torch.Generator:
        """A fresh stream of random numbers, on the CPU, so that it is the same whatever device the model is on."""
        return torch.Generator().manual_seed(self.seed)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """What a token is drawn from: logits [...,V] → [...,V] in float64, which add up to 1.

    Of equally likely tokens, the one with the lower number counts as the likelier.

    Raises:
        UsageError: a logit is not finite.
    """
    logits = logits.double()
    if not bool(logits.isfinite().all()):
        raise UsageError("The model's logits are not all finite, so no token can be drawn; its weights are damaged.")
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1)
    scaled = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature  # no temperature is too small for that
    if sampling.top_k == 0 and sampling.top_p == 1:
        return scaled.softmax(-1)
    ranked, order = scaled.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        ranked[..., sampling.top_k :] = -torch.inf
    p = ranked.softmax(-1)
    if sampling.top_p < 1:  # with 1, rounding could drop the least likely tokens
        likelier = p.cumsum(-1) - p
        p = p.where(likelier < sampling.top_p, 0)
    return torch.zeros_like(p).scatter(-1, order, p / p.sum(-1, keepdim=True))


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token after logits [V]: one random number of the generator, or none with temperature 0."""
    p = probabilities(logits.cpu(), sampling)
    if sampling.temperature == 0:
        return int(p.argmax())
    # A token's share of [0,1) is half open, so that one of probability 0 has none.
    at = torch.rand(1, dtype=torch.float64, generator=generator)
    below = p.cumsum(-1)
    return int(torch.searchsorted(below, at * below[-1], right=True))
