"""Windows of a long text: the same ones for every model that is evaluated on it.

n tokens of text · L length · S windows. A window of L inputs also needs the token after it, the last one's target.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
from torch import Tensor

from deltaproduct.errors import UsageError
from deltaproduct.models import ModelConfig
from deltaproduct.renamed import renamed_names

MOST_WINDOWS = 256  # that are taken where nobody says how many
APART = 8  # they begin at least L/8 tokens apart

TokensDone = Callable[[int], None]  # is told how many tokens are done


class Text(Protocol):
    """Documents one after another as one stream of tokens, such as a corpus's split."""

    @property
    def num_tokens(self) -> int:
        """n."""

    @property
    def document_offsets(self) -> np.ndarray:
        """[documents+1] ints from 0 to n: where each document begins, with its document token."""

    def tokens(self, start: int, stop: int) -> Tensor:
        """Tokens start … stop − 1, int64 [stop−start]."""


def evenly_spaced(text: Text, length: int, windows: int | None = None) -> list[range]:
    """The inputs of S windows of L tokens, evenly spaced from the text's first token to its last.

    Args:
        windows: S; they overlap where the text is shorter than all of them together. That has its use: the more they
            do, the more nearly each position sees the same text, so that a mean by position tells of the position and
            not of the text there. None means as many as begin L/8 tokens apart, and at most `MOST_WINDOWS`.

    Raises:
        UsageError: a size is not positive, the text is too short, or it has no such number of different windows.
    """
    check_length(text, length)
    last = text.num_tokens - 1 - length  # where the last window begins
    if windows is None:
        windows = min(MOST_WINDOWS, 1 + last // max(1, length // APART))
    if not 1 <= windows <= last + 1:
        raise UsageError(f"sequences must be from 1 to {last + 1:,}, the windows of {length:,} tokens in this text, "
                         f"not {windows:,}.")  # fmt: skip
    return [range(start, start + length) for start in evenly_spaced_starts(last, windows)]


def evenly_spaced_starts(last: int, windows: int, *, reach_last: bool = True) -> list[int]:
    """Where windows begin, from 0 on: the last of them at `last`, or as far before it as they are apart."""
    gaps = max(1, windows - 1) if reach_last else windows
    return [i * last // gaps for i in range(windows)]


def consecutive(text: Text, length: int) -> list[range]:
    """The inputs of windows of L tokens that follow one another through the whole text, the last one shorter.

    Every token but the first is a target once. Raises UsageError as `evenly_spaced` does.
    """
    check_length(text, length)
    inputs = text.num_tokens - 1
    return [range(start, min(start + length, inputs)) for start in range(0, inputs, length)]


def check_length(text: Text, length: int) -> None:
    """`UsageError` unless the text has a window of that length."""
    if length < 1:
        raise UsageError(f"length must be at least 1, not {length}.")
    if text.num_tokens <= length:
        raise UsageError(f"The split has {text.num_tokens:,} tokens; a window of {length:,} and the token after it "
                         f"do not fit, so choose a shorter length.")  # fmt: skip


def check_vocabulary(config: ModelConfig, vocab_size: int) -> None:
    """`UsageError` unless the model reads and predicts a vocabulary of that size."""
    for name in ("vocab_size", "num_labels"):
        if getattr(config, name) != vocab_size:
            raise UsageError(f"The model has {name}={getattr(config, name)}, but the data have a vocabulary of "
                             f"{vocab_size}; evaluate it on data of its own tokenizer.")  # fmt: skip


__getattr__ = renamed_names(__name__, {"Progress": "TokensDone"})
