"""Points on a circle, told apart by the signs of what heads read: on which side of some lines a point is."""

import math

import torch
from torch import Tensor

FLIP = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))  # a mirroring
CORNER = torch.tensor([[1.0, 0.0]], dtype=torch.float64)  # which it leaves alone


def points(q: int) -> Tensor:
    """The corners [q,2] of a regular polygon, the first of them (1,0)."""
    angles = 2 * math.pi * torch.arange(q, dtype=torch.float64) / q
    return torch.stack((angles.cos(), angles.sin()), 1)


def lines(q: int) -> Tensor:
    """Normals [L,2] of the fewest lines through the centre that separate the corners of `points(q)` from each other.

    For even q each line goes through the middles of two opposite gaps, L = q/2. For odd q what lies opposite a gap's
    middle is a corner: the line goes a quarter of a gap beside it, and L = (q+1)/2.
    """
    gap = 2 * math.pi / q
    if q % 2 == 0:
        angles = gap * (torch.arange(q // 2, dtype=torch.float64) + 1 / 2)
    else:
        angles = gap * (torch.arange((q + 1) // 2, dtype=torch.float64) + 1 / 4)
    return torch.stack((-angles.sin(), angles.cos()), 1)
