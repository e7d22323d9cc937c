"""Reading a prepared corpus: memory-mapped shards behind two streams of tokens."""

import hashlib
from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deltaproduct.errors import UsageError, did_you_mean
from deltaproduct.tasks.corpus.sidecar import (
    SIDECAR,
    TOKENIZER,
    FileEntry,
    SplitEntry,
    read_sidecar,
    token_dtype,
)
from deltaproduct.tasks.corpus.tokenizer import Tokenizer, load_tokenizer


class Split:
    """One stream of tokens, the documents one after the other; each begins with the document token.

    Attributes:
        name: "train" or "validation".
        num_tokens, num_documents: how many there are.
    """

    def __init__(self, folder: Path, name: str, entry: SplitEntry, dtype: np.dtype):
        self.name = name
        self.num_tokens, self.num_documents = entry.tokens, entry.documents
        self._folder, self._entry, self._dtype = folder, entry, dtype
        sizes = (shard.bytes // dtype.itemsize for shard in entry.shards)
        self._starts = list(accumulate(sizes, initial=0))  # of each shard in the stream, and the stream's end

    @cached_property
    def document_offsets(self) -> np.ndarray:
        """int64 [documents+1], memory-mapped: where each document starts, and then `num_tokens`."""
        path = self._folder / self._entry.offsets.name
        try:
            offsets = np.load(path, mmap_mode="r")
        except ValueError as e:
            raise UsageError(f"{path} is damaged: {e}.") from e
        if offsets.shape != (self.num_documents + 1,) or offsets[-1] != self.num_tokens:
            raise UsageError(f"{path} is damaged: it does not mark {self.num_documents} documents.")
        return offsets

    def tokens(self, start: int, stop: int) -> Tensor:
        """int64 [stop−start]: a copy of the stream's tokens from `start` up to, not including, `stop`."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of a split of {self.num_tokens}")
        out = np.empty(stop - start, np.int64)
        at = start
        while at < stop:
            shard = bisect_right(self._starts, at) - 1
            end = min(stop, self._starts[shard + 1])
            first = self._starts[shard]
            out[at - start : end - start] = self._shards[shard][at - first : end - first]
            at = end
        return torch.from_numpy(out)

    @cached_property
    def _shards(self) -> list[np.memmap]:
        return [np.memmap(self._folder / shard.name, self._dtype, mode="r") for shard in self._entry.shards]

    def __getstate__(self) -> dict[str, object]:
        """Without the maps: another process makes its own."""
        return {k: v for k, v in vars(self).items() if k not in ("_shards", "document_offsets")}


class Corpus:
    """A prepared corpus: a tokenizer and two splits.

    Attributes:
        folder: where it lies.
        tokenizer: what its tokens mean.
        vocab_size: the tokenizer's.
        fingerprint: sha256 of corpus.json in hexadecimal digits, and so of all that is in the corpus.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, fingerprint: str, splits: dict[str, Split]):
        self.folder, self.tokenizer, self.fingerprint = folder, tokenizer, fingerprint
        self._splits = splits

    @classmethod
    def open(cls, folder: Path, *, verify: bool = True) -> "Corpus":
        """Open what `deltaproduct lm prepare` wrote.

        Args:
            folder: its --out.
            verify: read every file once and compare its sha256; otherwise only sizes are looked at.

        Raises:
            UsageError: the folder is no corpus, one of its files is not what was written, or its tokenizer is not the
                one that it was made with.
        """
        sidecar = read_sidecar(folder)
        fingerprint = hashlib.sha256((folder / SIDECAR).read_bytes()).hexdigest()
        for split in sidecar.splits.values():
            for entry in (*split.shards, split.offsets):
                _check_file(folder, entry, verify)
        tokenizer = load_tokenizer(folder / TOKENIZER)
        if tokenizer.vocab_size != sidecar.vocab_size or tokenizer.document_token != sidecar.document_token:
            raise UsageError(
                f"The tokenizer in {folder} has {tokenizer.vocab_size} tokens and starts documents with "
                f"{tokenizer.document_token}, but the corpus was made with {sidecar.vocab_size} and "
                f"{sidecar.document_token}; prepare it again."
            )
        dtype = token_dtype(sidecar.vocab_size)
        splits = {name: Split(folder, name, entry, dtype) for name, entry in sidecar.splits.items()}
        return cls(folder, tokenizer, fingerprint, splits)

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""
        return self.tokenizer.vocab_size

    def split(self, name: str) -> Split:
        """The split "train" or "validation"; `UsageError` for any other name."""
        if name not in self._splits:
            near = did_you_mean(name, self._splits)
            raise UsageError(
                f"The corpus {self.folder} has no split {name!r}{near}; it has {' and '.join(self._splits)}."
            )
        return self._splits[name]


def _check_file(folder: Path, entry: FileEntry, verify: bool) -> None:
    path = folder / entry.name
    if not path.is_file():
        raise UsageError(f"The corpus {folder} is incomplete: {entry.name} is missing.")
    size = path.stat().st_size
    if size != entry.bytes:
        raise UsageError(
            f"The corpus {folder} is corrupt: {entry.name} has {size} bytes and should have {entry.bytes}."
        )
    if verify:
        with open(path, "rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != entry.sha256:
                raise UsageError(f"The corpus {folder} is corrupt: {entry.name} does not match its recorded sha256.")
