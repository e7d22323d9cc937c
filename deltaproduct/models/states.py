"""A model's carried state as named tensors, for files and for exported programs: "layer.field", such as 0.recurrent."""

from typing import Any

import torch
from torch import Tensor

from deltaproduct.models.sequence_model import Block, SequenceModel, check_layers


def initial_state(
    model: SequenceModel, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[Any, ...]:
    """The state of `batch_size` sequences before their first token, a layer's after another's (`Mixer.init_state`)."""
    blocks = (block for block in model.blocks if isinstance(block, Block))
    return tuple(block.mixer.init_state(batch_size, dtype, device) for block in blocks)


def check_state(model: SequenceModel, state: Any, sequences: int, device: torch.device | None = None) -> None:
    """`UsageError` unless a state is the model's, of so many sequences; None, which starts afresh, always is, and so is
    None in a layer's place.

    The model checks a state itself when it is called with one; this is for what is kept or loaded before that.
    """
    if state is None:
        return
    check_layers(state, len(model.blocks))
    for block, part in zip(model.blocks, state, strict=True):
        if part is not None and isinstance(block, Block):
            block.mixer.check_state(part, sequences, device)


def named_tensors(state: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors of a state, which is None, a tensor or a tuple of states, by the path that leads to each."""
    if state is None:
        return {}
    if isinstance(state, Tensor):
        return {name: state}
    named: dict[str, Tensor] = {}
    for field, part in zip(_fields(state), state, strict=True):
        named |= named_tensors(part, f"{name}.{field}" if name else field)
    return named


def from_named(template: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """The inverse of `named_tensors`: a state built as `template` is, of the tensors in place of its own."""
    if template is None:
        return None
    if isinstance(template, Tensor):
        return tensors[name]
    parts = [
        from_named(part, tensors, f"{name}.{field}" if name else field)
        for field, part in zip(_fields(template), template, strict=True)
    ]
    return type(template)(*parts) if hasattr(template, "_fields") else tuple(parts)


def _fields(state: tuple[Any, ...]) -> tuple[str, ...]:
    """A named tuple's own names; those of a plain one are its places."""
    return getattr(state, "_fields", tuple(map(str, range(len(state)))))
