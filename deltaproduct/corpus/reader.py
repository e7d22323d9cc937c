"""Reading a prepared corpus: memory-mapped shards behind two streams of tokens."""

import hashlib
from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deltaproduct.corpus.sidecar import (
    SIDECAR,
    TOKENIZER,
    FileEntry,
    SplitEntry,
    inside,
    read_sidecar,
    token_dtype,
    tokenizer_digest,
)
from deltaproduct.corpus.tokenizer import Tokenizer, load_tokenizer
from deltaproduct.errors import UsageError, did_you_mean

CHUNK = 2**18  # ids or offsets that are looked at together


class Split:
    """One stream of tokens, the documents one after the other; each begins with the document token.

    Attributes:
        name: "train" or "validation".
        num_tokens, num_documents: how many there are.
    """

    def __init__(self, folder: Path, name: str, entry: SplitEntry, dtype: np.dtype, vocab_size: int | None = None):
        """`vocab_size`: ids from it on are refused where they are read; None: all are taken."""
        self.name = name
        self.num_tokens, self.num_documents = entry.tokens, entry.documents
        self._folder, self._entry, self._dtype, self._vocab_size = folder, entry, dtype, vocab_size
        sizes = (shard.bytes // dtype.itemsize for shard in entry.shards)
        self._starts = list(accumulate(sizes, initial=0))  # of each shard in the stream, and the stream's end

    @cached_property
    def document_offsets(self) -> np.ndarray:
        """int64 [documents+1], memory-mapped: where each document starts, and then `num_tokens`.

        Raises:
            UsageError: the file holds no such numbers, or they do not rise from 0.
        """
        offsets = self._offsets
        for first in range(0, self.num_documents, CHUNK):
            if not (np.diff(offsets[first : first + CHUNK + 1]) > 0).all():
                path = self._folder / self._entry.offsets.name
                raise UsageError(f"{path} is damaged: its documents do not start one after the other.")
        return offsets

    @cached_property
    def _offsets(self) -> np.memmap:
        """The same, of which only the first and the last were looked at."""
        path = self._folder / self._entry.offsets.name
        try:
            offsets = np.lib.format.open_memmap(path, mode="r")
        except Exception as e:  # what a damaged header makes numpy raise can be anything
            reason = " ".join(str(e).split())[:200]
            raise UsageError(f"{path} is damaged: {reason or type(e).__name__}.") from e
        shape = (self.num_documents + 1,)
        if offsets.dtype != np.int64 or offsets.shape != shape or offsets[0] != 0 or offsets[-1] != self.num_tokens:
            raise UsageError(f"{path} is damaged: it does not mark {self.num_documents} documents.")
        return offsets

    def check_ends(self) -> None:
        """`UsageError` if the documents' offsets are not as many as they should be, from 0 to the split's end."""
        _ = self._offsets

    def check_ids(self) -> None:
        """Read all tokens; `UsageError` if one is beyond the vocabulary."""
        for shard, ids in enumerate(self._shards):
            for first in range(0, len(ids), CHUNK):
                self._check(ids[first : first + CHUNK], shard)

    def tokens(self, start: int, stop: int) -> Tensor:
        """int64 [stop−start]: a copy of the stream's tokens from `start` up to, not including, `stop`.

        Raises:
            UsageError: a file is not what it was when the corpus was opened, or holds ids beyond the vocabulary.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of a split of {self.num_tokens}")
        out = np.empty(stop - start, np.int64)
        at = start
        while at < stop:
            shard = bisect_right(self._starts, at) - 1
            end = min(stop, self._starts[shard + 1])
            first = self._starts[shard]
            part = self._shards[shard][at - first : end - first]
            self._check(part, shard)
            out[at - start : end - start] = part
            at = end
        return torch.from_numpy(out)

    def _check(self, ids: np.ndarray, shard: int) -> None:
        largest = int(ids.max())
        if self._vocab_size is not None and largest >= self._vocab_size:
            path = self._folder / self._entry.shards[shard].name
            raise UsageError(
                f"{path} is damaged: it holds the token {largest}, but the vocabulary has {self._vocab_size}."
            )

    @cached_property
    def _shards(self) -> list[np.memmap]:
        shards = []
        for entry in self._entry.shards:
            path = self._folder / entry.name
            try:
                # With its shape: a file that is too short for it is refused, here and not in the middle of a read.
                size = entry.bytes // self._dtype.itemsize
                shards.append(np.memmap(path, self._dtype, mode="r", shape=(size,)))
            except (OSError, ValueError) as e:
                reason = getattr(e, "strerror", None) or e
                raise UsageError(f"{path} is not what it was when the corpus was opened: {reason}.") from e
        return shards

    def __getstate__(self) -> dict[str, object]:
        """Without the maps: another process makes its own."""
        return {k: v for k, v in vars(self).items() if k not in ("_shards", "_offsets", "document_offsets")}


class Corpus:
    """A prepared corpus: a tokenizer and two splits.

    Attributes:
        folder: where it lies.
        tokenizer: what its tokens mean.
        vocab_size: the tokenizer's.
        fingerprint: sha256 of corpus.json in hexadecimal digits, and so of all that is in the corpus, its tokenizer
            included.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, fingerprint: str, splits: dict[str, Split]):
        self.folder, self.tokenizer, self.fingerprint = folder, tokenizer, fingerprint
        self._splits = splits

    @classmethod
    def open(cls, folder: Path, *, verify: bool = True) -> "Corpus":
        """Open what `deltaproduct lm prepare` wrote.

        Args:
            folder: its --out.
            verify: read every file once, compare its sha256, and see that all tokens are in the vocabulary and that
                documents start one after the other. Otherwise what is cheap is looked at: corpus.json's own seal, all
                names and sizes, the tokenizer's files, the number of documents, and the first token of each split;
                tokens and documents are then checked as they are read.

        Raises:
            UsageError: the folder is no corpus, one of its files is not what was written or leads out of the folder, or
                its tokenizer is not the one that it was made with.
        """
        sidecar = read_sidecar(folder)
        fingerprint = hashlib.sha256(inside(folder, SIDECAR, "the corpus").read_bytes()).hexdigest()
        for split in sidecar.splits.values():
            for entry in (*split.shards, split.offsets):
                _check_file(folder, entry, verify)
        tokenizer = load_tokenizer(inside(folder, TOKENIZER, "the corpus"))
        if tokenizer.vocab_size != sidecar.vocab_size or tokenizer.document_token != sidecar.document_token:
            raise UsageError(
                f"The tokenizer in {folder} has {tokenizer.vocab_size} tokens and starts documents with "
                f"{tokenizer.document_token}, but the corpus was made with {sidecar.vocab_size} and "
                f"{sidecar.document_token}; prepare it again."
            )
        if sidecar.tokenizer_sha256 not in (None, tokenizer_digest(folder / TOKENIZER)):
            raise UsageError(
                f"The tokenizer in {folder} is not the one that the corpus was made with; prepare the corpus again."
            )
        dtype, size = token_dtype(sidecar.vocab_size), sidecar.vocab_size
        splits = {name: Split(folder, name, entry, dtype, size) for name, entry in sidecar.splits.items()}
        for split_ in splits.values():
            split_.check_ends()
            if split_.num_tokens and split_.tokens(0, 1).item() != sidecar.document_token:
                raise UsageError(
                    f"The corpus {folder} is corrupt: {split_.name} does not start with the document token "
                    f"{sidecar.document_token}."
                )
            if verify:
                _ = split_.document_offsets
                split_.check_ids()
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
    path = inside(folder, entry.name, "the corpus")
    if not path.is_file():
        raise UsageError(f"The corpus {folder} is incomplete: {entry.name} is missing.")
    size = path.stat().st_size
    if size != entry.bytes:
        raise UsageError(
            f"The corpus {folder} is corrupt: {entry.name} has {size} bytes and should have {entry.bytes}."
        )
    if not verify:
        return
    try:
        with open(path, "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise UsageError(f"{path} cannot be read: {e.strerror or e}.") from e
    if digest != entry.sha256:
        raise UsageError(f"The corpus {folder} is corrupt: {entry.name} does not match its recorded sha256.")
