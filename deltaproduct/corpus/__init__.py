"""Corpora for language models: `deltaproduct lm prepare` writes one, training and evaluation read it.

A datum's path is the files' order: a source yields documents (`sources.py`), a tokenizer makes ids of their text
(`tokenizer.py`), the writer puts them into shards (`writer.py`; what is on disk is in `sidecar.py`), the reader maps
those (`reader.py`), and windows of them are a batch (`windows.py`).

    corpus = Corpus.open(Path("corpus"))
    batch = Windows(corpus.split("train"), length=512, seed=0).batch(step=0, size=8)
"""

from typing import TYPE_CHECKING

from deltaproduct.late import late

if TYPE_CHECKING:
    from deltaproduct.corpus.reader import Corpus, Split
    from deltaproduct.corpus.sidecar import TOKENIZER
    from deltaproduct.corpus.tokenizer import Tokenizer, load_tokenizer
    from deltaproduct.corpus.windows import Batch, PackedDocuments, Windows

__all__ = ["TOKENIZER", "Batch", "Corpus", "PackedDocuments", "Split", "Tokenizer", "Windows", "load_tokenizer"]

__getattr__, __dir__ = late(
    __name__,
    {
        "reader": ("Corpus", "Split"),
        "sidecar": ("TOKENIZER",),
        "tokenizer": ("Tokenizer", "load_tokenizer"),
        "windows": ("Batch", "PackedDocuments", "Windows"),
    },
)
