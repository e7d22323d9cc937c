"""The source of the Python that runs this, as documents."""

import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltaproduct.corpus.source import Document, Source, Tick, digest, is_held_out, reading
from deltaproduct.errors import UsageError

MODULE_SHARE = 0.1  # of the standard library's two hundred or so modules and packages, held out by name
# Folders of an installation that are no library: what was installed into it, what tests it, and what is generated.
NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "__pycache__"})


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
            "sha256": digest((path.as_posix(), size) for path, size in zip(self._files, self._sizes)),
        }

    def documents(self) -> Iterator[Document]:
        for path, size in zip(self._files, self._sizes):
            with reading(self._root / path), tokenize.open(self._root / path) as f:  # in the encoding that it names
                text = f.read()
            yield Document(text, is_held_out(_module(path), self._share), size)


def _module(path: Path) -> str:
    return path.parts[0].removesuffix(".py")
