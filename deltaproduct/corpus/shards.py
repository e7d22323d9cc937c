"""Writing one split: tokens appended to shards, document starts beside them, and a state to go on from after a kill."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path

import numpy as np

from deltaproduct.corpus.sidecar import FileEntry, SplitEntry, document_file, inside, shard_file
from deltaproduct.errors import UsageError

OFFSET = np.dtype("<i8")


@dataclass(frozen=True)
class SplitState:
    """How far a split is; whatever lies in its files beyond that is written again.

    Attributes:
        tokens, documents: how many are written.
        shards: those that are full.
        shard_sha256, offsets_sha256: of what the shard that is not full holds, and of the documents' offsets; None
            where an older version did not note them.
    """

    tokens: int = 0
    documents: int = 0
    shards: tuple[FileEntry, ...] = ()
    shard_sha256: str | None = None
    offsets_sha256: str | None = None


class SplitWriter:
    """Appends documents to a split's shards.

    The offsets of documents are kept in a file of raw int64 until the split is finished and their number is known.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype, shard_tokens: int, state: SplitState):
        """Go on after `state`; `UsageError` if the files hold less than it says, or cannot be written."""
        self._folder, self._name, self._dtype, self._shard_tokens = folder, name, dtype, shard_tokens
        self._tokens, self._documents, self._full = state.tokens, state.documents, list(state.shards)
        for shard in self._full:
            path = inside(folder, shard.name, "the corpus")
            if not path.is_file() or path.stat().st_size != shard.bytes:
                raise _damaged(path)
        with self._writing():
            self._offsets, self._offsets_hash = self._open(
                f"{document_file(name)}.partial", state.documents * OFFSET.itemsize, state.offsets_sha256
            )
            self._shard, self._hash = self._open_shard(
                (state.tokens - len(self._full) * shard_tokens) * dtype.itemsize, state.shard_sha256
            )

    @property
    def full_shards(self) -> int:
        """How many shards are full."""
        return len(self._full)

    @property
    def tokens(self) -> int:
        """How many tokens are written."""
        return self._tokens

    def append(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: their tokens one after the other, and how many each has."""
        starts = self._tokens + np.cumsum(lengths) - lengths
        with self._writing():
            data = starts.astype(OFFSET).tobytes()
            self._offsets.write(data)
            self._offsets_hash.update(data)
            self._documents += len(lengths)
            ids = ids.astype(self._dtype)
            while len(ids):
                room = self._shard_tokens * (len(self._full) + 1) - self._tokens
                data = ids[:room].tobytes()
                self._shard.write(data)
                self._hash.update(data)
                self._tokens += len(ids[:room])
                ids = ids[room:]
                if self._tokens == self._shard_tokens * (len(self._full) + 1):
                    self._full.append(self._close_shard())
                    self._shard, self._hash = self._open_shard(0)

    def save(self) -> SplitState:
        """Have the disk hold all that was appended; returns the state to go on from."""
        with self._writing():
            for file in (self._shard, self._offsets):
                file.flush()
                os.fsync(file.fileno())
        hashes = self._hash.hexdigest(), self._offsets_hash.hexdigest()
        return SplitState(self._tokens, self._documents, tuple(self._full), *hashes)

    def finish(self) -> SplitEntry:
        """Close all files and write the offsets as an .npy; to be called once."""
        with self._writing():
            last = self._close_shard()
            if last.bytes:
                self._full.append(last)
            else:
                (self._folder / last.name).unlink()
            self._offsets.write(OFFSET.type(self._tokens).tobytes())
            self._offsets.close()
            return SplitEntry(self._tokens, self._documents, self._write_offsets(), tuple(self._full))

    def close(self) -> None:
        """Let go of the files, whatever is in them."""
        for file in (self._shard, self._offsets):
            try:
                file.close()
            except OSError:  # what could not be written is not counted in any state
                continue

    def _open_shard(self, size: int, sha256: str | None = None) -> "tuple[BufferedRandom, hashlib._Hash]":
        return self._open(shard_file(self._name, len(self._full)), size, sha256)

    def _open(self, name: str, size: int, sha256: str | None) -> "tuple[BufferedRandom, hashlib._Hash]":
        """A file that goes on after `size` bytes, and their hash; `UsageError` if that is not the one noted."""
        path = inside(self._folder, name, "the corpus")
        file = _open_at(path, size)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256")  # leaves the file at its end
        if sha256 not in (None, digest.hexdigest()):
            file.close()
            raise UsageError(
                f"{path} is not what was written to it, so this corpus cannot be resumed; start it anew in another "
                "folder."
            )
        return file, digest

    def _close_shard(self) -> FileEntry:
        self._shard.flush()
        os.fsync(self._shard.fileno())
        size = self._shard.tell()
        self._shard.close()
        return FileEntry(shard_file(self._name, len(self._full)), size, self._hash.hexdigest())

    def _write_offsets(self) -> FileEntry:
        raw, path = Path(self._offsets.name), self._folder / document_file(self._name)
        header = {"descr": OFFSET.str, "fortran_order": False, "shape": (self._documents + 1,)}
        with open(raw, "rb") as source, open(path, "w+b") as target:
            np.lib.format.write_array_header_1_0(target, header)
            shutil.copyfileobj(source, target)
            target.flush()
            os.fsync(target.fileno())
            size = target.tell()
            target.seek(0)
            return FileEntry(path.name, size, hashlib.file_digest(target, "sha256").hexdigest())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise UsageError(
                f"The corpus {self._folder} cannot be written: {e.strerror or e}. What is finished of it is kept; "
                "when that is put right, the same command with --resume goes on."
            ) from e


def _open_at(path: Path, size: int) -> BufferedRandom:
    """Open for writing at `size` bytes, of which the file already has at least as many; cuts off the rest."""
    present = path.stat().st_size if path.exists() else 0
    if present < size:
        raise _damaged(path)
    file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 (the writer closes it)
    file.truncate(size)
    file.seek(size)
    return file


def _damaged(path: Path) -> UsageError:
    return UsageError(f"{path} holds less than was written to it, so this corpus cannot be resumed; start it anew.")
