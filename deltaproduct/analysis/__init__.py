"""What a trained model has learned: the automaton that it follows, and how much its states hold."""

from deltaproduct.analysis.automaton import Extraction, extract
from deltaproduct.analysis.monoid import GroupVerdict, compare_with_group, monoid_size
from deltaproduct.analysis.teacher import Vocabulary, vocabulary

__all__ = ["Extraction", "GroupVerdict", "Vocabulary", "compare_with_group", "extract", "monoid_size", "vocabulary"]
