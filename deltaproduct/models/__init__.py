"""Models: a configuration, the stack of blocks that it describes, and its decoding token by token."""

from deltaproduct.models.config import ModelConfig
from deltaproduct.models.decoder import Decoder
from deltaproduct.models.sequence_model import SequenceModel

__all__ = ["Decoder", "ModelConfig", "SequenceModel"]
