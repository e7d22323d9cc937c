"""Preparing a corpus: sources in, shards and their sidecar out; streaming, in parallel, and resumable after a kill."""

import importlib.metadata
import itertools
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import deltaproduct
from deltaproduct.errors import UsageError
from deltaproduct.files import write_json
from deltaproduct.tasks.corpus.encode import batched, encode_all
from deltaproduct.tasks.corpus.journal import JOURNAL, Journal, Settings, claim_folder
from deltaproduct.tasks.corpus.shards import SplitWriter
from deltaproduct.tasks.corpus.sidecar import (
    FORMAT,
    SIDECAR,
    SPLITS,
    TOKENIZER,
    Sidecar,
    read_sidecar,
    token_dtype,
)
from deltaproduct.tasks.corpus.sources import Document, Source, make_source
from deltaproduct.tasks.corpus.tokenizer import Tokenizer, check_tokenizer, load_tokenizer, make_tokenizer

SHARD_TOKENS = 2**26
JOURNAL_SECONDS = 10.0  # between two journals where no shard is filled


class Progress(NamedTuple):
    """How far a preparation is.

    Attributes:
        doing: "learning the tokenizer" or "encoding".
        done, total: sizes of documents, as the sources measure them; total is None where a source does not know its.
        tokens: written so far.
    """

    doing: str
    done: int
    total: int | None
    tokens: int


def prepare(
    sources: Sequence[str],
    tokenizer: str,
    out: Path,
    *,
    shard_tokens: int = SHARD_TOKENS,
    validation_share: float | None = None,
    workers: int = 1,
    resume: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Sidecar:
    """Make a corpus of all documents of the sources, one source after the other.

    Args:
        sources: as `sources.make_source` takes them.
        tokenizer: as `tokenizer.make_tokenizer` takes it.
        out: the folder to write; new or empty, unless `resume`.
        shard_tokens: tokens in a file.
        validation_share: of what a source holds out by hash; None: each source's own.
        workers: processes that encode; their number changes nothing but the time.
        resume: go on with what `out` holds, to the same bytes as without interruption; an empty folder is simply begun.
        progress: called after every batch of documents.

    Raises:
        UsageError: a setting is impossible, a source or the tokenizer cannot be had, `out` holds something else or was
            begun with other settings, nothing can be written, or no document is left for training.
    """
    for name, value in (("shard_tokens", shard_tokens), ("workers", workers)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}.")
    if not sources:
        raise UsageError("A corpus needs at least one --source.")
    check_tokenizer(tokenizer)
    texts = [make_source(spec, validation_share) for spec in sources]
    settings = Settings(tokenizer, shard_tokens, validation_share, [source.description() for source in texts])
    journal = claim_folder(out, settings, resume=resume)
    if journal is not None:
        chosen = _tokenizer(out / TOKENIZER, tokenizer, texts, progress)
        _write_shards(out, journal, chosen, texts, workers, progress)
    _remove_traces(out)
    return read_sidecar(out)


def _tokenizer(folder: Path, spec: str, sources: Sequence[Source], progress: Callable[[Progress], None]) -> Tokenizer:
    """The tokenizer in `folder`, made and put there first if it is not there yet."""
    if not folder.exists():
        make_tokenizer(spec, lambda: _training_texts(sources, progress)).save(folder)
    return load_tokenizer(folder)


def _training_texts(sources: Sequence[Source], progress: Callable[[Progress], None]) -> Iterator[str]:
    done, total = 0, _total(sources)
    for batch in batched(_documents(sources)):
        yield from batch.texts["train"]
        done += batch.size
        progress(Progress("learning the tokenizer", done, total, 0))


def _write_shards(
    out: Path,
    journal: Journal,
    tokenizer: Tokenizer,
    sources: Sequence[Source],
    workers: int,
    progress: Callable[[Progress], None],
) -> None:
    settings, total = journal.settings, _total(sources)
    dtype = token_dtype(tokenizer.vocab_size)
    with ExitStack() as stack:
        writers = {}
        for name in SPLITS:
            writers[name] = SplitWriter(out, name, dtype, settings.shard_tokens, journal.splits[name])
            stack.callback(writers[name].close)
        left = itertools.islice(_documents(sources), journal.documents, None)
        encoded = stack.enter_context(closing(encode_all(batched(left), out / TOKENIZER, workers)))
        documents, done = journal.documents, journal.size
        last, full = time.monotonic(), 0
        for batch, parts in encoded:
            for name, part in parts.items():
                writers[name].append(part.ids, part.lengths)
            documents, done = documents + batch.documents, done + batch.size
            now, before = time.monotonic(), full
            full = sum(writer.full_shards for writer in writers.values())
            if full > before or now - last >= JOURNAL_SECONDS:
                Journal(settings, documents, done, {name: w.save() for name, w in writers.items()}).write(out)
                last = now
            progress(Progress("encoding", done, total, sum(writer.tokens for writer in writers.values())))
        if not writers["train"].tokens:
            raise UsageError("The sources have no document to train on: all are empty, blank, or held out.")
        splits = {name: writer.finish() for name, writer in writers.items()}
    sidecar = Sidecar(
        format=FORMAT,
        dtype=dtype.name,
        vocab_size=tokenizer.vocab_size,
        document_token=tokenizer.document_token,
        splits=splits,
        versions=_versions(tokenizer, settings),
        **vars(settings),
    )
    write_json(out / SIDECAR, asdict(sidecar))


def _documents(sources: Sequence[Source]) -> Iterator[Document]:
    return itertools.chain.from_iterable(source.documents() for source in sources)


def _total(sources: Sequence[Source]) -> int | None:
    totals = [source.total for source in sources]
    return None if None in totals else sum(total or 0 for total in totals)


def _versions(tokenizer: Tokenizer, settings: Settings) -> dict[str, str]:
    """Of what had a part in the corpus, and of nothing else: they are in its fingerprint."""
    packages = {"tokenizers": ["tokenizers"], "transformers": ["tokenizers", "transformers"]}.get(tokenizer.kind, [])
    if any(source["source"] == "hf" for source in settings.sources):
        packages = ["datasets", *packages]
    found = {"deltaproduct": deltaproduct.__version__, "python": platform.python_version()}
    return found | {package: importlib.metadata.version(package) for package in packages}


def _remove_traces(out: Path) -> None:
    """Remove what only an unfinished corpus needs, and what a kill within the writing of a journal leaves."""
    for path in (out / JOURNAL, *out.glob("*.partial"), *out.glob(f".{JOURNAL}.*.tmp")):
        path.unlink(missing_ok=True)
