"""Word problems of finite groups: read group elements x_1 … x_T and say, at every t, the product x_1 ∘ … ∘ x_t.

These are the state-tracking tasks of both papers: DeltaProduct (arXiv 2502.10297) and Unlocking State-Tracking (arXiv
2411.12537). From the bottom up: `running_product` multiplies along a sequence; `Group` is a list of permutations and
its Cayley table; `build_group` makes S_n, A_n, Z_n, D_n and their direct products from a name; `GroupTask` samples the
plain word problem, and `BlockTask` the variants that spend several tokens on each symbol; the `*_task` functions build
each variant from the parts of its name, and `registry.py` lists them.
"""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deltaproduct.errors import UsageError, did_you_mean
from deltaproduct.tasks.names import SHOWN, shortened
from deltaproduct.tasks.task import Task

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


# --------------------------------------------------------------------------------------------------------------- groups


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


def _moved(p: Permutation) -> int:
    return sum(x != y for x, y in enumerate(p))


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
        near = did_you_mean(name, [meant]) if len(name) <= SHOWN and re.fullmatch(GROUP_NAME, meant, re.ASCII) else ""
        raise UsageError(f"there is no group {shortened(name)}{near}: names are such as S5, A5, Z60, D4 or S3_x_Z2")
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
        shown = name if len(name) <= SHOWN else shortened(name)
        raise UsageError(f"{shown} has {size} elements, and a group may have at most {MAX_ELEMENTS:,}")

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


# ---------------------------------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True, eq=False, kw_only=True)
class GroupTask(Task):
    """The word problem of a group: tokens are elements drawn uniformly from `inputs`, labels their running product.

    Token i and label i both mean `elements[i]`; BOS is token n, the number of elements. Labels follow
    acc = compose(acc, x) from the identity, and every position but BOS is scored: with S3, the tokens
    [BOS] (0 1) (1 2) have the labels - (0 1) (0 1 2). Sequences are drawn with replacement (the papers keep unique
    ones, which differs only where a length has few sequences). `chance` is 1/n: the product is uniform, or, when
    `inputs` is only a part of the group, soon nearly so.

    Attributes:
        group: the group whose elements are multiplied.
        inputs: indices of the elements that can be drawn, increasing.
    """

    group: Group
    inputs: tuple[int, ...] = field(repr=False)

    @property
    def elements(self) -> tuple[Permutation, ...]:
        """The permutations; index i is token i and label i."""
        return self.group.elements

    @property
    def table(self) -> Tensor:
        """The group's Cayley table, [n, n] int64, on the CPU."""
        return self.group.table

    @property
    def identity(self) -> int:
        """Index of the identity."""
        return 0

    def compose(self, i: int, j: int) -> int:
        """Index of elements[i] ∘ elements[j], where (p ∘ q)(x) = p[q[x]]: j acts first."""
        return int(self.table[i, j])

    def token_name(self, i: int) -> str:
        return "[BOS]" if i == self.bos_id else self.group.names[i]

    def label_name(self, i: int) -> str:
        return self.group.names[i]

    def _sample(self, batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        tokens = self._draw(batch, length, generator)
        return tokens, running_product(self.table, tokens), torch.ones_like(tokens, dtype=torch.bool)

    def _draw(self, batch: int, count: int, generator: torch.Generator) -> Tensor:
        """[batch, count] indices, uniform over `inputs`."""
        drawn = torch.randint(len(self.inputs), (batch, count), generator=generator, device=generator.device)
        if len(self.inputs) == len(self.elements):
            return drawn
        inputs = torch.tensor(self.inputs, device=drawn.device)
        return inputs.index_select(0, drawn.view(-1)).view(batch, count)


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockTask(GroupTask):
    """A word problem in which every symbol takes a block of k = `block` tokens, and is answered with the last of them.

    So the model has k steps for each product. With symbols a, b, … and their running products A, B, … (e the identity,
    · the filler), k = 3, and the position within the block repeating 0 1 2:

        filling       labels_filler   tokens           labels           task
        "repeat"      False           a a a b b b      e e A A A B      G_k_tokens
        "filler"      True            a · · b · ·      · · A · · B      G_k_s_tokens
        "filler"      False           a · · b · ·      e e A A A B      G_k_s_tokens_only_input
        "identity"    False           a e e b e e      e e A A A B      Sn_hard (there k = 4)

    Labels are delayed by k−1: a label is the product of the symbols whose blocks are complete. Every position but BOS
    is scored, the trivial ones too (e before the first complete block; the filler labels, which `chance` allows for).
    The last block may be cut short. Lengths count tokens, not symbols, and the shortest is k.

    A filler is token n+1 (after BOS) and, where it is a label, label n. `draws_per_symbol` > 1 makes each symbol the
    product of that many draws from `inputs`; symbols then reach beyond `inputs`.

    Source: the code published with P1 (state_tracking/src/generate_data.py), whose delay and scoring these are. Two
    differences, of no consequence: the first k−1 labels of `G_k_s_tokens` are e there, and · here as in every later
    block; a last block cut short collapses fewer swaps there, and as many as any other here.
    """

    block: int
    filling: Literal["repeat", "filler", "identity"]
    labels_filler: bool = False
    draws_per_symbol: int = 1

    @property
    def filler_id(self) -> int | None:
        """The filler's token id, or None when the task has no filler."""
        return self.bos_id + 1 if self.filling == "filler" else None

    @property
    def filler_label(self) -> int | None:
        """The filler's label id, or None when no position is labelled as filler."""
        return len(self.elements) if self.labels_filler else None

    def token_name(self, i: int) -> str:
        return "[FILL]" if i == self.filler_id else super().token_name(i)

    def label_name(self, i: int) -> str:
        return "[FILL]" if i == self.filler_label else super().label_name(i)

    def _sample(self, batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        symbols = self._draw(batch, -(-length // self.block) * self.draws_per_symbol, generator)
        if self.draws_per_symbol > 1:
            draws = symbols.view(-1, self.draws_per_symbol)
            symbols = running_product(self.table, draws)[:, -1].view(batch, -1)
        tokens, labels = self._spell(symbols, length)
        return tokens, labels, torch.ones_like(tokens, dtype=torch.bool)

    def _spell(self, symbols: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Tokens and labels, each [B, length], of symbols [B, ceil(length / block)]."""
        k = self.block
        batch, count = symbols.shape
        products = running_product(self.table, symbols)
        if self.filling == "repeat":
            tokens = symbols.repeat_interleave(k, dim=1)
        else:
            fill = self.filler_id if self.filling == "filler" else self.identity
            assert fill is not None  # a task that fills has a filler
            tokens = symbols.new_full((batch, count * k), fill)
            tokens[:, ::k] = symbols
        if self.labels_filler:
            assert self.filler_label is not None
            labels = symbols.new_full((batch, count * k), self.filler_label)
            labels[:, k - 1 :: k] = products
        else:
            nothing_yet = symbols.new_full((batch, k - 1), self.identity)
            labels = torch.cat([nothing_yet, products.repeat_interleave(k, dim=1)], dim=1)
        return tokens[:, :length], labels[:, :length]


# ------------------------------------------------------------------------------------------- a task from a name's parts


def _inputs(group: Group, most_moved: int | None) -> tuple[int, ...]:
    return tuple(i for i, p in enumerate(group.elements) if most_moved is None or _moved(p) <= most_moved)


def _require_symmetric(group_name: str, suffix: str) -> int:
    """n of S_n, or a UsageError: counting moved points means something only for all permutations of n points."""
    if not re.fullmatch(r"S\d+", group_name):
        raise UsageError(f"{group_name}{suffix} cannot be used: {suffix} needs one symmetric group, such as S5{suffix}")
    return int(group_name[1:])


def _parse_base(base: str) -> tuple[Group, tuple[int, ...], str]:
    """(group, inputs, what is multiplied in words) of `G`, `Sn_only_swaps` or `Sn_limit_to_k`."""
    group_name, restriction, limit = re.fullmatch(r"(.*?)(_only_swaps|_limit_to_(\d+))?", base).groups()  # type: ignore[union-attr]  # matches anything
    if restriction is None:
        group = build_group(group_name)
        return group, _inputs(group, None), f"the elements of {group_name} ({len(group.elements)} of them)"
    n = _require_symmetric(group_name, restriction)
    k = 2 if limit is None else int(limit)
    group = build_group(group_name)
    if k < 2:
        raise UsageError(f"{base} cannot be used because only the identity moves fewer than 2 points; use 1 < k < n")
    if k >= n:
        raise UsageError(f"{base} cannot be used because no element of {group_name} moves more than {n} points; "
                         f"use {group_name}, or a limit k with 1 < k < n")  # fmt: skip
    inputs = _inputs(group, k)
    what = "the swaps and the identity" if limit is None else f"the elements moving at most {k} points"
    return group, inputs, f"{what} of {group_name} ({len(inputs)} of its {len(group.elements)} elements)"


def group_task(name: str, base: str) -> GroupTask:
    """`G`, `Sn_only_swaps` (elements moving at most 2 points) or `Sn_limit_to_k` (at most k points, 1 < k < n).

    A restriction narrows only what is drawn. Swaps generate S_n, so the labels, the ids and the sizes are those of S_n.
    Raises UsageError for a group or limit that cannot be used.
    """
    group, inputs, what = _parse_base(base)
    n = len(group.elements)
    return GroupTask(
        name=name, summary=f"the running product of {what}", group=group, inputs=inputs,
        vocab_size=n + 1, num_labels=n, bos_id=n, chance=1 / n,
    )  # fmt: skip


def _block_task(
    name: str, base: str, summary: str, block: int, filling: Literal["repeat", "filler", "identity"],
    labels_filler: bool = False, draws_per_symbol: int = 1,
) -> BlockTask:  # fmt: skip
    group, inputs, what = _parse_base(base)
    n = len(group.elements)
    return BlockTask(
        name=name, summary=summary.format(what=what, k=block), group=group, inputs=inputs,
        vocab_size=n + 2 if filling == "filler" else n + 1, num_labels=n + labels_filler, bos_id=n, min_length=block,
        chance=(block - 1 + 1 / n) / block if labels_filler else 1 / n,
        block=block, filling=filling, labels_filler=labels_filler, draws_per_symbol=draws_per_symbol,
    )  # fmt: skip


def _tokens_per_symbol(name: str, k: str) -> int:
    if int(k) < 2:
        raise UsageError(f"{name} cannot be used: the number of tokens per symbol must be at least 2, not {k}")
    return int(k)


def repeated_task(name: str, base: str, k: str) -> BlockTask:
    """`G_k_tokens`: every symbol k times, labels delayed by k−1 (see `BlockTask`). Raises UsageError when k < 2."""
    summary = "the running product of {what}, each written {k} times"
    return _block_task(name, base, summary, _tokens_per_symbol(name, k), "repeat")


def filler_task(name: str, base: str, k: str) -> BlockTask:
    """`G_k_s_tokens`: every symbol followed by k−1 fillers; the label is the product on the last of the k tokens, and
    the filler on the others (see `BlockTask`). Raises UsageError when k < 2."""
    summary = "the running product of {what}, each followed by fillers to make {k} tokens; the product labels the last"
    return _block_task(name, base, summary, _tokens_per_symbol(name, k), "filler", labels_filler=True)


def filler_input_task(name: str, base: str, k: str) -> BlockTask:
    """`G_k_s_tokens_only_input`: as `filler_task`, but the filler is only in the input: every label is the product of
    the complete blocks (see `BlockTask`). Raises UsageError when k < 2."""
    summary = "the running product of {what}, each followed by fillers to make {k} tokens; a product labels every token"
    return _block_task(name, base, summary, _tokens_per_symbol(name, k), "filler")


def hard_task(name: str, group_name: str) -> BlockTask:
    """`Sn_hard`, or `Sn_only_swaps_hard` as the authors write it: four draws from the swaps and the identity are
    multiplied into one token, which three identities follow; labels are delayed by 3 (see `BlockTask`).

    Four tokens carry as much as four of `Sn_only_swaps` do, but the first holds all of it, and the three steps after it
    are only room to work. Raises UsageError unless the group is S_n with n ≥ 3.
    """
    _require_symmetric(group_name, "_hard")
    summary = "the running product of {what}, {k} multiplied into one token and followed by identities"
    return _block_task(name, f"{group_name}_only_swaps", summary, 4, "identity", draws_per_symbol=4)
