"""Writing so that nothing good is ever lost: whole files, whole folders, folders that are checked when read."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deltaproduct.errors import UsageError

MANIFEST = "manifest.json"


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file in one step: a reader, or a crash, sees the old content or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise UsageError(f"{path} cannot be written: {e.strerror or e}.") from e


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of text in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_text(path: Path) -> str:
    """The text of a file in UTF-8; `UsageError` if it is missing or is none."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise UsageError(f"{path} cannot be read: {e.strerror or e}.") from e
    except ValueError as e:
        raise UsageError(f"{path} is not text in UTF-8.") from e


def read_json(path: Path) -> Any:
    """The value in a JSON file; `UsageError` if it is missing or is no JSON."""
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as e:
        raise UsageError(f"{path} is not valid JSON: {e}.") from e


def make_folder(path: Path) -> Path:
    """Create a folder that can be written to; `UsageError` if that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{os.getpid()}.probe"
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise UsageError(f"The folder {path} cannot be written: {e.strerror or e}.") from e
    return path


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as f:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(f, "sha256").hexdigest()}


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Write a folder anew: yields an empty one to fill, then puts it in place of `path` with a manifest.

    Until the last moment the old folder stays; if the process dies between the two renames, `recover_folder` (which
    `verified_folder` calls) puts back what is whole. If the body raises, the old folder is untouched.
    """
    recover_folder(path)
    fresh, old = beside(path, "new"), beside(path, "old")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        yield fresh
        names = sorted(p.name for p in fresh.iterdir())
        files = {name: _fingerprint(fresh / name) for name in names}
        for name in names:
            _sync(fresh / name)
        write_json(fresh / MANIFEST, {"format": 1, "files": files})
        _sync(fresh)
        if path.exists():
            os.rename(path, old)
        os.rename(fresh, path)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as e:
        raise UsageError(f"The folder {path} cannot be written: {e.strerror or e}.") from e
    finally:
        if path.exists():
            shutil.rmtree(fresh, ignore_errors=True)


def recover_folder(path: Path) -> None:
    """Finish or undo a `replaced_folder` that was cut off between its two renames."""
    fresh, old = beside(path, "new"), beside(path, "old")
    if not path.exists() and old.exists():
        # The manifest is written last, so a fresh folder that has one is whole and is the newer of the two.
        os.rename(fresh if (fresh / MANIFEST).exists() else old, path)
    if path.exists() and old.exists():
        shutil.rmtree(old, ignore_errors=True)


def verified_folder(path: Path, what: str) -> list[str]:
    """The files of a folder made by `replaced_folder`, after checking each one's size and sha256 against the manifest.

    Raises:
        UsageError: there is no such folder, or a file is missing, or not what was written.
    """
    recover_folder(path)
    if not path.is_dir():
        raise UsageError(f"{path} is not a folder, so there is no {what} to load.")
    if not (path / MANIFEST).is_file():
        raise UsageError(f"{path} has no {MANIFEST}, so it is not a {what} of this library.")
    manifest = read_json(path / MANIFEST)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or manifest.get("format") != 1:
        raise UsageError(f"{path / MANIFEST} is damaged or of another version: it lists no files of format 1.")
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            raise UsageError(f"The {what} {path} is incomplete: {name} is missing.")
        if entry != _fingerprint(file):
            raise UsageError(f"The {what} {path} is corrupt: {name} does not match its recorded size and sha256.")
    return list(files)


def beside(path: Path, kind: str) -> Path:
    """The hidden folder next to `path` that a new one is written into ("new"), or an old one waits in ("old")."""
    return path.with_name(f".{path.name}.{kind}")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
