"""What the tasks of the Chomsky hierarchy's benchmark have in common (Delétang et al., arXiv 2207.02098).

Two formats, both of which any causal model can be asked in. An *answer* is one symbol, asked for by the last token:

    0 1 1 0 =  →  even

A *transduction* is a sequence of symbols. After the input and "=" comes one placeholder "_" for each, as in the paper,
and the output is read there, so that the model has seen all of the input and none of the output:

    0 0 1 = _ _ _  →  1 0 0

The length counts every token after BOS: the input, "=" and the placeholders. Where a length does not divide evenly, the
input is the longest that fits, and the placeholders left over at the end are not scored; nor are those after the
symbol "end" where the output's own length varies.

The tasks themselves are in `regular.py`, `context_free.py` and `context_sensitive.py`, one function each.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaproduct.tasks.task import Task

Draw = Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]

BITS = ("0", "1")
PARITIES = ("even", "odd")
DIGITS = tuple("01234")  # arithmetic modulo 5, as in the papers
UNSCORED = -1


@dataclass(frozen=True, eq=False, kw_only=True)
class FormalTask(Task):
    """One answer for a sequence, scored at its last token.

    Attributes:
        symbols: the names of all tokens but BOS, which is the last token id.
        answers: the names of the labels.
        draw: (batch, length, generator) → tokens [batch,length] and answers [batch].
    """

    symbols: tuple[str, ...]
    answers: tuple[str, ...]
    draw: Draw = field(repr=False)

    def token_name(self, i: int) -> str:
        return "[BOS]" if i == self.bos_id else self.symbols[i]

    def label_name(self, i: int) -> str:
        return self.answers[i]

    def _sample(self, batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        tokens, answer = self.draw(batch, length, generator)
        labels, mask = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
        labels[:, -1], mask[:, -1] = answer, True
        return tokens, labels, mask


@dataclass(frozen=True, eq=False, kw_only=True)
class Transduction(FormalTask):
    """An output of several symbols, scored at the placeholders.

    Here `draw` is (batch, n, generator) → inputs [batch,n] and outputs [batch,m], `UNSCORED` after an output's end;
    "=" and "_" are the last two of `symbols`.

    Attributes:
        input_length: n for a length, such that n + 1 + m fits in it.
    """

    input_length: Callable[[int], int] = field(repr=False)

    def _sample(self, batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        n = self.input_length(length)
        inputs, outputs = self.draw(batch, n, generator)
        equals, placeholder = len(self.symbols) - 2, len(self.symbols) - 1
        tokens = F.pad(ended(inputs, equals), (0, length - n - 1), value=placeholder)
        labels = F.pad(outputs, (n + 1, length - n - 1 - outputs.shape[1]), value=UNSCORED)
        mask = labels != UNSCORED
        return tokens, labels.masked_fill(~mask, 0), mask


def answer_task(
    name: str, summary: str, symbols: tuple[str, ...], answers: tuple[str, ...], draw: Draw, *, min_length: int = 2
) -> FormalTask:
    """A task whose answer is one symbol, each of `answers` as likely as another to the papers' guess."""
    return FormalTask(
        name=name, summary=summary, symbols=symbols, answers=answers, draw=draw, chance=1 / len(answers),
        **_sizes(symbols, answers, min_length),
    )  # fmt: skip


def transduction(
    name: str, summary: str, symbols: tuple[str, ...], draw: Draw, input_length: Callable[[int], int], *,
    min_length: int, answers: tuple[str, ...] = BITS, chance: float = 0.5,
) -> Transduction:  # fmt: skip
    """A task whose answer is a sequence; `symbols` are those of its input."""
    symbols = (*symbols, "=", "_")
    return Transduction(
        name=name, summary=summary, symbols=symbols, answers=answers, draw=draw, input_length=input_length,
        chance=chance, **_sizes(symbols, answers, min_length),
    )  # fmt: skip


def _sizes(symbols: tuple[str, ...], answers: tuple[str, ...], min_length: int) -> dict:
    return {
        "vocab_size": len(symbols) + 1,
        "num_labels": len(answers),
        "bos_id": len(symbols),
        "min_length": min_length,
        "train_lengths": (max(3, min_length), 40),
        "test_lengths": (40, 256),
    }


# ------------------------------------------------------------------------------------------------- parts of the drawing


def uniform(below: int, batch: int, n: int, generator: torch.Generator) -> Tensor:
    """[batch,n] int64, each from 0 … below−1."""
    return torch.randint(below, (batch, n), generator=generator, device=generator.device)


def uniform_up_to(most: Tensor, generator: torch.Generator) -> Tensor:
    """One integer from 1 … most[i] for each i, int64. Uniform but for float64's rounding."""
    share = torch.rand(most.shape, dtype=torch.float64, generator=generator, device=generator.device)
    return 1 + torch.minimum((share * most).long(), most - 1)  # the product may round up to `most`


def half(length: int) -> int:
    """How much input leaves room for "=" and as much output."""
    return (length - 1) // 2


def ended(tokens: Tensor, end: int) -> Tensor:
    """[batch,n] → [batch,n+1]: with the token `end` after them."""
    return F.pad(tokens, (0, 1), value=end)


def integers(generator: torch.Generator) -> random.Random:
    """Python's random numbers of any size, determined by the generator's state, which moves on."""
    seed = torch.randint(2**62, (1,), generator=generator, device=generator.device)
    return random.Random(int(seed))
