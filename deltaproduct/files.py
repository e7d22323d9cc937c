"""Reading and writing so that nothing good is lost: whole files, whole folders, folders that are checked when read.

A folder is replaced in one step, or where the file system has none for that, by two renames. Who reads it meanwhile
gets the old one or the new one, and renames nothing; who writes it holds a lock, so that a second writer is refused.
"""

import ctypes
import errno
import fcntl
import hashlib
import json
import math
import os
import shlex
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from deltaproduct.errors import UsageError

T = TypeVar("T")

MANIFEST = "manifest.json"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's renameat2: paths as they are given, and two names exchanged
LONGEST_NAME = 255  # bytes
PATIENCE = 5.0  # seconds that a writer waits for another, which may be on its way out
READER_PATIENCE = 60.0  # seconds that a reader waits for a writer which moves files one by one
PAUSE = 0.05  # seconds between two tries


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
        raise UsageError(f"{path} cannot be written: {e.strerror or e}.") from e
    finally:  # also where Ctrl-C ends it
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of text in UTF-8."""
    # File names may hold bytes that are no UTF-8; as escapes they are valid JSON, and a reader sees what they were.
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


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
        if "\\ud" in text or "\\uD" in text:  # half of a character; only those that stand for a file name's bytes go
            json.dumps(value, ensure_ascii=False).encode(errors="surrogateescape")
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
    except OSError as e:
        raise UsageError(f"The folder {path} cannot be written: {e.strerror or e}.") from e
    if not os.access(path, os.W_OK | os.X_OK):
        raise UsageError(f"The folder {path} cannot be written: you have no permission to, or its disk is read-only.")
    return path


def is_plain_name(name: object) -> bool:
    """Whether something that a file says is the name of a file in its own folder: no path, no control characters, and
    no longer than file systems allow."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & {"/", "\\"} or not name.isprintable():
        return False
    return len(name.encode()) <= LONGEST_NAME


# ---------------------------------------------------------------------------------------------------------- reading


def read_folder(path: Path, what: str, read: Callable[[Path, list[str]], T]) -> T:
    """What `read(folder, files)` makes of a folder with a manifest, whose `files` have been checked against it.

    Raises:
        UsageError: there is no such folder, a file is missing or not what was written, or `read` says so.
    """
    return read_whole(path, lambda folder: read(folder, _verified(folder, path, what)))


def read_whole(path: Path, read: Callable[[Path], T]) -> T:
    """What `read(folder)` makes of a folder that a writer may replace at any moment.

    It reads the old one or the new one, whole, and is called again where that changed meanwhile. Nothing is renamed or
    removed.

    Raises:
        UsageError: `read` says so, or the folder changes too fast.
    """
    deadline = time.monotonic() + READER_PATIENCE
    while True:
        folder = whole_folder(path)
        before, busy = _mark(folder), _is_locked(path)  # in this order: what is moved after its manifest has a lock
        try:
            found = read(folder)
        except (UsageError, OSError):
            if _mark(whole_folder(path)) == before and not busy:
                raise
            if time.monotonic() > deadline:
                raise
            time.sleep(PAUSE)
        else:
            if _mark(whole_folder(path)) == before or _mark(folder) == before:
                return found
            if time.monotonic() > deadline:
                raise UsageError(f"{path} is written anew more often than it can be read; try again later.")


def verified_folder(path: Path, what: str) -> list[str]:
    """The files of a folder with a manifest, after checking each one's size and sha256; `UsageError` as `read_folder`.

    Only for who holds the folder's lock, or reads nothing afterwards.
    """
    return read_folder(path, what, lambda _, files: files)


def check_listed(path: Path, what: str, is_read: Callable[[str], bool]) -> None:
    """Check those files of a folder that its manifest lists and that `is_read`; nothing where there is no manifest.

    This is for folders that others write to as well, and read in ways of their own.

    Raises:
        UsageError: one is missing or not what was written; the message says how to keep it.
    """

    def check(folder: Path) -> None:
        if (folder / MANIFEST).is_file():
            _check_files(folder, path, what, {n: entry for n, entry in _read_manifest(folder).items() if is_read(n)})

    read_whole(path, check)


def whole_folder(path: Path) -> Path:
    """Where the newest whole version of a folder lies: at `path`, but for the moment between a writer's two renames,
    or for ever after a writer that died there."""
    if not path.exists():
        fresh, old = beside(path, "new"), beside(path, "old")
        # The manifest is written last, so a fresh folder that has one is whole and is the newer of the two.
        if old.exists() and (fresh / MANIFEST).exists():
            return fresh
        if old.exists():
            return old
    return path


def _verified(folder: Path, path: Path, what: str) -> list[str]:
    if not folder.is_dir():
        raise UsageError(f"{path} is not a folder, so there is no {what} to load.")
    if not (folder / MANIFEST).is_file():
        raise UsageError(f"{path} has no {MANIFEST}, so it is not a {what} of this library.")
    files = _read_manifest(folder)
    _check_files(folder, path, what, files)
    return list(files)


def _check_files(folder: Path, path: Path, what: str, files: Mapping[str, Any]) -> None:
    """Check files of a folder, which is called `path` in messages, against what its manifest says of each."""
    for name, entry in files.items():
        file = folder / name
        if not file.is_file():
            raise UsageError(f"The {what} {path} is incomplete: {name} is missing.")
        if entry != _fingerprint(file):
            raise UsageError(
                f"The {what} {path} is corrupt: {name} does not match its recorded size and sha256. If you changed it, "
                f"`deltaproduct seal {shlex.quote(str(path))}` accepts it."
            )


def _mark(folder: Path) -> bytes | None:
    """What changes whenever other files are written: the manifest, with their sums; None where there is none.

    Its inode and time are not enough: both come again within milliseconds on some file systems.
    """
    try:
        return (folder / MANIFEST).read_bytes() if (folder / MANIFEST).is_file() else None  # a pipe would never end
    except OSError:
        return None


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
        return {"bytes": os.fstat(f.fileno()).st_size, "sha256": digest}


def _read_manifest(folder: Path) -> dict[str, Any]:
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or manifest.get("format") != 1:
        raise UsageError(f"{folder / MANIFEST} is damaged or of another version: it lists no files of format 1.")
    for name in files:
        if not is_plain_name(name):
            raise UsageError(f"{folder / MANIFEST} names the file {name[:80]!r}, which is not in its own folder.")
    return files


# ---------------------------------------------------------------------------------------------------------- writing


@contextmanager
def locked(lock: Path, what: str) -> Iterator[None]:
    """Be the only process that writes `what`, for the time of a `with`: a lock on the file `lock`, made for it.

    A process that dies, in whatever way, loses its locks.

    Raises:
        UsageError: another process has it, and does not give it up within seconds.
    """
    handle = _acquired(lock, what)
    try:
        yield
    finally:
        if handle is not None:
            lock.unlink(missing_ok=True)  # before it is given up, or it could be another's by now
            os.close(handle)


def _acquired(lock: Path, what: str) -> int | None:
    """A handle that has the lock; None on a file system without locks."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as e:
            raise UsageError(f"{what} cannot be written: {lock}: {e.strerror or e}.") from e
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):  # it may have been another's, who has removed it since it was opened
                if os.fstat(handle).st_ino == os.stat(lock).st_ino:
                    os.ftruncate(handle, 0)
                    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                    return handle
            os.close(handle)
        except BlockingIOError:
            holder = os.read(handle, 200).decode(errors="replace").strip() or "another process"
            os.close(handle)
            if time.monotonic() > deadline:
                raise UsageError(
                    f"{what} is being written by {holder}; wait until it ends, or choose another folder."
                ) from None
            time.sleep(PAUSE)
        except OSError as e:
            os.close(handle)
            if e.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise UsageError(f"{what} cannot be written: {lock}: {e.strerror or e}.") from e
            warnings.warn(f"{lock.parent} is on a file system without locks, so that nobody notices it when two "
                          f"processes write {what} at once.", stacklevel=4)  # fmt: skip
            return None


def _is_locked(path: Path) -> bool:
    """Whether someone writes the folder `path` at this moment."""
    try:
        handle = os.open(beside(path, "lock"), os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Write a folder anew: yields an empty one to fill, then puts it in place of `path` with a manifest.

    Until the last moment the old folder stays, and whoever reads it gets it or the new one (`read_folder`). If the
    body raises, the old folder is untouched. Where `path` is a symbolic link, the folder that it leads to is replaced.

    Raises:
        UsageError: it cannot be written, or another process is writing it.
    """
    path = path.resolve()
    with _writing(path):
        recover_folder(path)
        fresh, old = beside(path, "new"), beside(path, "old")
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir()
            yield fresh
            _finish(fresh)
            if path.exists() and not _exchanged(fresh, path):
                os.rename(path, old)
            if not path.exists():
                os.rename(fresh, path)
            shutil.rmtree(old, ignore_errors=True)
            _sync(path.parent)
        except OSError as e:
            raise UsageError(f"The folder {path} cannot be written: {e.strerror or e}.") from e
        finally:
            with suppress(OSError):
                recover_folder(path)
            shutil.rmtree(fresh, ignore_errors=True)


@contextmanager
def updated_folder(path: Path) -> Iterator[Path]:
    """`replaced_folder` for a folder that others write to as well, perhaps at this moment: their files stay.

    Yields an empty folder to fill, whose files then go to `path` one by one, the manifest first; those that an earlier
    manifest lists and that were not written again are removed. Until all are on the disk, `path` is untouched. If the
    process dies while they are moved, `read_folder` refuses what is there.
    """
    path = path.resolve()
    with _writing(path):
        recover_folder(path)
        fresh = beside(path, "update")
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir()
            yield fresh
            names = _finish(fresh)
            path.mkdir(exist_ok=True)
            stale = {p.name for p in path.iterdir()} & _listed(path) - set(names)
            for name in (MANIFEST, *names):  # in this order, who reads now sees that it changed
                os.replace(fresh / name, path / name)
            for name in stale:
                (path / name).unlink()
            _sync(path)
        except OSError as e:
            raise UsageError(f"The folder {path} cannot be written: {e.strerror or e}.") from e
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def seal_folder(path: Path, names: Collection[str] | None = None) -> list[str]:
    """Write a folder's manifest for the files as they are now, which says: I changed them, and mean it.

    Args:
        names: the files to list; None: all that lie in it and are not hidden.

    Returns:
        their names.

    Raises:
        UsageError: it is no folder, or it cannot be written.
    """
    path = path.resolve()
    if not path.is_dir():
        raise UsageError(f"{path} is not a folder, so there is nothing to seal.")
    with _writing(path):
        try:
            if names is None:
                names = [p.name for p in path.iterdir() if p.is_file() and p.name[0] != "." and p.name != MANIFEST]
            return _seal(path, names)
        except OSError as e:
            raise UsageError(f"The folder {path} cannot be written: {e.strerror or e}.") from e


def reseal_folder(path: Path) -> list[str]:
    """`seal_folder` for a folder that was sealed before and was changed since.

    The manifest lists what it listed before and is still there, and what of a model's weights and configuration has
    come to lie there. Other files that came, such as a tokenizer's, stay unlisted, as they were.

    Returns:
        The files that differ from the old manifest, were added to it or left it.

    Raises:
        UsageError: there is no manifest, it cannot be read, or it cannot be written.
    """
    if not (path / MANIFEST).is_file():
        raise UsageError(
            f"{path} has no {MANIFEST}, so nothing in it is checked and there is nothing to seal; give the folder of a "
            "checkpoint, or of a run that has ended."
        )
    before = _read_manifest(path)
    there = {p.name for p in path.iterdir() if p.is_file()}
    seal_folder(path, there & (before.keys() | {name for name in there if is_model_file(name)}))
    now = _read_manifest(path)
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def is_model_file(name: str) -> bool:
    """Whether a file of this name is a model's configuration, weights or their index: what loading a model reads."""
    weights = name.startswith(("model", "pytorch_model")) and name.endswith((".safetensors", ".bin", ".index.json"))
    return weights or name in ("config.json", "generation_config.json")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """The lock of the folder `path`, whose parent is made if need be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError(f"The folder {path} cannot be written: {e.strerror or e}.") from e
    with locked(beside(path, "lock"), f"The folder {path}"):
        yield


def _exchanged(a: Path, b: Path) -> bool:
    """Give each of two folders the other's name in one step, so that there is one of that name at every moment, also
    for programs that know nothing of `read_folder`; False where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2  # of Linux
    except (AttributeError, OSError):
        return False
    return rename(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0


def recover_folder(path: Path) -> None:
    """Finish or undo a `replaced_folder` that was cut off between its two renames; only for who may write there."""
    path = path.resolve()
    old, whole = beside(path, "old"), whole_folder(path)
    if whole != path:
        os.rename(whole, path)
    if path.exists() and old.exists():
        shutil.rmtree(old, ignore_errors=True)


def _finish(fresh: Path) -> list[str]:
    """Seal a folder that is to be put in place, with files that are readable for whom the umask says."""
    mode = fresh.stat().st_mode & 0o666  # of a folder made a moment ago
    names = [p.name for p in fresh.iterdir()]
    for name in names:  # some libraries write files that only their owner may read
        (fresh / name).chmod(mode | (fresh / name).stat().st_mode & 0o111)
    return _seal(fresh, names)


def _seal(folder: Path, names: Collection[str]) -> list[str]:
    """Bring files of a folder to the disk, and write the manifest of them; returns their names."""
    names = sorted(names)
    files = {name: _fingerprint(folder / name) for name in names}
    for name in names:
        _sync(folder / name)
    write_json(folder / MANIFEST, {"format": 1, "files": files})
    _sync(folder)
    return names


def _listed(folder: Path) -> set[str]:
    """The files that a folder's manifest lists; none if there is no manifest or it cannot be read."""
    try:
        return set(_read_manifest(folder))
    except UsageError:
        return set()


def beside(path: Path, kind: str) -> Path:
    """What is hidden next to a folder: the one that a new one is written into ("new"), the one that an old one waits in
    ("old"), its writer's lock ("lock")."""
    path = path.resolve()
    return path.with_name(f".{path.name}.{kind}")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
