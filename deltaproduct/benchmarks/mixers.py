"""A whole training step with each mixer, as the training loop does it, beside DeltaNet's.

A float32 step is timed only after its loss and gradients have been held against the same model's in float64. That finds
what loses precision; that a mixer's formula is right is what `tests/layers/test_mixers.py` and its neighbours hold.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deltaproduct.benchmarks.correctness import error_limit, judge
from deltaproduct.benchmarks.report import MixerRow, MixersBenchmark
from deltaproduct.benchmarks.settings import BenchmarkSettings
from deltaproduct.benchmarks.timing import interleaved, peak_extra_bytes
from deltaproduct.benchmarks.train import QUICK_BATCH, QUICK_LENGTH, Training, resized
from deltaproduct.errors import UsageError, first_line
from deltaproduct.layers import MIXERS
from deltaproduct.tasks import get_task
from deltaproduct.tasks.task import check_fits
from deltaproduct.training import Run, TrainConfig
from deltaproduct.training.objectives.task import sample_batch

YARDSTICK = "deltanet"
CHECKED_BATCH = 2  # sequences, of full length, that correctness is checked on
SLOW = 5.0  # times the yardstick's time: what is slower says why
UNKNOWN = "no reason is known"
# Found with PyTorch's profiler and by changing sizes; of the mixers that are not slow here, what would make them so.
REASONS = {
    "mamba": "every token's state is expand · D · N floats; off the native engine all go through memory, many times",
    "dense_linear_rnn": "a K×K transition per head and token is projected, bounded and multiplied by the next",
    "mamba2": "twice the width (expand), and chunks of PyTorch operators that all go through memory",
    "gla": "a decay per channel, in chunks of PyTorch operators that all go through memory",
    "rwkv7": "a decay per channel and two keys, in chunks of PyTorch operators that all go through memory",
    "titans": "a memory and a momentum, in chunks of PyTorch operators that all go through memory",
    "ttt_linear": "mini-batches one after the other, each of many small operators",
    "slstm": "tokens one after the other, each of many small operators",
    "lstm": "tokens one after the other",
    "gru": "tokens one after the other",
}


def bench_mixers(
    config: Run[TrainConfig],
    *,
    mixers: Sequence[str] | None = None,
    device: str = "auto",
    repeats: int | None = None,
    quick: bool = False,
    progress: Callable[[str], None] | None = None,
) -> MixersBenchmark:
    """Check, then time, the training step of a run's last stage with every mixer in place of the run's own.

    Args:
        config: the run; float32, no accumulation, layers that are all alike, one length a stage.
        mixers: rows; None is every registered mixer. Without "deltanet" there are no ratios.
        device, repeats, progress: as for `bench_ops`.
        quick: a batch of 8 sequences of length 16 in place of the run's.

    Raises:
        UsageError: a run that is none of the above, an unknown mixer or device, fewer than one repeat.
    """
    say = progress or (lambda line: None)
    training, task = config.training, get_task(config.training.task)
    if training.precision != "float32" or training.grad_accumulation != 1:
        raise UsageError("Mixers are compared in float32 without gradient accumulation.")
    if training.min_length is not None or config.model.is_hybrid:
        raise UsageError("Mixers are compared on sequences of one length, in layers that are all alike.")
    check_fits(config.model, task)
    if mixers is not None and not mixers:
        raise UsageError(f"There is no mixer to benchmark; choose from {', '.join(MIXERS)}.")
    names = list(dict.fromkeys(MIXERS if mixers is None else mixers))
    stage = len(training.lengths) - 1
    length = QUICK_LENGTH if quick else training.lengths[stage]
    batch_size = QUICK_BATCH if quick else training.batch_size(stage)
    config = resized(config, length, batch_size)
    settings = BenchmarkSettings.of(device=device, repeats=repeats, seed=training.seed, quick=quick)
    tokens = sample_batch(task, config.training, 0, 0)[0].shape[1]
    # All of them before the first is run: an unknown name is noticed at once.
    configs = {name: dataclasses.replace(config, model=config.model.changed(mixer=name)) for name in names}

    rows: list[MixerRow] = []
    runs: dict[str, Callable[[], object]] = {}
    for name, mine in configs.items():
        say(f"checking {name}")
        try:
            row = MixerRow(name, **_check(mine, settings))
            if row.status == "timed":
                trained = Training(mine, "auto", settings.device)
                row.num_parameters = trained.model.num_parameters
                row.state_size = trained.model.state_size_after(tokens)
                row.peak_extra_bytes = peak_extra_bytes(trained.step, settings.device)  # also the warm-up
                runs[name] = trained.step
        except Exception as e:  # a finding, as in `bench_ops`
            row = MixerRow(name, status="failed", reason=first_line(e, with_kind=True))
        rows.append(row)
    say(f"timing {len(runs)} rows, {settings.repeats} runs each")
    times = interleaved(runs, repeats=settings.repeats, device=settings.device)
    for row in rows:
        row.step = times.get(row.mixer)
        if row.step and YARDSTICK in times:
            row.ratio = row.step.median_ms / times[YARDSTICK].median_ms
            row.why_slow = REASONS.get(row.mixer, UNKNOWN) if row.ratio > SLOW else None
    return MixersBenchmark(
        **settings.circumstances(),
        error_limit=error_limit(settings.dtype, settings.device),
        config=json.loads(json.dumps(config.to_dict())),  # lists where there are tuples
        batch_size=batch_size,
        tokens=tokens,
        checked_batch=min(CHECKED_BATCH, batch_size),
        yardstick=YARDSTICK,
        slow=SLOW,
        rows=rows,
    )


def _check(config: Run[TrainConfig], settings: BenchmarkSettings) -> dict[str, Any]:
    """`judge` of the loss and the gradients of a few sequences; in float64 the operator is the plain loop."""
    training = config.training
    config = resized(config, training.lengths[0], min(CHECKED_BATCH, training.batch_size(0)))
    wanted = Training(config, "reference", settings.device, torch.float64).loss_and_gradients()
    got = Training(config, "auto", settings.device).loss_and_gradients()
    return judge(_maps(got), _maps(wanted), error_limit(settings.dtype, settings.device))


def _maps(outcome: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients by name, with a map's weight and bias as one tensor.

    By itself, a bias may have a gradient that is 0 but for rounding, and an error relative to that means nothing: the
    bias of mLSTM's input gates scales a head's output, and the LayerNorm behind it takes all scales away.
    """
    found = dict(outcome)
    for name, gradient in outcome.items():
        weight = f"{name.removesuffix('.bias')}.weight"
        if name.endswith(".bias") and weight in found:
            found[weight] = torch.cat((found[weight].flatten(), gradient.flatten()))
            del found[name]
    return found
