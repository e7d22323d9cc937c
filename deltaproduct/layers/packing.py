"""Packed sequences laid side by side, for the mixers that work on rows of one length.

N packed tokens · S sequences · T tokens of the longest of them.
"""

import torch
from torch import Tensor


def unpack(packed: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """packed [1,N,…] and cu_seqlens [S+1] → (rows [S,T,…] with zeros behind the shorter ones, real [S,T] bool)."""
    lengths = cu_seqlens.diff().long()
    longest = int(lengths.max())
    real = torch.arange(longest, device=packed.device) < lengths[:, None]
    rows = packed.new_zeros(*real.shape, *packed.shape[2:])
    return rows.masked_scatter(real.view(*real.shape, *[1] * (packed.dim() - 2)), packed), real


def real_tokens(x: Tensor, lengths: Tensor) -> Tensor:
    """[B,T] bool: which tokens of rows x [B,T,…] belong to the first `lengths` [B] of theirs."""
    return torch.arange(x.shape[1], device=x.device) < lengths[:, None]


def pack(rows: Tensor, real: Tensor) -> Tensor:
    """The inverse of `unpack`: rows [S,T,…] and real [S,T] → [1,N,…]."""
    return rows[real][None]
