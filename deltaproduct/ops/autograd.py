"""How PyTorch is told the gradients of the operators that are written by hand: in one way for all of them.

Such an operator takes seven tensors, of which the sixth is the state before the first token and the seventh
cu_seqlens, and then its options. It returns what is read, the state after the last token, and whatever it keeps for
the backward. `Arguments` are the seven of the recurrence.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.library import CustomOpDef

from deltaproduct.ops import transforms
from deltaproduct.ops.inputs import Arguments, num_sequences
from deltaproduct.ops.transforms import Tensors

TENSORS = 7


class First(Protocol):
    """The hand-written backward: the gradients of the seven tensors, from those of all results.

    kept: the results after the first two. A cotangent that is None is zero, and so is a gradient.
    """

    def __call__(
        self, inputs: Tensors, kept: Sequence[Tensor], cotangents: Tensors, options: Sequence[Any]
    ) -> Tensors: ...


class Again(Protocol):
    """The same from a formula of plain PyTorch operations, so that it can be differentiated again."""

    def __call__(self, inputs: Tensors, cotangents: Tensors, options: Sequence[Any]) -> Tensors: ...


def register_gradients(operator: CustomOpDef, first: First, again: Again) -> None:
    """Have `backward()` compute the operator's gradients by `first`, and by `again` where those are transformed."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)  # no zeros as large as the states
        ctx.save_for_backward(*inputs[:TENSORS], *output[2:])
        ctx.options = inputs[TENSORS:]

    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, options = ctx.saved_tensors, ctx.options
        inputs = saved[:TENSORS]
        if transforms.beyond_first(*cotangents, *inputs):
            grads = again(inputs, cotangents, options)
        else:
            grads = first(inputs, saved[TENSORS:], cotangents, options)
        return *grads, *([None] * len(options))

    operator.register_autograd(backward, setup_context=setup_context)


def cotangent_of_output(x: Arguments, d_o: Tensor | None) -> Tensor:
    """d_o [B,T,HV,V], zeros where only the final state has a gradient."""
    return x.v.new_zeros(x.v.shape[0], x.v.shape[1], *x.v.shape[3:]) if d_o is None else d_o


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # of q, k, v, beta, g and the initial state


def as_given(x: Arguments, found: Gradients) -> Tensors:
    """What a backward operator found, with None for what was not given, and the state's gradient in its own dtype."""
    d_q, d_k, d_v, d_beta, d_g, d_initial = found
    initial = None if x.initial_state is None else d_initial.to(x.initial_state.dtype)
    return d_q, d_k, d_v, d_beta, None if x.g is None else d_g, initial, None


def empty_gradients(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, states: Tensor, cu_seqlens: Tensor | None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Gradients:  # fmt: skip
    """Tensors as a backward operator returns them, for a compiler; `states` are any [slots,HV,K,V] in their dtype.

    An operator's result cannot be None, so that the gradient of no g is empty.
    """
    d_q, d_k, d_v, d_beta = (torch.empty_like(x, memory_format=memory_format) for x in (q, k, v, beta))
    d_g = v.new_empty(0) if g is None else torch.empty_like(g, memory_format=memory_format)
    sequences = num_sequences(v.shape[0], cu_seqlens)
    return d_q, d_k, d_v, d_beta, d_g, states.new_empty(sequences, *states.shape[1:])
