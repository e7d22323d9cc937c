"""What lets a preparation go on after a kill: its settings, and how far everything on disk is known to be right."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deltaproduct.corpus.shards import SplitState
from deltaproduct.corpus.sidecar import (
    LARGEST_VOCABULARY,
    SIDECAR,
    SPLITS,
    TOKENIZER,
    check_entries,
    inside,
    read_sidecar,
    sealed,
    structured,
    token_dtype,
    unsealed,
)
from deltaproduct.errors import UsageError, quoted
from deltaproduct.files import locked, make_folder, read_json, write_json
from deltaproduct.renamed import renamed_names

JOURNAL = "unfinished.json"
LOCK = ".lock"
FORMAT = 2  # of the journal; the first had neither this number nor a seal, nor the fields that may be None


@dataclass(frozen=True)
class CorpusSettings:
    """All that decides what a corpus holds, as `Sidecar` has it."""

    tokenizer: str
    shard_tokens: int
    validation_share: float | None
    sources: list[dict[str, Any]]

    def differences(self, other: "CorpusSettings") -> list[str]:
        """The fields in which two differ, as "name: mine and theirs"; a sha256 that an older version did not note is
        not compared."""
        mine, theirs = self._flat(), other._flat()
        unnoted = {name for name in theirs if name.endswith(", sha256") and name not in mine}
        found = [k for k in {**mine, **theirs} if k not in unnoted and mine.get(k) != theirs.get(k)]
        return [f"{k}: {_plain(mine.get(k))} and {_plain(theirs.get(k))}" for k in found]

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
        tokenizer_sha256: `tokenizer_digest` of what the documents were encoded with; None where none was yet.
    """

    settings: CorpusSettings
    documents: int = 0
    size: int = 0
    splits: dict[str, SplitState] = field(default_factory=lambda: {name: SplitState() for name in SPLITS})
    tokenizer_sha256: str | None = None

    def write(self, folder: Path) -> None:
        """Replace the folder's journal in one step."""
        write_json(folder / JOURNAL, sealed({"format": FORMAT, **asdict(self)}))


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make a corpus' folder, and be the only process that writes it; where nothing was written, it is removed again.

    Raises:
        UsageError: it cannot be made or written, or another process is preparing a corpus there.
    """
    made = not folder.exists()
    make_folder(folder)
    try:
        with locked(folder / LOCK, f"The corpus {folder}"):
            yield
    finally:
        if made:
            with suppress(OSError):  # it holds something
                folder.rmdir()


def check_free(folder: Path, *, resume: bool) -> None:
    """`UsageError` where `claim_folder` is sure to refuse, whatever the settings are: no source is read for that."""
    if (folder / SIDECAR).exists():
        if not resume:
            raise UsageError(f"{folder} already holds a corpus; choose another folder for --out.")
    elif (folder / TOKENIZER).exists() and (folder / JOURNAL).exists():
        if not resume:
            raise UsageError(
                f"{folder} holds an unfinished corpus: --resume goes on with it; to begin anew, remove the folder or "
                "choose another for --out."
            )
    elif any(path.name != JOURNAL and not path.name.startswith(".") for path in folder.iterdir()):
        raise UsageError(f"{folder} holds something that is no corpus; choose an empty or a new folder for --out.")


def claim_folder(folder: Path, settings: CorpusSettings, *, resume: bool) -> Journal | None:
    """Take a folder for a corpus of these settings: the journal to go on from, or None if the corpus is finished.

    A preparation that did not get as far as its tokenizer has left nothing worth keeping, and is begun anew.

    Raises:
        UsageError: the folder holds something else, or a corpus that is finished, or one that is
            not and should not be resumed, or one of other settings (the message names the fields).
    """
    check_free(folder, resume=resume)
    if (folder / SIDECAR).exists():
        made = read_sidecar(folder)
        _compare(
            folder, CorpusSettings(made.tokenizer, made.shard_tokens, made.validation_share, made.sources), settings
        )
        return None
    if (folder / TOKENIZER).exists() and (folder / JOURNAL).exists():
        journal = _read(folder / JOURNAL)
        _compare(folder, journal.settings, settings)
        return journal
    journal = Journal(settings)
    journal.write(folder)
    return journal


def _read(path: Path) -> Journal:
    values = read_json(inside(path.parent, path.name, "the corpus"))
    if not isinstance(values, dict):
        raise UsageError(f"{path} is damaged: it holds no object; start this corpus anew.")
    if "format" in values or "seal" in values:
        values = unsealed(path, values)
        if values.pop("format", None) != FORMAT:
            raise UsageError(f"{path} was written by another version; finish this corpus with that, or start it anew.")
    else:
        splits = values.get("splits")
        values = values | {"tokenizer_sha256": values.get("tokenizer_sha256")}
        if isinstance(splits, dict) and all(isinstance(state, dict) for state in splits.values()):
            unhashed: dict[str, Any] = {"shard_sha256": None, "offsets_sha256": None}
            values["splits"] = {name: unhashed | state for name, state in splits.items()}
    journal = structured(path, values, Journal)
    if why := _contradiction(journal):
        raise UsageError(f"{path} is damaged: {why}; start this corpus anew.")
    return journal


def _contradiction(journal: Journal) -> str | None:
    if min(journal.documents, journal.size) < 0:
        return "it counts fewer documents than none"
    if set(journal.splits) != set(SPLITS):
        return f"it has the splits {quoted(list(journal.splits))}, not {' and '.join(SPLITS)}"
    shard_tokens = journal.settings.shard_tokens
    if shard_tokens < 1:
        return f"it has {shard_tokens} tokens in a shard"
    full = {shard_tokens * token_dtype(size).itemsize for size in (1, LARGEST_VOCABULARY)}  # whatever the vocabulary is
    for name, state in journal.splits.items():
        if why := check_entries(name, None, state.shards):
            return why
        sizes = {shard.bytes for shard in state.shards}
        if len(sizes) > 1 or not sizes <= full:
            return f"the shards of {name} that are full are of other sizes than {shard_tokens} tokens have"
        if not 0 <= state.tokens - len(state.shards) * shard_tokens < shard_tokens:
            return f"{len(state.shards)} full shards of {name} cannot be {state.tokens} tokens"
        if not 0 <= state.documents <= state.tokens or bool(state.documents) != bool(state.tokens):
            return f"{state.tokens} tokens cannot be {state.documents} documents of {name}"
    if sum(state.documents for state in journal.splits.values()) > journal.documents:
        return f"its splits have more than its {journal.documents} documents"
    return None


def _compare(folder: Path, stored: CorpusSettings, asked: CorpusSettings) -> None:
    if found := stored.differences(asked):
        raise UsageError(f"{folder} was begun with other settings, its own first: {'; '.join(found)}.")


def _plain(value: object) -> str:
    return value if isinstance(value, str) and value == quoted(value)[1:-1] else quoted(value)


__getattr__ = renamed_names(__name__, {"Settings": "CorpusSettings"})
