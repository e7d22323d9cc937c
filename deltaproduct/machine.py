"""What this machine is: written beside every result, and shown by `deltaproduct doctor`; and what it is asked to do."""

import ctypes
import functools
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

import deltaproduct
from deltaproduct.errors import UsageError, did_you_mean


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe_machine() -> dict[str, Any]:
    """Hardware and versions, as plain values."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "deltaproduct": deltaproduct.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "gpus": gpus,
    }


def command_line() -> str:
    """The command that started this process, without the folder that its program lies in."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def choose_device(name: str) -> torch.device:
    """ "auto" is the GPU if there is one; `UsageError` if the named device is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as e:
        near = did_you_mean(name, ("auto", "cpu", "cuda"))
        raise UsageError(f"There is no kind of device called {name!r}{near}; try auto, cpu or cuda.") from e
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"Device {name!r} was asked for, but PyTorch sees no GPU here.")
    return device


# Dense products of bfloat16 matrices with float32 sums, in FLOP/s, as the makers state them without sparsity.
GPU_PEAKS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
             "RTX 4090": 165e12, "RTX 3090": 71e12, "V100": 125e12}  # fmt: skip


@functools.cache
def peak_flops(device: torch.device) -> float | None:
    """FLOP/s that the device could reach: a GPU's from its maker; a CPU's by a float32 product of two large matrices.

    None where it is not known. For a CPU it is this process's share: of its threads, beside whatever else is running.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for part, peak in GPU_PEAKS.items() if part in name), None)
    if device.type != "cpu":
        return None
    size = 1024
    x = torch.rand(size, size)
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        x @ x
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / min(seconds)


def memory_in_use(device: torch.device) -> int:
    """The most bytes so far: of tensors on a GPU, or of this whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


# mallopt's parameters and values (malloc.h): blocks of what size are mapped one by one, and how much free memory at the
# heap's end is given back. The values fit its `int`.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_OF_HEAP, KEPT_FREE = 1 << 30, (1 << 31) - 1  # bytes


def keep_freed_memory() -> bool:
    """Have the C library keep the memory of freed tensors for the next ones; True if it will.

    glibc gives large blocks back to the system as soon as they are freed, and the system clears every page of the next
    one: in a loop that allocates the same tensors again and again that is a tenth to a fifth of the time (docs/LOG.md).
    The price is that the process keeps what it once used, up to 2 GiB, so this is for programs and not done on import.
    A user's own MALLOC_… settings stand, and so does any other C library or allocator.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Either call ends glibc's own adjustment of both, so that the second without the first would make things worse.
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_OF_HEAP) and mallopt(M_TRIM_THRESHOLD, KEPT_FREE))
