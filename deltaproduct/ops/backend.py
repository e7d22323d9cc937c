"""What an implementation of the operator offers: the contract between `dispatch.py` and every backend.

Letters and shapes are those of `delta_product`. Whoever calls has checked the shapes, turned autocast off and settled
`scale`. Results: o in the dtype of v, states in float32, or float64 where an input is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Recurrence(Protocol):
    """The operator with its options settled: (o [B,T,HV,V], final state [B or S,HV,K,V])."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip


class Forward(Protocol):
    """The operator: (o [B,T,HV,V], final state [B or S,HV,K,V]); differentiable by `backward()` at the least."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None,
        cu_seqlens: Tensor | None, scale: float, qk_l2norm: bool,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip


class Step(Protocol):
    """One token, B ≥ 1; shapes as in `delta_product_step`: (o [B,HV,V], the state after it [B,HV,K,V])."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, scale: float,
        qk_l2norm: bool,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip


class StepInplace(Protocol):
    """The same into the given state, which is contiguous and of the dtype of states, without a gradient: o."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, scale: float,
        qk_l2norm: bool,
    ) -> Tensor: ...  # fmt: skip


class States(Protocol):
    """The trace [B,P,HV,K,V], as `delta_product_states` numbers its positions."""

    def __call__(
        self, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None, positions: list[int]
    ) -> Tensor: ...


def _any_size(steps: int, key_dim: int) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """An implementation of the operator.

    Attributes:
        unsupported_reason: of (device, dtype of states): None if it can serve, else the reason why not.
        unsupported_size_reason: the same of (N, K).
        step: a kernel for one token; None: there is none, and a token is a sequence of length 1.
        step_inplace: a kernel that overwrites the state; None: it is copied there.
    """

    name: str
    summary: str
    run: Forward
    states: States
    unsupported_reason: Callable[[torch.device, torch.dtype], str | None]
    unsupported_size_reason: Callable[[int, int], str | None] = _any_size
    step: Step | None = None
    step_inplace: StepInplace | None = None
