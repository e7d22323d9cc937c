"""What this machine can do at best: the rate of a plain matrix product, measured in the run that it is compared with.

The recurrence, however it is arranged, is multiplications and additions, and a large square product is the best rate
of them that PyTorch reaches here with the same threads. Data-sheet figures would be flattering or unfair.
"""

from dataclasses import dataclass
from functools import partial

import torch

from deltaproduct.benchmarks.timing import time_once

SIZES = {"cpu": (1024,), "cuda": (2048, 4096)}  # rows; smaller ones leave a GPU idle, larger ones only take longer
SIZES_DEFAULT = (1024,)


@dataclass(frozen=True)
class Roofline:
    """The best rate seen of a square matrix product [size,size] @ [size,size], 2·size³ flops."""

    gflops: float  # GFLOP/s
    size: int
    dtype: str
    threads: int  # PyTorch's CPU threads
    precision: str  # torch.get_float32_matmul_precision(): "highest" is float32 throughout, others allow TF32

    @classmethod
    def best(cls, *several: "Roofline") -> "Roofline":
        """Of measurements at different moments of one run: the one least disturbed by other jobs."""
        return max(several, key=lambda r: r.gflops)


def measure_roofline(device: torch.device, dtype: torch.dtype = torch.float32, *, repeats: int = 8) -> Roofline:
    """The best of `repeats` products of each size of SIZES, after one to warm up."""
    found = []
    for size in SIZES.get(device.type, SIZES_DEFAULT):
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
        out = torch.empty_like(a)
        product = partial(torch.mm, a, b, out=out)
        product()
        best_ms = min(time_once(product, device) for _ in range(repeats))
        found.append(
            Roofline(
                gflops=2 * size**3 / best_ms / 1e6,
                size=size,
                dtype=str(dtype).removeprefix("torch."),
                threads=torch.get_num_threads(),
                precision=torch.get_float32_matmul_precision(),
            )
        )
    return Roofline.best(*found)
