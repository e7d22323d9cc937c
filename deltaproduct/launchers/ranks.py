"""One call on many ranks: a training run that several processes, on one machine or on several, carry out together.

The other launchers carry out many calls that know nothing of each other. Here every process makes the same call, and
`Ranks.started` in it finds the others. What is a result is on the disk that all of them share.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from deltaproduct.errors import UsageError
from deltaproduct.launchers.launcher import Call, carry_out, last_line
from deltaproduct.progress import Bar, progress_bar
from deltaproduct.training.metrics import last_metrics

Tick = Callable[[], None]


class RankLauncher(Protocol):
    """Carries out one call on as many ranks as its options ask for."""

    def run(self, call: Call, tick: Tick) -> None:
        """Carry it out, and tick about once a second; raises what explains best why a rank failed.

        Args:
            call: picklable, with absolute paths; made again, in full, where processes were lost or their time was over,
                so that it has to go on where it was.

        If it is left by an exception, such as KeyboardInterrupt, the ranks are stopped.
        """
        ...


@dataclass(frozen=True)
class RankCall:
    """The call as it is made in the process of a rank."""

    call: Call
    command: Sequence[str]  # that started all this, and that a run's records are to name
    threads: int | None = None

    def __call__(self) -> bytes:
        """Its end, for `opened`."""
        sys.argv = list(self.command)
        return carry_out(self.call, self.threads)


class LostRank(UsageError):
    """A rank whose process was ended from outside, or that can no longer reach the others: no mistake of anybody's."""


def at_least_one(options: Mapping[str, Any], *names: str) -> None:
    """`UsageError` for an option of these that is 0."""
    for name in names:
        if options.get(name, 1) < 1:
            raise UsageError(f"The option {name} must be at least 1, not {options[name]}.")


def mistaken(error: Exception | None) -> bool:
    """Whether an error is a mistake of the user's, which would come again."""
    return isinstance(error, UsageError) and not isinstance(error, LostRank)


def cause(errors: Mapping[int, Exception]) -> Exception:
    """Of the errors of ranks, by rank, the one that explains the others."""
    rank = min(errors, key=lambda rank: _remoteness(errors[rank]))
    error = errors[rank]
    if _remoteness(error) == _DEAF:
        return LostRank(f"Rank {rank} has lost the others: {last_line(str(error))}")
    return error


_DEAF = 3


def _remoteness(error: Exception) -> int:
    """How far an error is from the cause of all."""
    if mistaken(error):
        return 0
    if isinstance(error, LostRank):
        return 2  # killed perhaps by the cluster, because another had failed
    # Where a rank ends, those that wait for it fail in their means of communication: gloo's errors have no class.
    return _DEAF if isinstance(error, dist.DistError) or "gloo" in str(error) else 1


@contextmanager
def followed(metrics: Path, title: str, steps: int) -> Iterator[Tick]:
    """Progress on standard error of a run that other processes carry out: each call of what this yields looks at the
    file of its metrics."""
    with progress_bar(title, steps) as bar:
        yield _Look(metrics, bar)


class _Look:
    def __init__(self, metrics: Path, bar: Bar):
        self._metrics, self._bar = metrics, bar
        self._seen = time.time_ns()  # what an earlier sitting wrote is no progress

    def __call__(self) -> None:
        try:
            changed = self._metrics.stat().st_mtime_ns
        except FileNotFoundError:
            return
        if changed > self._seen and (line := last_metrics(self._metrics)):
            self._seen = changed
            self._bar.update(line["step"], f"loss {line['loss']:.4f}  {line['tokens_per_second']:,.0f} tokens/s")
