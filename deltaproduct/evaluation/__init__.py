"""Evaluation: how well a model does, at lengths it was not trained on."""

from typing import TYPE_CHECKING

from deltaproduct.late import late

if TYPE_CHECKING:
    from deltaproduct.evaluation.lengths import (
        LengthResult,
        RangeResult,
        evaluate_length,
        evaluate_lengths,
        evaluate_range,
        scores,
    )

__all__ = ["LengthResult", "RangeResult", "evaluate_length", "evaluate_lengths", "evaluate_range", "scores"]

__getattr__, __dir__ = late(__name__, {"lengths": __all__})
