"""How much memory there is, and whether what is asked for can fit: in bytes, before any of it is taken.

What is estimated is a lower bound, of what is certainly needed at one time, so that nothing that fits is refused.
"""

import os
import re
import sys
from pathlib import Path
from typing import Any

from deltaproduct.errors import UsageError

UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB")
ALWAYS = 64 << 20  # bytes: less is never looked at, so that a check costs nothing where little is asked for
# What PyTorch and NumPy say of sizes that no machine has.
BEYOND_ANY = (
    "[Ss]torage size calculation overflowed|numel: integer mult|Overflow when unpacking long|array is too big|"
    "Maximum allowed dimension exceeded"
)
ENDLESS = 1 << 60  # bytes; beyond it the number says nothing to anyone
MEMINFO, PROCESS, CGROUPS = Path("/proc/meminfo"), Path("/proc/self"), Path("/sys/fs/cgroup")


def check_memory(what: str, needed: int, advice: str, *, device: Any = None) -> None:
    """`UsageError` unless so many bytes can be had at all.

    Args:
        what: needs them, as the beginning of a sentence.
        needed: bytes, at least.
        advice: what to lower, as the end of a sentence.
        device: whose memory: a torch.device or its name; None or a CPU: this process's.
    """
    if needed <= ALWAYS:
        return
    there = available_memory(device)
    if there is None or needed <= there:
        return
    where = "on this machine" if device is None or _kind(device) == "cpu" else f"on {device}"
    raise UsageError(
        f"{what} needs at least {format_bytes(needed)} of memory, and there are {format_bytes(there)} {where}; lower "
        f"{advice}."
    )


def available_memory(device: Any = None) -> int | None:
    """Bytes that this process could still take, with swap, within the limits of its control groups and its own; of a
    CUDA device all that it has. None where nothing says."""
    if device is not None and _kind(device) != "cpu":
        return _of_device(device)
    found = [_of_machine(), *_of_groups(), _of_process()]
    return min((size for size in found if size is not None), default=None)


def format_bytes(size: int) -> str:
    """Bytes as a person says them: "3.2 GiB"."""
    if size >= ENDLESS:
        return f"{ENDLESS >> 50:,} PiB"
    if size < 1024:
        return f"{size} bytes"
    power = min(len(UNITS), (size.bit_length() - 1) // 10)
    return f"{size / (1 << 10 * power):,.1f} {UNITS[power - 1]}"


def why_out_of_memory(e: BaseException) -> str | None:
    """One sentence where an exception says that memory was not there: Python's, NumPy's, PyTorch's on a CPU or a GPU;
    None for every other."""
    text = str(e)
    if type(e).__name__ in ("OutOfMemoryError", "AcceleratorError") and "out of memory" in text:
        asked = re.search(r"Tried to allocate ([\d.]+ \w+)", text)
        where = "The GPU has"
    elif isinstance(e, MemoryError):  # NumPy's says how much
        asked = re.search(r"Unable to allocate ([\d.]+ \w+)", text)
        where = "This machine has"
    elif isinstance(e, RuntimeError) and re.search(r"can't allocate memory|not enough memory|out of memory", text):
        asked = re.search(r"tried to allocate (\d+ bytes)", text)
        where = "The GPU has" if "CUDA" in text else "This machine has"
    elif isinstance(e, RuntimeError | TypeError | ValueError) and re.search(BEYOND_ANY, text):
        asked, where = None, "No machine has"
    else:
        return None
    more = f" for another {asked[1]}" if asked else ""
    return f"{where} not enough memory{more}; lower the sizes of the model, the batch or the sequences."


def _kind(device: Any) -> str:
    return str(getattr(device, "type", device)).split(":")[0]


def _of_device(device: Any) -> int | None:
    if _kind(device) != "cuda":
        return None
    import torch

    return int(torch.cuda.get_device_properties(device).total_memory)


def _of_machine() -> int | None:
    """What the system could give: free memory, caches, and free swap."""
    sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _read(MEMINFO) or "", re.MULTILINE))
    if "MemAvailable" in sizes:
        return 1024 * (int(sizes["MemAvailable"]) + int(sizes.get("SwapFree", 0)))
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _of_process() -> int | None:
    """What `ulimit -v` leaves of addresses."""
    try:
        import resource
    except ImportError:
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY or sys.platform == "darwin":
        return None
    pages = (_read(PROCESS / "statm") or "0").split()[0]
    return max(0, limit - int(pages) * resource.getpagesize())


def _of_groups() -> list[int]:
    """What each of this process's control groups, and those around it, leaves it: of version 2 and of version 1."""
    found = []
    for line in (_read(PROCESS / "cgroup") or "").splitlines():
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUPS / "memory" if controllers else CGROUPS
        group = root / path.strip("/")
        for folder in (group, *group.parents):
            if (left := _left_in(folder, first="" if controllers else "memory.")) is not None:
                found.append(left)
            if folder == root:
                break
    return found


def _left_in(folder: Path, first: str) -> int | None:
    """What one group's limit leaves; what it holds of files is given back when something else needs it."""
    names = ("memory.max", "memory.current") if first else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    limit, used = (_number(folder / name) for name in names)
    if limit is None or used is None or limit >= ENDLESS:
        return None
    files = re.search(r"^(?:total_)?inactive_file (\d+)$", _read(folder / "memory.stat") or "", re.MULTILINE)
    left = max(0, limit - used + (int(files[1]) if files else 0))
    return left + (_swap_left(folder) if first else 0)


def _swap_left(folder: Path) -> int:
    """Of version 2, what the group may still swap out; where it says "max", what the machine has of it."""
    limit, used = _number(folder / "memory.swap.max"), _number(folder / "memory.swap.current")
    if used is None:
        return 0
    free = re.search(r"^SwapFree:\s+(\d+) kB$", _read(MEMINFO) or "", re.MULTILINE)
    there = 1024 * int(free[1]) if free else 0
    return there if limit is None else min(there, max(0, limit - used))


def _number(path: Path) -> int | None:
    text = (_read(path) or "").strip()
    return int(text) if text.isdecimal() else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
