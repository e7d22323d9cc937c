"""A small corpus, for tests of what trains on one."""

import random
from pathlib import Path

from deltaproduct.corpus.writer import prepare


def corpus_of_words(folder: Path) -> Path:
    """Forty documents of 60 words in bytes, a fifth of them held out; where the corpus is."""
    draw = random.Random(0)
    for i in range(40):
        words = draw.choices(["sun", "moon", "rises", "sets", "and", "the", "old", "sea"], k=60)
        (folder / f"{i}.txt").write_text(" ".join(words) + ".")
    prepare([f"text:{folder}/*.txt"], "bytes", folder / "corpus", validation_share=0.2)
    return folder / "corpus"
