"""Models: a configuration, the stack of blocks that it describes, and its decoding token by token."""

from typing import TYPE_CHECKING

from deltaproduct.late import late

if TYPE_CHECKING:
    from deltaproduct.models.config import ModelConfig
    from deltaproduct.models.decoding import Decoder
    from deltaproduct.models.sequence_model import SequenceModel, evaluating, run_in_pieces

__all__ = ["Decoder", "ModelConfig", "SequenceModel", "evaluating", "run_in_pieces"]

__getattr__, __dir__ = late(
    __name__,
    {
        "config": ("ModelConfig",),
        "decoding": ("Decoder",),
        "sequence_model": ("SequenceModel", "evaluating", "run_in_pieces"),
    },
)
