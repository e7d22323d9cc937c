"""What this machine is: written beside every result, and shown by `deltaproduct doctor`."""

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
