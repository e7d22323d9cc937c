"""What this machine can do at best: a plain matrix product, and a copy, run in turn with what is compared with them.

The recurrence, however it is arranged, is multiplications and additions, and a large square product is the best rate
of them that PyTorch reaches here with the same threads. Data-sheet figures would be flattering or unfair, and so would
a product measured while the machine was quieter, or busier, than it was for the rows.
"""

from dataclasses import dataclass

import torch

from deltaproduct.benchmarks.timing import Timing, time_once

SIZES = {"cpu": (1024,), "cuda": (2048, 4096)}  # rows; smaller ones leave a GPU idle, larger ones only take longer
SIZES_DEFAULT = (1024,)


@dataclass(frozen=True)
class Roofline:
    """Rates of a square matrix product [size,size] @ [size,size], 2·size³ flops."""

    gflops: float  # GFLOP/s at the median of runs in turn with the rows
    best_gflops: float  # at the fastest of them
    size: int
    dtype: str
    threads: int  # PyTorch's CPU threads
    precision: str  # torch.get_float32_matmul_precision(): "highest" is float32 throughout, others allow TF32


class MatrixProduct:
    """The product to run in turn with the rows: of the sizes of SIZES, the one with the best rate, warmed up."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        rates = {}
        for size in SIZES.get(device.type, SIZES_DEFAULT):
            generator = torch.Generator().manual_seed(0)
            a, b = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
            self._operands = a, b, torch.empty_like(a)
            self()
            rates[size] = (size**3 / min(time_once(self, device) for _ in range(3)), self._operands)
        self.size, (_, self._operands) = max(rates.items(), key=lambda item: item[1][0])

    def __call__(self) -> None:
        a, b, out = self._operands
        torch.mm(a, b, out=out)

    def roofline(self, timing: Timing) -> Roofline:
        """What these runs of the product say."""
        return Roofline(
            gflops=2 * self.size**3 / timing.median_ms / 1e6,
            best_gflops=2 * self.size**3 / timing.min_ms / 1e6,
            size=self.size,
            dtype=str(self.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            precision=torch.get_float32_matmul_precision(),
        )


COPY_BYTES = 1 << 30  # several times a GPU's second-level cache


class MemoryCopy:
    """A large copy to run in turn with the rows: what the memory gives, reading and writing."""

    def __init__(self, device: torch.device) -> None:
        self._source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
        self._target = torch.empty_like(self._source)
        self()

    def __call__(self) -> None:
        self._target.copy_(self._source)

    def gb_per_second(self, timing: Timing) -> float:
        """10⁹ bytes a second, at the median of its runs."""
        return 2 * COPY_BYTES / timing.median_ms / 1e6
