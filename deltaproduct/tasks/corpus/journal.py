"""What lets a preparation go on after a kill: its settings, and how far everything on disk is known to be right."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cattrs

from deltaproduct.errors import UsageError
from deltaproduct.files import make_folder, read_json, write_json
from deltaproduct.tasks.corpus.shards import SplitState
from deltaproduct.tasks.corpus.sidecar import SIDECAR, SPLITS, TOKENIZER, read_sidecar

JOURNAL = "unfinished.json"


@dataclass(frozen=True)
class Settings:
    """All that decides what a corpus holds, as `Sidecar` has it."""

    tokenizer: str
    shard_tokens: int
    validation_share: float | None
    sources: list[dict[str, Any]]

    def differences(self, other: "Settings") -> list[str]:
        """The fields in which two differ, as "name: mine and theirs"."""
        mine, theirs = self._flat(), other._flat()
        return [f"{k}: {mine.get(k)} and {theirs.get(k)}" for k in {**mine, **theirs} if mine.get(k) != theirs.get(k)]

    def _flat(self) -> dict[str, Any]:
        named = {f"source {i}, {k}": v for i, source in enumerate(self.sources, start=1) for k, v in source.items()}
        return {k: v for k, v in asdict(self).items() if k != "sources"} | named


@dataclass(frozen=True)
class Journal:
    """A preparation under way.

    Attributes:
        documents: how many of the sources' documents are done with, blank ones counted.
        size: the sum of their sizes.
        splits: how far each split is.
    """

    settings: Settings
    documents: int = 0
    size: int = 0
    splits: dict[str, SplitState] = field(default_factory=lambda: {name: SplitState() for name in SPLITS})

    def write(self, folder: Path) -> None:
        """Replace the folder's journal in one step."""
        write_json(folder / JOURNAL, asdict(self))


def claim_folder(folder: Path, settings: Settings, *, resume: bool) -> Journal | None:
    """Take a folder for a corpus of these settings: the journal to go on from, or None if the corpus is finished.

    A preparation that did not get as far as its tokenizer has left nothing worth keeping, and is begun anew.

    Raises:
        UsageError: the folder cannot be written or holds something else, or a corpus that is finished, or one that is
            not and should not be resumed, or one of other settings (the message names the fields).
    """
    make_folder(folder)
    if (folder / SIDECAR).exists():
        if not resume:
            raise UsageError(f"{folder} already holds a corpus; choose another folder for --out.")
        made = read_sidecar(folder)
        _compare(folder, Settings(made.tokenizer, made.shard_tokens, made.validation_share, made.sources), settings)
        return None
    if (folder / TOKENIZER).exists() and (folder / JOURNAL).exists():
        if not resume:
            raise UsageError(f"{folder} holds an unfinished corpus: --resume goes on with it.")
        journal = _read(folder / JOURNAL)
        _compare(folder, journal.settings, settings)
        return journal
    if any(path.name != JOURNAL and not path.name.startswith(".") for path in folder.iterdir()):
        raise UsageError(f"{folder} holds something that is no corpus; choose an empty or a new folder for --out.")
    journal = Journal(settings)
    journal.write(folder)
    return journal


def _read(path: Path) -> Journal:
    try:
        return cattrs.Converter(forbid_extra_keys=True).structure(read_json(path), Journal)
    except UsageError:
        raise
    except Exception as e:  # cattrs raises groups of whatever the fields' conversions raise
        raise UsageError(f"{path} is damaged, so this corpus cannot be resumed; start it anew.") from e


def _compare(folder: Path, stored: Settings, asked: Settings) -> None:
    if found := stored.differences(asked):
        raise UsageError(f"{folder} was begun with other settings, its own first: {'; '.join(found)}.")
