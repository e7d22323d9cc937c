"""What a compiled model's configuration says of all its layers together."""

from deltaproduct.models import ModelConfig


def most_steps(config: ModelConfig) -> int:
    """The most Householder factors per token in any layer."""
    return max(options.num_householder for options in config.mixers)
