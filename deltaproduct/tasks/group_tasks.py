"""Word problems of finite groups: read group elements x_1 … x_T and say, at every t, the product x_1 ∘ … ∘ x_t.

These are the state-tracking tasks of both papers: DeltaProduct (arXiv 2502.10297) and Unlocking State-Tracking (arXiv
2411.12537). `GroupTask` samples the plain word problem, and `BlockTask` the variants that spend several tokens on each
symbol; the `*_task` functions build each variant from the parts of its name, and `registry.py` lists them.
"""

import re
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from deltaproduct.errors import UsageError
from deltaproduct.tasks.groups import Group, Permutation, build_group, running_product
from deltaproduct.tasks.task import Task


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


def _moved(p: Permutation) -> int:
    return sum(x != y for x, y in enumerate(p))


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
