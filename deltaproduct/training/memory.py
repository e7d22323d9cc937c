"""Whether a run can fit into memory, from its configuration alone."""

import torch

from deltaproduct.memory import check_memory
from deltaproduct.models import ModelConfig
from deltaproduct.models.size import FLOAT, SIZES, activation_bytes, check_model, model_bytes
from deltaproduct.training.config import LanguageRun, OptimiserConfig, RunConfig

TRAINED = 4 * FLOAT  # bytes of a parameter: itself, its gradient and AdamW's two moments


def check_run(config: RunConfig, device: torch.device) -> None:
    """`UsageError` if training on a task cannot fit: the model with its optimiser, and the largest micro-batch."""
    settings = config.training
    tokens = max(
        settings.batch_size(stage) // settings.grad_accumulation * (1 + length)
        for stage, length in enumerate(settings.lengths)
    )
    _check(config.model, settings, tokens, device, advice="batch_sizes or lengths, or raise grad_accumulation")


def check_language_run(
    config: LanguageRun,
    device: torch.device,
    *,
    processes: int = 1,
    sharded: bool = False,
    gradient_checkpointing: bool = False,
) -> None:
    """`UsageError` if this process's share of training on a corpus cannot fit.

    Args:
        processes: that the tokens of a step are dealt out to.
        sharded: whether the optimiser's numbers are dealt out too.
        gradient_checkpointing: whether blocks keep nothing but their inputs.
    """
    settings = config.training
    tokens = settings.batch_size // settings.grad_accumulation * settings.context // processes
    per_parameter = max(FLOAT, TRAINED // processes) if sharded else TRAINED
    advice = "batch_size or context, or raise grad_accumulation"
    _check(
        config.model,
        settings,
        tokens,
        device,
        advice=advice,
        per_parameter=per_parameter,
        gradient_checkpointing=gradient_checkpointing,
    )


def _check(
    model: ModelConfig, settings: OptimiserConfig, tokens: int, device: torch.device, *, advice: str,
    per_parameter: int = TRAINED, gradient_checkpointing: bool = False,
) -> None:  # fmt: skip
    if device.type != "cpu":
        check_model(model)  # it is built here first
    alone = model_bytes(model, per_parameter=per_parameter)
    check_memory("Training the model", alone, SIZES, device=device)
    short = 2 if settings.precision == "bfloat16" else FLOAT
    step = tokens * activation_bytes(model, gradient_checkpointing=gradient_checkpointing, per_float=short)
    check_memory(f"A step of {tokens:,} tokens", alone + step, f"{advice}, or the model's sizes", device=device)
