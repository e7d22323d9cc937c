"""What transformers hands to a forward pass beside the tokens: padding, packed sequences, and names of other models.

B batch · T tokens · D hidden size · S packed sequences · N real tokens of all rows.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaproduct.errors import UsageError, did_you_mean
from deltaproduct.models.hf.cache import DeltaProductCache
from deltaproduct.ops.inputs import check_cu_seqlens, num_sequences

PACKING = ("position_ids", "seq_idx", "cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def packing_of(*values: Any) -> dict[str, Any]:
    """The arguments `PACKING` of a forward pass, in that order, by name."""
    return dict(zip(PACKING, values, strict=True))


@dataclass(frozen=True)
class SequenceLayout:
    """Where the sequences of a call's [B,T] tokens lie.

    Attributes:
        mask: [B,T] bools, True at real tokens; None if all are.
        cu_seqlens: [S+1] ints from 0 to N: the sequences of the real tokens of all rows, one row after the other; None
            if every row is one sequence.
        starts: [B,T] bools, True where a packed sequence begins; None where cu_seqlens is.
    """

    mask: Tensor | None
    cu_seqlens: Tensor | None = None
    starts: Tensor | None = None

    def sequences(self, batch: int) -> int:
        """How many states there are."""
        return num_sequences(batch, self.cu_seqlens)

    def pack(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [B,T,D] as the blocks take it, and the mask that they take beside it: [1,N,D] and None if it is packed."""
        if self.cu_seqlens is None:
            return x, self.mask
        return (x.flatten(0, 1) if self.mask is None else x[self.mask])[None], None

    def unpack(self, y: Tensor, x: Tensor) -> Tensor:
        """The inverse of `pack`, of what it made of x [B,T,D]; zeros at padding."""
        if self.cu_seqlens is None:
            return y
        if self.mask is None:
            return y.reshape(x.shape)
        return y.new_zeros(x.shape).masked_scatter(self.mask[..., None].to(y.device), y)

    def without_borders(self, labels: Tensor, ignored: int) -> Tensor:
        """Labels [B,T] that ask of no sequence how the next one in its row begins."""
        return labels if self.starts is None else labels.masked_fill(self.starts.to(labels.device), ignored)


def read_layout(
    x: Tensor, attention_mask: Tensor | None, cache: DeltaProductCache | None, packing: Mapping[str, Any]
) -> SequenceLayout:
    """The layout of a call.

    Args:
        x: [B,T] or [B,T,D], the tokens or their embeddings.
        attention_mask: as `padding_mask` takes it.
        cache: of the tokens before these.
        packing: any of `PACKING`, each of which says by itself where packed sequences begin: positions that do not
            increase, another seq_idx, or the ends of cu_seqlens and cu_seq_lens_q and _k.

    Raises:
        UsageError: one of them is malformed, or they contradict each other or the cache.
    """
    batch, tokens = x.shape[:2]
    seen = 0 if cache is None or cache.state is None else cache.tokens_seen
    mask = padding_mask(attention_mask, x, seen)
    ends = _ends({name: packing.get(name) for name in PACKING}, x)
    if ends is not None and mask is not None:
        raise UsageError(
            "cu_seqlens cannot stand beside padding: leave the padding out of the packed tokens, or give position_ids "
            "or seq_idx in place of cu_seqlens."
        )
    by_column: dict[str, Tensor] = {}  # name → [B,T] ints
    for name in ("position_ids", "seq_idx"):
        value = packing.get(name)
        if value is not None:
            if not isinstance(value, Tensor) or value.shape not in ((batch, tokens), (1, tokens)):
                got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise UsageError(f"{name} must be [B,T] = {[batch, tokens]}, not {got}.")
            by_column[name] = value.to(x.device).expand(batch, tokens)
    positions = by_column.get("position_ids")
    if seen and positions is not None:
        _check_goes_on(positions, mask, attention_mask, seen)
    if not by_column or tokens == 1:  # one token is one sequence
        return SequenceLayout(mask, ends, None if ends is None else _marks(ends, tokens))

    real = torch.ones(batch, tokens, dtype=torch.bool, device=x.device) if mask is None else mask
    row, column = real.nonzero(as_tuple=True)  # [N]
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = row.diff() != 0
    found = {} if ends is None else {_name_of_ends(packing): _marks(ends, tokens)[row, column]}
    for name, value in by_column.items():
        found[name] = _begins(name, value[row, column], row, column, first)
    (name, begins), *others = found.items()
    for other, its in others:
        if not torch.equal(begins, its):
            at = int((begins != its).nonzero()[0])
            one, two = (name, other) if bool(begins[at]) else (other, name)
            raise UsageError(
                f"{one} begins a sequence at column {int(column[at])} of row {int(row[at])}, where {two} goes on with "
                "the one before; give only the one that is right."
            )
    if ends is None:
        if torch.equal(begins, first):
            return SequenceLayout(mask)
        if seen:
            raise UsageError(
                f"{name} begins a new sequence inside these tokens, but past_key_values goes on with sequences of "
                f"{seen} tokens, one in a row: give packed sequences without past_key_values."
            )
        start = begins.nonzero()[:, 0]
        ends = torch.cat((start, start.new_tensor([len(row)])))
    starts = torch.zeros_like(real)
    starts[row, column] = begins
    return SequenceLayout(mask, ends, starts)


def padding_mask(attention_mask: Tensor | None, x: Tensor, tokens_seen: int) -> Tensor | None:
    """The part of a mask that is about x [B,T] or [B,T,D], as bools [B,T], True at real tokens; None if all are."""
    if attention_mask is None:
        return None
    batch, tokens = x.shape[:2]
    if attention_mask.dim() != 2 or attention_mask.shape not in ((batch, tokens), (batch, tokens_seen + tokens)):
        raise UsageError(
            f"attention_mask must be [B,T] = {[batch, tokens]}, or with the {tokens_seen} tokens before them "
            f"{[batch, tokens_seen + tokens]}, not {list(attention_mask.shape)}."
        )
    recent = attention_mask[:, -tokens:] if tokens else attention_mask[:, :0]
    mask = recent == 1
    if torch.compiler.is_compiling():  # a graph cannot depend on what the mask says
        return mask
    if bool(mask.all()):
        return None
    others = recent[~mask & (recent != 0)]
    if len(others):
        raise UsageError(
            f"attention_mask must be 1 at tokens and 0 at padding, and here is {others[0].item()}: give the places of "
            "packed sequences as position_ids or seq_idx."
        )
    return mask


def check_other_arguments(given: Mapping[str, Any], forward: Callable[..., Any], tokens_seen: int) -> None:
    """Whether what `forward` was given beside its own arguments can be left aside.

    transformers gives every model some arguments that mean nothing to this one. An argument that would change the
    answer of a model which understood it is refused, and so is one that nobody knows.

    Raises:
        UsageError: the argument's name, and why it cannot be left aside.
    """
    for name, value in given.items():
        if value is None:
            continue
        if name in _REFUSED:
            harmless, why = _REFUSED[name]
            if not harmless(value):
                raise UsageError(f"{name}={_value_or_shape(value)} cannot be given to this model: {why}.")
        elif name == "cache_position":
            at = int(torch.as_tensor(value).flatten()[0])
            if at != tokens_seen:
                raise UsageError(
                    f"cache_position begins at {at}, but past_key_values has seen {tokens_seen} tokens: leave "
                    "cache_position out, since this model's cache counts by itself."
                )
        elif name not in _HARMLESS:
            known = (*inspect.signature(forward).parameters, *_REFUSED)
            raise UsageError(f"This model's forward has no argument {name!r}{did_you_mean(name, known)}; leave it out.")


# Counted for a loss, whether or not there are labels in the call.
_HARMLESS = ("num_items_in_batch",)

# What may be given if its value says nothing: name → (whether it says nothing, why anything else is refused).
_REFUSED = {
    "output_attentions": (lambda x: not x, "its layers return no attention weights"),
    "output_router_logits": (lambda x: not x, "it has no experts to choose from"),
    "is_causal": (bool, "a recurrence cannot look ahead"),
    "token_type_ids": (
        lambda x: not bool(torch.as_tensor(x).any()),
        "it has no embedding for kinds of tokens, so they must all be 0; call the tokenizer with "
        "return_token_type_ids=False",
    ),
}


def _value_or_shape(value: Any) -> str:
    return f"{list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _name_of_ends(packing: Mapping[str, Any]) -> str:
    return next(n for n in ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k") if packing.get(n) is not None)


def _ends(packing: Mapping[str, Any], x: Tensor) -> Tensor | None:
    """The one cu_seqlens that was given under one or more of its names."""
    ends, name = None, ""
    for other in ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k"):
        value = packing[other]
        if value is None:
            continue
        if isinstance(value, Tensor) and value.dim() == 2 and value.shape[0] == 1:
            value = value[0]  # some collators give every field a row
        if ends is None:
            check_cu_seqlens(value, x)
            ends, name = value, other
        elif not isinstance(value, Tensor) or not torch.equal(value.to(ends), ends):
            raise UsageError(f"{name} and {other} differ; this model reads each of its sequences from the beginning.")
    for other in ("max_length_q", "max_length_k"):
        if ends is not None and packing[other] is not None and packing[other] < (longest := int(ends.diff().max())):
            raise UsageError(f"{other}={int(packing[other])}, but {name} holds a sequence of {longest} tokens.")
    return ends


def _begins(name: str, value: Tensor, row: Tensor, column: Tensor, first: Tensor) -> Tensor:
    """Where position_ids or seq_idx [N] of the tokens at (row, column) begin a sequence, `first` of a row or not."""
    step, begins = value.diff(), first.clone()
    if name == "seq_idx":
        begins[1:] |= step != 0
        return begins
    begins[1:] |= step <= 0
    # From one real token to the next it is one further, counted in tokens or in columns of the row.
    jumps = ~begins[1:] & (step != 1) & (step != column.diff())
    if bool(jumps.any()):
        at = int(jumps.nonzero()[0]) + 1
        raise UsageError(
            f"position_ids jump from {int(value[at - 1])} to {int(value[at])} at column {int(column[at])} of row "
            f"{int(row[at])}: positions go on by one inside a sequence and start again with the next one."
        )
    return begins


def _marks(ends: Tensor, tokens: int) -> Tensor:
    """cu_seqlens [S+1] → [1,T] bools, True where a sequence begins."""
    marks = torch.zeros(1, tokens + 1, dtype=torch.bool, device=ends.device)
    marks[0, ends.long()] = True
    return marks[:, :tokens]


def _check_goes_on(positions: Tensor, mask: Tensor | None, attention_mask: Tensor | None, seen: int) -> None:
    """`UsageError` if a row's positions begin at 0 though the cache has already read tokens of it."""
    first = positions[:, 0] if mask is None else positions.gather(1, mask.int().argmax(1, keepdim=True))[:, 0]
    begins = first == 0
    if mask is not None:
        begins = begins & mask.any(1)
    if attention_mask is not None and attention_mask.shape[1] > positions.shape[1]:
        begins = begins & attention_mask[:, : -positions.shape[1]].any(1)
    if bool(begins.any()):
        raise UsageError(
            f"position_ids begin at 0, but past_key_values has already read {seen} tokens of the same sequence: leave "
            "past_key_values out to begin a new one."
        )
