"""The contract of a sequence mixer: what a block calls, whatever recurrence or attention is inside.

B batch · T tokens · D width · S packed sequences.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from deltaproduct.errors import UsageError
from deltaproduct.layers.options import MixerOptions, option_names
from deltaproduct.layers.states import copied
from deltaproduct.ops.context_parallel import ContextParallel
from deltaproduct.ops.engine_program import EngineProgram
from deltaproduct.ops.inputs import check_cu_seqlens, num_sequences


class About(NamedTuple):
    """What a reader wants to know of a mixer before its options."""

    summary: str  # a line
    paper: str  # with its arXiv number, if it has one
    recurrence: str  # the row of the papers' table, H_t = A(x_t) H_{t−1} + B(x_t), or why it has none
    negative_eigenvalues: (
        str  # of A: "yes", "no", "allow_neg_eigval" where that option decides, "-" where there is no A
    )


class Mixer(nn.Module, ABC):
    """Mixes information along time: forward(x, state, cu_seqlens=…, mask=…) → (y, state).

    Running a sequence whole, in pieces with the carried state, packed beside others (cu_seqlens) or padded (mask)
    gives the same outputs and the same final state; `tests/layers/test_mixers.py` holds every registered mixer to it.

    States are the caller's. Every tensor of one has its storage to itself, so that keeping, copying or saving a state
    takes the memory that its numbers need, and writing into it changes nothing else.

    A mixer with parameters of its own, beside its modules', fills them in `reset_parameters`, which draws those alone.
    """

    options: ClassVar[type[MixerOptions]]  # the record in the mixer's file
    about: ClassVar[About]
    takes_norm_eps: ClassVar[bool] = True  # whether the constructor has a norm_eps, which is the model's
    backend: str = "auto"  # of the operator, for the mixers that have a choice
    fixed: ClassVar[dict[str, Any]] = {}  # arguments that a preset sets by itself
    divisible: ClassVar[bool] = False  # whether `context_parallel` is looked at
    context_parallel: ContextParallel | None = None  # the processes that each has a part of a sequence; None: no others
    drawn_after: ClassVar[str | None] = None  # the child after which the constructor draws the mixer's own parameters
    _form: Any = None  # of its states, once a state has been given

    def __init__(self) -> None:
        super().__init__()
        self._form = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = vars(cls)
        if "mix_aligned" not in own and ("mix" in own or "project" in own):  # what it inherits is another mixer's
            cls.mix_aligned = Mixer.mix_aligned  # type: ignore[method-assign]

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
            state: from `init_state` or an earlier call, of B sequences or with cu_seqlens of S; None starts afresh.
            cu_seqlens: [S+1] ints from 0 to T, B = 1: packed sequences, each with a state of its own.
            mask: [B,T] bool, True = a real token. The others are skipped: they leave the state alone and give y = 0.

        Returns:
            (y [B,T,D], state).

        Raises:
            UsageError: cu_seqlens, mask or state are not of the kind and the shapes that they should be.
        """
        if self.context_parallel is not None and (mask is not None or cu_seqlens is not None):
            raise UsageError("A sequence divided over processes can be neither padded nor packed.")
        if mask is not None:
            if cu_seqlens is not None:
                raise UsageError("Give either cu_seqlens or mask, not both.")
            if mask.shape != x.shape[:2] or mask.dtype != torch.bool:
                raise UsageError(f"mask must be bool {list(x.shape[:2])}, not {mask.dtype} {list(mask.shape)}.")
            if torch.compiler.is_compiling():
                return self._mix_masked(x, state, mask)
            # Real tokens, packed: the one way in which padding cannot touch any state, a convolution's included.
            ends = mask.sum(1).cumsum(0)
            packed, state = self.forward(x[mask][None], state, cu_seqlens=torch.cat((ends.new_zeros(1), ends)))
            return packed.new_zeros(x.shape).masked_scatter(mask[..., None], packed), state
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, x)
        sequences = num_sequences(x.shape[0], cu_seqlens)
        if state is None:
            state = self.init_state(sequences, dtype=x.dtype, device=x.device)
        else:
            if not torch.compiler.is_compiling():  # a compiled graph has been traced with states of its own sizes
                self.check_state(state, sequences, x.device)
            if x.shape[1] == 0 and self.context_parallel is None:
                return x.new_zeros(x.shape), copied(state)
        return self.mix(x, state, cu_seqlens)

    def _mix_masked(self, x: Tensor, state: Any, mask: Tensor) -> tuple[Tensor, Any]:
        """`forward` with a mask, in shapes that do not depend on its values: for a graph, which may be exported."""
        if type(self).mix_aligned is Mixer.mix_aligned:
            # Before anything at which a compiler breaks the graph: it then runs `forward` without one, which packs.
            return self.mix_aligned(x, state, mask)
        if state is None:
            state = self.init_state(x.shape[0], dtype=x.dtype, device=x.device)
        if x.shape[1] == 0:
            return self.mix(x, state, None)
        counted = mask.cumsum(1)
        lengths = counted[:, -1]
        # A row's real tokens in their order, then its padding.
        place = torch.where(mask, counted - 1, lengths[:, None] + (~mask).cumsum(1) - 1)[..., None]
        x = x.masked_fill(~mask[..., None], 0)
        y, state = self.mix_aligned(torch.zeros_like(x).scatter(1, place.expand_as(x), x), state, lengths)
        return y.gather(1, place.expand_as(y)).masked_fill(~mask[..., None], 0), state

    def mix_aligned(self, x: Tensor, state: Any, lengths: Tensor) -> tuple[Tensor, Any]:
        """`mix` for rows whose first `lengths` [B] tokens are real and whose others are zeros, which leave the states
        alone; y is of no meaning behind a row's end. All shapes are static.

        Raises:
            UsageError: this mixer cannot do that.
        """
        raise UsageError(
            f"{type(self).__name__} cannot be exported or compiled into one graph with a mask; leave the mask out and "
            "give rows of one length, or call the model without that."
        )

    def check_state(self, state: Any, sequences: int, device: torch.device | None = None) -> None:
        """`UsageError` unless a state is one of this mixer's, of so many sequences and on the device, if one is named.

        Its numbers may be of any floating-point dtype; every mixer converts them.
        """
        if self._form is not None and _problem(self._form, state, sequences, device) is None:
            return
        grows = self.state_size_after(1) != self.state_size
        self._form = _form_of(self.init_state(1, torch.float32, "meta"), grows)
        if problem := _problem(self._form, state, sequences, device):
            raise UsageError(f"This state is not one of {type(self).__name__}'s for this call: {problem}.")

    def emit(self, program: EngineProgram, x: Tensor, onto: Tensor) -> Any:
        """Emit one token for native decoding: the mixer's output for x [B,D] is added to `onto` [B,D].

        Returns:
            The state, as tensors that every run of the program moves on in place.

        Raises:
            UsageError: this mixer has no native decoding; calling it token by token with the carried state always goes.
        """
        raise UsageError(f"{type(self).__name__} has no native decoding; call the model token by token.")

    @classmethod
    def from_options(cls, hidden_size: int, options: MixerOptions, *, norm_eps: float = 1e-5) -> Self:
        """Build the mixer that a record describes, of width D = hidden_size.

        Raises:
            UsageError: the record is another mixer's, or its options do not go together.
        """
        if not isinstance(options, cls.options):
            raise UsageError(f"{cls.__name__} is built from {cls.options.__name__}, not {type(options).__name__}.")
        given = {name: getattr(options, name) for name in option_names(options)}
        kind: Any = cls  # whose constructor takes the options, and norm_eps or not
        return kind(hidden_size, **given, **({"norm_eps": norm_eps} if cls.takes_norm_eps else {}))


def _form_of(state: Any, grows: bool) -> Any:
    """What all states of a mixer have in common with this one: (shape after the batch, dtype) for each tensor, and
    (class, names, forms) for each tuple. A size of None is any: that of no tokens, where the state grows with them."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        return tuple(None if grows and size == 0 else size for size in state.shape[1:]), state.dtype
    names = getattr(state, "_fields", tuple(map(str, range(len(state)))))
    return type(state), names, tuple(_form_of(part, grows) for part in state)


def _problem(form: Any, state: Any, sequences: int, device: torch.device | None, name: str = "it") -> str | None:
    """What is wrong with a state, as a sentence; None if nothing is."""
    if form is None:
        return None if state is None else f"{name} is a {type(state).__name__} and should be None"
    if len(form) == 3:
        kind, names, parts = form
        if not isinstance(state, kind) or len(state) != len(parts):
            return f"{name} is a {type(state).__name__} and should be a {kind.__name__}"
        for part_name, part_form, part in zip(names, parts, state, strict=True):
            if problem := _problem(part_form, part, sequences, device, part_name):
                return problem
        return None
    sizes, dtype = form
    if not isinstance(state, Tensor):
        return f"{name} is a {type(state).__name__} and should be a tensor"
    shape = state.shape
    if shape != (sequences, *sizes) and (
        None not in sizes
        or len(shape) != 1 + len(sizes)
        or shape[0] != sequences
        or any(want is not None and size != want for size, want in zip(shape[1:], sizes, strict=True))
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in (sequences, *sizes))
        return f"{name} has shape {list(shape)} and should have [{wanted}], for {sequences} sequences"
    found = state.dtype
    if found != dtype and not (found.is_floating_point and dtype.is_floating_point):
        return f"{name} is {found} and should be {dtype}"
    if device is not None and state.device != device:
        return (
            f"{name} is on {state.device} and the input on {device}; move one of them, or make the state with "
            "init_state(batch_size, x.dtype, x.device)"
        )
    return None
