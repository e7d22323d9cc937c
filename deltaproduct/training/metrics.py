"""metrics.jsonl: what a run says while it goes, one JSON object a line."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, TextIO

from deltaproduct.errors import UsageError
from deltaproduct.files import parse_json, write_bytes


def last_metrics(path: Path) -> dict[str, Any] | None:
    """The last whole line of metrics.jsonl; None if there is none, or no such file.

    A reader may come while a line is being written, and a kill may have cut one off: such an end is passed over.
    """
    try:
        lines = _lines(path)
    except UsageError:
        return None
    return next((values for line in reversed(lines) if (values := _values(line)) is not None), None)


def _lines(path: Path) -> list[bytes]:
    """The lines of a file, each without its end; none if it is missing; `UsageError` if it cannot be read."""
    if not path.exists():
        if path.is_symlink():
            raise UsageError(f"{path} is a symbolic link to nothing; remove it, and the run goes on without its lines.")
        return []
    if not path.is_file():
        raise UsageError(f"{path} is not a file; remove it, and the run goes on without its lines.")
    try:
        return path.read_bytes().split(b"\n")
    except OSError as e:
        raise UsageError(f"{path} cannot be read: {e.strerror or e}.") from e


def _values(line: bytes) -> dict[str, Any] | None:
    """The values of a line; None if it is no JSON object with a step."""
    try:
        # Losses may be NaN, as Python writes it.
        values = parse_json(line.decode(), "a line", finite=False)
    except ValueError:
        return None
    step = values.get("step") if isinstance(values, dict) else None
    return values if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


class Metrics:
    """metrics.jsonl: one JSON object a line, appended as training goes; the source of truth for curves."""

    def __init__(self, path: Path, *, after_step: int, digest: str | None = None):
        """Open for appending, keeping only the lines up to `after_step`: later ones will be computed again.

        A last line without an end was cut off by a kill, and goes.

        Args:
            digest: what `synced` returned when step `after_step` was saved, if that is known.

        Raises:
            UsageError: the file cannot be read or written, or has a line that no run wrote: one that is no JSON object
                with a step, or whose step is not above the one before, and the message names its number; or its lines
                are others than they were. Nothing changed. A file that is not there is begun anew.
        """
        *lines, cut_off = _lines(path) or [b""]
        if cut_off and (values := _values(cut_off)) is not None and values["step"] <= after_step:
            lines.append(cut_off)  # whole, but for its end
        kept, before = [], -1
        for number, line in enumerate(lines, start=1):
            values = _values(line)
            if values is None or values["step"] <= before:
                why = "is no metrics of a step" if values is None else f"is of step {values['step']} after {before}"
                raise UsageError(
                    f"{path} was changed: line {number} {why}. Put back the file that the run wrote, or remove that "
                    "line."
                )
            before = values["step"]
            if before <= after_step:
                kept.append(line + b"\n")
        self._sum = hashlib.sha256(b"".join(kept))
        if digest not in (None, self._sum.hexdigest()) and path.exists():
            raise UsageError(
                f"{path} was changed: its lines up to step {after_step} are not those that the run wrote before it "
                "saved that step. Put back the file that it wrote, or remove it: the run then goes on without them."
            )
        write_bytes(path, b"".join(kept))
        try:
            self._file: TextIO = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        except OSError as e:
            raise UsageError(f"{path} cannot be written: {e.strerror or e}.") from e

    def synced(self) -> str:
        """Bring all lines to the disk, where a checkpoint is about to count on them; returns their sha256."""
        os.fsync(self._file.fileno())
        return self._sum.hexdigest()

    def write(self, values: dict[str, Any]) -> None:
        line = json.dumps(values) + "\n"
        self._file.write(line)
        self._file.flush()
        self._sum.update(line.encode())

    def close(self) -> None:
        self._file.close()
