"""What a trained model has learned: the automaton that it follows, and how much its states hold."""

from typing import TYPE_CHECKING

from deltaproduct.late import late

if TYPE_CHECKING:
    from deltaproduct.analysis.automaton import Extraction, extract
    from deltaproduct.analysis.monoid import GroupVerdict, compare_with_group, monoid_size
    from deltaproduct.analysis.teacher import Vocabulary, vocabulary

__all__ = ["Extraction", "GroupVerdict", "Vocabulary", "compare_with_group", "extract", "monoid_size", "vocabulary"]

__getattr__, __dir__ = late(
    __name__,
    {
        "automaton": ("Extraction", "extract"),
        "monoid": ("GroupVerdict", "compare_with_group", "monoid_size"),
        "teacher": ("Vocabulary", "vocabulary"),
    },
)
