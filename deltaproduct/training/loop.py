"""The training loop: gradient → clipped AdamW step, with checkpoints that continue bit for bit; on one process or many.

What is trained on, and what its loss is, an objective says (`objectives`).
"""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor, nn

from deltaproduct.errors import UsageError
from deltaproduct.machine import choose_device
from deltaproduct.models import SequenceModel
from deltaproduct.models.size import FLOAT, check_training
from deltaproduct.progress import progress_bar
from deltaproduct.renamed import renamed_names
from deltaproduct.seeds import weights_seed
from deltaproduct.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from deltaproduct.training.config import OptimizerConfig, Run, TrainConfig
from deltaproduct.training.interruption import interruptible
from deltaproduct.training.metrics import Metrics
from deltaproduct.training.run_folder import CHECKPOINT, METRICS, begin_record, end_record, is_finished, writing_run

if TYPE_CHECKING:
    from deltaproduct.ops.context_parallel import ContextParallel
    from deltaproduct.training.objectives.objective import Objective

PARALLEL = ("ddp", "fsdp")


class OneProcess:
    """What the loop asks of the processes that train one model, where there is one. Many are `distributed.Ranks`.

    Attributes:
        device: where it computes.
        rank, size: which process of how many.
        first: whether this is the one that writes what is written once.
        context_parallel: the processes that each sequence is divided over; None where each has whole sequences.
        per_sequence: how many these are.
        data_rank, data_size: which share of a batch this process works on, of how many; those who divide its sequences
            have the same one.
    """

    rank: int = 0
    size: int = 1
    first: bool = True
    per_sequence: int = 1
    data_rank: int = 0
    data_size: int = 1
    context_parallel: Optional["ContextParallel"] = None

    def __init__(self, device: torch.device):
        self.device = device

    def wrap(self, module: nn.Module, parallel: str, *, blocks: Iterable[nn.Module], precision: str) -> nn.Module:
        """The module with gradients that are averaged over all processes.

        Args:
            parallel: "ddp", every process has all parameters, or "fsdp" (FSDP2), each has a share of every parameter
                and gathers those of one block at a time.
            blocks: the parts of the module that are gathered one by one.
            precision: "bfloat16" has FSDP gather and multiply in it; sums of gradients are float32 in any case.
        """
        return module

    def accumulating(self, module: nn.Module) -> AbstractContextManager[object]:
        """Have the processes exchange no gradients: more of this step's are to come."""
        return nullcontext()

    def my_span(self, x: Tensor) -> Tensor:
        """This process's tokens of sequences x [b,T]; `UsageError` unless they can be divided evenly."""
        return x

    def summed(self, x: Tensor) -> Tensor:
        """The sum of the processes' tensors."""
        return x

    def any(self, here: bool) -> bool:
        """Whether something holds on any of the processes."""
        return here

    def wait(self) -> None:
        """Until all processes are here."""

    def texts(self, text: str) -> list[str]:
        """Every process's text, by rank."""
        return [text]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails on one process fails on all of them, so that none waits for another that has gone. All enter.

        Raises:
            UsageError: the first error of any process, with its rank unless all say the same.
        """
        yield

    def whole_weights(self, model: SequenceModel, module: nn.Module | None) -> dict[str, Tensor]:
        """All weights of a model, of which this process may have a share.

        Args:
            module: what `wrap` gave.
        """
        return model.state_dict()

    def restore_weights(self, model: SequenceModel, module: nn.Module | None, weights: dict[str, Tensor]) -> None:
        """Give the model weights, of which this process may keep a share."""
        model.load_state_dict(weights)


def train(
    run: Run[Any],
    out: Path,
    objective: Optional["Objective"] = None,
    ranks: OneProcess | None = None,
    *,
    resume: bool = False,
    device: str = "auto",
    backend: str = "auto",
    parallel: str = "ddp",
    gradient_checkpointing: bool = False,
    compile: bool = False,
    log_every: int = 10,
    checkpoint_every: int = 100,
    allow_pickled_optimizer: bool = False,
    show: bool = True,
) -> SequenceModel:
    """Train one run in folder `out`: config.json, metrics.jsonl, checkpoint/ and run.json.

    Of several processes each calls this, with an `out` that all of them see. A run may go on with another number of
    processes, or with other values of the keywords: none of them is part of its configuration.

    Args:
        objective: what is trained on; None: the task that the run names. A corpus is given in a `LanguageObjective`.
        ranks: the processes that train the model (`Ranks.started`); None: this one alone.
        resume: continue what `out` holds, bit for bit on a CPU; an empty folder is simply begun.
        device: where to compute, where `ranks` does not say it.
        parallel: "ddp" or "fsdp"; see `OneProcess.wrap`.
        gradient_checkpointing: keep only the blocks' inputs for the backward pass, and run the blocks again in it.
        compile: have torch.compile compile every block.
        log_every, checkpoint_every: steps between metric lines and between checkpoints; the last step has both.
        allow_pickled_optimizer: resume also from what an earlier version saved; see `load_checkpoint`.
        show: show progress on standard error.

    Raises:
        UsageError: the folder cannot be used, another process trains there, model, data and processes do not fit
            together, the device or backend cannot serve, or training goes wrong: loss, gradient or weights are no
            longer finite, or the objective says so. The message says where the last good checkpoint is.
        KeyboardInterrupt: Ctrl-C; the checkpoint is of the last step, unless the loss had risen too far by then.
    """
    settings = run.training
    if parallel not in PARALLEL:
        raise UsageError(f"parallel must be one of {', '.join(PARALLEL)}, not {parallel!r}.")
    objective = _objective_of(run) if objective is None else objective
    ranks = OneProcess(choose_device(device)) if ranks is None else ranks
    objective.check(run.model, ranks)
    check_fits_memory(
        run,
        ranks.device,
        processes=ranks.size,
        sharded=parallel == "fsdp",
        gradient_checkpointing=gradient_checkpointing,
    )
    model = new_model(run).to(ranks.device).use_backend(backend)
    if ranks.context_parallel is not None:
        model.use_context_parallel(ranks.context_parallel)
    model.gradient_checkpointing = gradient_checkpointing
    if compile:
        for block in model.blocks:
            block.compile()
    module = objective.module(model, ranks)
    module = ranks.wrap(module, parallel, blocks=model.blocks, precision=settings.precision)
    optimizer = new_optimizer(model, settings)
    checkpoint, progress = out / CHECKPOINT, Progress(objective.kept())
    with ExitStack() as held:
        begun = finished = False
        with ranks.together():
            if ranks.first:
                held.enter_context(writing_run(run, out, resume))
                objective.write_files(out)
                begun, finished = checkpoint.exists(), is_finished(out, run)
        if ranks.any(begun):
            progress = load_checkpoint(
                checkpoint, model, optimizer, objective.kept, run, ranks, module,
                allow_pickled_optimizer=allow_pickled_optimizer,
            )  # fmt: skip
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
        title = f"{objective.name or out.name} seed {settings.seed}"
        bar = held.enter_context(progress_bar(title, settings.steps, show=show and ranks.first))
        module.train()
        since, before, saved = time.monotonic(), progress.seconds, progress.step
        while progress.step < settings.steps:
            rate = settings.learning_rate(progress.step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            sums, norm = train_step(objective, module, optimizer, progress, ranks)
            progress.step += 1
            report = objective.after_step(progress, sums)
            loss = report.figures["loss"]
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what = f"Step {progress.step} has a loss of {loss} and a gradient of norm {norm}"
                raise UsageError(_divergence_message(what, checkpoint, saved))
            if report.divergence is not None:
                raise UsageError(_divergence_message(report.divergence, checkpoint, saved))
            progress.seconds = before + time.monotonic() - since
            bar.update(progress.step, report.info)
            done = progress.step == settings.steps
            due, ending = done or progress.step % checkpoint_every == 0, ranks.any(bool(asked_to_end))
            saving = done or ((due or ending) and report.safe_to_save)
            validating = objective.validates and due and saving
            if done or validating or progress.step % log_every == 0:
                line = {"step": progress.step, **report.figures, "lr": rate, "grad_norm": norm, **objective.speed(),
                        "seconds": round(progress.seconds, 3)}  # fmt: skip
                if validating:
                    line |= objective.validate(module, ranks)
                if metrics is not None:
                    metrics.write(line)  # first, so that no checkpoint is without the lines before it
            if saving:
                name = not_finite(model, optimizer)
                if ranks.any(name is not None):
                    what = f"After step {progress.step}, {name or 'a weight of another process'} is not finite"
                    raise UsageError(_divergence_message(what, checkpoint, saved))
                progress.metrics = metrics.synced() if metrics is not None else ""
                save_checkpoint(checkpoint, model, optimizer, progress, run, ranks, module)
                saved = progress.step
            if ending and not done:
                raise asked_to_end.error(_interrupted(checkpoint, saved) if ranks.first else "")
        if ranks.first:
            figures = {"parameters": model.num_parameters, "processes": ranks.size, "device": str(ranks.device)}
            end_record(out, run, progress.seconds, commands, **figures)
        ranks.wait()
    return model.eval()


def train_step(
    objective: "Objective",
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress[Any],
    ranks: OneProcess,
) -> tuple[list[float], float]:
    """One optimiser step; returns the objective's sums over all processes, and the gradient's norm before clipping.

    Where loss or gradient are not finite the weights stay as they are.

    Args:
        module: what `Objective.module` gave, or what `ranks.wrap` made of it.
    """
    optimizer.zero_grad(set_to_none=True)
    sums = ranks.summed(objective.backward(module, progress, ranks))
    parameters = [p for p in module.parameters() if p.grad is not None]
    clip = objective.settings.clip
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip if clip > 0 else math.inf)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP's, of which each process has a share
    *values, norm_value = torch.cat((sums, norm[None])).tolist()  # one synchronisation
    if math.isfinite(values[0]) and math.isfinite(norm_value):  # or the weights would be lost with it
        optimizer.step()
    return values, norm_value


def new_model(run: Run[Any]) -> SequenceModel:
    """The model with its initial weights, which depend on the seed and on nothing else."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(weights_seed(run.training.seed))
        return SequenceModel(run.model)


def new_optimizer(model: SequenceModel, settings: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW; weight decay acts on matrices, not on gains and biases."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=True)


def check_fits_memory(
    run: Run[Any],
    device: torch.device,
    *,
    processes: int = 1,
    sharded: bool = False,
    gradient_checkpointing: bool = False,
) -> None:
    """`UsageError` if this process's share of a run cannot fit: the model with its optimiser, and a micro-batch.

    Args:
        processes: that the tokens of a step are dealt out to.
        sharded: whether the optimiser's numbers are dealt out too.
        gradient_checkpointing: whether blocks keep nothing but their inputs.
    """
    settings = run.training
    check_training(
        run.model,
        settings.largest_batch // processes,
        device,
        advice=settings.smaller_batch,
        processes=processes,
        sharded=sharded,
        gradient_checkpointing=gradient_checkpointing,
        per_float=2 if settings.precision == "bfloat16" else FLOAT,
    )


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


def _objective_of(run: Run[Any]) -> "Objective":
    from deltaproduct.training.objectives.task import TaskObjective

    if not isinstance(run.training, TrainConfig):
        raise UsageError(
            "A run on a corpus needs the corpus: train(run, out, LanguageObjective(run.training, corpus)), all of "
            "deltaproduct.training."
        )
    return TaskObjective(run.training)


def _divergence_message(what: str, checkpoint: Path, saved: int) -> str:
    """What to say when training cannot go on."""
    last = f"the last good checkpoint, of step {saved}, is in {checkpoint}" if saved else "there is no checkpoint yet"
    return (
        f"{what}; {last}. Going on from there usually comes to the same; begin another run with a lower --lr, more "
        "--warmup-steps or a smaller --clip."
    )


def _interrupted(checkpoint: Path, saved: int) -> str:
    """What to say when training was asked to end."""
    if not saved:
        return "interrupted; no step was saved."
    return f"interrupted; step {saved} is saved in {checkpoint}: the same command with --resume goes on."


if not TYPE_CHECKING:  # a type checker would take any name for one of this module's
    __getattr__ = renamed_names(
        __name__,
        {
            "sample_batch": "deltaproduct.training.objectives.task.sample_batch",
            "masked_loss": "deltaproduct.training.objectives.task.masked_loss",
            # Of training/memory.py, which was here once.
            "check_run": "check_fits_memory",
            "check_language_run": "check_fits_memory",
            "TRAINED": "deltaproduct.models.size.TRAINED",
        },
    )
