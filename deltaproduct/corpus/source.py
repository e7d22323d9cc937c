"""What a source of texts is: documents in one fixed order, each on its side of the split.

A source yields its documents one after the other, so that memory does not grow with their number, and says of each
whether it is held out for validation. What is held out is decided by the document alone: the same document is on the
same side in every corpus. Files and rows that are too few for that, such as a single file, have their end held out
instead (`HashedSource`).

A source is scanned before anything is written, so that what cannot be read is known by then.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from deltaproduct.errors import UsageError, quoted

DOCUMENT_SHARE = 0.01  # of documents, held out by the hash of their text
TAIL_SHARE = 0.1  # of the characters, held out at the end where the hash leaves a split without a document

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
                at = _dividing_place(text, left, scan.tail // 2)
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


def is_held_out(key: str, share: float) -> bool:
    """True for about `share` of all keys, decided by the key's hash."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _dividing_place(text: str, at: int, slack: int) -> int:
    """Where to divide a text near `at`, at most `slack` characters away: after a line, or else after a space."""
    low, high = max(1, at - slack), at + slack + 1
    for border in ("\n", " "):
        for place in (text.rfind(border, low - 1, at) + 1, text.find(border, at, high) + 1):
            if place and text[:place].strip() and text[place:].strip():
                return place
    return at


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Have a file that cannot be read be one line that says which, and where."""
    try:
        yield
    except OSError as e:
        raise UsageError(f"{escaped(path)} cannot be read: {e.strerror or e}.") from e
    except (SyntaxError, UnicodeDecodeError) as e:  # of a source in Python, which names its encoding
        raise UsageError(f"{escaped(path)} is not in the encoding that it names: {e}.") from e


def escaped(path: Path) -> str:
    text = str(path)
    return text if text.isprintable() else quoted(text)


def text_field(row: Any, where: str) -> str:
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise UsageError(f'{where} has no field "text" that is a string.')
    return text.encode(errors="replace").decode()  # JSON can spell half of a surrogate pair, which is no character


def digest(pairs: Iterable[tuple[str, object]]) -> str:
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(repr(pair).encode())
    return digest.hexdigest()
