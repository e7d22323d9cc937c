"""Decoding on the native engine: what a token of a whole model takes is one program, which runs for every token.

With a few sequences at a time a token is hundreds of small pieces of work around one reading of the weights, and called
one by one from Python they take as long again. A program calls the engine once. Buffers and states are tensors that
every run overwrites in place; weights are read where the model has them, so that what an optimiser changes is seen.

B batch · D, O sizes · w convolution width.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltaproduct.errors import UsageError
from deltaproduct.ops import cpu
from deltaproduct.ops.native.library import EngineCall, Instruction
from deltaproduct.renamed import renamed_names


class Kind(IntEnum):
    """`InstructionKind` of interface.h."""

    PRODUCT = 0
    PRODUCT_ADDED = 1
    NORM = 2
    CONVOLUTION = 3
    SILU_TIMES = 4
    SIGMOID = 5
    GATE = 6
    TOKEN = 7
    NORM_BACKWARD = 8


ACTIVATION_CODES = {"identity": 0, "silu": 1, "relu": 2}


class EngineProgram:
    """Instructions for `batch_size` sequences, in the order in which they are emitted; `run` runs them all.

    Every method takes tensors [B,size] and returns a new one that each run fills.

    Raises:
        UsageError: there is no engine, or a tensor is not contiguous float32 on the CPU.
    """

    def __init__(self, batch_size: int):
        if reason := cpu.unsupported_reason(torch.device("cpu"), torch.float32):
            raise UsageError(f"There is no native decoding here: {reason}.")
        self.batch_size = batch_size
        self._instructions: list[Instruction] = []
        self._alive: list[Tensor] = []  # whatever an instruction points to
        self._calls: list[EngineCall] = []
        self._after: int | None = None
        self._array: ctypes.Array[Instruction] | None = None

    def buffer(self, *shape: int) -> Tensor:
        """A tensor of zeros to be written in place."""
        return torch.zeros(shape)

    @contextmanager
    def independent(self) -> Iterator[None]:
        """Within it, nothing needs a result of what is emitted in it, so that nobody waits between them."""
        self._after = len(self._instructions)
        yield
        self._after = None

    def product(self, x: Tensor, weight: Tensor, *, bias: Tensor | None = None, onto: Tensor | None = None) -> Tensor:
        """x [B,D] times weight [O,D] transposed, plus bias [O]; added to `onto` [B,O] in place if that is given."""
        rows, columns = weight.shape
        self._check_sizes("A product", x, columns, (weight, (rows, columns)), (bias, (rows,)))
        if onto is not None:
            self._check_sizes("A product", onto, rows)
        y = self.buffer(self.batch_size, rows) if onto is None else onto
        kind = Kind.PRODUCT if onto is None else Kind.PRODUCT_ADDED
        self._emit(kind, batch=self.batch_size, rows=rows, columns=columns, w=weight, x=x, u=bias, y=y)
        return y

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / √(mean x² + eps) · weight over the last dimension, [..., D] with weight [D]."""
        y, size = self.buffer(*x.shape), x.shape[-1]
        self._check_sizes("A norm", x, size, (weight, (size,)))
        self._emit(Kind.NORM, rows=x.numel() // size, columns=size, w=weight, x=x, y=y, a=eps)
        return y

    def convolution(self, x: Tensor, weight: Tensor | None, activation: str) -> tuple[Tensor, Tensor | None]:
        """A causal convolution with weight [D,1,w] and then the activation; without a weight the activation alone.

        Returns (y [B,D], the history [B,w−1,D]).
        """
        size, y, history, width = x.shape[-1], self.buffer(*x.shape), None, 0
        if weight is not None:
            width = weight.shape[-1]
            self._check_sizes("A convolution", x, size, (weight, (size, 1, width)))
            history = self.buffer(self.batch_size, width - 1, size)
        self._emit(
            Kind.CONVOLUTION, activation=ACTIVATION_CODES[activation], batch=self.batch_size, rows=size, columns=width,
            w=weight, x=x, y=y, z=history,
        )  # fmt: skip
        return y, history

    def silu_times(self, x: Tensor, y: Tensor) -> Tensor:
        """silu(x) · y of the same shape."""
        self._check_sizes("A gate", x, x.shape[-1], (y, tuple(x.shape)))
        out = self.buffer(*y.shape)
        self._emit(Kind.SILU_TIMES, rows=y.numel(), x=x, u=y, y=out)
        return out

    def sigmoid(self, x: Tensor, factor: float) -> Tensor:
        """factor · σ(x)."""
        y = self.buffer(*x.shape)
        self._emit(Kind.SIGMOID, rows=x.numel(), x=x, y=y, a=factor)
        return y

    def gate(self, x: Tensor, a_log: Tensor, dt_bias: Tensor) -> Tensor:
        """−exp(a_log) · softplus(x + dt_bias), with a number of either per column of x [B,HV]."""
        y, size = self.buffer(*x.shape), x.shape[-1]
        self._check_sizes("A gate", x, size, (a_log, (size,)), (dt_bias, (size,)))
        self._emit(Kind.GATE, rows=x.numel(), columns=x.shape[-1], w=a_log, x=x, u=dt_bias, y=y)
        return y

    def token(self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor]:
        """One token of the recurrence with normalised q, k; shapes as in `delta_product_step`.

        Returns (o [B,HV,V], the state [B,HV,K,V]).
        """
        batch, _, heads, value_dim = v.shape
        state = self.buffer(batch, heads, k.shape[-1], value_dim)
        o = self.buffer(batch, heads, value_dim)
        call = cpu.token_call(q, k, v, beta, g, state, o)
        self._calls.append(call)
        self._emit(Kind.TOKEN, call=call)
        self._alive += [x for x in (q, k, v, beta, g, state, o) if x is not None]
        return o, state

    @staticmethod
    def _check_sizes(what: str, x: Tensor, size: int, *weights: tuple[Tensor | None, tuple[int, ...]]) -> None:
        """The engine takes pointers and would read past the end of what is too small."""
        for given, wanted in ((x, (*x.shape[:-1], size)), *weights):
            if given is not None and tuple(given.shape) != wanted:
                raise UsageError(
                    f"{what} of the native decoder takes a tensor of {list(wanted)} and was given {list(given.shape)}; "
                    "the model's modules are not of the sizes that its options say."
                )

    def run(self) -> None:
        """Run all instructions once, on as many threads as PyTorch uses."""
        if self._array is None:
            self._array = (Instruction * len(self._instructions))(*self._instructions)
        cpu.engine().run_program(self._array, torch.get_num_threads())

    def _emit(
        self,
        kind: Kind,
        *,
        a: float = 0.0,
        activation: int = 0,
        call: EngineCall | None = None,
        **fields: int | Tensor | None,
    ) -> None:
        sizes = {name: value for name, value in fields.items() if isinstance(value, int)}
        tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
        for x in tensors.values():
            if x.dtype != torch.float32 or x.device.type != "cpu" or not x.is_contiguous():
                raise UsageError(f"Native decoding needs contiguous float32 on the CPU, not {x.dtype} on {x.device}.")
        self._alive += [x.detach() for x in tensors.values()]  # the storage itself: a parameter can be given another
        after = len(self._instructions) if self._after is None else self._after
        pointers = {name: x.data_ptr() for name, x in tensors.items()}
        instruction = Instruction(kind=kind, activation=activation, after=after, a=a, **sizes, **pointers)
        if call is not None:
            instruction.call = ctypes.pointer(call)
        self._instructions.append(instruction)
        self._array = None


if not TYPE_CHECKING:  # a type checker would take any name for one of this module's
    __getattr__ = renamed_names(__name__, {"Tape": "EngineProgram"})
