"""Cross-entropy over a large vocabulary, of which no more than a block of logits is ever there.

M positions · D hidden size · V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaproduct.errors import UsageError
from deltaproduct.ops import transforms

BLOCK = 1 << 23  # logits at a time: 32 MiB of float32
IGNORED = -100  # a label that no task has


def summed_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, *, block: int = BLOCK) -> Tensor:
    """Σ −log softmax(x Wᵀ)[label] over all positions whose label is not `IGNORED`.

    What a head and `F.cross_entropy` compute, block of positions by block: of the logits [M,V] only `block` are there
    at any time. Where a gradient is wanted, it is computed in the same walk, so that no logit is computed twice;
    what is kept for the backward pass are the two gradients, [M,D] and [V,D].

    Args:
        x: [M,D], what the head sees; under autocast it and the weight are multiplied in autocast's dtype.
        weight: [V,D], of the head.
        labels: [M] ints.

    Returns:
        The sum, float32 (float64 if x is). In forward mode and inside of `torch.func` all logits are there at once.

    Raises:
        UsageError: in a backward pass with `create_graph`: what is kept does not tell how the gradients change.
    """
    kind = x.device.type
    mixed = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if mixed else x.dtype
    with torch.autocast(kind, enabled=False):
        if transforms.active(x, weight):
            logits = (x.to(dtype) @ weight.to(dtype).mT).to(
                torch.float64 if x.dtype == torch.float64 else torch.float32
            )
            return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        return _SummedCrossEntropy.apply(x, weight, labels, dtype, max(1, block // weight.shape[0]))


def summed_cross_entropy_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Σ −log softmax(logits)[label] over all positions whose label is not `IGNORED`, for logits [M,V] that are there.

    Returns:
        The sum, float32 (float64 if the logits are).
    """
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(logits.to(wide), labels, ignore_index=IGNORED, reduction="sum")


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype, rows: int) -> Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        of_x, of_weight = ctx.needs_input_grad[:2]
        used = weight.to(dtype)
        dx = torch.empty_like(x) if of_x else None
        dweight = torch.zeros_like(weight, dtype=wide) if of_weight else None
        total = torch.zeros((), dtype=wide, device=x.device)
        for x_rows, label, at in zip(x.split(rows), labels.split(rows), range(0, len(x), rows), strict=True):
            x_used = x_rows.to(dtype)
            logp = F.log_softmax((x_used @ used.mT).to(wide), -1)
            total += F.nll_loss(logp, label, ignore_index=IGNORED, reduction="sum")
            if not (of_x or of_weight):
                continue
            real = (label != IGNORED).unsqueeze(-1)
            p = logp.exp_()
            p.scatter_add_(1, label.clamp_min(0).unsqueeze(-1), -real.to(wide))
            p.mul_(real)  # the gradient of the logits: softmax minus the label
            p_used = p.to(dtype)
            if dx is not None:
                dx[at : at + rows] = p_used @ used
            if dweight is not None:
                dweight += p_used.mT @ x_used
        ctx.save_for_backward(dx, dweight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        dx, dweight = ctx.saved_tensors
        (grad,) = grads
        if transforms.beyond_first(grad):
            raise UsageError(
                "summed_cross_entropy has first derivatives by backward() only; use torch.nn.functional.cross_entropy "
                "on the head's logits for second ones."
            )
        dx = None if dx is None else dx * grad.to(dx.dtype)
        dweight = None if dweight is None else (dweight * grad).to(ctx.weight_dtype)
        return dx, dweight, None, None, None
