"""Documents to token ids, batch by batch and in order, in this process or in several."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from deltaproduct.corpus.sidecar import SPLITS
from deltaproduct.corpus.source import Document
from deltaproduct.corpus.tokenizer import Tokenizer, load_tokenizer
from deltaproduct.errors import UsageError

BATCH_CHARACTERS = 2**20  # enough work for a process to be worth its while, little enough to hold a few of
WAITING = 2  # batches per worker that are under way or done and not yet written


@dataclass
class DocumentBatch:
    """Documents that are encoded together.

    Attributes:
        texts: by split, blank ones left out.
        documents, size: of all documents, blank ones counted.
    """

    texts: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in SPLITS})
    documents: int = 0
    size: int = 0
    characters: int = 0

    def add(self, document: Document) -> None:
        """Append a document."""
        self.documents += 1
        self.size += document.size
        self.characters += len(document.text)
        if document.text and not document.text.isspace():
            self.texts["validation" if document.held_out else "train"].append(document.text)


@dataclass(frozen=True)
class Encoded:
    """Documents of one split: ids [tokens], one document after the other, and lengths [documents]."""

    ids: np.ndarray
    lengths: np.ndarray


def batched(documents: Iterable[Document]) -> Iterator[DocumentBatch]:
    """Documents in their order, in batches of about `BATCH_CHARACTERS`."""
    batch = DocumentBatch()
    for document in documents:
        batch.add(document)
        if batch.characters >= BATCH_CHARACTERS:
            yield batch
            batch = DocumentBatch()
    if batch.documents:
        yield batch


def encode_batch(tokenizer: Tokenizer, batch: DocumentBatch) -> dict[str, Encoded]:
    """Each split's documents as ids, the document token before each.

    Raises:
        UsageError: the tokenizer gives an id that it says it does not have, which a shard might not even hold.
    """
    return {name: _encode(tokenizer, texts) for name, texts in batch.texts.items()}


def _encode(tokenizer: Tokenizer, texts: list[str]) -> Encoded:
    rows = [np.array([tokenizer.document_token, *tokenizer.encode(text)], np.uint32) for text in texts]
    ids = np.concatenate(rows) if rows else np.empty(0, np.uint32)
    if len(ids) and ids.max() >= tokenizer.vocab_size:
        raise UsageError(
            f"The tokenizer has {tokenizer.vocab_size} tokens, but gives the token {ids.max()} for a text; no corpus "
            "can be made with it."
        )
    return Encoded(ids, np.array([len(row) for row in rows], np.int64))


def encode_all(
    batches: Iterable[DocumentBatch], tokenizer_folder: Path, workers: int
) -> Generator[tuple[DocumentBatch, dict[str, Encoded]], None, None]:
    """Every batch and its ids, in order, whatever the number of workers.

    Args:
        tokenizer_folder: where each worker loads the tokenizer from.
        workers: processes; 1 means this one.

    Raises:
        UsageError: a worker was killed, as the system does where memory runs out.
    """
    if workers == 1:
        tokenizer = load_tokenizer(tokenizer_folder)
        for batch in batches:
            yield batch, encode_batch(tokenizer, batch)
        return
    # Fresh processes: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (tokenizer_folder,))
    waiting: deque[tuple[DocumentBatch, Future[dict[str, Encoded]]]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(_work, batch)))
            if len(waiting) >= WAITING * workers:
                batch, future = waiting.popleft()
                yield batch, future.result()
        while waiting:
            batch, future = waiting.popleft()
            yield batch, future.result()
    except BrokenProcessPool as e:
        raise UsageError(
            "A worker process was killed, perhaps for want of memory; take fewer --workers and go on with --resume."
        ) from e
    finally:
        pool.shutdown(cancel_futures=True)


_tokenizer: Tokenizer  # of a worker process


def _start_worker(tokenizer_folder: Path) -> None:
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tokenizer = load_tokenizer(tokenizer_folder)


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers, and they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(batch: DocumentBatch) -> dict[str, Encoded]:
    return encode_batch(_tokenizer, batch)
