"""One benchmark problem: its inputs, the work a row does with them, and whether the row is right."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaproduct.benchmarks.peers import TEXTBOOK, textbook_loop
from deltaproduct.benchmarks.report import OpShape, Row
from deltaproduct.errors import UsageError
from deltaproduct.machine import choose_device, command_line, describe_machine
from deltaproduct.ops import delta_product
from deltaproduct.ops.inputs import DTYPES

REPEATS, QUICK_REPEATS = 7, 3
ERROR_LIMIT = 1e-3  # relative to max|·|; far above float32's rounding here (1e-6 to 3e-4), far below a wrong formula
GIB = 1 << 30
CHECK_BYTES = GIB // 2  # float64 states that the correctness check may keep: decides how long its prefix is


class Problem:
    """Inputs of one shape, and the work that a row does with them."""

    def __init__(self, shape: OpShape, device: torch.device, dtype: torch.dtype, seed: int, backward: bool) -> None:
        self.shape, self.backward = shape, backward
        generator = torch.Generator().manual_seed(seed)
        b, t, n, h, d = shape.batch, shape.length, shape.num_householder, shape.num_heads, shape.head_dim

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator)

        x = {
            "q": F.normalize(normal(b, t, h, d), dim=-1),
            "k": F.normalize(normal(b, t, n, h, d), dim=-1),
            "v": normal(b, t, n, h, d),
            "beta": 2 * torch.rand(b, t, n, h, generator=generator),
        }
        if shape.gate:
            x["g"] = F.logsigmoid(normal(b, t, h) + 3)
        self.x = {name: y.to(device, dtype).requires_grad_(backward) for name, y in x.items()}
        self.d_o = normal(b, t, h, d).to(device, dtype)
        kept_per_token = 8 * n * b * h * d * d
        self.checked_length = max(1, min(t, CHECK_BYTES // kept_per_token))
        self._wanted: tuple[Tensor, ...] | None = None

    def work(self, name: str) -> Callable[[], tuple[Tensor, ...]]:
        """One forward and backward (forward alone without `backward`) of the row `name`."""
        return lambda: _outcome(_operator(name), self.x, self.d_o if self.backward else None)

    def forward(self, name: str) -> Callable[[], Tensor]:
        """One forward of the row `name` for inference: nothing is kept for a backward."""

        def run() -> Tensor:
            with torch.no_grad():
                return _operator(name)(**self.x)

        return run

    def check(self, name: str) -> Row:
        """A row with its error against the float64 reference on the first `checked_length` tokens."""
        if self._wanted is None:
            self._wanted = _outcome(_operator("reference"), *self._prefix(torch.float64))
        row = Row(name)
        try:
            got = _outcome(_operator(name), *self._prefix(None))
        except Exception as e:  # a row may be anyone's code: its failure is a finding, and the other rows go on
            return dataclasses.replace(row, status="failed", reason=first_line(e))
        errors: dict[str, float] = {}
        names = ["o", *(f"d_{x}" for x in self.x)][: len(self._wanted)]
        for tensor, have, want in zip(names, got, self._wanted, strict=True):
            if have.shape != want.shape:
                reason = f"{tensor} has shape {list(have.shape)} and should have {list(want.shape)}"
                return dataclasses.replace(row, status="wrong", reason=reason, worst=tensor)
            size = max(want.abs().max().item(), torch.finfo(torch.float32).tiny)
            errors[tensor] = (have.double() - want).abs().max().item() / size
            if not math.isfinite(errors[tensor]):
                return dataclasses.replace(row, status="wrong", reason=f"{tensor} is not finite", worst=tensor)
        worst, limit = max(errors, key=lambda name: errors[name]), error_limit(self.d_o.dtype)
        row.worst, row.error = worst, errors[worst]
        if errors[worst] > limit:
            row.status, row.reason = "wrong", f"the error of {worst} is {errors[worst]:.1e}, above {limit:.1e}"
        return row

    def _prefix(self, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], Tensor | None]:
        t = self.checked_length
        x = {n: y.detach()[:, :t].to(dtype or y.dtype).requires_grad_(self.backward) for n, y in self.x.items()}
        return x, self.d_o[:, :t].to(dtype or self.d_o.dtype) if self.backward else None


def _operator(name: str) -> Callable[..., Tensor]:
    if name == TEXTBOOK:
        return textbook_loop
    return lambda **x: delta_product(**x, backend=name)[0]


def _outcome(operator: Callable[..., Tensor], x: dict[str, Tensor], d_o: Tensor | None) -> tuple[Tensor, ...]:
    """The output and, unless d_o is None, the gradients of Σ o·d_o by every input."""
    o = operator(**x)
    return (o,) if d_o is None else (o.detach(), *torch.autograd.grad(o, list(x.values()), d_o))


def error_limit(dtype: torch.dtype) -> float:
    """The largest error at which a row is still timed: ERROR_LIMIT, plus the rounding of results in a short dtype."""
    if dtype == torch.float64:
        return 1e-9  # to tell a row that works in float32 although its inputs are float64
    return ERROR_LIMIT + (torch.finfo(dtype).eps if dtype != torch.float32 else 0)


def circumstances(device: torch.device, dtype: torch.dtype, repeats: int, backward: bool, seed: int) -> dict[str, Any]:
    return {
        "machine": describe_machine(),
        "command": command_line(),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": repeats,
        "backward": backward,
        "seed": seed,
        "error_limit": error_limit(dtype),
    }


def chosen_device(name: str) -> torch.device:
    device = choose_device(name)
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"Benchmarks run on cpu or cuda, not {name!r}: no other device's clock is known here.")
    return device


def chosen_dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in DTYPES:
        raise UsageError(f"dtype {dtype!r} cannot be benchmarked; choose float64, float32, bfloat16 or float16.")
    return found


def chosen_repeats(repeats: int | None, quick: bool) -> int:
    if repeats is None:
        return QUICK_REPEATS if quick else REPEATS
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise UsageError(f"repeats must be a whole number of at least 1, not {repeats!r}.")
    return repeats


def first_line(e: Exception) -> str:
    lines = str(e).strip().splitlines()
    return f"{type(e).__name__}: {lines[0]}" if lines else type(e).__name__
