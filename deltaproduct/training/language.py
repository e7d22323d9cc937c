"""Training a language model, on one process or on many: the next token, in windows of a corpus.

b windows of this process · T tokens in a window, or in this process's span of it · D hidden size · V vocabulary.
"""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from deltaproduct.corpus import TOKENIZER, Corpus, PackedDocuments, Split, Windows
from deltaproduct.errors import UsageError
from deltaproduct.layers.plain import runs_as_written
from deltaproduct.machine import memory_in_use, peak_flops
from deltaproduct.models import SequenceModel
from deltaproduct.progress import progress_bar
from deltaproduct.training.config import LanguageConfig, LanguageRun
from deltaproduct.training.corpus_place import note_corpus
from deltaproduct.training.distributed import Ranks
from deltaproduct.training.distributed_checkpoint import LanguageProgress, load_shards, save_shards
from deltaproduct.training.interruption import interruptible
from deltaproduct.training.loop import gone_wrong, interrupted, new_model, new_optimizer, not_finite
from deltaproduct.training.loss import summed_cross_entropy, summed_cross_entropy_of
from deltaproduct.training.memory import check_language_run
from deltaproduct.training.metrics import Metrics
from deltaproduct.training.run_folder import CHECKPOINT, METRICS, begin_record, end_record, is_finished, writing_run

MEMORY = 0.95  # of the running mean of the loss
VALIDATION_WINDOWS = 32


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


def train_language(
    config: LanguageRun,
    corpus: Corpus,
    out: Path,
    ranks: Ranks,
    *,
    resume: bool = False,
    backend: str = "auto",
    parallel: str = "ddp",
    gradient_checkpointing: bool = False,
    compile: bool = False,
    log_every: int = 10,
    checkpoint_every: int = 100,
    allow_pickled_optimizer: bool = False,
    show: bool = True,
) -> SequenceModel:
    """Train one run in folder `out`: config.json, metrics.jsonl, checkpoint/, tokenizer/, data.json and
    run.json.

    Every process calls this, with an `out` that all of them see. A run may go on with another number of processes, or
    with other values of the keywords: none of them is part of its configuration.

    Args:
        resume: continue what `out` holds; an empty folder is simply begun.
        parallel: "ddp" or "fsdp"; see `Ranks.wrap`.
        gradient_checkpointing: keep only the blocks' inputs for the backward pass, and run the blocks again in it.
        compile: have torch.compile compile every block.
        log_every, checkpoint_every: steps between metric lines, and between checkpoints with the validation loss.
        allow_pickled_optimizer: resume also from what an earlier version saved; see `load_shards`.

    Raises:
        UsageError: folder, corpus, model and processes do not fit together, or training goes wrong: the loss is no
            longer finite, or has risen by `max_rise`. The message says where the last good checkpoint is.
        KeyboardInterrupt: Ctrl-C; the checkpoint is of the last step, unless the loss had risen too far by then.
    """
    settings = config.training
    _check(config, corpus, ranks)
    check_language_run(
        config,
        ranks.device,
        processes=ranks.size,
        sharded=parallel == "fsdp",
        gradient_checkpointing=gradient_checkpointing,
    )
    model = new_model(config).to(ranks.device).use_backend(backend).use_context_parallel(ranks.context_parallel)
    model.gradient_checkpointing = gradient_checkpointing
    if compile:
        for block in model.blocks:
            block.compile()
    kind = PackedDocuments if settings.packed else Windows
    batches = kind(corpus.split("train"), settings.context, seed=settings.seed)
    meter = _Meter(model, settings, ranks)
    wrapped = ranks.wrap(LanguageLoss(model), parallel, blocks=model.blocks, precision=settings.precision)
    optimizer = new_optimizer(model, settings)
    checkpoint, progress = out / CHECKPOINT, LanguageProgress()
    with ExitStack() as held:
        with ranks.together():
            if ranks.first:
                held.enter_context(writing_run(config, out, resume))
                corpus.tokenizer.save(out / TOKENIZER)  # so that the run's folder is all that generating needs
                note_corpus(out, corpus.folder)
        if ranks.any(ranks.first and checkpoint.exists()):
            progress = load_shards(
                checkpoint, wrapped, model, optimizer, config, ranks, allow_pickled_optimizer=allow_pickled_optimizer
            )
        with ranks.together():
            finished = ranks.first and is_finished(out, config)
        if ranks.any(finished):
            return model.eval()
        metrics: Metrics | None = None
        with ranks.together():
            if ranks.first:
                commands = begin_record(out)
                metrics = Metrics(out / METRICS, after_step=progress.step, digest=progress.metrics or None)
                held.callback(metrics.close)
        # Of several processes, one that has died would have the others wait for it after a SIGTERM.
        asked_to_end = held.enter_context(interruptible(terminable=ranks.size == 1))
        title = f"{out.name} seed {settings.seed}"
        bar = held.enter_context(progress_bar(title, settings.steps, show=show and ranks.first))
        wrapped.train()
        begun, before, saved = time.monotonic(), progress.seconds, progress.step
        while progress.step < settings.steps:
            rate = settings.learning_rate(progress.step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, norm = language_step(wrapped, model, batches, settings, progress.step, ranks)
            good = math.isfinite(loss) and math.isfinite(norm)
            if not good or advance(progress, settings, loss) > (settings.max_rise or math.inf):
                raise UsageError(gone_wrong(_what_is_wrong(progress, loss, norm), checkpoint, saved))
            optimizer.step()
            progress.seconds = before + time.monotonic() - begun
            meter.count(settings.tokens_per_step)
            done = progress.step == settings.steps
            bar.update(progress.step, f"loss {loss:.4f}  {meter.rate:,.0f} tokens/s")
            due, ending = done or progress.step % checkpoint_every == 0, ranks.any(bool(asked_to_end))
            saving = done or ((due or ending) and _calm(progress, settings))
            logged = (due and saving) or progress.step % log_every == 0
            if logged:
                line = {"step": progress.step, "tokens": progress.step * settings.tokens_per_step, "loss": loss,
                        "loss_mean": progress.loss_mean, "lr": rate, "grad_norm": norm, **meter.figures(),
                        "seconds": round(progress.seconds, 3)}  # fmt: skip
                if due and saving:
                    line["validation_loss"] = validation_loss(wrapped, corpus.split("validation"), settings, ranks)
                if metrics is not None:
                    metrics.write(line)  # first, so that no checkpoint is without the lines before it
            if saving:
                name = not_finite(model, optimizer)
                if ranks.any(name is not None):
                    what = f"After step {progress.step}, {name or 'a weight of another process'} is not finite"
                    raise UsageError(gone_wrong(what, checkpoint, saved))
                progress.metrics = metrics.synced() if metrics is not None else ""
                save_shards(checkpoint, wrapped, model, optimizer, progress, config, ranks)
                saved = progress.step
            if logged:
                meter.begin()
            if ending and not done:
                raise asked_to_end.error(interrupted(checkpoint, saved) if ranks.first else "")
        if ranks.first:
            figures = {"parameters": meter.parameters, "processes": ranks.size, "device": str(ranks.device)}
            end_record(out, config, progress.seconds, commands, **figures)
        ranks.wait()
    return model.eval()


def language_step(
    wrapped: nn.Module,
    model: SequenceModel,
    batches: Windows | PackedDocuments,
    settings: LanguageConfig,
    step: int,
    ranks: Ranks,
) -> tuple[float, float]:
    """The gradient of one step, clipped; returns the mean loss of all ranks' tokens and the norm before clipping."""
    model.zero_grad(set_to_none=True)
    micro = settings.grad_accumulation
    total = torch.zeros((), device=ranks.device)
    for i in range(micro):
        # Batches of a fraction of the size, counted on, are the same windows in the same order.
        batch = batches.batch(
            step * micro + i, settings.batch_size // micro, rank=ranks.data_rank, ranks=ranks.data_size
        )
        inputs, targets = (ranks.my_span(x).to(ranks.device) for x in batch[:2])
        cu_seqlens = None if batch.cu_seqlens is None else batch.cu_seqlens.to(ranks.device)
        with _synchronised(wrapped, last=i == micro - 1):
            with _precision(settings, ranks.device):
                loss = wrapped(inputs, targets, cu_seqlens)
            # The ranks' gradients are averaged, and are to be the sum's over all tokens of the step.
            (loss * (ranks.size / settings.tokens_per_step)).backward()
        total += loss.detach()
    norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip if settings.clip > 0 else math.inf)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return float(ranks.summed(total)) / settings.tokens_per_step, float(norm)


@torch.no_grad()
def validation_loss(wrapped: nn.Module, split: Split, settings: LanguageConfig, ranks: Ranks) -> float:
    """Mean cross-entropy, in nats, over windows that lie evenly spaced in the split: the same ones at every step."""
    wanted = min(VALIDATION_WINDOWS, (split.num_tokens - 1) // settings.context)
    count = max(1, wanted // ranks.data_size)  # of each rank
    every = count * ranks.data_size
    total = torch.zeros((), device=ranks.device)
    wrapped.eval()
    for i in range(ranks.data_rank * count, (ranks.data_rank + 1) * count):
        start = i * (split.num_tokens - settings.context - 1) // every
        row = split.tokens(start, start + settings.context + 1)[None].to(ranks.device)
        with _precision(settings, ranks.device):
            total += wrapped(ranks.my_span(row[:, :-1]), ranks.my_span(row[:, 1:]))
    wrapped.train()
    return float(ranks.summed(total)) / (every * settings.context)


def advance(progress: LanguageProgress, settings: LanguageConfig, loss: float) -> float:
    """Count a step; returns by how much the running mean of the loss lies above its lowest, in nats."""
    mean = loss if progress.loss_mean is None else MEMORY * progress.loss_mean + (1 - MEMORY) * loss
    lowest = mean if progress.lowest_mean is None else min(progress.lowest_mean, mean)
    progress.step, progress.loss_mean, progress.lowest_mean = progress.step + 1, mean, lowest
    return mean - lowest


def _calm(progress: LanguageProgress, settings: LanguageConfig) -> bool:
    """Whether the loss is where a checkpoint is a good one: not half way to where training would be stopped."""
    assert progress.loss_mean is not None and progress.lowest_mean is not None  # a step has been counted
    return not settings.max_rise or progress.loss_mean - progress.lowest_mean <= settings.max_rise / 2


def _what_is_wrong(progress: LanguageProgress, loss: float, norm: float) -> str:
    if math.isfinite(loss) and math.isfinite(norm):
        return f"The mean loss has risen from {progress.lowest_mean:.3f} to {progress.loss_mean:.3f} nats"
    return f"Step {progress.step + 1} has a loss of {loss} and a gradient of norm {norm}"


def _check(config: LanguageRun, corpus: Corpus, ranks: Ranks) -> None:
    settings, model = config.training, config.model
    if not model.vocab_size == model.num_labels == corpus.vocab_size:
        raise UsageError(
            f"The corpus {corpus.folder} has {corpus.vocab_size} tokens, but the model has vocab_size="
            f"{model.vocab_size} and num_labels={model.num_labels}."
        )
    held_out = corpus.split("validation").num_tokens
    if held_out <= settings.context:
        raise UsageError(f"The validation split has {held_out} tokens, too few for a context of {settings.context}.")
    if settings.corpus != corpus.fingerprint:
        raise UsageError(f"The run is one on another corpus than {corpus.folder}; prepare that again, or start anew.")
    share = settings.batch_size // settings.grad_accumulation
    if share % ranks.data_size:
        raise UsageError(
            f"{share} sequences (batch_size / grad_accumulation) cannot be dealt out evenly to {ranks.data_size} "
            "ranks: each needs the same number of them, and at least one."
        )
    if ranks.context_parallel is not None and settings.packed:
        raise UsageError(
            "Packed documents cannot be divided over processes; take plain windows or --context-parallel 1."
        )
    if settings.context % ranks.per_sequence:
        raise UsageError(f"A context of {settings.context} cannot be divided evenly over {ranks.per_sequence} ranks.")


def _precision(settings: LanguageConfig, device: torch.device) -> AbstractContextManager[object]:
    mixed = settings.precision == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16) if mixed else nullcontext()


@contextmanager
def _synchronised(wrapped: nn.Module, *, last: bool) -> Iterator[None]:
    """Have ranks exchange gradients after the last micro-batch only."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(last)
    with wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not last else nullcontext():
        yield


class _Meter:
    """How fast training goes: tokens a second of all ranks, the share of what the devices could do, and memory."""

    def __init__(self, model: SequenceModel, settings: LanguageConfig, ranks: Ranks):
        self.parameters = model.num_parameters
        table = sum(p.numel() for p in model.embedding.parameters())
        multiplied = self.parameters - (0 if model.is_tied else table)
        peak = peak_flops(ranks.device)
        # 6 FLOP per token and weight in a product, forward and backward: the usual count, which leaves out the
        # recurrence (2N·HV·K·V·… of it, a few percent) and whatever is computed a second time.
        self._best = None if peak is None else peak * ranks.size / (6 * multiplied)
        self._device = ranks.device
        self.begin()

    def begin(self) -> None:
        """Count the rate from here on."""
        self._tokens, self._since, self.rate = 0, time.monotonic(), 0.0

    def count(self, tokens: int) -> None:
        self._tokens += tokens
        self.rate = self._tokens / max(1e-9, time.monotonic() - self._since)

    def figures(self) -> dict[str, float]:
        """For a line of metrics."""
        found = {"tokens_per_second": round(self.rate, 1), "memory_gib": round(memory_in_use(self._device) / 2**30, 3)}
        if self._best is not None:
            found["mfu"] = round(self.rate / self._best, 4)
        return found
