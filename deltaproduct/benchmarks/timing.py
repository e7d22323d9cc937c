"""How long something takes and how much memory it needs, measured so that rows can be compared.

Machines drift: clocks change and other jobs come and go. Rows are therefore run in turn, not one after the other's
last repeat, and what is reported is the median and the range, never the best alone.
"""

import gc
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

SECONDS_EACH = 20.0  # what is slower than this is repeated no more than MIN_RUNS times
MIN_RUNS = 3

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """Wall time of `runs` repeats, in milliseconds."""

    median_ms: float
    min_ms: float
    max_ms: float
    runs: int

    @classmethod
    def of(cls, times_ms: list[float]) -> "Timing":
        return cls(statistics.median(times_ms), min(times_ms), max(times_ms), len(times_ms))


def time_once(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds that one call takes: by CUDA events on a GPU, by the wall clock elsewhere.

    What the call returns is released after the clock has stopped.
    """
    collecting = gc.isenabled()
    gc.disable()  # a collection in the middle of a loop of many small tensors would be charged to whoever is running
    try:
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            with torch.cuda.device(device):  # events belong to the current device's stream
                begin.record()
                result = run()
                end.record()
            end.synchronize()
            elapsed = begin.elapsed_time(end)
        else:
            start = time.perf_counter_ns()
            result = run()
            elapsed = (time.perf_counter_ns() - start) / 1e6
        del result
        return elapsed
    finally:
        if collecting:
            gc.enable()


def interleaved(
    runs: Mapping[Key, Callable[[], object]],
    *,
    repeats: int,
    device: torch.device,
    before: Mapping[Key, Callable[[], object]] | None = None,
    seconds_each: float = SECONDS_EACH,
) -> dict[Key, Timing]:
    """`repeats` rounds of one run of each entry in turn, each round starting with another entry.

    `before` holds what some entries need to have done each time, off the clock. Warming up is the caller's business. An
    entry that has used `seconds_each` seconds is left out of later rounds once it has MIN_RUNS runs; `Timing.runs` says
    how many it had.
    """
    before = before or {}
    times: dict[Key, list[float]] = {key: [] for key in runs}
    keys = list(runs)
    for i in range(repeats):
        first = i % max(1, len(keys))  # nobody always follows the same neighbour's cache
        for key in keys[first:] + keys[:first]:
            if len(times[key]) < MIN_RUNS or sum(times[key]) < 1e3 * seconds_each:
                if key in before:
                    before[key]()
                times[key].append(time_once(runs[key], device))
    return {key: Timing.of(t) for key, t in times.items()}


def peak_extra_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Most bytes held at any moment of one call beyond those held before it: results, what is kept, temporaries.

    On a GPU the caching allocator keeps this count. On a CPU it is the running sum of the allocations and releases
    that PyTorch's allocator reports to its profiler; unlike a TorchDispatchMode that sees inside custom operators,
    and unlike the process's resident size it is not blurred by pages that the allocator keeps for reuse. It sees the
    calling thread's tensors only, not what native code takes from malloc. None where it cannot be had.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    # The older of PyTorch's two profilers: the newer one takes seconds to start and writes to standard error.
    try:
        from torch.autograd import profiler_legacy

        enable, disable = profiler_legacy._enable_profiler_legacy, profiler_legacy._disable_profiler_legacy
        config = profiler_legacy.profile(profile_memory=True).config()
    except (ImportError, AttributeError):  # a torch without it
        run()
        return None
    enable(config)
    try:
        result = run()
    finally:
        threads = disable()
    del result
    peak = 0
    for records in threads:
        held = 0
        for record in records:
            if str(record.kind()) == "memory_alloc":
                held += record.cpu_memory_usage()
                peak = max(peak, held)
    return peak
