"""Accuracy by sequence length, or over a range of lengths; in pieces, so that a million tokens fit in memory.

B sequences · L length, BOS not counted · scored positions are those of the task's mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaproduct.errors import UsageError
from deltaproduct.memory import check_memory
from deltaproduct.models import SequenceModel, evaluating, run_in_pieces
from deltaproduct.models.size import FLOAT
from deltaproduct.seeds import evaluation_generator
from deltaproduct.tasks import Task
from deltaproduct.tasks.task import check_fits

SAMPLED_TOKENS = 1 << 22  # tokens of data held at once
MOST_TOKENS = 10**12  # of all sequences of a length: days on the fastest machine


@dataclass(frozen=True)
class LengthResult:
    """How a model did on sequences of one length. Positions are numbered from 0, the BOS; unscored ones are NaN."""

    length: int
    sequences: int
    accuracy: float  # scored positions that are right
    sequence_accuracy: float  # sequences whose every scored position is right (prefix-exact at the full length)
    scored_by_position: Tensor  # [1+L] sequences that have a label at each position
    by_position: Tensor  # [1+L] share of these that are right there
    prefix_by_position: Tensor  # [1+L] share of sequences right at every scored position up to each one


@dataclass(frozen=True)
class RangeResult:
    """How a model did on sequences whose lengths were drawn uniformly from a range, both ends included."""

    lengths: tuple[int, int]
    sequences: int
    accuracy: float  # each length's, over its scored positions, weighted with its sequences
    scaled_accuracy: float  # (accuracy − chance) / (1 − chance)
    sequence_accuracy: float  # sequences whose every scored position is right
    by_length: dict[int, LengthResult]  # of the lengths that were drawn


def evaluate_length(
    model: SequenceModel, task: Task, length: int, *, sequences: int = 64, seed: int = 0
) -> LengthResult:
    """Evaluate on `sequences` fresh sequences of one length, in float32 (float64 models stay so), in evaluation mode.

    The data come from the evaluation stream of `seed`, which no training run can draw from.

    Raises UsageError when `sequences` is less than 1, or there are more than 10¹² tokens, or more at once than fit.
    """
    if sequences < 1:
        raise UsageError(f"sequences must be at least 1, not {sequences}.")
    generator = evaluation_generator(seed, length)
    _check_size(model, sequences, length)
    right_at = torch.zeros(1 + length, dtype=torch.long)
    exact_at = torch.zeros(1 + length, dtype=torch.long)
    scored_at = torch.zeros(1 + length, dtype=torch.long)
    exact = 0
    at_once = max(1, SAMPLED_TOKENS // (1 + length))
    with evaluating(model):
        for begin in range(0, sequences, at_once):
            tokens, labels, mask = task.sample(min(at_once, sequences - begin), length, generator=generator)
            unbroken = torch.ones(tokens.shape[0], dtype=torch.bool)
            for lo, logits, _ in run_in_pieces(model, tokens):
                span = slice(lo, lo + logits.shape[1])
                hit = (logits.argmax(-1).cpu() == labels[:, span]) & mask[:, span]
                fine = hit | ~mask[:, span]
                prefix = fine.int().cummin(dim=1).values.bool() & unbroken[:, None]
                unbroken = prefix[:, -1]
                right_at[span] += hit.sum(0)
                exact_at[span] += prefix.sum(0)
                scored_at[span] += mask[:, span].sum(0)
            exact += int(unbroken.sum())
    nowhere = scored_at == 0
    return LengthResult(
        length=length,
        sequences=sequences,
        accuracy=right_at.sum().item() / max(1, scored_at.sum().item()),
        sequence_accuracy=exact / sequences,
        scored_by_position=scored_at,
        by_position=(right_at / scored_at.clamp(min=1)).masked_fill(nowhere, torch.nan),
        prefix_by_position=(exact_at / sequences).masked_fill(nowhere, torch.nan),
    )


def evaluate_lengths(
    model: SequenceModel, task: Task, lengths: Sequence[int], *, sequences: int = 64, seed: int = 0
) -> dict[int, LengthResult]:
    """`evaluate_length` for each of `lengths`; `UsageError` also when the model does not fit the task."""
    check_fits(model.config, task)
    return {n: evaluate_length(model, task, n, sequences=sequences, seed=seed) for n in lengths}


def evaluate_range(
    model: SequenceModel,
    task: Task,
    lengths: tuple[int, int] | None = None,
    *,
    sequences: int = 8192,
    seed: int = 0,
) -> RangeResult:
    """Evaluate on `sequences` fresh sequences of random lengths, those of one length together.

    Args:
        lengths: the shortest and the longest, BOS not counted; None means the task's `test_lengths`.

    The data come from the evaluation stream of `seed`, which no training run can draw from. Where every sequence has
    one answer, `accuracy` is the share of sequences that are right. 8,192 sequences are those of arXiv 2411.12537.

    Raises UsageError when `lengths` is no range of legal lengths or None where the task has no test lengths, when
    `sequences` is less than 1, or when the model does not fit the task.
    """
    if lengths is None and task.test_lengths is None:
        raise UsageError(f"Task {task.name} has no test lengths of its own; a range of lengths has to be given.")
    lo, hi = lengths or task.test_lengths or (0, 0)
    if not task.min_length <= lo <= hi:
        raise UsageError(f"The lengths {lo} to {hi} are no range; task {task.name} begins at {task.min_length}.")
    if sequences < 1:
        raise UsageError(f"sequences must be at least 1, not {sequences}.")
    check_fits(model.config, task)
    check_memory(f"A draw of {sequences:,} lengths", 8 * sequences, "sequences")
    # No sequence has length 0, so this stream is nobody else's.
    drawn = torch.randint(lo, hi + 1, (sequences,), generator=evaluation_generator(seed, 0))
    by_length = {
        length: evaluate_length(model, task, length, sequences=count, seed=seed)
        for length, count in enumerate(drawn.bincount().tolist())
        if count
    }
    accuracy = sum(r.accuracy * r.sequences for r in by_length.values()) / sequences
    return RangeResult(
        lengths=(lo, hi),
        sequences=sequences,
        accuracy=accuracy,
        scaled_accuracy=task.scaled(accuracy),
        sequence_accuracy=sum(r.sequence_accuracy * r.sequences for r in by_length.values()) / sequences,
        by_length=by_length,
    )


def scores(results: dict[int, LengthResult]) -> dict[str, dict[str, float]]:
    """The two figures of merit by length, as they go into JSON."""
    return {
        "accuracy": {str(n): r.accuracy for n, r in results.items()},
        "sequence_accuracy": {str(n): r.sequence_accuracy for n, r in results.items()},
    }


def _check_size(model: SequenceModel, sequences: int, length: int) -> None:
    """`UsageError` if so much can never be read, or what is held at once cannot fit."""
    if sequences * (1 + length) > MOST_TOKENS:
        raise UsageError(
            f"{sequences:,} sequences of length {length:,} are more than {MOST_TOKENS:,} tokens; lower one of them."
        )
    what, advice = f"Evaluation at length {length:,}", "lengths or sequences"
    at_once = min(sequences, max(1, SAMPLED_TOKENS // (1 + length)))
    data = (34 * at_once + 3 * 8) * (1 + length)  # of `Task.sample`, and three counts at each position
    state, device = 0, torch.device("cpu")
    if isinstance(model, SequenceModel):  # nothing is known of what others hold
        state, device = FLOAT * at_once * model.state_size_after(1 + length), model.device
    check_memory(what, data + (state if device.type == "cpu" else 0), advice)
    check_memory(what, state, advice, device=device)
