"""How sequences are cut into chunks, and chunks into segments, for the kernels: sizes, and tables for packed sequences.

What depends on the lengths of packed sequences stays on the device: sizes are bounds, and places that no sequence needs
have no tokens.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from deltaproduct.ops.inputs import num_sequences

MIN_TILE = 16  # the smallest side of a matrix product
WIDE_KEY = 128  # above it, chunks have half the rows: accumulators [C,K] have to fit into registers
KEPT_EVERY = 8  # chunks from one kept state to the next, where a sequence is run through as a whole


def tile(size: int) -> int:
    """The power of two that holds `size`, at least the smallest side of a product."""
    return max(MIN_TILE, triton.next_power_of_2(size))


@dataclass(frozen=True)
class Layout:
    """Sizes that shapes alone decide.

    Attributes:
        sequences, length: how many, and the tokens of each, or of all where they are packed.
        steps: N.
        rows: C, the rows of a chunk. tokens: of a chunk. token_rows: BT.
        span: chunks in a segment.
        segmented: whether segments run side by side in the forward scan, with their states found first.
        packed: whether lengths differ.
    """

    sequences: int
    length: int
    steps: int
    rows: int
    tokens: int
    token_rows: int
    span: int
    segmented: bool
    packed: bool

    @classmethod
    def of(cls, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, processors: int) -> "Layout":
        """`processors`: how many programs can run at once; a scan of fewer is divided in time."""
        batch, length, steps, _, key_dim = k.shape
        rows = max(64 if key_dim <= WIDE_KEY else 32, tile(steps))
        tokens = rows // steps
        packed = cu_seqlens is not None
        sequences = num_sequences(batch, cu_seqlens)
        span, segmented = _division(sequences, length, tokens, packed, v.shape[3], v.shape[4], processors)
        return cls(sequences, length, steps, rows, tokens, tile(tokens), span, segmented, packed)

    @property
    def chunks(self) -> int:
        """Of each sequence where they are equally long, otherwise a bound for all."""
        return self.length // self.tokens + self.sequences if self.packed else -(-self.length // self.tokens)

    @property
    def segments(self) -> int:
        """The same for segments."""
        if self.packed:
            return self.length // (self.tokens * self.span) + self.sequences
        return -(-self.chunks // self.span)

    @property
    def all_chunks(self) -> int:
        return self.chunks if self.packed else self.sequences * self.chunks

    @property
    def all_segments(self) -> int:
        return self.segments if self.packed else self.sequences * self.segments

    def tables(self, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
        """For packed sequences (table, starts, owners), all int32; None otherwise.

        table [chunks,2]: the first token and the number of tokens of every chunk. starts [S+2,2]: the first chunk and
        the first segment of every sequence, and twice where all end. owners [segments]: whose it is; S is nobody.
        """
        if cu_seqlens is None:
            return None
        ends = cu_seqlens.long()
        lengths = ends.diff()
        chunks = -(-lengths // self.tokens)
        counts = torch.stack([chunks, -(-chunks // self.span)], dim=1)
        starts = torch.cat([counts.new_zeros(1, 2), counts.cumsum(0)])
        starts = torch.cat([starts, starts[-1:]])
        device = cu_seqlens.device
        number = torch.arange(self.all_chunks, device=device)
        owner = torch.searchsorted(starts[1:-1, 0].contiguous(), number, right=True)
        lengths = torch.cat([lengths, lengths.new_zeros(1)])  # nobody's chunks have no tokens
        begin = (number - starts[owner, 0]) * self.tokens
        table = torch.stack([ends[owner] + begin, (lengths[owner] - begin).clamp(0, self.tokens)], dim=1)
        number = torch.arange(self.all_segments, device=device)
        owners = torch.searchsorted(starts[1:-1, 1].contiguous(), number, right=True)
        return table.int(), starts.int(), owners.int()


def _division(
    sequences: int, length: int, tokens: int, packed: bool, heads: int, value_dim: int, processors: int
) -> tuple[int, bool]:
    """(chunks in a segment, whether segments run side by side)."""
    side_by_side = sequences * heads * max(1, value_dim // 64)
    chunks = -(-length // tokens) if not packed else length // tokens // sequences + 1
    # A segment's summary costs twice what it saves in waiting, so that a few of them gain nothing.
    wanted = processors // side_by_side
    if wanted < 4 or chunks < 4 * wanted:
        return KEPT_EVERY, False
    return max(KEPT_EVERY, -(-chunks // (2 * wanted))), True
