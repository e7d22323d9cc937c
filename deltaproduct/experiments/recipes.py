"""Recipes that several experiments and the command line start from."""

from collections.abc import Mapping
from typing import Any

from deltaproduct.experiments.state_tracking import STATE_TRACKING
from deltaproduct.layers.options import option_names
from deltaproduct.models import ModelConfig
from deltaproduct.tasks import Task
from deltaproduct.training import TrainConfig

# Layers as the papers have them, at half their width: with convolution, SiLU, MLP, and β from 1 on.
SMALL: dict[str, Any] = {"hidden_size": 64, "num_heads": 4, "head_dim": 16, "initializer_range": None}

# What the larger groups need (hidden 64 stays stuck on A5), and the curriculum that brings a layer to length 128.
LARGER_GROUPS: dict[str, Any] = {"hidden_size": 128, "num_heads": 8}
CURRICULUM: dict[int, tuple[int, int]] = {  # length → batch size, steps
    4: (512, 300), 8: (512, 300), 16: (256, 400), 32: (128, 800), 64: (64, 500), 128: (64, 1200),
}  # fmt: skip

# arXiv 2502.10297, appendix C.1, and its published code.
PAPER_MODEL: dict[str, Any] = {
    "hidden_size": 128,
    "num_heads": 12,
    "head_dim": 32,
    "use_short_conv": False,
}
PAPER_SAMPLES, PAPER_EPOCHS = 2_000_000, 100


def state_tracking_model(task: Task, **changes: Any) -> ModelConfig:
    """The recipe's model for a task; `changes` are what `ModelConfig.build` takes."""
    return sized(task, STATE_TRACKING, **changes)


def sized(task: Task, recipe: Mapping[str, Any], **changes: Any) -> ModelConfig:
    """A model for a task: a recipe, of which the mixer takes what it has, and what is changed in it."""
    return ModelConfig.build(task.vocab_size, task.num_labels, defaults=recipe, **changes)


def curriculum(task: Task, seed: int, *, longest: int = 128) -> TrainConfig:
    """The schedule of the larger groups, up to a length of its stages: all models have the same number of steps."""
    stages = {length: stage for length, stage in CURRICULUM.items() if length <= longest}
    steps = [steps for _, steps in stages.values()]
    return TrainConfig(
        task=task.name,
        steps=sum(steps),
        seed=seed,
        lengths=tuple(stages),
        batch_sizes=tuple(batch for batch, _ in stages.values()),
        stage_steps=tuple(steps[:-1]),
        stage_loss=None,
        lr=5e-3,
    )


def small_curriculum(task: Task, seed: int) -> TrainConfig:
    """The schedule with which hidden 64 learns S3 and S4 in a minute. Its stages' steps are fixed, so that models that
    do not learn have the same ones."""
    return TrainConfig(
        task=task.name,
        steps=700,
        seed=seed,
        lengths=(4, 8, 16, 128),
        batch_sizes=(256, 256, 128, 64),
        stage_steps=(100, 100, 100),
        stage_loss=None,
    )


def paper_training(task: Task, seed: int, *, length: int = 128) -> TrainConfig:
    """arXiv 2502.10297's training on groups: 100 epochs over 2 million sequences of length 128."""
    batch = 2048 if task.name == "S3" else 1024
    return TrainConfig(
        task=task.name,
        steps=PAPER_EPOCHS * (PAPER_SAMPLES // batch),
        seed=seed,
        lengths=(length,),
        batch_sizes=(batch,),
        stage_loss=None,
        num_samples=PAPER_SAMPLES,
        lr=1e-3,
        min_lr_ratio=0.0,
        warmup_steps=0,
        beta2=0.999,
        weight_decay=1e-6,
        clip=0.0,
    )


PAPERS_NAMES = {
    "attention": "Transformer",
    "dense_linear_rnn": "dense linear RNN",
    "deltanet": "DeltaNet",
    "gated_deltanet": "Gated DeltaNet",
    "gla": "GLA",
    "gru": "GRU",
    "linear_attention": "linear attention",
    "lstm": "LSTM",
    "mamba": "Mamba",
    "mamba2": "Mamba-2",
    "mlstm": "mLSTM",
    "rwkv7": "RWKV-7",
    "slstm": "sLSTM",
    "titans": "Titans",
    "ttt_linear": "TTT-Linear",
}


def label(model: ModelConfig) -> str:
    """As the papers write it: DeltaProduct_2[-1,1], with the range of eigenvalues where the mixer has a choice."""
    options = model.mixer
    name = PAPERS_NAMES.get(options.name, options.name)
    if options.name == "deltaproduct":
        name = f"{'Gated ' if options.use_forget_gate else ''}DeltaProduct_{options.num_householder}"
    if "allow_neg_eigval" not in option_names(options):
        return name
    return f"{name}{'[-1,1]' if options.allow_neg_eigval else '[0,1]'}"
