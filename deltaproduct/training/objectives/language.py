"""Training on a corpus: the next token, in windows; the loss on held-out ones; and a guard against a loss that rises.

b windows of this process · T tokens in a window, or in this process's span of it · D hidden size · V vocabulary.
"""

import math
import time
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaproduct.corpus import TOKENIZER, Corpus, PackedDocuments, Windows
from deltaproduct.errors import UsageError
from deltaproduct.evaluation.windows import evenly_spaced_starts
from deltaproduct.layers.plain import runs_as_written
from deltaproduct.machine import memory_in_use, peak_flops
from deltaproduct.models import ModelConfig, SequenceModel, evaluating
from deltaproduct.training.checkpoint import Progress
from deltaproduct.training.config import LanguageConfig, Run
from deltaproduct.training.corpus_place import note_corpus
from deltaproduct.training.loop import OneProcess, train
from deltaproduct.training.loss import summed_cross_entropy, summed_cross_entropy_of
from deltaproduct.training.objectives.objective import StepReport

LOSS_EMA_DECAY = 0.95  # of the running mean that tells a loss that rises
VALIDATION_WINDOWS = 32


@dataclass
class LossTrend:
    """Where a run's loss is.

    Attributes:
        loss_mean: running mean; None before the first step.
        lowest_mean: the lowest that it has been.
    """

    loss_mean: float | None = None
    lowest_mean: float | None = None

    def advance(self, loss: float) -> tuple[float, float]:
        """Note the loss of a step; returns the running mean and its lowest, in nats."""
        before, lowest = self.loss_mean, self.lowest_mean
        mean = loss if before is None else LOSS_EMA_DECAY * before + (1 - LOSS_EMA_DECAY) * loss
        lowest = mean if lowest is None else min(lowest, mean)
        self.loss_mean, self.lowest_mean = mean, lowest
        return mean, lowest

    def problem(self, settings: LanguageConfig, step: int) -> str | None:
        """Why no run can be here after so many steps."""
        lacking = step and None in (self.loss_mean, self.lowest_mean)
        return f"it has no loss_mean or lowest_mean of {step} steps" if lacking else None


class LanguageLoss(nn.Module):
    """A model with its loss inside: FSDP has the head's weight whole only within the forward pass of what it wraps.

    The head is not called where its weight says all that it computes, and its logits are then never there at once. An
    adapter, a hook, a parametrization, a bias or another module in its place is called, and so is the model itself
    where it has a hook or a forward of its own.
    """

    def __init__(self, model: SequenceModel):
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """The sum of the tokens' cross-entropies in nats; inputs and targets [b,T]."""
        model, targets = self.model, targets.flatten()
        if not runs_as_written(model, owner=SequenceModel):
            logits, _ = model(inputs, cu_seqlens=cu_seqlens)
            return summed_cross_entropy_of(logits.flatten(0, 1), targets)
        x, _ = model.hidden(inputs, cu_seqlens=cu_seqlens)
        head = model.head
        if isinstance(head, nn.Linear) and head.bias is None and runs_as_written(head):
            return summed_cross_entropy(x.flatten(0, 1), head.weight, targets)
        return summed_cross_entropy_of(head(x).flatten(0, 1), targets)


class LanguageObjective:
    """Training on a corpus; see `Objective`."""

    kept = LossTrend
    validates = True
    name = ""

    def __init__(self, settings: LanguageConfig, corpus: Corpus):
        self.settings, self.corpus = settings, corpus
        self._windows: Windows | PackedDocuments | None = None
        self._meter: _Meter | None = None

    def check(self, model: ModelConfig, ranks: OneProcess) -> None:
        settings, corpus = self.settings, self.corpus
        if not model.vocab_size == model.num_labels == corpus.vocab_size:
            raise UsageError(
                f"The corpus {corpus.folder} has {corpus.vocab_size} tokens, but the model has vocab_size="
                f"{model.vocab_size} and num_labels={model.num_labels}."
            )
        held_out = corpus.split("validation").num_tokens
        if held_out <= settings.context:
            raise UsageError(
                f"The validation split has {held_out} tokens, too few for a context of {settings.context}."
            )
        if settings.corpus != corpus.fingerprint:
            raise UsageError(
                f"The run is one on another corpus than {corpus.folder}; prepare that again, or start anew."
            )
        share = settings.batch_size // settings.grad_accumulation
        if share % ranks.data_size:
            raise UsageError(
                f"{share} sequences (batch_size / grad_accumulation) cannot be dealt out evenly to {ranks.data_size} "
                "ranks: each needs the same number of them, and at least one."
            )
        if ranks.per_sequence > 1 and settings.packed:
            raise UsageError(
                "Packed documents cannot be divided over processes; take plain windows or --context-parallel 1."
            )
        if settings.context % ranks.per_sequence:
            raise UsageError(
                f"A context of {settings.context} cannot be divided evenly over {ranks.per_sequence} ranks."
            )

    def write_files(self, out: Path) -> None:
        self.corpus.tokenizer.save(out / TOKENIZER)  # so that the run's folder is all that generating needs
        note_corpus(out, self.corpus.folder)

    def module(self, model: SequenceModel, ranks: OneProcess) -> nn.Module:
        windows = PackedDocuments if self.settings.packed else Windows
        self._windows = windows(self.corpus.split("train"), self.settings.context, seed=self.settings.seed)
        self._meter = _Meter(model, ranks)
        return LanguageLoss(model)

    def backward(self, module: nn.Module, progress: Progress[LossTrend], ranks: OneProcess) -> Tensor:
        assert self._windows is not None and self._meter is not None  # since `module` was called
        settings, micro = self.settings, self.settings.grad_accumulation
        self._meter.go_on()
        total = torch.zeros((), device=ranks.device)
        for i in range(micro):
            # Batches of a fraction of the size, counted on, are the same windows in the same order.
            batch = self._windows.batch(
                progress.step * micro + i, settings.batch_size // micro, rank=ranks.data_rank, ranks=ranks.data_size
            )
            inputs, targets = (ranks.my_span(x).to(ranks.device) for x in batch[:2])
            cu_seqlens = None if batch.cu_seqlens is None else batch.cu_seqlens.to(ranks.device)
            with nullcontext() if i == micro - 1 else ranks.accumulating(module):
                with torch.autocast(ranks.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
                    loss = module(inputs, targets, cu_seqlens)
                # The ranks' gradients are averaged, and are to be the sum's over all tokens of the step.
                (loss * (ranks.size / settings.tokens_per_step)).backward()
            total += loss.detach()
        return total[None]

    def after_step(self, progress: Progress[LossTrend], sums: list[float]) -> StepReport:
        assert self._meter is not None
        settings, tokens = self.settings, self.settings.tokens_per_step
        loss = sums[0] / tokens
        mean, lowest = progress.kept.advance(loss)
        self._meter.count(tokens)
        return StepReport(
            {"tokens": progress.step * tokens, "loss": loss, "loss_mean": mean},
            f"loss {loss:.4f}  {self._meter.rate:,.0f} tokens/s",
            divergence=_divergence_message(mean, lowest, settings),
            safe_to_save=_safe_to_save(mean, lowest, settings),
        )

    def speed(self) -> Mapping[str, float]:
        assert self._meter is not None
        return self._meter.read()

    def validate(self, module: nn.Module, ranks: OneProcess) -> Mapping[str, float]:
        """The mean cross-entropy, in nats, over windows that lie evenly spaced in the split: the same at every step."""
        settings, split = self.settings, self.corpus.split("validation")
        wanted = min(VALIDATION_WINDOWS, (split.num_tokens - 1) // settings.context)
        count = max(1, wanted // ranks.data_size)  # of each rank
        every = count * ranks.data_size
        total = torch.zeros((), device=ranks.device)
        starts = evenly_spaced_starts(split.num_tokens - settings.context - 1, every, reach_last=False)
        with evaluating(module):
            for start in starts[ranks.data_rank * count : (ranks.data_rank + 1) * count]:
                row = split.tokens(start, start + settings.context + 1)[None].to(ranks.device)
                with torch.autocast(ranks.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
                    total += module(ranks.my_span(row[:, :-1]), ranks.my_span(row[:, 1:]))
        return {"validation_loss": float(ranks.summed(total)) / (every * settings.context)}


def _safe_to_save(mean: float, lowest: float, settings: LanguageConfig) -> bool:
    """Whether the loss is where a checkpoint is a good one: not half way to where training would be stopped."""
    return not settings.max_rise or mean - lowest <= settings.max_rise / 2


def _divergence_message(mean: float, lowest: float, settings: LanguageConfig) -> str | None:
    """Why training cannot go on, as a clause; None where it can."""
    risen = mean - lowest > (settings.max_rise or math.inf)
    return f"The mean loss has risen from {lowest:.3f} to {mean:.3f} nats" if risen else None


class _Meter:
    """How fast training goes: tokens a second of all ranks, the share of what the devices could do, and memory."""

    def __init__(self, model: SequenceModel, ranks: OneProcess):
        table = sum(p.numel() for p in model.embedding.parameters())
        multiplied = model.num_parameters - (0 if model.is_tied else table)
        peak = peak_flops(ranks.device)
        # 6 FLOP per token and weight in a product, forward and backward: the usual count, which leaves out the
        # recurrence (2N·HV·K·V·… of it, a few percent) and whatever is computed a second time.
        self._best = None if peak is None else peak * ranks.size / (6 * multiplied)
        self._device = ranks.device
        self._tokens, self._since, self.rate = 0, time.monotonic(), 0.0
        self._paused = True

    def go_on(self) -> None:
        """A step begins. What came before it, since the meter was read, was no training."""
        if self._paused:
            self._tokens, self._since, self._paused = 0, time.monotonic(), False

    def count(self, tokens: int) -> None:
        """A step of so many tokens is done."""
        self._tokens += tokens
        self.rate = self._tokens / max(1e-9, time.monotonic() - self._since)

    def read(self) -> dict[str, float]:
        """For a line of metrics."""
        self._paused = True
        found = {"tokens_per_second": round(self.rate, 1), "memory_gib": round(memory_in_use(self._device) / 2**30, 3)}
        if self._best is not None:
            found["mfu"] = round(self.rate / self._best, 4)
        return found


def train_language(
    config: Run[LanguageConfig], corpus: Corpus, out: Path, ranks: OneProcess, **options: Any
) -> SequenceModel:
    """The name of earlier versions for `train(config, out, LanguageObjective(config.training, corpus), ranks, …)`."""
    warnings.warn(
        "train_language is now deltaproduct.training.train with a LanguageObjective; the old name goes with the next "
        "release.",
        DeprecationWarning,
        stacklevel=2,
    )
    return train(config, out, LanguageObjective(config.training, corpus), ranks, **options)
