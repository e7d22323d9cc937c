"""The recurrence on a sequence that is divided over processes: rank r of R holds the r-th of R consecutive spans.

A span maps the state that it begins with to the one it ends with, S ↦ A S + B. Ranks exchange these summaries and
nothing else, K·K + K·V numbers for every value head, however long the spans are.

B batch · T tokens of a span · N Householder steps · H query/key heads · HV value heads · K, V their dimensions.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from deltaproduct.errors import UsageError
from deltaproduct.ops import transforms
from deltaproduct.ops.dispatch import delta_product
from deltaproduct.ops.inputs import compute_dtype
from deltaproduct.renamed import renamed_names


class ContextParallel:
    """The ranks that hold one sequence, in its order, and which of them this process is.

    Every rank has to make the same calls in the same order, forward and backward. That is why what a rank has no use
    for, such as the border before the first span, still comes from the collective call, as zeros: were it left out of
    one rank's graph, the others would wait for that rank in the backward pass.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None):
        """group: whose ranks hold the spans; None: all processes."""
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's x, of one shape on all of them → [R,…]; differentiable.

        Raises:
            UsageError: in forward mode or inside of `torch.func`, which know of no other process.
        """
        if transforms.active(x):
            raise UsageError(
                "A sequence divided over processes has derivatives by backward(), any number of them, "
                "and none in forward mode or inside of torch.func; compute the whole sequence in one process for those."
            )
        return _Gather.apply(x, self)

    def before(self, x: Tensor) -> Tensor:
        """The x of the rank before this one, zeros on the first; differentiable."""
        every = self.gather(x)
        return torch.cat((torch.zeros_like(every[:1]), every))[self.rank]


class _Gather(torch.autograd.Function):
    """All ranks' tensors. The gradient of one's own is the sum of what all ranks send back for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, context_parallel: ContextParallel) -> Tensor:
        ctx.context_parallel = context_parallel
        every = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(context_parallel.size)]
        dist.all_gather(every, x.contiguous(), group=context_parallel.group)
        return torch.stack(every)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Scatter.apply(grads[0], ctx.context_parallel), None


class _Scatter(torch.autograd.Function):
    """The sum of what all ranks have for this rank, of [R,…]: the adjoint of `_Gather`, as that is of this."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, context_parallel: ContextParallel) -> Tensor:
        ctx.context_parallel = context_parallel
        total = x.contiguous().clone()
        dist.all_reduce(total, group=context_parallel.group)
        return total[context_parallel.rank]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(grads[0], ctx.context_parallel), None


def delta_product_context_parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    context_parallel: ContextParallel,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    qk_l2norm: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`delta_product` on this rank's span of a sequence, T tokens of it.

    The columns of a state never meet, so that one run which begins with [I | 0] and writes [0 | v] ends with [A | B]
    and reads [Aₜᵀq | what the span alone would read]: both are there before any other rank has been heard of. The cost
    is (K + V)/V of a run that knows its initial state.

    Args:
        q, k, v, beta, g, scale, qk_l2norm, backend: as for `delta_product`; q, k, v, … of this span only.
        initial_state: [B,HV,K,V], of the whole sequence, the same on every rank; None means zeros.

    Returns:
        (o [B,T,HV,V], the state [B,HV,K,V] after this span).
    """
    if k.shape[1] < 1:
        raise UsageError("A sequence divided over processes needs at least one token on each of them.")
    batch, heads, key_dim, dtype = k.shape[0], v.shape[3], k.shape[4], compute_dtype(q, k, v, beta)
    eye = torch.eye(key_dim, dtype=dtype, device=k.device).expand(batch, heads, -1, -1)
    nothing = eye.new_zeros(batch, heads, key_dim, v.shape[4])
    read, end = delta_product(
        q, k, torch.cat((v.new_zeros(*v.shape[:4], key_dim), v), -1).to(dtype), beta, g, scale=scale,
        initial_state=torch.cat((eye, nothing), -1), output_final_state=True, qk_l2norm=qk_l2norm, backend=backend,
    )  # fmt: skip
    assert end is not None  # it was asked for
    start = nothing if initial_state is None else initial_state.to(dtype)
    starts = [start]
    for summary in context_parallel.gather(end).unbind():
        starts.append(summary[..., :key_dim] @ starts[-1] + summary[..., key_dim:])
    # Stacked and then chosen from, so that every rank's graph has the summaries in it (see `ContextParallel`).
    borders = torch.stack(starts)
    start, after = borders[context_parallel.rank], borders[context_parallel.rank + 1]
    o = torch.einsum("bthk,bhkv->bthv", read[..., :key_dim], start) + read[..., key_dim:]
    return o.to(v.dtype), after


if not TYPE_CHECKING:  # a type checker would take any name for one of this module's
    __getattr__ = renamed_names(
        __name__, {"Spans": "ContextParallel", "delta_product_span": "delta_product_context_parallel"}
    )
