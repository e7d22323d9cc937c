"""The contract that every task keeps: a sampler of (tokens, labels, mask), the sizes a model needs, and readable names.

Training, evaluation and the command line know tasks only through this class. A new kind of task subclasses `Task`,
passes its sizes to the constructor, writes `_sample`, `token_name` and `label_name`, and gets a line in `registry.py`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from deltaproduct.errors import UsageError, shown
from deltaproduct.memory import check_memory

MOST_SHOWN = 100_000  # tokens of a worked example


@dataclass(frozen=True, eq=False, kw_only=True)
class Task(ABC):
    """A labelled sequence problem. Immutable: one object can be cached and shared.

    Attributes:
        name: the name that `get_task` knows it by.
        summary: one line for a listing.
        vocab_size: number of token ids, BOS included; an embedding needs this many rows.
        num_labels: number of label ids; a head needs this many outputs.
        bos_id: the token that begins every sequence.
        chance: expected accuracy, over the scored positions of a long sequence, of the best guess that reads no input;
            for the tasks of the Chomsky hierarchy, the papers' value of it, so that scores compare with theirs.
        min_length: the shortest legal length.
        train_lengths, test_lengths: the shortest and the longest that the papers train and test at; None where they
            have no such ranges.
    """

    name: str
    summary: str
    vocab_size: int
    num_labels: int
    bos_id: int
    chance: float
    min_length: int = 1
    train_lengths: tuple[int, int] | None = None
    test_lengths: tuple[int, int] | None = None

    def scaled(self, accuracy: float) -> float:
        """(accuracy − chance) / (1 − chance): 0 for guessing, 1 for all right, below 0 for worse than guessing."""
        return (accuracy - self.chance) / (1 - self.chance)

    def sample(self, batch: int, length: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw `batch` independent sequences of `length` tokens, BOS not counted.

        Returns (tokens, labels, mask), each [batch, 1 + length], on the generator's device: tokens and labels int64,
        mask bool and True where the label is scored. Column 0 is BOS; its label is 0 and it is never scored. The
        generator is the only source of randomness, so equal generator states give equal data.

        Raises UsageError when `batch` is less than 1, `length` is less than `min_length`, or they cannot fit into
        memory.
        """
        if batch < 1:
            raise UsageError(f"batch must be at least 1, not {batch} (task {self.name})")
        if length < self.min_length:
            raise UsageError(f"length must be at least {self.min_length}, not {length} (task {self.name})")
        # Tokens and labels of 8 bytes and the mask of 1, here and once more with the column of BOS.
        what = f"A sample of {batch:,} sequences of length {length:,}"
        check_memory(what, 34 * batch * (1 + length), "their number or length", device=generator.device)
        tokens, labels, mask = self._sample(batch, length, generator)
        column = (batch, 1)
        return (
            torch.cat([tokens.new_full(column, self.bos_id), tokens], dim=1),
            torch.cat([labels.new_zeros(column), labels], dim=1),
            torch.cat([mask.new_zeros(column), mask], dim=1),
        )

    @abstractmethod
    def _sample(self, batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """What `sample` returns, without the BOS column: each [batch, length]. The arguments are already checked."""

    @abstractmethod
    def token_name(self, i: int) -> str:
        """Token i as a person would write it, 0 ≤ i < vocab_size."""

    @abstractmethod
    def label_name(self, i: int) -> str:
        """Label i as a person would write it, 0 ≤ i < num_labels."""

    def worked_example(self, length: int | None = None, seed: int = 0) -> str:
        """One sampled sequence as a table for a terminal: its tokens, labels and scored positions, a line for each.

        `length` None means 8, or `min_length` if that is more. Raises UsageError as `sample` does.
        """
        length = max(8, self.min_length) if length is None else length
        if length > MOST_SHOWN:
            raise UsageError(f"An example may have at most {MOST_SHOWN:,} tokens, not {length:,} (task {self.name})")
        sampled = self.sample(1, length, generator=torch.Generator().manual_seed(seed))
        columns = (column[0].tolist() for column in sampled)
        rows = [("position", "token", "label", "scored")]
        for t, (token, label, scored) in enumerate(zip(*columns, strict=True)):
            answer = (self.label_name(label), "yes") if scored else ("-", "no")
            rows.append((str(t), shown(self.token_name(token)), shown(answer[0]), answer[1]))
        widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        title = shown(f"{self.name}: {self.summary}")
        return "\n".join([title, f"one sequence of length {length}, seed {seed}", "", *lines])


class HasVocabulary(Protocol):
    """What a model, or its configuration, says of what it reads and writes."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def num_labels(self) -> int: ...


def check_fits(model: HasVocabulary, task: Task) -> None:
    """`UsageError` unless the model's vocabulary and labels are the task's."""
    for name in ("vocab_size", "num_labels"):
        mine, wanted = getattr(model, name), getattr(task, name)
        if mine != wanted:
            raise UsageError(f"The model has {name}={mine}, but task {task.name} needs {wanted}.")
