"""A whole training step with each backend, as the training loop does it, and its parts beside it."""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deltaproduct.benchmarks.correctness import error_limit, judge
from deltaproduct.benchmarks.report import TrainBenchmark, TrainRow
from deltaproduct.benchmarks.settings import BenchmarkSettings, serving
from deltaproduct.benchmarks.shapes import OpShape
from deltaproduct.benchmarks.timing import interleaved
from deltaproduct.benchmarks.workload import Workload
from deltaproduct.errors import UsageError, first_line
from deltaproduct.layers import DeltaProductOptions
from deltaproduct.ops import BACKENDS
from deltaproduct.tasks import get_task
from deltaproduct.tasks.task import check_fits
from deltaproduct.training import Run, TrainConfig
from deltaproduct.training.checkpoint import Progress
from deltaproduct.training.loop import OneProcess, new_model, new_optimizer, train_step
from deltaproduct.training.objectives.task import Curriculum, TaskObjective, masked_loss, sample_batch

QUICK_BATCH, QUICK_LENGTH = 8, 16
SAMPLING = ("", "sampling")


def bench_train(
    config: Run[TrainConfig],
    *,
    backends: Sequence[str] | None = None,
    device: str = "auto",
    repeats: int | None = None,
    quick: bool = False,
    progress: Callable[[str], None] | None = None,
) -> TrainBenchmark:
    """Check, then time, the training step of a run's last stage with every backend.

    Args:
        config: the run; float32, no accumulation, layers of DeltaProduct with as many value as query/key heads.
        backends: rows; None is every backend that can serve.
        device, repeats, progress: as for `bench_ops`.
        quick: a batch of 8 sequences of length 16 in place of the run's.

    Raises:
        UsageError: a run that is none of the above, an unknown backend or device, or a named one that cannot serve.
    """
    say = progress or (lambda line: None)
    training = config.training
    if quick:
        config = resized(config, QUICK_LENGTH, QUICK_BATCH)
        training = config.training
    settings = BenchmarkSettings.of(device=device, repeats=repeats, seed=training.seed, quick=quick)
    check_fits(config.model, get_task(training.task))
    names, unavailable = serving(backends, BACKENDS, settings)
    shape = operator_shape(config)
    workload = Workload(shape, settings)

    rows: list[TrainRow] = []
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    before: dict[tuple[str, str], Callable[[], object]] = {}
    say("gradients of the float64 reference")
    wanted = Training(config, "reference", settings.device, torch.float64).loss_and_gradients()
    for name in names:
        say(f"checking {name}")
        try:
            trained = Training(config, name, settings.device)
            row = TrainRow(
                name, **judge(trained.loss_and_gradients(), wanted, error_limit(settings.dtype, settings.device))
            )
            parts: dict[str, Callable[[], object]] = {
                "step": trained.step,
                "forward": trained.forward,
                "backward": trained.backward,
                "optimizer": trained.update,
                "operator": workload.work(name),
            }
            if row.status == "timed":
                trained.prepare_backward()
                for run in parts.values():  # to warm up
                    run()
                runs |= {(name, part): run for part, run in parts.items()}
                before[name, "backward"] = trained.prepare_backward
        except Exception as e:  # a finding, as in `bench_ops`
            row = TrainRow(name, status="failed", reason=first_line(e, with_kind=True))
        rows.append(row)
    say(f"timing {sum(row.status == 'timed' for row in rows)} rows, {settings.repeats} runs each")
    runs[SAMPLING] = _sampler(config)
    runs[SAMPLING]()
    times = interleaved(runs, before=before, repeats=settings.repeats, device=settings.device)
    for (name, part), timing in times.items():
        if (name, part) != SAMPLING:
            setattr(next(row for row in rows if row.backend == name), part, timing)
    for row in rows:
        if row.step and row.operator:
            row.operator_share = config.model.num_hidden_layers * row.operator.median_ms / row.step.median_ms
            others = {r.backend: r.step for r in rows if r is not row}
            row.speedup = {name: theirs.median_ms / row.step.median_ms for name, theirs in others.items() if theirs}
    return TrainBenchmark(
        **settings.circumstances(),
        error_limit=error_limit(settings.dtype, settings.device),
        config=json.loads(json.dumps(config.to_dict())),  # lists where there are tuples
        batch_size=shape.batch,
        tokens=shape.length,
        operator_shape=shape.label,
        sampling=times[SAMPLING],
        rows=rows,
        unavailable=unavailable,
    )


def resized(config: Run[TrainConfig], length: int, batch_size: int) -> Run[TrainConfig]:
    """The run with one stage, of this length and this many sequences."""
    training = dataclasses.replace(
        config.training, lengths=(length,), batch_sizes=(batch_size,), stage_steps=(), num_samples=None
    )
    return dataclasses.replace(config, training=training)


def operator_shape(config: Run[TrainConfig]) -> OpShape:
    """What the operator is given in a step of the run's last stage."""
    model, training = config.model, config.training
    if training.precision != "float32" or training.grad_accumulation != 1:
        raise UsageError("bench train measures runs in float32 without gradient accumulation.")
    options = model.mixer
    if not isinstance(options, DeltaProductOptions):
        raise UsageError("bench train measures models whose layers are all alike and DeltaProduct.")
    if options.num_v_heads not in (None, options.num_heads) or options.expand_v != 1:
        raise UsageError("bench train measures layers whose value heads are as many and as wide as the key heads.")
    stage = len(training.lengths) - 1
    return OpShape(
        training.batch_size(stage),
        1 + training.lengths[stage],  # BOS
        options.num_heads,
        options.head_dim,
        options.num_householder,
        gate=options.use_forget_gate,
    )


def _sampler(config: Run[TrainConfig]) -> Callable[[], object]:
    """Draw the batch of another step of the last stage with each call."""
    task, training, stage = get_task(config.training.task), config.training, len(config.training.lengths) - 1
    numbers = itertools.count()
    return lambda: sample_batch(task, training, next(numbers), stage)


class Training:
    """What the training loop holds while it runs, at the first step of the run's last stage."""

    def __init__(
        self, config: Run[TrainConfig], backend: str, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.settings, self.device = config.training, device
        self.objective, self.ranks = TaskObjective(self.settings), OneProcess(device)
        self.model = new_model(config).to(device, dtype).use_backend(backend).train()
        self.optimizer = new_optimizer(self.model, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate(0)
        self.progress = Progress(Curriculum(stage=len(self.settings.lengths) - 1))
        batch = sample_batch(self.objective.task, self.settings, 0, self.progress.kept.stage)
        self.tokens, self.labels, self.mask = (x.to(device) for x in batch)
        self.loss: Tensor | None = None

    def step(self) -> object:
        """The loop's own step, on the next batch."""
        result = train_step(self.objective, self.model, self.optimizer, self.progress, self.ranks)
        self.progress.step += 1
        return result

    def forward(self) -> Tensor:
        logits, _ = self.model(self.tokens)
        return masked_loss(logits, self.labels, self.mask)

    def prepare_backward(self) -> None:
        """What `backward` needs each time: no gradients, and a loss that has not been gone through."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = self.forward()

    def backward(self) -> None:
        assert self.loss is not None
        self.loss.backward()

    def update(self) -> None:
        """Clip and update, with the gradients of whichever backward came last."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip if self.settings.clip > 0 else math.inf)
        self.optimizer.step()

    def loss_and_gradients(self) -> dict[str, Tensor]:
        """Of the first batch, by name."""
        self.prepare_backward()
        self.backward()
        assert self.loss is not None
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        return {"loss": self.loss.detach()} | gradients
