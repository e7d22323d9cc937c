"""Batches of a split as a pure function of (seed, step, rank): there is nothing to save in order to resume.

The split is read as a ring, on which its last token is followed by the first document's document token. An epoch lays
num_tokens // T windows of T inputs end to end on the ring, from a place drawn for the epoch, and visits each once in an
order drawn for the epoch. The order is a keyed permutation, computed index by index, so that memory does not grow with
the corpus.
"""

import hashlib
from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deltaproduct.corpus.reader import Split
from deltaproduct.errors import UsageError

ROUNDS = 4  # of the Feistel network: Luby and Rackoff (1988) need four for a strong pseudorandom permutation


class Batch(NamedTuple):
    """What one rank trains on in one step; targets[…, i] is the token that follows inputs[…, i] in the stream.

    b sequences of the rank · T tokens in each · S packed sequences.

    Attributes:
        inputs: int64 [b,T]; packed [1,b·T].
        targets: of the same shape. A document's last token has the next document's document token as its target.
        cu_seqlens: int64 [S+1] from 0 to b·T where packed: every window's start and every document's start within
            them; None where windows are plain.
    """

    inputs: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None


class _Batches(ABC):
    """Windows of a split, by step and rank."""

    def __init__(self, split: Split, length: int, *, seed: int):
        """Windows of `length` inputs and as many targets.

        Raises:
            UsageError: the length is below 1, or the split has fewer than length + 1 tokens.
        """
        if length < 1:
            raise UsageError(f"The context must be at least 1 token, not {length}.")
        if split.num_tokens < length + 1:
            raise UsageError(
                f"The split {split.name} has {split.num_tokens} tokens, but a context of {length} needs {length + 1}; "
                "take a shorter context or a larger corpus."
            )
        self.split, self.length, self.seed = split, length, seed
        self.windows_per_epoch = split.num_tokens // length

    @abstractmethod
    def batch(self, step: int, size: int, *, rank: int = 0, ranks: int = 1) -> Batch:
        """The batch of one step.

        Args:
            step: counted from 0.
            size: sequences in the batch of all ranks together; it has to stay the same over a run, because step s takes
                up where s·size sequences end.
            rank: which of `ranks` equal parts; the parts side by side are the batch of one rank.

        Raises:
            UsageError: the size cannot be dealt out evenly to the ranks.
        """

    def _starts(self, step: int, size: int, rank: int, ranks: int) -> list[int]:
        """Where on the ring each of the rank's windows starts."""
        if size < ranks:
            raise UsageError(f"A batch of {size} sequences is too small for {ranks} ranks: each needs at least one.")
        if size % ranks:
            raise UsageError(f"A batch of {size} sequences cannot be shared evenly by {ranks} ranks.")
        share = size // ranks
        first = step * size + rank * share
        return [self._start(*divmod(i, self.windows_per_epoch)) for i in range(first, first + share)]

    def _start(self, epoch: int, index: int) -> int:
        key = hashlib.blake2b(repr(("windows", self.seed, epoch)).encode(), digest_size=32).digest()
        shift = int.from_bytes(key[:8], "big") % self.split.num_tokens
        window = permuted(index, self.windows_per_epoch, key)
        return (shift + window * self.length) % self.split.num_tokens

    def _read(self, starts: list[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each [b,T]."""
        rows = torch.stack([self._ring(start, self.length + 1) for start in starts])
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def _ring(self, start: int, count: int) -> Tensor:
        whole = min(count, self.split.num_tokens - start)
        return torch.cat([self.split.tokens(start, start + whole), self.split.tokens(0, count - whole)])


class Windows(_Batches):
    """Plain windows: a model reads across the documents' borders and tells them by the document token."""

    def batch(self, step: int, size: int, *, rank: int = 0, ranks: int = 1) -> Batch:
        return Batch(*self._read(self._starts(step, size, rank, ranks)), None)


class PackedDocuments(_Batches):
    """The same windows laid end to end, with every document a sequence of its own: no state crosses a border."""

    def batch(self, step: int, size: int, *, rank: int = 0, ranks: int = 1) -> Batch:
        starts = self._starts(step, size, rank, ranks)
        inputs, targets = self._read(starts)
        cuts = [i * self.length + cut for i, start in enumerate(starts) for cut in self._cuts(start)]
        cuts.append(inputs.numel())
        return Batch(inputs.view(1, -1), targets.view(1, -1), torch.tensor(cuts))

    def _cuts(self, start: int) -> list[int]:
        """Where sequences start within a window, in order: at its own start, and wherever a document does."""
        end, total = start + self.length, self.split.num_tokens
        found = self._documents(start + 1, min(end, total)) - start
        around = self._documents(0, max(0, end - total)) + total - start
        return [0, *found.tolist(), *around.tolist()]

    def _documents(self, start: int, stop: int) -> np.ndarray:
        """The starts of documents from `start` up to, not including, `stop`."""
        offsets = self.split.document_offsets[:-1]
        first, last = np.searchsorted(offsets, [start, stop])
        return np.asarray(offsets[first:last])


def permuted(index: int, size: int, key: bytes) -> int:
    """Where a permutation of 0 … size−1, chosen by `key`, sends `index`.

    A Feistel network permutes the smallest 2^(2h) ≥ size numbers; walking along its cycle until a number below `size`
    comes up restricts it to those (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for i in range(ROUNDS):
            mixed = hashlib.blake2b(right.to_bytes(8, "big"), digest_size=8, key=key, salt=bytes([i])).digest()
            left, right = right, left ^ (int.from_bytes(mixed, "big") & mask)
        index = left << half | right
        if index < size:
            return index
