"""Evaluation: how well a model does, at lengths it was not trained on."""

from deltaproduct.evaluation.lengths import LengthResult, evaluate_length, evaluate_lengths, scores

__all__ = ["LengthResult", "evaluate_length", "evaluate_lengths", "scores"]
