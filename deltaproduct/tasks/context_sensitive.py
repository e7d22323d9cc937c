"""The context-sensitive tasks of the Chomsky hierarchy's benchmark (Delétang et al., arXiv 2207.02098): odds first,
bucket sort, duplicate string, interlocked pairing, missing duplicate, and arithmetic on binary numbers.

A linear bounded automaton can do each of them. The drawing functions take (batch, n, generator) and return inputs
[batch,n] and outputs [batch,m]; `chomsky.py` says how they are asked. The examples are tokens → output.
"""

import math
import operator
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from deltaproduct.tasks.chomsky import (
    BITS,
    DIGITS,
    UNSCORED,
    answer_task,
    ended,
    half,
    integers,
    transduction,
    uniform,
    uniform_up_to,
)

BUCKETS = 5


def odds_first(batch: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The bits in the odd places (first, third, …), then those in the even ones, as in the paper and its examples; the
    published code has the even ones first.

    0 1 1 = _ _ _ → 0 1 1
    0 1 0 1 = _ _ _ _ → 0 0 1 1
    """
    bits = uniform(2, batch, n, generator)
    return bits, torch.cat([bits[:, ::2], bits[:, 1::2]], dim=1)


def bucket_sort(batch: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Symbols from 0 to 4, sorted. `chance` is the papers' 1/5, though in long strings the place tells more.

    3 0 4 0 = _ _ _ _ → 0 0 3 4
    2 1 = _ _ → 1 2
    """
    symbols = uniform(BUCKETS, batch, n, generator)
    return symbols, symbols.sort(dim=1).values


def duplicate_string(batch: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A string of bits twice.

    0 1 = _ _ _ _ → 0 1 0 1
    1 0 1 = _ _ _ _ _ _ → 1 0 1 1 0 1
    """
    bits = uniform(2, batch, n, generator)
    return bits, torch.cat([bits, bits], dim=1)


def interlocked_pairing(batch: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """aⁿbᵐ becomes aⁿbᵐbⁿaᵐ: the input, then with both symbols exchanged; a is 0 or 1, and n and m are at least 1.

    0 0 1 = _ _ _ _ _ _ → 0 0 1 1 1 0
    1 0 = _ _ _ _ → 1 0 0 1
    """
    first = uniform(2, batch, 1, generator)
    border = uniform_up_to(first.new_full((batch, 1), n - 1), generator)
    symbols = torch.where(torch.arange(n, device=first.device) < border, first, 1 - first)
    return symbols, torch.cat([symbols, 1 - symbols], dim=1)


def missing_duplicate(batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The bit that is missing ("?") in a string that stands there twice; "_" fills an odd length, as published.

    0 1 ? 1 = → 0
    1 0 1 ? 0 1 _ = → 1
    """
    half = (length - 1) // 2
    bits = uniform(2, batch, half, generator)
    twice = torch.cat([bits, bits], dim=1)
    place = uniform(2 * half, batch, 1, generator)
    tokens = ended(twice.scatter(1, place, 2), 4)
    if length % 2 == 0:
        tokens = torch.cat([tokens[:, :-1], tokens.new_full((batch, 1), 3), tokens[:, -1:]], dim=1)
    return tokens, twice.gather(1, place)[:, 0]


def binary_operation(
    batch: int, n: int, generator: torch.Generator, *, operation: Callable[[int, int], int]
) -> tuple[Tensor, Tensor]:
    """Two positive binary numbers, the lowest bit first, with the operator between them; the result, without zeros at
    its high end, and "end".

    The first number has from 1 to n−2 of the n symbols, each number as likely as another; the numbers are uniform among
    those that fit. The result of either operation has at most n−1 bits.

    binary_addition: 0 1 + 1 1 = _ _ _ _ _ → 1 0 1 end
    binary_multiplication: 0 1 * 1 1 = _ _ _ _ _ → 0 1 1 end
    """
    rng = integers(generator)
    inputs, outputs = [], []
    for _ in range(batch):
        size = rng.randint(1, n - 2)
        a, b = (rng.randint(1, 2**bits - 1) for bits in (size, n - 1 - size))
        result = _low_first(operation(a, b), 0)
        inputs.append([*_low_first(a, size), 2, *_low_first(b, n - 1 - size)])
        outputs.append([*result, 2, *[UNSCORED] * (n - 1 - len(result))])
    return torch.tensor(inputs, device=generator.device), torch.tensor(outputs, device=generator.device)


def compute_sqrt(batch: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The square root, rounded down, of a positive number of n bits, in half as many bits, rounded up; highest bits
    first, as published.

    1 0 0 1 = _ _ → 1 1
    0 0 1 1 1 = _ _ _ → 0 1 0
    """
    rng = integers(generator)
    numbers = [rng.randint(1, 2**n - 1) for _ in range(batch)]
    inputs = [_low_first(x, n)[::-1] for x in numbers]
    roots = [_low_first(math.isqrt(x), (n + 1) // 2)[::-1] for x in numbers]
    return torch.tensor(inputs, device=generator.device), torch.tensor(roots, device=generator.device)


def _low_first(number: int, size: int) -> list[int]:
    """At least `size` bits."""
    return [int(bit) for bit in reversed(f"{number:b}".zfill(size))]


def _third(length: int) -> int:
    return (length - 1) // 3


def _two_thirds(length: int) -> int:
    return 2 * (length - 1) // 3


_SUM, _PRODUCT = (partial(binary_operation, operation=f) for f in (operator.add, operator.mul))

TASKS = {
    task.name: task
    for task in (
        transduction("odds_first", "the bits in odd places, then those in even ones", BITS, odds_first, half,
                     min_length=3),
        transduction("bucket_sort", "symbols from 0 to 4, sorted", DIGITS, bucket_sort, half, min_length=3,
                     answers=DIGITS, chance=0.2),
        transduction("binary_addition", "the sum of two binary numbers, lowest bit first", (*BITS, "+"), _SUM, half,
                     min_length=7, answers=(*BITS, "end")),
        transduction("binary_multiplication", "the product of two binary numbers, lowest bit first", (*BITS, "*"),
                     _PRODUCT, half, min_length=7, answers=(*BITS, "end")),
        transduction("compute_sqrt", "the square root of a binary number, rounded down", BITS, compute_sqrt,
                     _two_thirds, min_length=3),
        transduction("duplicate_string", "a string of bits twice", BITS, duplicate_string, _third, min_length=4),
        answer_task("missing_duplicate", "the bit that is missing in a string written twice", (*BITS, "?", "_", "="),
                    BITS, missing_duplicate, min_length=3),
        transduction("interlocked_pairing", "0^n 1^m as 0^n 1^m 1^n 0^m, or with 0 and 1 exchanged", BITS,
                     interlocked_pairing, _third, min_length=7),
    )
}  # fmt: skip
