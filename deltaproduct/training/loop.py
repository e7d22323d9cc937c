"""The training loop: fresh batch → loss → clipped AdamW step, with checkpoints that continue bit for bit.

B sequences · T = 1 + length tokens, BOS first.
"""

import math
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaproduct.errors import UsageError
from deltaproduct.files import make_folder, read_json, recover_folder, write_json
from deltaproduct.machine import choose_device, command_line, describe_machine
from deltaproduct.models import SequenceModel
from deltaproduct.models.config import check_fits
from deltaproduct.seeds import order_generator, training_generator, weights_seed
from deltaproduct.tasks import Task, get_task
from deltaproduct.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from deltaproduct.training.config import AnyRun, OptimiserConfig, RunConfig, TrainConfig
from deltaproduct.training.log import Metrics, progress_bar
from deltaproduct.training.loss import IGNORED

CONFIG, RUN, METRICS, CHECKPOINT = "config.json", "run.json", "metrics.jsonl", "checkpoint"
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
        UsageError: the folder cannot be used, the device or backend cannot serve, or the loss is no longer finite.
    """
    settings = config.training
    task = get_task(settings.task)
    check_fits(config.model, task)
    where = choose_device(device)
    model = new_model(config).to(where).use_backend(backend)
    optimizer = new_optimizer(model, settings)
    open_run(config, out, resume)
    progress, checkpoint = Progress(), out / CHECKPOINT
    recover_folder(checkpoint)
    if resume and checkpoint.exists():
        progress = load_checkpoint(checkpoint, model, optimizer)
    metrics = Metrics(out / METRICS, after_step=progress.step)
    model.train()
    begun, before = time.monotonic(), progress.seconds
    title = f"{settings.task} seed {settings.seed}"
    try:
        with progress_bar(title, settings.steps, show=show) as bar:
            while progress.step < settings.steps:
                rate = settings.learning_rate(progress.step)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                loss, accuracy, norm = train_step(model, optimizer, task, settings, progress, where)
                if not math.isfinite(loss):
                    raise UsageError(
                        f"The loss of step {progress.step + 1} is {loss}; the last good checkpoint is in {checkpoint}. "
                        "A lower --lr, more --warmup-steps or a smaller --clip usually helps."
                    )
                length = settings.lengths[progress.stage]
                mean = advance(progress, settings, loss)
                progress.seconds = before + time.monotonic() - begun
                done = progress.step == settings.steps
                bar.update(progress.step, f"length {length}  loss {loss:.4f}  accuracy {accuracy:.3f}")
                if done or progress.step % log_every == 0:
                    metrics.write({"step": progress.step, "length": length, "loss": loss, "loss_mean": mean,
                                   "accuracy": accuracy, "lr": rate, "grad_norm": norm,
                                   "seconds": round(progress.seconds, 3)})  # fmt: skip
                if done or progress.step % checkpoint_every == 0:
                    save_checkpoint(checkpoint, model, optimizer, progress, config)
    finally:
        metrics.close()
    write_json(out / RUN, {"finished": True, "seed": settings.seed, "steps": settings.steps,
                           "wall_seconds": round(progress.seconds, 2), "command": command_line(),
                           "device": str(where), "machine": describe_machine()})  # fmt: skip
    return model.eval()


def open_run(config: AnyRun, out: Path, resume: bool) -> None:
    """Make `out` this run's folder; `UsageError` if it holds another run, or any run without `resume`."""
    make_folder(out)
    if (out / CONFIG).exists():
        if not resume:
            raise UsageError(f"{out} already holds a run; add --resume to continue it, or choose another folder.")
        stored = type(config).from_dict(read_json(out / CONFIG))
        if stored != config:
            differences = "; ".join(config.differences(stored))
            raise UsageError(f"{out} holds a run with another configuration ({differences}).")
    elif (out / CHECKPOINT).exists():
        raise UsageError(f"{out} holds a checkpoint but no {CONFIG}; choose another folder.")
    else:
        write_json(out / CONFIG, config.to_dict())


def is_finished(out: Path, config: AnyRun) -> bool:
    """Whether `out` holds this very run, trained to its end."""
    if not (out / RUN).exists() or not (out / CONFIG).exists():
        return False
    return bool(read_json(out / RUN).get("finished")) and type(config).from_dict(read_json(out / CONFIG)) == config


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
    """One optimiser step; returns the loss, the token accuracy and the gradient's norm before clipping."""
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
    optimizer.step()
    loss_value, right_value, norm_value = torch.stack((loss_sum, right, norm)).tolist()  # one synchronisation
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
