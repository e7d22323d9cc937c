"""Writing so that nothing good is ever lost: whole files, whole folders, folders that are checked when read."""

import hashlib
import json
import math
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
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


def read_json(path: Path, *, finite: bool = True) -> Any:
    """The value in a JSON file.

    Args:
        finite: whether NaN and infinities, which Python writes and JSON does not have, are refused.

    Raises:
        UsageError: the file is missing or is no JSON, an object names an entry twice, a number has more than 100 digits
            or is not finite, or a string is not text.
    """
    if path.exists() and not path.is_file():  # a folder, or a pipe that nobody may ever write to
        raise UsageError(f"{path} cannot be read: it is not a file.")
    return parse_json(read_text(path), str(path), finite=finite)


def parse_json(text: str, where: str, *, finite: bool = True) -> Any:
    """The value in a JSON text, as `read_json`; `where` names the text in messages."""
    try:
        value = json.loads(
            text,
            object_pairs_hook=_once_each,
            parse_int=_small_integer,
            parse_float=_finite_number if finite else float,
            parse_constant=_no_constant if finite else float,
        )
        if "\\ud" in text or "\\uD" in text:  # half of a character, which could be neither printed nor written
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as e:
        raise UsageError(f"{where} is not valid JSON: it is nested too deeply.") from e
    except UnicodeEncodeError as e:
        raise UsageError(f"{where} is not valid JSON: a string has half of a surrogate pair.") from e
    except ValueError as e:
        raise UsageError(f"{where} is not valid JSON: {e}.") from e
    return value


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; an entry that comes twice would be read in one way here and in another elsewhere."""
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the entry {twice[:40]!r} comes twice")
    return values


def _small_integer(digits: str) -> int:
    if len(digits) > 100:
        raise ValueError(f"it has an integer of {len(digits.lstrip('-')):,} digits")
    return int(digits)


def _finite_number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"it has the number {digits[:40]}, which is too large")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"it has {name}, which JSON does not")


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
        _seal(fresh)
        if path.exists():
            os.rename(path, old)
        os.rename(fresh, path)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as e:
        raise UsageError(f"The folder {path} cannot be written: {e.strerror or e}.") from e
    finally:
        if path.exists():
            shutil.rmtree(fresh, ignore_errors=True)


@contextmanager
def updated_folder(path: Path) -> Iterator[Path]:
    """`replaced_folder` for a folder that others write to as well, perhaps at this moment: their files stay.

    Yields an empty folder to fill, whose files then go to `path` one by one, the manifest last; those that an earlier
    manifest lists and that were not written again are removed. Until all are on the disk, `path` is untouched. If the
    process dies while they are moved, `verified_folder` refuses what is there.
    """
    path = path.absolute()
    recover_folder(path)
    fresh = beside(path, "update")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        yield fresh
        names = _seal(fresh)
        path.mkdir(exist_ok=True)
        stale = {p.name for p in path.iterdir()} & _listed(path) - set(names)
        for name in (*names, MANIFEST):
            os.replace(fresh / name, path / name)
        for name in stale:
            (path / name).unlink()
        _sync(path)
    except OSError as e:
        raise UsageError(f"The folder {path} cannot be written: {e.strerror or e}.") from e
    finally:
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
    files = _read_manifest(path)
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            raise UsageError(f"The {what} {path} is incomplete: {name} is missing.")
        if entry != _fingerprint(file):
            raise UsageError(f"The {what} {path} is corrupt: {name} does not match its recorded size and sha256.")
    return list(files)


def seal_folder(folder: Path) -> list[str]:
    """Say that the files of a folder are meant to be as they are now: its manifest is written anew.

    It lists what it listed before and is still there, and what of a model's weights and configuration has come to lie
    there since. Other files that came, such as a tokenizer's, stay unlisted, as they were.

    Returns:
        The files that differ from the old manifest, were added to it or left it.

    Raises:
        UsageError: there is no manifest, it cannot be read, or it cannot be written.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise UsageError(f"{folder} has no {MANIFEST}, so it was not written by this library; there is nothing to seal.")
    before = _read_manifest(folder)
    try:
        there = {p.name for p in folder.iterdir() if p.is_file()}
        names = sorted(there & (before.keys() | {name for name in there if is_model_file(name)}))
        now = {name: _fingerprint(folder / name) for name in names}
    except OSError as e:
        raise UsageError(f"The folder {folder} cannot be read: {e.strerror or e}.") from e
    write_json(folder / MANIFEST, {"format": 1, "files": now})
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def is_model_file(name: str) -> bool:
    """Whether a file of this name is a model's configuration, weights or their index: what loading a model reads."""
    weights = name.startswith(("model", "pytorch_model")) and name.endswith((".safetensors", ".bin", ".index.json"))
    return weights or name in ("config.json", "generation_config.json")


def check_listed(folder: Path, what: str, is_read: Callable[[str], bool]) -> None:
    """Check those files of a folder that its manifest lists and that `is_read`; nothing where there is no manifest.

    This is for folders that others write to as well, and read in ways of their own.

    Raises:
        UsageError: one is missing or not what was written; the message says how to keep it.
    """
    if not (folder / MANIFEST).is_file():
        return
    for name, entry in _read_manifest(folder).items():
        if not is_read(name):
            continue
        file = folder / name
        if not file.is_file():
            raise UsageError(f"The {what} {folder} is incomplete: {name} is missing.")
        try:
            same = entry == _fingerprint(file)
        except OSError as e:
            raise UsageError(f"{file} cannot be read: {e.strerror or e}.") from e
        if not same:
            raise UsageError(
                f"The {what} {folder} is corrupt, or was changed: {name} does not match its recorded size and sha256. "
                f"If you changed it on purpose, run: deltaproduct seal {shlex.quote(str(folder))}"
            )


def _seal(folder: Path) -> list[str]:
    """Bring every file of a folder to the disk, and write the manifest of them; returns their names."""
    names = sorted(p.name for p in folder.iterdir())
    files = {name: _fingerprint(folder / name) for name in names}
    for name in names:
        _sync(folder / name)
    write_json(folder / MANIFEST, {"format": 1, "files": files})
    _sync(folder)
    return names


def _read_manifest(folder: Path) -> dict[str, Any]:
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or manifest.get("format") != 1:
        raise UsageError(f"{folder / MANIFEST} is damaged or of another version: it lists no files of format 1.")
    return files


def _listed(folder: Path) -> set[str]:
    """The files that a folder's manifest lists; none if there is no manifest or it cannot be read."""
    try:
        return set(_read_manifest(folder))
    except UsageError:
        return set()


def beside(path: Path, kind: str) -> Path:
    """The hidden folder next to `path` that a new one is written into ("new"), or an old one waits in ("old")."""
    return path.with_name(f".{path.name}.{kind}")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
