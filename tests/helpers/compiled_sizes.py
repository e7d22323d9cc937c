"""What a compiled model's configuration says of all its layers together."""

from deltaproduct.models import ModelConfig


def most_steps(config: ModelConfig) -> int:
    """The most Householder factors per token in any layer; a mixer without that option has one."""
    return max(getattr(options, "num_householder", 1) for options in config.mixers)
