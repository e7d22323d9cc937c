"""Files of one's own as documents: a file, a folder or a pattern; plain text, or JSON with a document a line."""

import codecs
import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltaproduct.corpus.source import HashedSource, digest, escaped, reading, text_field
from deltaproduct.errors import UsageError, quoted

BINARY_BYTES = 8192  # at a file's start: a zero among them makes it no text, as in git
NAMED = 5  # of the files that are skipped, in a message


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
                 "sha256_of_names_and_sizes": digest(zip(names, self._sizes)),
                 "sha256": self._scan().sha256}  # fmt: skip
        return known | self._held_out()


class TextSource(FileSource):
    """Files of text in UTF-8, one a document."""

    kind = "text"

    def _texts(self) -> Iterator[tuple[str, int]]:
        for path, size in zip(self._files, self._sizes):
            with reading(path):
                data = path.read_bytes()
            yield _decoded(path, data).replace("\r\n", "\n").replace("\r", "\n"), size


class JsonLinesSource(FileSource):
    """Files with a JSON object a line, whose field "text" is a document."""

    kind = "jsonl"
    suffix = ".jsonl"

    def _texts(self) -> Iterator[tuple[str, int]]:
        for path in self._files:
            with reading(path), open(path, "rb") as f:
                for number, line in enumerate(f, start=1):
                    if line.strip():
                        yield text_field(_parsed(path, number, line), f"{path}, line {number},"), len(line)


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
        raise UsageError(f"{quoted(pattern)} cannot be looked for: {reason}.") from e
    if not files:
        raise UsageError(
            f"No file matches {quoted(pattern)}; patterns such as 'texts/**/*.txt' need quotes in a shell."
        )
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
                skipped.append(f"{escaped(path)} ({reason})")
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
    with reading(path), open(path, "rb") as f:
        start = f.read(BINARY_BYTES)
    # UTF-16 is full of zeros and is text all the same: it has to be converted, and is not left out.
    return "binary" if b"\0" in start and not start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else None


def _within(path: Path, folder: Path | None) -> bool:
    return folder is not None and (folder.resolve() == path.resolve() or folder.resolve() in path.resolve().parents)


def _size(path: Path) -> int:
    with reading(path):
        return path.stat().st_size


def _decoded(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise UsageError(
            f"{escaped(path)} is not text in UTF-8: byte {e.start} is 0x{data[e.start]:02x}. Convert it, as with "
            "`iconv -f ENCODING -t utf-8`, or leave it out."
        ) from e


def _parsed(path: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UsageError(f"{path}, line {number}, is not valid JSON: {e}.") from e
