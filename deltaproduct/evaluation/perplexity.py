"""Cross-entropy of a language model by position, streamed in pieces with the carried state.

L positions, numbered from 0: at position t the model has read t+1 tokens of the window and predicts the next. Losses
are in nats. Of the text and of the logits only a piece is held at a time, so that memory grows with L by no more than
the curve itself, and by the state where that is a cache.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from deltaproduct.errors import UsageError
from deltaproduct.evaluation.windows import Text, TokensDone, check_length, consecutive, evenly_spaced
from deltaproduct.models import SequenceModel, evaluating, run_in_pieces
from deltaproduct.ops.inputs import compute_dtype

BATCH = 8  # windows that go through the model side by side
PIECE_TOKENS = 1 << 12  # tokens that go through the model at once
PIECE_LOGITS = 1 << 25  # floats of logits that are held at once
PAPERS_WINDOW = 501  # positions that arXiv 2502.10297 smooths its curves over, of 32,768


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text that is cut into windows of `context` tokens."""

    context: int
    by_position: Tensor  # [L] float64: mean loss at each position
    predicted: Tensor  # [L] ints: tokens predicted at each position; fewer where the last window has ended
    bytes: int  # of the predicted text, in UTF-8; document tokens have none

    @property
    def tokens(self) -> int:
        """Predicted tokens, those that begin a document included."""
        return int(self.predicted.sum())

    @property
    def nats(self) -> float:
        """The loss of all of them together."""
        return float((self.by_position * self.predicted).sum())

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Per token."""
        return _exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Of text; the loss of document tokens counts. Infinite where nothing but such tokens was predicted."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.inf

    @property
    def byte_perplexity(self) -> float:
        """Per byte of text, which compares models of different tokenizers."""
        return _exp(self.bits_per_byte * math.log(2))


class Bucket(NamedTuple):
    """Positions start … stop − 1 of a window, and the perplexity of the tokens that are predicted there."""

    start: int
    stop: int
    perplexity: float


def loss_by_position(
    model: SequenceModel,
    text: Text,
    *,
    length: int,
    sequences: int | None = None,
    piece: int | None = None,
    progress: TokensDone | None = None,
) -> Tensor:
    """The mean loss at each position of windows that are spaced evenly over the text (`evenly_spaced`).

    Args:
        text: whose tokens the model's vocabulary has (`check_vocabulary`).
        length: L; may be many times the training context.
        sequences: windows, which may overlap; None: see `evenly_spaced`.
        piece: tokens of a window that go through the model at once; None means what fits `PIECE_TOKENS` and
            `PIECE_LOGITS`. It does not change the result but for rounding.
        progress: is told how many tokens are done.

    Returns:
        [L] float64, in nats.

    Raises:
        UsageError: the text has no such windows, or a size is not positive.
    """
    total, predicted = _sums(model, text, evenly_spaced(text, length, sequences), piece, progress)
    return total / predicted


def perplexity(
    model: SequenceModel,
    text: Text,
    decode: Callable[[list[int]], str],
    *,
    context: int,
    sequences: int | None = None,
    piece: int | None = None,
    progress: TokensDone | None = None,
) -> Perplexity:
    """The loss on windows that do not overlap, each read from a fresh state.

    Args:
        decode: the tokenizer's, by which bytes are counted. Where `sequences` leaves gaps, a window that begins or ends
            within a character counts up to two bytes too many or too few at that end.
        context: L; the last window may be shorter.
        sequences: windows, spaced evenly; None means all of the text.

    The other arguments, and the errors, are those of `loss_by_position`.
    """
    check_length(text, context)
    if sequences is None:
        windows = consecutive(text, context)
    elif sequences * context >= text.num_tokens:
        raise UsageError(f"sequences must be at most {(text.num_tokens - 1) // context:,}, the windows of {context:,} "
                         f"tokens that do not overlap in this text, not {sequences:,}.")  # fmt: skip
    else:
        windows = evenly_spaced(text, context, sequences)
    total, predicted = _sums(model, text, windows, piece, progress)
    return Perplexity(context, total / predicted, predicted, _bytes(text, decode, windows))


def smoothed(curve: Tensor, window: int) -> Tensor:
    """The centred mean of a curve [L] over `window` positions, and near its ends over those of them that there are.

    Of an even window, one position more lies before the centre than after it. Raises UsageError when it is below 1.
    """
    if window < 1:
        raise UsageError(f"The window of a mean must be at least 1, not {window}.")
    sums = F.pad(curve.double().cumsum(0), (1, 0))
    at = torch.arange(len(curve))
    lo, hi = (at - window // 2).clamp(min=0), (at + (window + 1) // 2).clamp(max=len(curve))
    return (sums[hi] - sums[lo]) / (hi - lo)


def smoothing_window(length: int) -> int:
    """The odd number of positions that a curve of that length is smoothed over unless somebody says otherwise: the
    papers' 501, or a sixteenth of the length where that is less."""
    return min(PAPERS_WINDOW, length // 16 | 1)


def cumulative_perplexity(curve: Tensor) -> Tensor:
    """The perplexity of the mean loss up to each position, of a curve [L]."""
    return (curve.double().cumsum(0) / torch.arange(1, len(curve) + 1)).exp()


def thinned_curve(curve: Tensor, window: int, points: int = 512) -> dict[str, list[float]]:
    """A curve [L] for JSON and figures, at up to `points` positions that are spaced evenly from its first to its last.

    Returns:
        "position": how many tokens have been read there, 1 … L; "loss": the mean over `window` positions (`smoothed`);
        "cumulative_perplexity".
    """
    at = np.unique(np.linspace(0, len(curve) - 1, min(len(curve), points)).round().astype(int))
    return {
        "position": (1 + at).tolist(),
        "loss": smoothed(curve, window)[at].tolist(),
        "cumulative_perplexity": cumulative_perplexity(curve)[at].tolist(),
    }


def perplexity_in_buckets(curve: Tensor, width: int, predicted: Tensor | None = None) -> list[Bucket]:
    """The perplexity within each bucket of `width` positions, of which the last may be narrower.

    Args:
        curve: [L] mean loss by position.
        predicted: [L] how many tokens each is the mean of; None means equally many.

    Raises UsageError when the width is below 1.
    """
    if width < 1:
        raise UsageError(f"A bucket must have at least 1 position, not {width}.")
    weights = torch.ones(len(curve), dtype=torch.float64) if predicted is None else predicted.double()
    buckets = []
    for start in range(0, len(curve), width):
        stop = min(start + width, len(curve))
        mean = (curve[start:stop].double() * weights[start:stop]).sum() / weights[start:stop].sum()
        buckets.append(Bucket(start, stop, _exp(float(mean))))
    return buckets


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def _sums(
    model: SequenceModel, text: Text, windows: Sequence[range], piece: int | None, progress: TokensDone | None
) -> tuple[Tensor, Tensor]:
    """The sum of the losses at each position [L] float64, and of how many [L]; every window from a fresh state."""
    if piece is not None and piece < 1:
        raise UsageError(f"piece must be at least 1, not {piece}.")
    length, done = max(map(len, windows)), 0
    total, predicted = torch.zeros(length, dtype=torch.float64), torch.zeros(length, dtype=torch.long)
    with evaluating(model):
        for batch in _batches(windows):
            fits = min(PIECE_TOKENS, PIECE_LOGITS // model.config.num_labels) // len(batch)
            for start, logits, _ in run_in_pieces(model, _inputs(text, batch, piece or max(1, fits))):
                span = slice(start, start + logits.shape[1])
                targets = _tokens(text, batch, span.start + 1, span.stop + 1).to(logits.device)
                losses = F.cross_entropy(
                    logits.to(compute_dtype(logits)).flatten(0, 1), targets.flatten(), reduction="none"
                )
                total[span] += losses.double().view(len(batch), -1).sum(0).cpu()
                predicted[span] += len(batch)
                done += losses.numel()
                if progress is not None:
                    progress(done)
    return total, predicted


def _batches(windows: Sequence[range]) -> Iterator[Sequence[range]]:
    """Up to `BATCH` consecutive windows at a time, all of one length."""
    batch: list[range] = []
    for window in windows:
        if batch and (len(batch) == BATCH or len(window) != len(batch[0])):
            yield batch
            batch = []
        batch.append(window)
    yield batch


def _inputs(text: Text, batch: Sequence[range], piece: int) -> Iterator[Tensor]:
    """The windows' tokens, so many of each at a time."""
    length = len(batch[0])
    return (_tokens(text, batch, lo, min(lo + piece, length)) for lo in range(0, length, piece))


def _tokens(text: Text, batch: Sequence[range], start: int, stop: int) -> Tensor:
    """[B,stop−start]: the text from `start` to `stop`, counted from where each window begins."""
    return torch.stack([text.tokens(window.start + start, window.start + stop) for window in batch])


def _bytes(text: Text, decode: Callable[[list[int]], str], windows: Sequence[range]) -> int:
    """Bytes of the text that the windows' targets spell. Windows that touch are decoded as one, because a document is
    exact only as a whole: cut within a character, it decodes to something else."""
    spans: list[tuple[int, int]] = []
    for window in windows:
        start, stop = window.start + 1, window.stop + 1
        if spans and spans[-1][1] == start:
            start = spans.pop()[0]
        spans.append((start, stop))
    offsets = text.document_offsets
    total = 0
    for start, stop in spans:
        first = int(np.searchsorted(offsets, start, side="right")) - 1
        last = int(np.searchsorted(offsets, stop, side="left"))
        for begin, end in zip(offsets[first:last].tolist(), offsets[first + 1 : last + 1].tolist(), strict=True):
            lo, hi = max(begin + 1, start), min(end, stop)
            if lo < hi:
                total += len(decode(text.tokens(lo, hi).tolist()).encode())
    return total
