"""Swaps of two things out of n, which chess, code and stories have as their events: drawn, numbered, and followed.

B sequences · E events.
"""

import numpy as np
import torch
from torch import Tensor


def draw_pairs(n: int, batch: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two different numbers below n, in either order, as two [batch,count]: uniform over the n(n−1) ordered pairs."""
    first = torch.randint(n, (batch, count), generator=generator, device=generator.device)
    step = torch.randint(1, n, (batch, count), generator=generator, device=generator.device)
    return first, (first + step) % n


def unordered(n: int, first: Tensor, second: Tensor) -> Tensor:
    """The number of each pair among the n(n−1)/2 unordered ones: (0,1), (0,2), … (1,2), …"""
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    return low * (2 * n - low - 1) // 2 + high - low - 1


def follow(start: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Where one thing is after each swap of two places, [B,E], from `start` [B]; the swaps are [B,E]."""
    a, b = (np.ascontiguousarray(places.T.cpu().numpy()) for places in (first, second))  # a step reads one row
    at, out = start.cpu().numpy(), np.empty_like(a)
    for t in range(len(out)):
        out[t] = at = np.where(at == a[t], b[t], np.where(at == b[t], a[t], at))
    return torch.from_numpy(out.T.copy()).to(start.device)
