"""What our operators do under PyTorch's other transformations: forward mode, `torch.func`, and second derivatives.

A hand-written operator has a forward and a backward. PyTorch takes it for a constant in forward mode, without a word,
and does not know how to map it over a batch or how to differentiate its backward. So every operator here asks:

* `active(...)` before it runs. Under a transformation it runs a formula of plain PyTorch operations in its stead, which
  PyTorch transforms itself. Or `FirstDerivative`, where first derivatives and batches are all that is asked for.
* `beyond_first(...)` in its backward, which is then that of the formula (`gradients`): differentiable again.

B batch · S packed sequences.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from deltaproduct.errors import UsageError
from deltaproduct.ops.backend import Recurrence
from deltaproduct.ops.inputs import Arguments, num_sequences

Tensors = Sequence[Tensor | None]
_BATCHED = torch._C._dispatch_key_parse("Batched")  # of the maps before torch.func's, which autograd still uses


def active(*tensors: Tensor | None) -> bool:
    """Whether `torch.func` transforms this call, or one of the tensors has a tangent."""
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    if torch.compiler.is_compiling():
        return True  # a compiler's tensors show no tangents
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def only_first() -> bool:
    """Whether all that is active are maps over batches and at most one gradient in reverse mode."""
    if forward_ad._current_level >= 0 or torch.compiler.is_compiling():
        return False
    kinds = [level.key() for level in torch._C._functorch.get_interpreter_stack() or ()]
    reverse, batch = torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Vmap
    return all(kind in (reverse, batch) for kind in kinds) and kinds.count(reverse) <= 1


def beyond_first(*tensors: Tensor | None) -> bool:
    """Whether a backward has to be differentiable (`create_graph`), or is itself transformed."""
    if torch.compiler.is_compiling():
        return False  # a compiled graph has first derivatives only, and PyTorch says so
    return torch.is_grad_enabled() or active(*tensors)


def refuse_batched(d: Tensor) -> None:
    """`UsageError` for a batch of gradients as `is_grads_batched` hands it over: few operations know such a tensor."""
    if not torch.compiler.is_compiling() and torch._C._dispatch_keys(d).has(_BATCHED):
        raise UsageError(
            "A backward pass was given a batch of gradients (is_grads_batched, or vectorize=True), which the norms and "
            "scans of deltaproduct do not take; use torch.func.jacrev or torch.func.vmap, or vectorize=False."
        )


def gradients(
    formula: Callable[[Tensors], tuple[Tensor, ...]], inputs: Tensors, cotangents: Tensors
) -> list[Tensor | None]:
    """The gradients of ⟨formula(inputs), cotangents⟩, differentiable and transformable; None where an input is.

    formula: of plain PyTorch operations. A cotangent that is None is zero. Inputs that are not floating-point have no
    gradient.
    """
    places = [i for i, x in enumerate(inputs) if x is not None and x.is_floating_point()]

    def of_places(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = list(inputs)
        for i, x in zip(places, tensors, strict=True):
            given[i] = x
        return formula(given)

    tensors = [x for x in inputs if x is not None and x.is_floating_point()]
    with torch.autocast(tensors[0].device.type, enabled=False):
        found, pull_back = torch.func.vjp(of_places, *tensors)  # type: ignore[misc]  # two, without has_aux
        filled = [torch.zeros_like(y) if d is None else d.to(y.dtype) for y, d in zip(found, cotangents, strict=True)]
        grads = pull_back(tuple(filled))
    result: list[Tensor | None] = [None] * len(inputs)
    for i, grad in zip(places, grads, strict=True):
        result[i] = grad
    return result


@dataclass(frozen=True)
class Rule:
    """An implementation of the recurrence and the formula that its second derivatives are of.

    `fast` need be differentiable by `backward()` only.
    """

    fast: Recurrence
    formula: Recurrence

    def of_formula(self, inputs: Tensors) -> tuple[Tensor, Tensor]:
        return self.formula(*Arguments._make(inputs))

    def once(self, d_o: Tensor | None, d_final: Tensor | None, inputs: Tensors) -> list[Tensor | None]:
        """The gradients of `fast`; where they are differentiated again, those of the formula are."""
        if not only_first():
            return gradients(self.of_formula, inputs, (d_o, d_final))
        _, k, v, _, _, _, cu_seqlens = Arguments._make(inputs)
        if d_o is None:
            d_o = torch.zeros_like(v[:, :, 0])
        if d_final is None:
            sequences = num_sequences(v.shape[0], cu_seqlens)
            d_final = v.new_zeros(sequences, v.shape[3], k.shape[4], v.shape[4], dtype=torch.float32)
        found = iter(_Gradient.apply(self, d_o, d_final, *inputs))
        return [None if x is None or not x.is_floating_point() else next(found) for x in inputs]


class FirstDerivative(torch.autograd.Function):
    """`rule.fast` for `torch.func`'s grad, vjp, jacrev and vmap: batches of a map become batches of the operator."""

    @staticmethod
    def forward(rule: Rule, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        return rule.fast(*Arguments._make(inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.rule, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, d_o: Tensor, d_final: Tensor) -> Any:  # type: ignore[override]
        return None, *ctx.rule.once(d_o, d_final, ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: Any, rule: Rule, *inputs: Tensor | None) -> Any:
        n = info.batch_size
        batches = _batches(n, in_dims[1:], inputs)
        o, final = FirstDerivative.apply(rule, *_joined(batches))
        return (_parted(o, n, batches), final.unflatten(0, (n, -1))), (0, 0)


class _Gradient(torch.autograd.Function):
    """The gradients of `rule.fast`'s inputs that are there, from d_o, d_final and all seven of them."""

    @staticmethod
    def forward(rule: Rule, d_o: Tensor, d_final: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            given = [x if x is None or not x.is_floating_point() else x.detach().requires_grad_() for x in inputs]
            o, final = rule.fast(*Arguments._make(given))
            leaves = [x for x in given if x is not None and x.requires_grad]
            # Of no token from no state there is nothing to differentiate.
            pairs = [(y, d.to(y.dtype)) for y, d in ((o, d_o), (final, d_final)) if y.requires_grad]
            results, cotangents = [y for y, _ in pairs], [d for _, d in pairs]
            return torch.autograd.grad(results, leaves, cotangents, materialize_grads=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.rule, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        def first(given: Tensors) -> tuple[Tensor, ...]:
            found = gradients(ctx.rule.of_formula, given[2:], given[:2])
            return tuple(grad for grad in found if grad is not None)

        return None, *gradients(first, ctx.saved_tensors, cotangents)

    @staticmethod
    def vmap(info: Any, in_dims: Any, rule: Rule, *tensors: Tensor | None) -> Any:
        n = info.batch_size
        batches = _batches(n, in_dims[1:], tensors)
        (d_o, d_final), inputs = (x for x in batches[:2] if x is not None), batches[2:]
        d_o, d_final = (_joined_tokens(d_o) if inputs[PACKED] is not None else d_o.flatten(0, 1)), d_final.flatten(0, 1)
        found = _Gradient.apply(rule, d_o, d_final, *_joined(inputs))
        names = [i for i, x in enumerate(inputs) if x is not None and x.is_floating_point()]
        grads = [
            grad.unflatten(0, (n, -1)) if i == STATE else _parted(grad, n, inputs)
            for i, grad in zip(names, found, strict=True)
        ]
        return tuple(grads), (0,) * len(grads)


STATE, PACKED = 5, 6  # places of initial_state and cu_seqlens among the inputs


def _batches(n: int, in_dims: Sequence[int | None], inputs: Tensors) -> list[Tensor | None]:
    """All inputs with the map's dimension of size n in front; cu_seqlens, which cannot have one, as it is."""
    found: list[Tensor | None] = []
    for x, dim in zip(inputs, in_dims, strict=True):
        if x is None or not x.is_floating_point():
            found.append(x)
        else:
            found.append(x.expand(n, *x.shape) if dim is None else x.movedim(dim, 0))
    return found


def _joined_tokens(x: Tensor) -> Tensor:
    """[n,1,T,...] → [1,n·T,...]"""
    return x.transpose(0, 1).flatten(1, 2)


def _joined(inputs: list[Tensor | None]) -> list[Tensor | None]:
    """Inputs [n,B,...] as one call's: n·B sequences, or n times as many packed ones."""
    cu_seqlens = inputs[PACKED]
    if cu_seqlens is None:
        return [None if x is None else x.flatten(0, 1) for x in inputs]
    q, k, v, beta, g, state, _ = Arguments._make(inputs)
    n, length = q.shape[0], q.shape[2]
    ends = cu_seqlens[1:] + length * torch.arange(n, device=cu_seqlens.device)[:, None]
    joined = torch.cat((cu_seqlens[:1], ends.flatten().to(cu_seqlens.dtype)))
    tokens = [None if x is None else _joined_tokens(x) for x in (q, k, v, beta, g)]
    return [*tokens, None if state is None else state.flatten(0, 1), joined]


def _parted(x: Tensor, n: int, inputs: list[Tensor | None]) -> Tensor:
    """The inverse of `_joined` for what has tokens: [n·B,T,...] or [1,n·T,...] → [n,B,T,...]."""
    if inputs[PACKED] is None:
        return x.unflatten(0, (n, -1))
    return x.unflatten(1, (n, -1)).transpose(0, 1)


def check_values(name: str, x: Tensor) -> None:
    """`UsageError` where x, whose values decide what is computed, is mapped over."""
    if torch._C._functorch.is_batchedtensor(x):
        raise UsageError(f"vmap cannot map over {name}; give all samples the same (None among in_dims).")
