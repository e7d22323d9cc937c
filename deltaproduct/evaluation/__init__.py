"""Evaluation: how well a model does, at lengths it was not trained on."""

from deltaproduct.evaluation.lengths import LengthResult, evaluate_length, evaluate_lengths, scores
from deltaproduct.evaluation.ranges import RangeResult, evaluate_range

__all__ = ["LengthResult", "RangeResult", "evaluate_length", "evaluate_lengths", "evaluate_range", "scores"]
