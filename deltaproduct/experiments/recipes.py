"""Recipes that several experiments and the command line start from."""

from typing import Any

from deltaproduct.models import ModelConfig
from deltaproduct.tasks import Task

# One layer that tracks state on a laptop. What each choice does for S3 is measured in docs/LOG.md: no convolution, MLP
# or gate, because the recurrence alone should do the work; keys and values without an activation, so that they can
# point anywhere on the sphere; β near 2 from the start, so that the first transitions are already reflections.
STATE_TRACKING: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "intermediate_size": 0,
    "num_heads": 4,
    "head_dim": 16,
    "num_householder": 2,
    "allow_neg_eigval": True,
    "use_short_conv": False,
    "qkv_activation": "identity",
    "beta_bias_init": 4.0,
    "initializer_range": None,
    "embedding_init_std": 1.0,
}


def state_tracking_model(task: Task, **changes: Any) -> ModelConfig:
    """The recipe's model for a task; `changes` are fields of `ModelConfig`."""
    return ModelConfig(**{**STATE_TRACKING, "vocab_size": task.vocab_size, "num_labels": task.num_labels, **changes})
