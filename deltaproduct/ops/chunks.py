"""Where the tokens of each chunk lie: dense or packed sequences cut into chunks, in the order of the scan."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from deltaproduct.ops.inputs import num_sequences, pad_time, sequence_bounds

CHUNK_STEPS = 32  # Householder steps in a chunk; measured on CPU against 16 and 64 (docs/LOG.md)
GROUP_ELEMENTS = {"cpu": 1 << 19}  # steps × heads × (K + V) worked on at once: a temporary is then about 1 MB
GROUP_ELEMENTS_DEFAULT = 1 << 26  # on an accelerator: as much in parallel as memory allows


def chunk_tokens(steps_per_token: int) -> int:
    """Tokens in a chunk: chunks end where tokens do, and hold about CHUNK_STEPS steps."""
    return max(1, CHUNK_STEPS // steps_per_token)


class Inputs(NamedTuple):
    """The operator's differentiable sequences, or their gradients; shapes as in `delta_product`."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None


@dataclass(frozen=True)
class Chunks:
    """Where each chunk's tokens lie. Chunks are numbered in scan order: all first chunks, then all second ones, …

    In scan order the chunks that can be worked on together are one slice: step i of the scan is the rows
    `starts[i] : starts[i+1]`, and they belong to the first `starts[i+1] − starts[i]` sequences, longest first.
    """

    tokens: int  # c, tokens in a chunk
    sequences: int
    starts: list[int]
    order: Tensor | None = None  # packed only: sequences by decreasing length
    index: Tensor | None = None  # packed only: [chunks, c], the token at each place, T where there is none

    @classmethod
    def of(cls, x: Inputs, cu_seqlens: Tensor | None, c: int) -> "Chunks":
        batch, length = x.v.shape[:2]
        if cu_seqlens is None:
            return cls(c, batch, [i * batch for i in range(-(-length // c) + 1)])
        bounds = sequence_bounds(cu_seqlens)
        order = sorted(range(len(bounds)), key=lambda s: bounds[s][0] - bounds[s][1])
        starts, spans = [0], []
        while True:
            depth = (len(starts) - 1) * c
            alive = [(bounds[s][0] + depth, bounds[s][1]) for s in order if bounds[s][0] + depth < bounds[s][1]]
            if not alive:
                break
            spans += alive
            starts.append(len(spans))
        first, end = torch.tensor(spans).unsqueeze(-1).unbind(1)
        place = first + torch.arange(c)
        index = torch.where(place < end, place, length)
        device = x.v.device
        return cls(c, len(bounds), starts, torch.tensor(order, device=device), index.to(device))

    def groups(self, x: Inputs) -> Iterator[tuple[int, int]]:
        """Consecutive scan steps (lo, hi) small enough to work on at once, at least one each."""
        per_chunk = self.tokens * x.v.shape[2] * x.v.shape[3] * (x.v.shape[4] + x.k.shape[4])
        limit = GROUP_ELEMENTS.get(x.v.device.type, GROUP_ELEMENTS_DEFAULT)
        lo, steps = 0, len(self.starts) - 1
        while lo < steps:
            hi = lo + 1
            while hi < steps and (self.starts[hi + 1] - self.starts[lo]) * per_chunk <= limit:
                hi += 1
            yield lo, hi
            lo = hi

    def scan(self, lo: int, hi: int, heads: int) -> Iterator[slice]:
        """The rows of each scan step lo … hi−1 within that group's [chunks·heads, ...] tensors."""
        for i in range(lo, hi):
            yield slice(*((self.starts[j] - self.starts[lo]) * heads for j in (i, i + 1)))

    def take(self, x: Tensor, lo: int, hi: int) -> Tensor:
        """Tokens [B,T,...] of scan steps lo … hi−1 as chunks [steps, chunks a step, c, ...], a view where it can be.

        Places without a token are zero. Packed sequences have all their chunks in one "step".
        """
        c = self.tokens
        if self.index is None:
            x = pad_time(x[:, lo * c : hi * c], (hi - lo) * c)
            return x.unflatten(1, (hi - lo, c)).transpose(0, 1)
        index = self.index[self.starts[lo] : self.starts[hi]]
        rows = x[0].index_select(0, index.clamp(max=x.shape[1] - 1).flatten()).unflatten(0, index.shape)
        missing = (index == x.shape[1]).reshape(*index.shape, *[1] * (x.dim() - 2))
        return rows.masked_fill(missing, 0)[None]

    def put(self, out: Tensor, chunks: Tensor, lo: int, hi: int) -> None:
        """The inverse of `take`: write chunks [rows, c, ...] to their tokens in out [B,T,...]."""
        c = self.tokens
        if self.index is None:
            x = chunks.unflatten(0, (hi - lo, out.shape[0])).transpose(0, 1)
            whole = min(out.shape[1] // c, hi) - lo  # all chunks but perhaps the last are full
            out[:, lo * c : (lo + whole) * c].unflatten(1, (whole, c)).copy_(x[:, :whole])
            if lo + whole < hi:
                rest = out[:, (lo + whole) * c : hi * c]
                rest.copy_(x[:, -1, : rest.shape[1]])
            return
        index = self.index[self.starts[lo] : self.starts[hi]].flatten()
        real = index < out.shape[1]
        out[0].index_copy_(0, index[real], chunks.flatten(0, 1)[real].to(out.dtype))

    def longest_first(self, state: Tensor) -> Tensor:
        """States in the caller's order of sequences → in scan order."""
        return state if self.order is None else state[self.order]

    def as_given(self, state: Tensor) -> Tensor:
        """The inverse of `longest_first`."""
        return state if self.order is None else torch.empty_like(state).index_copy_(0, self.order, state)


def kept_states(batch: int, length: int, c: int, cu_seqlens: Tensor | None) -> int:
    """How many states are kept, one for every c tokens: exact when dense, a bound known without reading cu_seqlens when
    packed."""
    sequences = num_sequences(batch, cu_seqlens)
    return batch * -(-length // c) if cu_seqlens is None else length // c + sequences
