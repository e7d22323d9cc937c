"""The states of a model's DeltaProduct layers while it reads: the operator's own trace, in pieces.

B sequences · T tokens · t tokens in a piece · N Householder steps per token · HV value heads · K, V sizes of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaproduct.errors import UsageError
from deltaproduct.layers import DeltaProduct
from deltaproduct.layers.deltaproduct import DeltaProductState
from deltaproduct.models import SequenceModel, run_in_pieces
from deltaproduct.ops import delta_product_states
from deltaproduct.ops.inputs import l2_normalise

PIECE_FLOATS = 1 << 23  # of one layer's states that are held at once


class Traced(NamedTuple):
    """What one layer's state was while the model read one piece."""

    layer: int
    start: int  # the piece's first token
    states: Tensor  # [B,t,N,HV,K,V], after each Householder step of each token


class _Read(NamedTuple):
    """What one layer was called with for one piece."""

    layer: int
    mixer: DeltaProduct
    x: Tensor  # [B,t,D]
    state: DeltaProductState  # before its first token


def traced_layers(model: SequenceModel) -> dict[int, DeltaProduct]:
    """The layers that have a trace, by number; `UsageError` if there is none."""
    mixers = [block.mixer for block in model.blocks]
    layers = {i: mixer for i, mixer in enumerate(mixers) if isinstance(mixer, DeltaProduct)}
    if not layers:
        names = ", ".join(dict.fromkeys(type(mixer).__name__ for mixer in mixers))
        raise UsageError(f"No layer of this model has states to trace: only DeltaProduct, DeltaNet and Gated DeltaNet "
                         f"do, and its mixers are {names}.")  # fmt: skip
    return layers


@torch.no_grad()
def trace(model: SequenceModel, tokens: Tensor, *, piece: int | None = None) -> Iterator[Traced]:
    """Every state of every DeltaProduct layer while the model reads `tokens` [B,T]: piece by piece, in each of them
    layer by layer.

    Nothing is kept from piece to piece but the model's own state, so that memory does not grow with T. The states are
    float32, or float64 where the model is.

    Args:
        piece: tokens of each sequence at a time; None means as many as keep a layer's states below `PIECE_FLOATS`. It
            does not change the states but for rounding.

    Raises:
        UsageError: no layer has a trace, or `piece` is below 1.
    """
    layers = traced_layers(model)
    if piece is None:
        floats = max(m.num_householder * m.num_v_heads * m.head_dim * m.head_v_dim for m in layers.values())
        piece = max(1, PIECE_FLOATS // (floats * tokens.shape[0]))
    pieces = run_in_pieces(model, tokens, piece=piece, hidden=True)
    while True:
        with _noted(layers) as reads:
            read = next(pieces, None)
        if read is None:
            return
        for call in reads:
            yield Traced(call.layer, read.start, _states(call))


@contextmanager
def _noted(layers: dict[int, DeltaProduct]) -> Iterator[list[_Read]]:
    """What the layers are called with in a `with`."""
    reads: list[_Read] = []

    def note(layer: int, mixer: DeltaProduct) -> Any:
        def hook(_: Any, arguments: tuple[Any, ...]) -> None:
            x, before = arguments
            state = mixer.init_state(x.shape[0], x.dtype, x.device) if before is None else before
            reads.append(_Read(layer, mixer, x, state))

        return mixer.register_forward_pre_hook(hook)

    hooks = [note(layer, mixer) for layer, mixer in layers.items()]
    try:
        yield reads
    finally:
        for hook in hooks:
            hook.remove()


def _states(read: _Read) -> Tensor:
    """The layer's states [B,t,N,HV,K,V] over a piece."""
    mixer = read.mixer
    _, k, v, beta, g, _ = mixer.project(read.x, read.state)
    states = delta_product_states(
        l2_normalise(k), v, beta, g, positions=range(1, 1 + k.shape[1] * k.shape[2]),
        initial_state=read.state.recurrent, backend=mixer.backend,
    )  # fmt: skip
    return states.unflatten(1, (-1, mixer.num_householder))
