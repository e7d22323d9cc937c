"""The training loop: fresh batch → loss → clipped AdamW step, with checkpoints that continue bit for bit.

B sequences · T = 1 + length tokens, BOS first.
"""

import math
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaproduct.errors import UsageError
from deltaproduct.machine import choose_device
from deltaproduct.models import SequenceModel
from deltaproduct.progress import progress_bar
from deltaproduct.seeds import order_generator, training_generator, weights_seed
from deltaproduct.tasks import Task, get_task
from deltaproduct.tasks.task import check_fits
from deltaproduct.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from deltaproduct.training.config import AnyRun, OptimiserConfig, RunConfig, TrainConfig
from deltaproduct.training.interruption import interruptible
from deltaproduct.training.loss import IGNORED
from deltaproduct.training.memory import check_run
from deltaproduct.training.metrics import Metrics
from deltaproduct.training.run_folder import CHECKPOINT, METRICS, begin_record, end_record, is_finished, writing_run

LOSS_MEMORY = 0.9  # of the running mean that decides when a curriculum's stage ends


def train(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    device: str = "auto",
    backend: str = "auto",
    log_every: int = 10,
    checkpoint_every: int = 100,
    show: bool = True,
) -> SequenceModel:
    """Train one run in folder `out`: config.json, metrics.jsonl, checkpoint/ and run.json.

    Args:
        resume: continue what `out` holds, bit for bit on a CPU; an empty folder is simply begun.
        device, backend: where to compute; neither is part of the run's configuration.
        show: show progress on standard error.
        log_every, checkpoint_every: steps between metric lines and between checkpoints; the last step has both.

    Raises:
        UsageError: the folder cannot be used, another process trains there, the device or backend cannot serve, or the
            loss, the gradient or the weights are no longer finite.
        KeyboardInterrupt: Ctrl-C; the checkpoint is of the last step.
    """
    settings = config.training
    task = get_task(settings.task)
    check_fits(config.model, task)
    where = choose_device(device)
    check_run(config, where)
    model = new_model(config).to(where).use_backend(backend)
    optimizer = new_optimizer(model, settings)
    progress, checkpoint = Progress(), out / CHECKPOINT
    with ExitStack() as held:
        held.enter_context(writing_run(config, out, resume))
        if checkpoint.exists():
            progress = load_checkpoint(checkpoint, model, optimizer)
        if is_finished(out, config):
            return model.eval()
        commands = begin_record(out)
        metrics = Metrics(out / METRICS, after_step=progress.step, digest=progress.metrics or None)
        held.callback(metrics.close)
        asked_to_end = held.enter_context(interruptible())
        bar = held.enter_context(progress_bar(f"{settings.task} seed {settings.seed}", settings.steps, show=show))
        model.train()
        begun, before, saved = time.monotonic(), progress.seconds, progress.step
        while progress.step < settings.steps:
            rate = settings.learning_rate(progress.step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, accuracy, norm = train_step(model, optimizer, task, settings, progress, where)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what = f"Step {progress.step + 1} has a loss of {loss} and a gradient of norm {norm}"
                raise UsageError(gone_wrong(what, checkpoint, saved))
            length = settings.lengths[progress.stage]
            mean = advance(progress, settings, loss)
            progress.seconds = before + time.monotonic() - begun
            done = progress.step == settings.steps
            bar.update(progress.step, f"length {length}  loss {loss:.4f}  accuracy {accuracy:.3f}")
            if done or progress.step % log_every == 0:
                metrics.write({"step": progress.step, "length": length, "loss": loss, "loss_mean": mean,
                               "accuracy": accuracy, "lr": rate, "grad_norm": norm,
                               "seconds": round(progress.seconds, 3)})  # fmt: skip
            if done or progress.step % checkpoint_every == 0 or asked_to_end:
                if name := not_finite(model, optimizer):
                    what = f"After step {progress.step}, {name} is not finite"
                    raise UsageError(gone_wrong(what, checkpoint, saved))
                progress.metrics = metrics.synced()
                save_checkpoint(checkpoint, model, optimizer, progress, config)
                saved = progress.step
            if asked_to_end and not done:
                raise asked_to_end.error(interrupted(checkpoint, saved))
        end_record(out, config, progress.seconds, commands, device=str(where))
    return model.eval()


def gone_wrong(what: str, checkpoint: Path, saved: int) -> str:
    """What to say when training cannot go on."""
    last = f"the last good checkpoint, of step {saved}, is in {checkpoint}" if saved else "there is no checkpoint yet"
    return (
        f"{what}; {last}. Going on from there usually comes to the same; begin another run with a lower --lr, more "
        "--warmup-steps or a smaller --clip."
    )


def interrupted(checkpoint: Path, saved: int) -> str:
    """What to say when training was asked to end."""
    if not saved:
        return "interrupted; no step was saved."
    return f"interrupted; step {saved} is saved in {checkpoint}: the same command with --resume goes on."


def not_finite(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
    """The first weight or moment of the optimiser that holds an infinity or none at all; None if all are finite."""

    def finite(x: Tensor) -> bool:
        here: Tensor = x.to_local() if hasattr(x, "to_local") else x  # FSDP's: this process's share
        return bool(here.isfinite().all())

    for name, weight in model.named_parameters():
        if not finite(weight):
            return f"the weight {name}"
        if not all(finite(x) for x in optimizer.state.get(weight, {}).values() if isinstance(x, Tensor)):
            return f"the optimiser's state of {name}"
    return None


def new_model(config: AnyRun) -> SequenceModel:
    """The model with its initial weights, which depend on the seed and on nothing else."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(weights_seed(config.training.seed))
        return SequenceModel(config.model)


def new_optimizer(model: SequenceModel, settings: OptimiserConfig) -> torch.optim.AdamW:
    """AdamW; weight decay acts on matrices, not on gains and biases."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=True)


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


def train_step(
    model: SequenceModel,
    optimizer: torch.optim.Optimizer,
    task: Task,
    settings: TrainConfig,
    progress: Progress,
    device: torch.device,
) -> tuple[float, float, float]:
    """One optimiser step; returns the loss, the token accuracy and the gradient's norm before clipping.

    Where loss or gradient are not finite the weights stay as they are.
    """
    batch = sample_batch(task, settings, progress.step, progress.stage)
    scored = batch[2].sum()
    loss_sum = torch.zeros((), device=device)
    right = torch.zeros((), device=device)
    optimizer.zero_grad(set_to_none=True)
    mixed = settings.precision == "bfloat16"
    for tokens, labels, mask in zip(*(x.to(device).chunk(settings.grad_accumulation) for x in batch), strict=True):
        with torch.autocast(device.type, dtype=torch.bfloat16) if mixed else nullcontext():
            logits, _ = model(tokens)
        # Weighted by scored positions, so that the sum over micro-batches is the mean over the whole batch.
        loss = masked_loss(logits, labels, mask) * (mask.sum() / scored.to(device))
        loss.backward()
        loss_sum += loss.detach()
        right += ((logits.detach().argmax(-1) == labels) & mask).sum()
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip if settings.clip > 0 else math.inf)
    loss_value, right_value, norm_value = torch.stack((loss_sum, right, norm)).tolist()  # one synchronisation
    if math.isfinite(loss_value) and math.isfinite(norm_value):  # or the weights would be lost with it
        optimizer.step()
    return loss_value, right_value / int(scored), norm_value


def advance(progress: Progress, settings: TrainConfig, loss: float) -> float:
    """Count a step, move to the next stage if this one is over, and return the running mean of the loss."""
    progress.loss_mean = LOSS_MEMORY * progress.loss_mean + (1 - LOSS_MEMORY) * loss
    progress.step += 1
    in_stage = progress.step - progress.stage_start
    mean = progress.loss_mean / (1 - LOSS_MEMORY**in_stage)
    if progress.stage < len(settings.lengths) - 1:
        learnt = settings.stage_loss is not None and mean < settings.stage_loss
        spent = bool(settings.stage_steps) and in_stage >= settings.stage_steps[progress.stage]
        if learnt or spent:
            progress.stage += 1
            progress.stage_start = progress.step
            progress.loss_mean = 0.0
    return mean
