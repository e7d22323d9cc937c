"""Finite groups: a list of permutations with its Cayley table, made from a name; and products along a sequence.

`running_product` multiplies along a sequence; `Group` is a list of permutations and its Cayley table; `build_group`
makes S_n, A_n, Z_n, D_n and their direct products from a name.
"""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deltaproduct.errors import QUOTED, UsageError, did_you_mean, quoted
from deltaproduct.renamed import renamed_names

MAX_ELEMENTS = 5_040
"""Largest group: S7, whose int64 Cayley table takes 203 MB."""

Permutation = tuple[int, ...]


def running_product(table: Tensor, tokens: Tensor, start: int | Tensor = 0) -> Tensor:
    """Every prefix product: out[:, t] = start ∘ tokens[:, 0] ∘ … ∘ tokens[:, t].

    table: [n, n] int64, table[i, j] = i ∘ j, any *associative* operation (a group's or a monoid's).
    tokens: [B, T] int64 in [0, n). start: one element, or [B] of them; 0 is the identity of every `Group`.
    Returns [B, T] int64 on the device of `tokens`.

    Associativity lets the time axis be cut into about √T blocks: the prefixes of all blocks are formed together, then
    the blocks' totals are chained, then each prefix is multiplied by what came before its block. That is 3√T steps over
    wide tensors in place of T steps over narrow ones.
    """
    batch, length = tokens.shape
    if length == 0:
        return tokens.clone()
    n = table.shape[0]
    products = table.to(tokens.device).reshape(-1)

    def compose(left: Tensor, right: Tensor) -> Tensor:
        index = torch.add(right, left, alpha=n)
        return products.index_select(0, index.view(-1)).view(index.shape)  # several times faster than products[index]

    size = math.isqrt(length - 1) + 1
    blocks = -(-length // size)
    padded = F.pad(tokens, (0, blocks * size - length))  # any element would do: nothing after the end is kept
    prefix = padded.view(batch, blocks, size).permute(2, 1, 0).contiguous()  # [size, blocks, B]: a step is one slab
    for t in range(1, size):
        prefix[t] = compose(prefix[t - 1], prefix[t])
    before = torch.empty_like(prefix[0])  # [blocks, B]: the product of everything before the block
    before[0] = start
    for b in range(1, blocks):
        before[b] = compose(before[b - 1], prefix[-1, b - 1])
    for t in range(size):
        prefix[t] = compose(before, prefix[t])
    return prefix.permute(2, 1, 0).reshape(batch, blocks * size)[:, :length].contiguous()


@dataclass(frozen=True, eq=False)
class Group:
    """A finite group of permutations of 0 … m−1.

    elements: n permutations p as tuples, x ↦ p[x], in lexicographic order, so that element 0 is the identity.
    names: what a person calls each element.
    """

    name: str
    elements: tuple[Permutation, ...] = field(repr=False)
    names: tuple[str, ...] = field(repr=False)

    @cached_property
    def table(self) -> Tensor:
        """The Cayley table, [n, n] int64: table[i, j] is the index of elements[i] ∘ elements[j]. Not to be written to.

        Raises UsageError when the elements are not closed under composition.
        """
        return torch.from_numpy(_cayley_table(self.elements))


def _cayley_table(elements: Sequence[Permutation]) -> np.ndarray:
    images = np.array(elements, dtype=np.int16)  # [n, m]
    n, m = images.shape

    # A few points (in group theory, a base) already tell all elements apart: keep each point that splits some class of
    # elements that look alike so far. Lexicographic order survives, since a skipped point is decided by earlier ones.
    base: list[int] = []
    rank, classes = np.zeros(n, dtype=np.int64), 1
    for point in range(m):
        if classes == n:
            break
        values, refined = np.unique(rank * m + images[:, point], return_inverse=True)
        if len(values) > classes:
            base, rank, classes = [*base, point], refined, len(values)

    def code(columns: Iterator[np.ndarray]) -> np.ndarray:
        # Images of the base points as the digits of one number: every kept point at least doubles the classes, so there
        # are at most 12 digits, and for groups this small the number stays below 2**63.
        total = np.zeros((), dtype=np.int64)
        for column in columns:
            total = total * m + column
        return total

    codes = code(images[:, point] for point in base)  # [n], increasing
    table = np.empty((n, n), dtype=np.int64)
    rows = max(1, 2**20 // n)  # rows at a time: bounds the temporaries
    for i in range(0, n, rows):
        left = images[i : i + rows]
        product = code(left[:, images[:, point]] for point in base)  # (p ∘ q)(x) = p[q[x]], [rows, n]
        table[i : i + rows] = np.minimum(np.searchsorted(codes, product), n - 1)
        if not np.array_equal(codes[table[i : i + rows]], product):
            raise UsageError("the permutations are not a group: some product of two of them is not among them")
    return table


def _cycles(p: Permutation) -> str:
    """p in cycle notation, `e` for the identity: (1, 0, 3, 2) is "(0 1)(2 3)"."""
    written, seen = "", set()
    for first in range(len(p)):
        cycle = []
        x = first
        while x not in seen:
            seen.add(x)
            cycle.append(x)
            x = p[x]
        if len(cycle) > 1:
            written += "(" + " ".join(map(str, cycle)) + ")"
    return written or "e"


def _is_even(p: Permutation) -> bool:
    return sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0


INTEGER = r"(?:0|[1-9]\d{0,8})"
GROUP_NAME = rf"[SAZD]{INTEGER}(?:_x_[SAZD]{INTEGER})*"  # what `build_group` takes, as a regular expression

_SMALLEST = {"S": 2, "A": 3, "Z": 2, "D": 3}


def _factor(family: str, n: int) -> tuple[list[Permutation], list[str]]:
    """Elements in lexicographic order, and their names, of S_n, A_n, Z_n or D_n.

    Names are cycles in S_n and A_n; "+i" is the shift x ↦ x+i of Z_n; D_n has rotations "ri", x ↦ i+x, and mirrorings
    "mi", x ↦ i−x, all mod n.
    """
    points = tuple(range(n))
    shifts = [points[i:] + points[:i] for i in points] if family in "ZD" else []
    if family == "Z":
        return shifts, [f"+{i}" for i in points]
    if family == "D":
        rotations = [(p, f"r{i}") for i, p in enumerate(shifts)]
        mirrorings = [(points[i::-1] + points[:i:-1], f"m{i}") for i in points]
        both = sorted(rotations + mirrorings)
        return [p for p, _ in both], [name for _, name in both]
    elements = [p for p in itertools.permutations(points) if family == "S" or _is_even(p)]
    return elements, [_cycles(p) for p in elements]


def _order(family: str, n: int) -> int:
    if family in "ZD":
        return n if family == "Z" else 2 * n
    return math.factorial(min(n, 30)) // (1 if family == "S" else 2)  # beyond 30 only "too many" matters


@lru_cache(maxsize=16)
def build_group(name: str) -> Group:
    """The group called `name`: `S5`, `A5`, `Z60`, `D4` (order 8), or a direct product of these such as `S3_x_Z2`.

    Z_n is the cyclic shifts of n points, D_n the symmetries of a regular n-gon as permutations of its corners, and a
    direct product acts on the disjoint union of its factors' points, the first factor's points first.

    Raises UsageError when a factor is trivial or not faithful on its points (S and Z need n ≥ 2, A and D need n ≥ 3),
    or when there are more than `MAX_ELEMENTS` elements, or when the name is of none of these forms.
    """
    if not re.fullmatch(GROUP_NAME, name, re.ASCII):
        # The families' letters are large, and what joins factors is small.
        meant = name.upper().replace("_X_", "_x_")
        near = did_you_mean(name, [meant]) if len(name) <= QUOTED and re.fullmatch(GROUP_NAME, meant, re.ASCII) else ""
        raise UsageError(f"there is no group {quoted(name)}{near}: names are such as S5, A5, Z60, D4 or S3_x_Z2")
    factors = [(part[0], int(part[1:])) for part in name.split("_x_")]
    for family, n in factors:
        least = _SMALLEST[family]
        if n < least:
            where = f" in {name}" if len(factors) > 1 else ""
            why = "fewer than 3 corners do not tell its elements apart" if family == "D" else "it has nothing to track"
            raise UsageError(f"{family}{n}{where} cannot be used because {why}; the smallest is {family}{least}")
    order = 1
    for family, n in factors:
        order = min(order * _order(family, n), 10**18)  # beyond that only "too many" matters
    if order > MAX_ELEMENTS:
        size = f"{order:,}" if order < 10**18 else "more than 10^18"
        known = name if len(name) <= QUOTED else quoted(name)
        raise UsageError(f"{known} has {size} elements, and a group may have at most {MAX_ELEMENTS:,}")

    elements, names = _factor(*factors[0])
    parts: list[tuple[str, ...]] = [(name,) for name in names]
    for family, n in factors[1:]:
        more, more_names = _factor(family, n)
        offset = len(elements[0])
        points = tuple(range(offset, offset + n))  # looked up, so that large products share their integers
        shifted = [tuple(points[x] for x in q) for q in more]
        elements = [p + q for p in elements for q in shifted]
        parts = [(*left, right) for left in parts for right in more_names]
    written = names if len(factors) == 1 else ["[" + ", ".join(part) + "]" for part in parts]
    return Group(name, tuple(elements), tuple(written))


__getattr__ = renamed_names(
    __name__,
    {
        "BlockTask": "deltaproduct.tasks.group_tasks.BlockTask",
        "GroupTask": "deltaproduct.tasks.group_tasks.GroupTask",
    },
)
