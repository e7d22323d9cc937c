"""The contract of a sequence mixer: what a block calls, whatever recurrence or attention is inside.

B batch · T tokens · D width · S packed sequences.
"""

import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from deltaproduct.errors import UsageError
from deltaproduct.layers.states import check_device, copied
from deltaproduct.ops.inputs import check_cu_seqlens
from deltaproduct.ops.spans import Spans
from deltaproduct.ops.tape import Tape


class Mixer(nn.Module, ABC):
    """Mixes information along time: forward(x, state, cu_seqlens=…, mask=…) → (y, state).

    Running a sequence whole, in pieces with the carried state, packed beside others (cu_seqlens) or padded (mask)
    gives the same outputs and the same final state; `tests/test_mixers.py` holds every registered mixer to it.

    States are the caller's. Every tensor of one has its storage to itself, so that keeping, copying or saving a state
    takes the memory that its numbers need, and writing into it changes nothing else.

    A mixer with parameters of its own, beside its modules', fills them in `reset_parameters`, which draws those alone.
    """

    backend: str = "auto"  # of the operator, for the mixers that have a choice
    fixed: ClassVar[dict[str, Any]] = {}  # arguments that a preset sets by itself
    divisible: ClassVar[bool] = False  # whether `spans` is looked at
    spans: Spans | None = None  # the processes that a sequence is divided over; None: this one has all of it
    drawn_after: ClassVar[str | None] = None  # the child after which the constructor draws the mixer's own parameters

    @abstractmethod
    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        """x [B,T,D] and a state for each sequence → y [B,T,D] and the states after the last token."""

    @abstractmethod
    def init_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Any:
        """The state of `batch_size` sequences before their first token.

        Args:
            dtype: of the inputs x. What a recurrence carries is float32, or float64 where x is; histories are as x.
            device: of the inputs x.

        None stands for the dtype or device of the mixer's parameters, or PyTorch's default (`states.input_options`).

        Raises:
            UsageError: x cannot have this dtype.
        """

    @property
    @abstractmethod
    def state_size(self) -> int:
        """Floats of state carried per sequence; of one that grows, what it holds before the first token."""

    def state_size_after(self, tokens: int) -> int:
        """Floats of state carried per sequence after so many tokens; only a cache of them grows."""
        return self.state_size

    def forward(
        self, x: Tensor, state: Any = None, *, cu_seqlens: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Mix x [B,T,D] along T.

        Args:
            state: from `init_state` or an earlier call; None starts afresh.
            cu_seqlens: [S+1] ints from 0 to T, B = 1: packed sequences, each with a state of its own.
            mask: [B,T] bool, True = a real token. The others are skipped: they leave the state alone and give y = 0.

        Returns:
            (y [B,T,D], state).

        Raises:
            UsageError: mask, cu_seqlens and state do not fit x or one another.
        """
        if self.spans is not None and (mask is not None or cu_seqlens is not None):
            raise UsageError("A sequence divided over processes can be neither padded nor packed.")
        if mask is not None:
            if cu_seqlens is not None:
                raise UsageError("Give either cu_seqlens or mask, not both.")
            if mask.shape != x.shape[:2] or mask.dtype != torch.bool:
                raise UsageError(f"mask must be bool {list(x.shape[:2])}, not {mask.dtype} {list(mask.shape)}.")
            # Real tokens, packed: the one way in which padding cannot touch any state, a convolution's included.
            ends = mask.sum(1).cumsum(0)
            packed, state = self.forward(x[mask][None], state, cu_seqlens=torch.cat((ends.new_zeros(1), ends)))
            return packed.new_zeros(x.shape).masked_scatter(mask[..., None], packed), state
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, x)
        if state is None:
            state = self.init_state(
                x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, dtype=x.dtype, device=x.device
            )
        else:
            check_device(state, x)
            if x.shape[1] == 0 and self.spans is None:
                return x.new_zeros(x.shape), copied(state)
        return self.mix(x, state, cu_seqlens)

    def record(self, tape: Tape, x: Tensor, onto: Tensor) -> Any:
        """Record one token for native decoding: the mixer's output for x [B,D] is added to `onto` [B,D].

        Returns:
            The state, as tensors that every playing of the tape moves on in place.

        Raises:
            UsageError: this mixer has no native decoding; calling it token by token with the carried state always goes.
        """
        raise UsageError(f"{type(self).__name__} has no native decoding; call the model token by token.")

    @classmethod
    def arguments(cls) -> list[str]:
        """What a configuration sets: the class's own arguments and, for a preset, its parent's that are not `fixed`."""
        inits = [base.__init__ for base in cls.__mro__ if issubclass(base, Mixer) and "__init__" in vars(base)]
        names = dict.fromkeys(name for init in inits for name in inspect.signature(init).parameters)
        return [name for name in names if name not in ("self", "options", *cls.fixed)]

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Build from whatever object has this mixer's arguments as attributes of the same names."""
        return cls(**{name: getattr(config, name) for name in cls.arguments() if hasattr(config, name)})
