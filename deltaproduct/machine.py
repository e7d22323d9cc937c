"""What this machine is: written beside every result, and shown by `deltaproduct doctor`; and what it is asked to do."""

import ctypes
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import deltaproduct
from deltaproduct.errors import UsageError


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
        raise UsageError(f"There is no kind of device called {name!r}; try auto, cpu or cuda.") from e
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"Device {name!r} was asked for, but PyTorch sees no GPU here.")
    return device


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
