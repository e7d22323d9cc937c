"""Accuracy over a range of lengths, as benchmarks of formal languages report it: one number for, say, 40 to 256."""

from dataclasses import dataclass

import torch

from deltaproduct.errors import UsageError
from deltaproduct.evaluation.lengths import LengthResult, evaluate_length
from deltaproduct.memory import check_memory
from deltaproduct.models import SequenceModel
from deltaproduct.seeds import evaluation_generator
from deltaproduct.tasks import Task
from deltaproduct.tasks.task import check_fits


@dataclass(frozen=True)
class RangeResult:
    """How a model did on sequences whose lengths were drawn uniformly from a range, both ends included."""

    lengths: tuple[int, int]
    sequences: int
    accuracy: float  # each length's, over its scored positions, weighted with its sequences
    scaled_accuracy: float  # (accuracy − chance) / (1 − chance)
    sequence_accuracy: float  # sequences whose every scored position is right
    by_length: dict[int, LengthResult]  # of the lengths that were drawn


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
    was_training = model.training
    model.eval()
    try:
        by_length = {
            length: evaluate_length(model, task, length, sequences=count, seed=seed)
            for length, count in enumerate(drawn.bincount().tolist())
            if count
        }
    finally:
        model.train(was_training)
    accuracy = sum(r.accuracy * r.sequences for r in by_length.values()) / sequences
    return RangeResult(
        lengths=(lo, hi),
        sequences=sequences,
        accuracy=accuracy,
        scaled_accuracy=task.scaled(accuracy),
        sequence_accuracy=sum(r.sequence_accuracy * r.sequences for r in by_length.values()) / sequences,
        by_length=by_length,
    )
