"""Training on a task: fresh sequences, the loss where a label is asked for, and a curriculum of lengths.

B sequences · T = 1 + length tokens, BOS first.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltaproduct.errors import UsageError
from deltaproduct.models import ModelConfig, SequenceModel
from deltaproduct.seeds import order_generator, training_generator
from deltaproduct.tasks import Task, get_task
from deltaproduct.tasks.task import check_fits
from deltaproduct.training.checkpoint import Progress
from deltaproduct.training.config import TrainConfig
from deltaproduct.training.loop import OneProcess
from deltaproduct.training.objectives.objective import StepReport

LOSS_EMA_DECAY = 0.9  # of the running mean that decides when a curriculum's stage ends
IGNORED = -100  # a label that no task has


@dataclass
class Curriculum:
    """Where a run is in its curriculum.

    Attributes:
        stage: from 0.
        stage_start: the step at which it began.
        loss_mean: running mean of the loss within the stage, uncorrected.
    """

    stage: int = 0
    stage_start: int = 0
    loss_mean: float = 0.0

    def advance(self, settings: TrainConfig, step: int, loss: float) -> float:
        """Note the loss of a step, with which `step` are done; move to the next stage if this one is over.

        Returns:
            The running mean of the loss.
        """
        self.loss_mean = LOSS_EMA_DECAY * self.loss_mean + (1 - LOSS_EMA_DECAY) * loss
        in_stage = step - self.stage_start
        mean = self.loss_mean / (1 - LOSS_EMA_DECAY**in_stage)
        if self.stage < len(settings.lengths) - 1:
            learnt = settings.stage_loss is not None and mean < settings.stage_loss
            spent = bool(settings.stage_steps) and in_stage >= settings.stage_steps[self.stage]
            if learnt or spent:
                self.stage, self.stage_start, self.loss_mean = self.stage + 1, step, 0.0
        return mean

    def problem(self, settings: TrainConfig, step: int) -> str | None:
        """Why no run of these settings can be here after so many steps."""
        stages = len(settings.lengths)
        if self.stage >= stages:
            return f"the run is in stage {self.stage}, and it has stages 0 to {stages - 1}"
        if not self.stage <= self.stage_start <= step:
            return f"stage {self.stage} is said to begin at step {self.stage_start} of {step}"
        return f"loss_mean is {self.loss_mean}, and no loss is negative" if self.loss_mean < 0 else None


class TaskObjective:
    """Training on a task; see `Objective`."""

    kept = Curriculum
    validates = False

    def __init__(self, settings: TrainConfig):
        self.settings, self.name = settings, settings.task
        self.task = get_task(settings.task)
        self._scored = 1  # positions of the batch that is trained on

    def check(self, model: ModelConfig, ranks: OneProcess) -> None:
        check_fits(model, self.task)
        if ranks.size == 1:
            return
        if ranks.per_sequence > 1:
            raise UsageError("A task's sequences cannot be divided over processes; take context_parallel=1.")
        shares = {size // self.settings.grad_accumulation for size in self.settings.batch_sizes}
        if uneven := sorted(share for share in shares if share % ranks.size):
            raise UsageError(
                f"{uneven[0]} sequences (batch_sizes / grad_accumulation) cannot be dealt out evenly to {ranks.size} "
                "ranks: each needs the same number of them, and at least one."
            )

    def write_files(self, out: Path) -> None:
        pass

    def module(self, model: SequenceModel, ranks: OneProcess) -> nn.Module:
        return model

    def backward(self, module: nn.Module, progress: Progress[Curriculum], ranks: OneProcess) -> Tensor:
        settings = self.settings
        batch = sample_batch(self.task, settings, progress.step, progress.kept.stage)
        scored = batch[2].sum()
        self._scored = int(scored)
        loss_sum, right = torch.zeros((), device=ranks.device), torch.zeros((), device=ranks.device)
        parts = list(zip(*(x.to(ranks.device).chunk(settings.grad_accumulation) for x in batch), strict=True))
        for number, part in enumerate(parts, start=1):
            tokens, labels, mask = (x.chunk(ranks.size)[ranks.rank] for x in part)
            with nullcontext() if number == len(parts) else ranks.accumulating(module):
                with torch.autocast(ranks.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
                    logits, _ = module(tokens)
                # Weighted by scored positions, so that the sum over micro-batches is the mean over the whole batch.
                loss = masked_loss(logits, labels, mask) * (mask.sum() / scored.to(ranks.device))
                (loss * ranks.size if ranks.size > 1 else loss).backward()
            loss_sum += loss.detach()
            right += ((logits.detach().argmax(-1) == labels) & mask).sum()
        return torch.stack((loss_sum, right))

    def after_step(self, progress: Progress[Curriculum], sums: list[float]) -> StepReport:
        loss, accuracy = sums[0], sums[1] / self._scored
        length = self.settings.lengths[progress.kept.stage]
        mean = progress.kept.advance(self.settings, progress.step, loss)
        figures = {"length": length, "loss": loss, "loss_mean": mean, "accuracy": accuracy}
        return StepReport(figures, f"length {length}  loss {loss:.4f}  accuracy {accuracy:.3f}")

    def speed(self) -> Mapping[str, float]:
        return {}

    def validate(self, module: nn.Module, ranks: OneProcess) -> Mapping[str, float]:
        return {}


def sample_batch(task: Task, settings: TrainConfig, step: int, stage: int) -> tuple[Tensor, Tensor, Tensor]:
    """The batch of a step: a pure function of (seed, step, stage), so that nothing need be saved to resume."""
    size = settings.batch_size(stage)
    number = step
    if settings.num_samples is not None:
        batches = settings.num_samples // size
        epoch, place = divmod(step, batches)
        number = int(torch.randperm(batches, generator=order_generator(settings.seed, epoch))[place])
    generator = training_generator(settings.seed, number)
    length = settings.lengths[stage]
    if settings.min_length is not None:
        length = int(torch.randint(settings.min_length, length + 1, (), generator=generator))
    return task.sample(size, length, generator=generator)


def masked_loss(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Mean cross-entropy over the scored positions. logits [B,T,num_labels], labels and mask [B,T]."""
    # Ignored and not indexed away, which would copy the logits and scatter their gradient.
    labels = labels.masked_fill(~mask, IGNORED)
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)
