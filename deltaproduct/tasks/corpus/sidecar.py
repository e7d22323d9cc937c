"""What a prepared corpus is on disk: files, and the JSON beside them that says what they are.

    DIR/corpus.json             this module's `Sidecar`; written last, so that a folder with it is whole
    DIR/tokenizer/              what `Tokenizer.save` writes
    DIR/train-00000.bin …       token ids one after the other, little-endian, in uint16 or uint32
    DIR/train-documents.npy     int64 [documents+1]: where in the split each document starts, and the split's end
    DIR/validation-…            the same for the documents that are held out

A split is one stream of tokens, cut into shards without regard to documents. Every document begins with the document
token.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cattrs
import numpy as np

from deltaproduct.errors import UsageError
from deltaproduct.files import read_json

SIDECAR = "corpus.json"
TOKENIZER = "tokenizer"  # the folder of it, in a corpus and in a run
SPLITS = ("train", "validation")
FORMAT = 1


@dataclass(frozen=True)
class FileEntry:
    """A file of the corpus, as it has to be."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SplitEntry:
    """A split's counts and files; all shards but the last have `Sidecar.shard_tokens` tokens."""

    tokens: int
    documents: int
    offsets: FileEntry
    shards: tuple[FileEntry, ...]


@dataclass(frozen=True)
class Sidecar:
    """corpus.json.

    Attributes:
        dtype: "uint16" or "uint32".
        tokenizer: as it was asked for, such as bpe:4096.
        vocab_size, document_token: the tokenizer's.
        shard_tokens: tokens in a full shard.
        validation_share: of the documents (or modules) held out by hash; None: each source's own.
        splits: by name.
        sources: what each source says of itself.
        versions: of what made the corpus.
    """

    format: int
    dtype: str
    tokenizer: str
    vocab_size: int
    document_token: int
    shard_tokens: int
    validation_share: float | None
    splits: dict[str, SplitEntry]
    sources: list[dict[str, Any]]
    versions: dict[str, str]


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type of 2 or 4 bytes that holds every id, little-endian."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def document_file(split: str) -> str:
    """The file of a split's document offsets."""
    return f"{split}-documents.npy"


def shard_file(split: str, index: int) -> str:
    """The file of a split's shard number `index`."""
    return f"{split}-{index:05d}.bin"


def read_sidecar(folder: Path) -> Sidecar:
    """Read corpus.json; `UsageError` if it is missing, damaged, or says things that cannot all be so."""
    path = folder / SIDECAR
    if not folder.is_dir():
        raise UsageError(
            f"{folder} is not a folder, so there is no corpus to open; `deltaproduct lm prepare` makes one."
        )
    if not path.is_file():
        raise UsageError(f"{folder} has no {SIDECAR}, so it is no corpus, or one that is not finished.")
    values = read_json(path)
    if isinstance(values, dict) and values.get("format", FORMAT) != FORMAT:
        raise UsageError(f"{path} is of format {values['format']!r}; this version reads format {FORMAT}.")
    try:
        sidecar = cattrs.Converter(forbid_extra_keys=True).structure(values, Sidecar)
    except Exception as e:  # cattrs raises groups of whatever the fields' conversions raise
        reasons = "; ".join(cattrs.transform_error(e, path="corpus"))
        raise UsageError(f"{path} is damaged: {reasons}.") from e
    if why := _contradiction(sidecar):
        raise UsageError(f"{path} is damaged: {why}.")
    return sidecar


def _contradiction(sidecar: Sidecar) -> str | None:
    dtype = token_dtype(sidecar.vocab_size)
    if sidecar.dtype != dtype.name:
        return f"{sidecar.vocab_size} tokens need {dtype.name}, not {sidecar.dtype}"
    if set(sidecar.splits) != set(SPLITS):
        return f"it has the splits {', '.join(sidecar.splits)}, not {' and '.join(SPLITS)}"
    full = sidecar.shard_tokens * dtype.itemsize
    for name, split in sidecar.splits.items():
        sizes = [shard.bytes for shard in split.shards]
        if sum(sizes) != split.tokens * dtype.itemsize or any(size != full for size in sizes[:-1]):
            return f"the sizes of the shards of {name} are not those of {split.tokens} tokens"
    return None
