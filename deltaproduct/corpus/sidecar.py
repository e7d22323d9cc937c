"""What a prepared corpus is on disk: files, and the JSON beside them that says what they are.

    DIR/corpus.json             this module's `Sidecar`; written last, so that a folder with it is whole
    DIR/tokenizer/              what `Tokenizer.save` writes
    DIR/train-00000.bin …       token ids one after the other, little-endian, in uint16 or uint32
    DIR/train-documents.npy     int64 [documents+1]: where in the split each document starts, and the split's end
    DIR/validation-…            the same for the documents that are held out

A split is one stream of tokens, cut into shards without regard to documents. Every document begins with the document
token.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import cattrs
import numpy as np

from deltaproduct.errors import QUOTED, UsageError, quoted, shortened
from deltaproduct.files import read_folder, read_json

SIDECAR = "corpus.json"
TOKENIZER = "tokenizer"  # the folder of it, in a corpus and in a run
SPLITS = ("train", "validation")
FORMAT = 2
UNSEALED = 1  # the format before it, without `seal` and `tokenizer_sha256`: what it says cannot be checked as well
SEAL = "seal"
LARGEST_VOCABULARY = 2**32
SHA256 = re.compile("[0-9a-f]{64}")

T = TypeVar("T")


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
    """corpus.json, which has besides these a `seal` over them.

    Attributes:
        dtype: "uint16" or "uint32".
        tokenizer: as it was asked for, such as bpe:4096.
        vocab_size, document_token: the tokenizer's.
        shard_tokens: tokens in a full shard.
        validation_share: of the documents (or modules) held out by hash; None: each source's own.
        splits: by name.
        sources: what each source says of itself.
        versions: of what made the corpus.
        tokenizer_sha256: `tokenizer_digest` of its folder; None in a corpus of format 1.
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
    tokenizer_sha256: str | None = None


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type of 2 or 4 bytes that holds every id, little-endian."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def document_file(split: str) -> str:
    """The file of a split's document offsets."""
    return f"{split}-documents.npy"


def shard_file(split: str, index: int) -> str:
    """The file of a split's shard number `index`."""
    return f"{split}-{index:05d}.bin"


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """Plain values with the sha256 of them all beside them, so that a change in any of them is noticed."""
    return values | {SEAL: _seal(values)}


def unsealed(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The values that were given to `sealed`; `UsageError` if they are others now."""
    inner = {k: v for k, v in values.items() if k != SEAL}
    try:
        same = values.get(SEAL) == _seal(inner)
    except RecursionError:
        same = False
    if not same:
        raise UsageError(
            f"{path} is damaged or was changed: it is not what `deltaproduct lm prepare` wrote. Prepare the corpus "
            "again, or bring back the file as it was."
        )
    return inner


def _seal(values: dict[str, Any]) -> str:
    # With escapes for all that is no ASCII: half a surrogate pair has no UTF-8.
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def structured(path: Path, values: Any, kind: type[T]) -> T:
    """Plain values as a dataclass; `UsageError` where they are not exactly what `dataclasses.asdict` gives of one."""
    try:
        largest = max(_integers(values), default=0)
        made = cattrs.Converter(forbid_extra_keys=True).structure(values, kind)
        same = _same(json.loads(json.dumps(asdict(made))), values)  # type: ignore[call-overload]
    except Exception as e:  # cattrs raises groups of whatever the fields' conversions raise
        reasons = "; ".join(cattrs.transform_error(e, path=path.stem))
        raise UsageError(f"{path} is damaged: {_printable(reasons)}.") from e
    if largest >= 2**63:
        raise UsageError(f"{path} is damaged: it has a number beyond 2^63.")
    if not same:  # cattrs takes "7" for 7, and leaves out what it need not know
        raise UsageError(f"{path} is damaged: it has values of other types than `deltaproduct lm prepare` writes.")
    return made


def _same(made: Any, values: Any) -> bool:
    """Whether plain values are equal, where True is not 1."""
    if isinstance(made, dict) and isinstance(values, dict):
        return made.keys() == values.keys() and all(_same(made[k], values[k]) for k in made)
    if isinstance(made, list) and isinstance(values, list):
        return len(made) == len(values) and all(map(_same, made, values))
    return bool(made == values) and isinstance(made, bool) == isinstance(values, bool)


def _integers(value: Any) -> Iterator[int]:
    """The absolute values of all integers in plain values."""
    if isinstance(value, int):
        yield abs(value)
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _integers(inner)


def _printable(text: str) -> str:
    """Of one line, control characters escaped, cut to a few hundred characters."""
    plain = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return shortened(plain, 5 * QUOTED)


def inside(folder: Path, name: str, what: str) -> Path:
    """The path of a corpus' own file or folder.

    Raises:
        UsageError: it is a link that leads out of the folder, to what is no part of `what`.
    """
    path = folder / name
    try:
        whole, real = folder.resolve(), path.resolve()
    except (OSError, RuntimeError) as e:  # links that lead to each other
        raise UsageError(f"{path} cannot be followed: {e}.") from e
    if whole not in real.parents:
        raise UsageError(f"{path} is a link that leads out of {what}; put the file itself in its place.")
    return path


def check_entries(split: str, offsets: FileEntry | None, shards: Sequence[FileEntry]) -> str | None:
    """What is wrong with a split's files as a file of ours lists them, or None: each has one name that it can have."""
    expected = [shard_file(split, i) for i in range(len(shards))]
    named = [*zip(shards, expected)] + ([(offsets, document_file(split))] if offsets is not None else [])
    for entry, name in named:
        if entry.name != name:
            return f"it names a file {quoted(entry.name)} where {name} should be"
        if entry.bytes < 0 or not SHA256.fullmatch(entry.sha256):
            return f"the size or the sha256 of {name} cannot be one"
    return None


def tokenizer_digest(folder: Path) -> str:
    """The sha256 of a tokenizer's files and their names, as its manifest lists them."""

    def digest_of(folder: Path, files: list[str]) -> str:
        digest = hashlib.sha256()
        for name in sorted(files):
            digest.update(repr((name, hashlib.sha256((folder / name).read_bytes()).hexdigest())).encode())
        return digest.hexdigest()

    return read_folder(folder, "tokenizer", digest_of)


def read_sidecar(folder: Path) -> Sidecar:
    """Read corpus.json; `UsageError` if it is missing, damaged, changed, or says things that cannot all be so."""
    path = folder / SIDECAR
    if not folder.is_dir():
        raise UsageError(
            f"{folder} is not a folder, so there is no corpus to open; `deltaproduct lm prepare` makes one."
        )
    if not path.is_file():
        raise UsageError(f"{folder} has no {SIDECAR}, so it is no corpus, or one that is not finished.")
    values = read_json(path)
    if not isinstance(values, dict):
        raise UsageError(f"{path} is damaged: it holds no object.")
    version = values.get("format")
    if type(version) is not int or version not in (FORMAT, UNSEALED):
        raise UsageError(f"{path} is of format {quoted(version)}; this version reads format {FORMAT} and {UNSEALED}.")
    if version == UNSEALED:
        sidecar = structured(path, {"tokenizer_sha256": None} | values, Sidecar)
    else:
        sidecar = structured(path, unsealed(path, values), Sidecar)
    if why := _contradiction(sidecar):
        raise UsageError(f"{path} is damaged: {why}.")
    return sidecar


def _contradiction(sidecar: Sidecar) -> str | None:
    if (sidecar.format == UNSEALED) != (sidecar.tokenizer_sha256 is None):
        return f"format {sidecar.format} has {'no' if sidecar.format == UNSEALED else 'a'} tokenizer_sha256"
    if not 1 <= sidecar.vocab_size <= LARGEST_VOCABULARY or not 0 <= sidecar.document_token < sidecar.vocab_size:
        return f"it names the document token {sidecar.document_token} of {sidecar.vocab_size}"
    dtype = token_dtype(sidecar.vocab_size)
    if sidecar.dtype != dtype.name:
        return f"{sidecar.vocab_size} tokens need {dtype.name}, not {quoted(sidecar.dtype)}"
    if set(sidecar.splits) != set(SPLITS):
        return f"it has the splits {quoted(list(sidecar.splits))}, not {' and '.join(SPLITS)}"
    if sidecar.shard_tokens < 1:
        return f"it has {sidecar.shard_tokens} tokens in a shard"
    share = sidecar.validation_share
    if share is not None and not 0 <= share < 1:
        return f"it has a validation_share of {share}"
    full = sidecar.shard_tokens * dtype.itemsize
    for name, split in sidecar.splits.items():
        if why := check_entries(name, split.offsets, split.shards):
            return why
        sizes = [shard.bytes for shard in split.shards]
        if sum(sizes) != split.tokens * dtype.itemsize or any(size != full for size in sizes[:-1]):
            return f"the sizes of the shards of {name} are not those of {split.tokens} tokens"
        if any(size > full or not size for size in sizes[-1:]):
            return f"the last shard of {name} has {sizes[-1]} bytes, and a full one {full}"
        if not 0 <= split.documents <= split.tokens or bool(split.documents) != bool(split.tokens):
            return f"{split.tokens} tokens cannot be {split.documents} documents of {name}"
    return None
