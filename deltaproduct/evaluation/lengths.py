"""Accuracy per sequence length, streamed in pieces with the carried state, so that a million tokens fit in memory.

B sequences · L length, BOS not counted · scored positions are those of the task's mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaproduct.errors import UsageError
from deltaproduct.layers.states import device_of
from deltaproduct.memory import check_memory
from deltaproduct.models import SequenceModel
from deltaproduct.models.size import FLOAT
from deltaproduct.seeds import evaluation_generator
from deltaproduct.tasks import Task
from deltaproduct.tasks.task import check_fits

SAMPLED_TOKENS = 1 << 22  # tokens of data held at once
MOST_TOKENS = 10**12  # of all sequences of a length: days on the fastest machine
PIECE_TOKENS = 1 << 15  # tokens that go through the model at once


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


@torch.no_grad()
def evaluate_length(
    model: SequenceModel, task: Task, length: int, *, sequences: int = 64, seed: int = 0
) -> LengthResult:
    """Evaluate on `sequences` fresh sequences of one length, in float32 (float64 models stay so).

    The data come from the evaluation stream of `seed`, which no training run can draw from.

    Raises UsageError when `sequences` is less than 1, or there are more than 10¹² tokens, or more at once than fit.
    """
    if sequences < 1:
        raise UsageError(f"sequences must be at least 1, not {sequences}.")
    generator = evaluation_generator(seed, length)
    device = device_of(model)
    _check_size(model, device, sequences, length)
    right_at = torch.zeros(1 + length, dtype=torch.long)
    exact_at = torch.zeros(1 + length, dtype=torch.long)
    scored_at = torch.zeros(1 + length, dtype=torch.long)
    exact = 0
    at_once = max(1, SAMPLED_TOKENS // (1 + length))
    for begin in range(0, sequences, at_once):
        tokens, labels, mask = task.sample(min(at_once, sequences - begin), length, generator=generator)
        unbroken = torch.ones(tokens.shape[0], dtype=torch.bool)
        state = None
        piece = max(1, PIECE_TOKENS // tokens.shape[0])
        for lo in range(0, 1 + length, piece):
            span = slice(lo, lo + piece)
            with torch.autocast(device.type, enabled=False):
                logits, state = model(tokens[:, span].to(device), state)
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


def _check_size(model: SequenceModel, device: torch.device, sequences: int, length: int) -> None:
    """`UsageError` if so much can never be read, or what is held at once cannot fit."""
    if sequences * (1 + length) > MOST_TOKENS:
        raise UsageError(
            f"{sequences:,} sequences of length {length:,} are more than {MOST_TOKENS:,} tokens; lower one of them."
        )
    what, advice = f"Evaluation at length {length:,}", "lengths or sequences"
    at_once = min(sequences, max(1, SAMPLED_TOKENS // (1 + length)))
    data = (34 * at_once + 3 * 8) * (1 + length)  # of `Task.sample`, and three counts at each position
    carried = model.state_size_after(1 + length) if isinstance(model, SequenceModel) else 0
    state = FLOAT * at_once * carried
    check_memory(what, data + (state if device.type == "cpu" else 0), advice)
    check_memory(what, state, advice, device=device)


def evaluate_lengths(
    model: SequenceModel, task: Task, lengths: Sequence[int], *, sequences: int = 64, seed: int = 0
) -> dict[int, LengthResult]:
    """`evaluate_length` for each of `lengths`, with the model in evaluation mode meanwhile."""
    check_fits(model.config, task)
    was_training = model.training
    model.eval()
    try:
        return {n: evaluate_length(model, task, n, sequences=sequences, seed=seed) for n in lengths}
    finally:
        model.train(was_training)


def scores(results: dict[int, LengthResult]) -> dict[str, dict[str, float]]:
    """The two figures of merit by length, as they go into JSON."""
    return {
        "accuracy": {str(n): r.accuracy for n, r in results.items()},
        "sequence_accuracy": {str(n): r.sequence_accuracy for n, r in results.items()},
    }
