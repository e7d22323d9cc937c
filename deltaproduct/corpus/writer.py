"""Preparing a corpus: sources in, shards and their sidecar out; streaming, in parallel, and resumable after a kill."""

import importlib.metadata
import itertools
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import deltaproduct
from deltaproduct.corpus.encode import batched, encode_all
from deltaproduct.corpus.journal import JOURNAL, CorpusSettings, Journal, check_free, claim_folder, held
from deltaproduct.corpus.shards import SplitWriter
from deltaproduct.corpus.sidecar import (
    FORMAT,
    SIDECAR,
    SPLITS,
    TOKENIZER,
    Sidecar,
    read_sidecar,
    sealed,
    token_dtype,
    tokenizer_digest,
)
from deltaproduct.corpus.source import Document, Source
from deltaproduct.corpus.sources import make_source
from deltaproduct.corpus.tokenizer import Tokenizer, check_tokenizer, load_tokenizer, make_tokenizer
from deltaproduct.errors import UsageError, quoted
from deltaproduct.files import write_json
from deltaproduct.renamed import renamed_names

SHARD_TOKENS = 2**26
MOST_SHARD_TOKENS = 2**40  # a file of 2 to 4 TB
SCAN_SECONDS = 0.2  # between two calls of `progress` while sources are read
JOURNAL_SECONDS = 10.0  # between two journals where no shard is filled


class PreparationProgress(NamedTuple):
    """How far a preparation is.

    Attributes:
        doing: "reading the sources", "learning the tokenizer" or "encoding".
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
    progress: Callable[[PreparationProgress], None] = lambda _: None,
    remark: Callable[[str], None] = lambda _: None,
) -> Sidecar:
    """Make a corpus of all documents of the sources, one source after the other.

    All files are read once before anything is written, so that one that is not text in UTF-8, or not JSON, is found
    while a second try is still free to begin. A tokenizer that is learnt, and encoding, read them again.

    Args:
        sources: as `sources.make_source` takes them.
        tokenizer: as `tokenizer.make_tokenizer` takes it.
        out: the folder to write; new or empty, unless `resume`.
        shard_tokens: tokens in a file.
        validation_share: of what a source holds out by hash, or of its end where the hash would hold out nothing or
            all; None: each source's own.
        workers: processes that encode; their number changes nothing but the time.
        resume: go on with what `out` holds, to the same bytes as without interruption; an empty folder is simply begun.
        progress: called as documents are read, and after every batch of them that is encoded.
        remark: called with lines such as which files of a folder are skipped, before anything is written.

    Raises:
        UsageError: a setting is impossible, a source or the tokenizer cannot be had, `out` holds something else or was
            begun with other settings, nothing can be written, or no document is left for training, or none for
            validation where `validation_share` is not 0.
    """
    for name, value, most in (
        ("shard_tokens", shard_tokens, MOST_SHARD_TOKENS),
        ("workers", workers, most_workers()),
    ):
        if not 1 <= value <= most:
            raise UsageError(f"{name} must be at least 1 and at most {most}, not {quoted(value)}.")
    if not sources:
        raise UsageError("A corpus needs at least one --source.")
    check_tokenizer(tokenizer)
    with held(out):
        check_free(out, resume=resume)
        texts = [make_source(spec, validation_share, leave_out=out) for spec in sources]
        _scan(texts, validation_share, progress)
        for spec, source in zip(sources, texts):
            for line in source.remarks:
                remark(f"{spec}: {line}")
        settings = CorpusSettings(tokenizer, shard_tokens, validation_share, [source.description() for source in texts])
        journal = claim_folder(out, settings, resume=resume)
        if journal is not None:
            chosen = _tokenizer(out / TOKENIZER, tokenizer, texts, progress)
            _write_shards(out, journal, chosen, texts, workers, progress)
        _remove_traces(out)
        return read_sidecar(out)


def most_workers() -> int:
    """More processes than these only take memory from each other."""
    return max(64, 4 * (os.cpu_count() or 1))


def _scan(sources: Sequence[Source], share: float | None, progress: Callable[[PreparationProgress], None]) -> None:
    """Read all sources once; `UsageError` if that is not possible, or if a split would have no document."""
    done, told, total = 0, time.monotonic(), _total(sources)

    def tick(size: int) -> None:
        nonlocal done, told
        done += size
        if time.monotonic() - told >= SCAN_SECONDS:
            told = time.monotonic()
            progress(PreparationProgress("reading the sources", done, total, 0))

    sides: frozenset[str] = frozenset().union(*(source.scan(tick) for source in sources))
    if "train" not in sides:
        raise UsageError("The sources have no document to train on: all are empty, blank, or held out.")
    if "validation" not in sides and share != 0:
        raise UsageError(
            "The sources have too little text, or too few modules or plays, for any to be held out for validation; "
            "give more of it, or --validation-share 0 to go without."
        )


def _tokenizer(
    folder: Path, spec: str, sources: Sequence[Source], progress: Callable[[PreparationProgress], None]
) -> Tokenizer:
    """The tokenizer in `folder`, made and put there first if it is not there yet."""
    if not folder.exists():
        make_tokenizer(spec, lambda: _training_texts(sources, progress)).save(folder)
    return load_tokenizer(folder)


def _training_texts(sources: Sequence[Source], progress: Callable[[PreparationProgress], None]) -> Iterator[str]:
    done, total = 0, _total(sources)
    for batch in batched(_documents(sources)):
        yield from batch.texts["train"]
        done += batch.size
        progress(PreparationProgress("learning the tokenizer", done, total, 0))


def _write_shards(
    out: Path,
    journal: Journal,
    tokenizer: Tokenizer,
    sources: Sequence[Source],
    workers: int,
    progress: Callable[[PreparationProgress], None],
) -> None:
    settings, total = journal.settings, _total(sources)
    sha256 = tokenizer_digest(out / TOKENIZER)
    if journal.tokenizer_sha256 not in (None, sha256):
        raise UsageError(
            f"The tokenizer in {out} is not the one that this corpus was begun with, so it cannot be resumed; start it "
            "anew in another folder."
        )
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
                states = {name: writer.save() for name, writer in writers.items()}
                Journal(settings, documents, done, states, sha256).write(out)
                last = now
            progress(PreparationProgress("encoding", done, total, sum(writer.tokens for writer in writers.values())))
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
        tokenizer_sha256=sha256,
        **vars(settings),
    )
    write_json(out / SIDECAR, sealed(asdict(sidecar)))


def _documents(sources: Sequence[Source]) -> Iterator[Document]:
    return itertools.chain.from_iterable(source.documents() for source in sources)


def _total(sources: Sequence[Source]) -> int | None:
    totals = [source.total for source in sources]
    return None if None in totals else sum(total or 0 for total in totals)


def _versions(tokenizer: Tokenizer, settings: CorpusSettings) -> dict[str, str]:
    """Of what had a part in the corpus, and of nothing else: they are in its fingerprint."""
    packages = {"tokenizers": ["tokenizers"], "transformers": ["tokenizers", "transformers"]}.get(tokenizer.kind, [])
    if any(source["source"] == "hf" for source in settings.sources):
        packages = ["datasets", *packages]
    found = {"deltaproduct": deltaproduct.__version__, "python": platform.python_version()}
    return found | {package: importlib.metadata.version(package) for package in packages}


def _remove_traces(out: Path) -> None:
    """Remove what only an unfinished corpus needs, and what a kill within the writing of a file leaves."""
    for path in (out / JOURNAL, *out.glob("*.partial"), *out.glob(".*.tmp")):
        path.unlink(missing_ok=True)


__getattr__ = renamed_names(__name__, {"Progress": "PreparationProgress"})
