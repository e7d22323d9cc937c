"""How long a piece of work takes, on machines that others use too."""

import time


def best_of(runs: int, work) -> float:
    """Seconds of this process's own work on one thread, whatever else the machine does."""
    times = []
    for _ in range(runs):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)
