"""How rows are run: chosen and checked once, then passed as one record; and which rows can be run at all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from deltaproduct.benchmarks.report import NotRun
from deltaproduct.errors import UsageError, did_you_mean
from deltaproduct.machine import choose_device, command_line, describe_machine
from deltaproduct.ops.inputs import DTYPES, compute_dtype
from deltaproduct.renamed import renamed_names

REPEATS, QUICK_REPEATS = 7, 3


@dataclass(frozen=True)
class BenchmarkSettings:
    """Where, in what precision and how often every row of a benchmark is run."""

    device: torch.device
    dtype: torch.dtype  # of the inputs
    repeats: int  # timed runs of each row
    backward: bool  # gradients too
    seed: int  # of the inputs
    hard: bool = False  # almost parallel keys and β near 2, in place of keys of any direction and any β

    @classmethod
    def of(
        cls,
        *,
        device: str = "auto",
        dtype: torch.dtype | str | None = None,
        repeats: int | None = None,
        backward: bool = True,
        seed: int = 0,
        quick: bool = False,
        hard: bool = False,
    ) -> "BenchmarkSettings":
        """Check what a user asked for.

        Args:
            device: "auto", "cpu" or "cuda".
            dtype: float64, float32, bfloat16 or float16, or its name; None is float32 on a CPU, bfloat16 on a GPU.
            repeats: None is REPEATS, or QUICK_REPEATS when `quick`.

        Raises:
            UsageError: an unknown device or dtype, no GPU, fewer than one repeat.
        """
        where = choose_device(device)
        if where.type not in ("cpu", "cuda"):
            raise UsageError(f"Benchmarks run on cpu or cuda, not {device!r}: no other device's clock is known here.")
        if dtype is None:
            dtype = torch.float32 if where.type == "cpu" else torch.bfloat16
        found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if found not in DTYPES:
            raise UsageError(f"dtype {dtype!r} cannot be benchmarked; choose float64, float32, bfloat16 or float16.")
        if repeats is None:
            repeats = QUICK_REPEATS if quick else REPEATS
        if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
            raise UsageError(f"repeats must be a whole number of at least 1, not {repeats!r}.")
        return cls(where, found, repeats, backward, seed, hard)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of states and solves: float64 for float64 inputs, otherwise float32."""
        return compute_dtype(torch.empty(0, dtype=self.dtype))

    def circumstances(self) -> dict[str, Any]:
        """The fields that every report has."""
        return {
            "machine": describe_machine(),
            "command": command_line(),
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "repeats": self.repeats,
            "seed": self.seed,
        }


class Candidate(Protocol):
    """A backend or another implementation: what may become a row."""

    @property
    def unsupported_reason(self) -> Callable[[torch.device, torch.dtype], str | None]:
        """None if it can serve, else the reason why not."""


def serving(
    asked: Sequence[str] | None, table: Mapping[str, Candidate], settings: BenchmarkSettings
) -> tuple[list[str], list[NotRun]]:
    """The rows of `table` to run, and those that cannot serve, with the reason.

    `asked` None is all that can; naming one that cannot, or that is not in the table, is a `UsageError`.
    """
    if asked is not None and not asked:
        raise UsageError(f"There is no backend to benchmark; choose from {', '.join(table)}.")
    names, away = list(dict.fromkeys(table if asked is None else asked)), []
    for name in names:
        if name not in table:
            raise UsageError(
                f"There is no backend {name!r} to benchmark{did_you_mean(name, table)}; choose from {', '.join(table)}."
            )
        if reason := table[name].unsupported_reason(settings.device, settings.compute_dtype):
            if asked is not None:
                raise UsageError(f"{name} cannot serve: {reason}.")
            away.append(NotRun(name, reason))
    return [name for name in names if name not in {other.backend for other in away}], away


__getattr__ = renamed_names(__name__, {"Settings": "BenchmarkSettings"})
