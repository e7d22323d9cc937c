"""What commands write: to places that are checked before the work, and lines that a terminal shows as they are."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from deltaproduct.errors import UsageError, shown

if TYPE_CHECKING:
    from rich.text import Text


def check_file(path: Path) -> None:
    """`UsageError` unless a file of that name can be written, in a folder that is there or can be made."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file to write, such as {path / 'report.json'}.")
    if _there(path) and not os.access(path, os.W_OK):
        raise UsageError(f"The file {path} cannot be written: its permissions forbid it.")
    _check_place(path.absolute().parent, f"The file {path}")


def check_folder(path: Path) -> None:
    """`UsageError` unless a folder of that name can be written to, or made."""
    if path.is_symlink() and not path.exists():
        raise UsageError(f"{path} is a link to nothing; choose another folder.")
    if path.exists() and not path.is_dir():
        raise UsageError(f"The folder {path} cannot be written: {path} is a file; choose another folder.")
    _check_place(path.absolute(), f"The folder {path}")


def check_new_folder(path: Path) -> None:
    """`UsageError` unless there is nothing of that name yet and a folder can be made there."""
    if _there(path):
        raise UsageError(f"{path} already exists; choose another folder.")
    _check_place(path.absolute().parent, f"The folder {path}")


def say(line: str) -> None:
    """Print a line that may hold names which others chose."""
    print(shown(line))


def plain(text: str) -> "Text":
    """A text as a cell of a table: no markup and nothing that a terminal would obey."""
    from rich.text import Text

    return Text(shown(text))


def _there(path: Path) -> bool:
    try:
        return os.path.lexists(path)
    except ValueError as e:  # a name with a null character
        raise UsageError(f"{str(path)!r} is no name of a file: {e}.") from None


def _check_place(folder: Path, what: str) -> None:
    """`UsageError` unless things can be made in the folder, or in the nearest one above it that there is."""
    while not _there(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise UsageError(f"{what} cannot be written: {folder} is not a folder.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{what} cannot be written: the folder {folder} cannot be written to.")
