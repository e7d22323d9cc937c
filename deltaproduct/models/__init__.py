"""Models: a configuration, and the stack of blocks that it describes."""

from deltaproduct.models.config import ModelConfig
from deltaproduct.models.sequence_model import SequenceModel

__all__ = ["ModelConfig", "SequenceModel"]
