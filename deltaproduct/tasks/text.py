"""What the tasks of state tracking in text have in common: chess, code and stories of trades, each in two forms.

Which text makes a model track state is discussed by Merrill, Petty and Sabharwal, "The Illusion of State in State-Space
Models" (arXiv 2404.08819), where each of the three encodes the permutations of five things; chess as such a test bed is
from Toshniwal et al., "Chess as a Testbed for Language Model State Tracking" (arXiv 2102.13249).

*Tokens* (`EventTask`): one token for an event, such as a whole swap, and after each event a label that tells a part of
the state. *Plain text* (`TextTask`): words and punctuation of a closed vocabulary; after each event comes a question,
whose last word is scored with the answer. The answer itself is not part of what the model reads: written out, it
would hand the model the state, and then nothing has to be tracked for longer than from one question to the next.

A length counts every token after BOS. As many whole events (in text, with their questions) as fit are written, and what
is left at the end is the padding "[PAD]", which is not scored.

The three kinds are in `chess_moves.py`, `code_swaps.py` and `entities.py`.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaproduct.errors import UsageError
from deltaproduct.renamed import renamed_names
from deltaproduct.tasks.task import Task

BLANK = -1  # no word here
_BEFORE, _AFTER = frozenset(",.?:()-\n"), frozenset("(-\n")  # no space before, and after, these


# ---------------------------------------------------------------------------------------------------------------- words


def spelt(words: Iterable[str], prefixes: frozenset[str] = frozenset()) -> str:
    """Words joined by single spaces, except around the marks that English and Python write without.

    prefixes: words that the next one follows without a space, such as "R" in "Ra8".
    """
    parts, tight = [], True
    for word in words:
        parts += [word] if tight or word in _BEFORE else [" ", word]
        tight = word in _AFTER or word in prefixes
    return "".join(parts)


@dataclass(frozen=True)
class WordTokenizer:
    """Words and punctuation marks of a closed vocabulary, to ids and back.

    Attributes:
        words: word i has id i.
        prefixes: as `spelt` takes them.
    """

    words: tuple[str, ...]
    prefixes: frozenset[str] = frozenset()

    @cached_property
    def ids(self) -> dict[str, int]:
        """The id of each word."""
        return {word: i for i, word in enumerate(self.words)}

    @cached_property
    def _pattern(self) -> re.Pattern:
        longest_first = sorted(self.words, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) + "|(?P<other>[^ ])")

    def encode(self, text: str) -> list[int]:
        """The ids of a text's words, such that `decode` gives the text back.

        Raises UsageError for a word that is not known, and for spaces that `decode` would write otherwise.
        """
        ids = []
        for match in self._pattern.finditer(text):
            if match["other"]:
                raise UsageError(f"the vocabulary has no word for {text[match.start() :].split()[0]!r}")
            ids.append(self.ids[match[0]])
        written = self.decode(ids)
        if written != text:
            place = next((i for i, (a, b) in enumerate(zip(written, text, strict=False)) if a != b), len(written))
            raise UsageError(f"the text is not spaced as expected at {text[place : place + 20]!r}")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of word ids; ids beyond the words, such as BOS and padding, are left out."""
        return spelt((self.words[i] for i in ids if i < len(self.words)), self.prefixes)

    def table(self, phrases: Sequence[Sequence[str]]) -> Tensor:
        """[rows, width] int64: the ids of each phrase's words, with `BLANK` before those of the shorter ones."""
        width = max(map(len, phrases))
        rows = [[BLANK] * (width - len(phrase)) + [self.ids[word] for word in phrase] for phrase in phrases]
        return torch.tensor(rows, dtype=torch.int64).reshape(len(phrases), width)


# ---------------------------------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True, eq=False, kw_only=True)
class EventTask(Task):
    """Events as tokens: `width` tokens for each event, of which the last is scored.

    Attributes:
        symbols: the names of the tokens but padding and BOS, which are the last two.
        answers: the names of the labels.
        width: k, tokens an event; only where that does not divide the length is there padding.
        draw: (batch, events, generator) → tokens [batch,events·k] and labels [batch,events].
    """

    symbols: tuple[str, ...]
    answers: tuple[str, ...]
    width: int
    draw: Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]] = field(repr=False)

    @property
    def pad_id(self) -> int:
        """The token that fills what no event fits in."""
        return self.bos_id - 1

    def token_name(self, i: int) -> str:
        return (*self.symbols, "[PAD]", "[BOS]")[i]

    def label_name(self, i: int) -> str:
        return self.answers[i]

    def _sample(self, batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        events = length // self.width
        written, answers = self.draw(batch, events, generator)
        tokens = F.pad(written, (0, length - events * self.width), value=self.pad_id)
        labels, mask = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
        last = slice(self.width - 1, events * self.width, self.width)
        labels[:, last], mask[:, last] = answers, True
        return tokens, labels, mask


class Story(NamedTuple):
    """What is told in B texts of E events, as rows of the task's tables."""

    opening: Tensor  # [B,H] the words of the beginning, as many in each text
    events: Tensor  # [B,E] which phrase
    questions: Tensor  # [B,E] which question
    answers: Tensor  # [B,E] labels


@dataclass(frozen=True, eq=False, kw_only=True)
class TextTask(Task):
    """Plain text: an opening, then events, each with a question after it whose answer is scored at its last word.

    Attributes:
        tokenizer: words and ids; padding and BOS are the two ids after the words.
        phrases: what can happen, in words.
        questions: what can be asked, in words.
        answers: the words that labels stand for.
        around: words before and after an answer where answers are written.
        end: words after each question.
        opening: how many words the opening has.
        draw: (batch, events, generator) → Story.
    """

    tokenizer: WordTokenizer
    phrases: tuple[tuple[str, ...], ...] = field(repr=False)
    questions: tuple[tuple[str, ...], ...] = field(repr=False)
    answers: tuple[str, ...]
    around: tuple[tuple[str, ...], tuple[str, ...]]
    end: tuple[str, ...]
    opening: int
    draw: Callable[[int, int, torch.Generator], Story] = field(repr=False)

    @property
    def pad_id(self) -> int:
        """The token that fills what no event fits in."""
        return self.bos_id - 1

    def token_name(self, i: int) -> str:
        return (*self.tokenizer.words, "[PAD]", "[BOS]")[i].replace("\n", "\\n")

    def label_name(self, i: int) -> str:
        return self.answers[i]

    def text(self, generator: torch.Generator, length: int, *, answers: bool = False) -> str:
        """One text of at most `length` words and marks; where `answers`, each question is followed by its answer.

        Without them this is what `sample` gives in words. Raises UsageError when `length` is too short for one event.
        """
        least = self.min_length + (1 + sum(map(len, self.around)) if answers else 0)
        if length < least:
            raise UsageError(f"length must be at least {least}, not {length} (task {self.name})")
        tokens, _ = self._write(1, length, generator, answers)
        return self.tokenizer.decode(tokens[0].tolist())

    def worked_example(self, length: int | None = None, seed: int = 0) -> str:
        """As every task's, and then the text; `length` None means as many words as are sure to hold three events."""
        length = self.opening + 3 * (self.min_length - self.opening) if length is None else length
        table = super().worked_example(length, seed)
        return f"{table}\n\nas text:\n\n{self.text(torch.Generator().manual_seed(seed), length).rstrip()}"

    def _sample(self, batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        tokens, labels = self._write(batch, length, generator, answers=False)
        mask = labels != BLANK
        return tokens, labels.masked_fill(~mask, 0), mask

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Phrases, questions, answers between what is around them, and the one row of `end`; each [rows, width]."""
        before, after = self.around
        written = tuple((*before, answer, *after) for answer in self.answers)
        return tuple(self.tokenizer.table(rows) for rows in (self.phrases, self.questions, written, (self.end,)))  # type: ignore[return-value]

    def _write(self, batch: int, length: int, generator: torch.Generator, answers: bool) -> tuple[Tensor, Tensor]:
        """Tokens and labels, each [batch,length]; labels are `BLANK` where nothing is scored."""
        device = generator.device
        phrases, questions, written, end = (table.to(device) for table in self._tables)
        shortest = sum(int((table != BLANK).sum(1).min()) for table in (phrases, questions, end))
        story = self.draw(batch, (length - self.opening) // shortest, generator)
        parts = [phrases[story.events], questions[story.questions]]
        scored = phrases.shape[1] + questions.shape[1] - 1  # questions end in this column: blanks are before the words
        if answers:
            parts.append(written[story.answers])
        parts.append(end[torch.zeros_like(story.events)])
        words = torch.cat(parts, dim=2)  # [B,E,W]
        real = words != BLANK
        ends = self.opening + real.sum(2).cumsum(1)
        real &= (ends <= length)[:, :, None]
        places = self.opening + real.flatten(1).cumsum(1) - 1
        places = places.masked_fill(~real.flatten(1), length)  # a column that is cut off

        tokens = words.new_full((batch, length + 1), self.pad_id)
        tokens[:, : self.opening] = story.opening
        tokens.scatter_(1, places, words.flatten(1))
        labels = words.new_full((batch, length + 1), BLANK)
        labels.scatter_(1, places.view(words.shape)[:, :, scored], story.answers)
        return tokens[:, :length], labels[:, :length]


# ----------------------------------------------------------------------------------------------------- parts of a task


def check_count(name: str, n: int, least: int, most: int, too_few: str, too_many: str) -> None:
    """Raises UsageError, with the reason, unless least ≤ n ≤ most."""
    if not least <= n <= most:
        why = too_few if n < least else too_many
        raise UsageError(f"{name} cannot be used because {why}; use {least} to {most}")


__getattr__ = renamed_names(
    __name__,
    {
        "draw_pairs": "deltaproduct.tasks.swaps.draw_pairs",
        "follow": "deltaproduct.tasks.swaps.follow",
        "unordered": "deltaproduct.tasks.swaps.unordered",
    },
)
