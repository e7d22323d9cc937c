"""Evaluation: how well a model does, at lengths it was not trained on."""

from typing import TYPE_CHECKING

from deltaproduct.late import late

if TYPE_CHECKING:
    from deltaproduct.evaluation.lengths import LengthResult, evaluate_length, evaluate_lengths, scores
    from deltaproduct.evaluation.ranges import RangeResult, evaluate_range

__all__ = ["LengthResult", "RangeResult", "evaluate_length", "evaluate_lengths", "evaluate_range", "scores"]

__getattr__, __dir__ = late(
    __name__,
    {
        "lengths": ("LengthResult", "evaluate_length", "evaluate_lengths", "scores"),
        "ranges": ("RangeResult", "evaluate_range"),
    },
)
