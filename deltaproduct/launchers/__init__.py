"""Where the runs of an experiment are carried out: in processes of this machine, or on a cluster.

A launcher takes named calls and hands back each outcome as soon as it is there. A call is an argument of another
process, so it has to be picklable, and its paths absolute. On a cluster they have to lead to a file system that every
machine shares, and every machine needs the same Python environment.
"""

import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaproduct.errors import UsageError, did_you_mean
from deltaproduct.launchers.options import (
    RAY_OPTIONS,
    RAY_RANK_OPTIONS,
    SLURM_OPTIONS,
    SLURM_RANK_OPTIONS,
    parse_options,
    typed,
)

if TYPE_CHECKING:
    from deltaproduct.launchers.launcher import Launcher
    from deltaproduct.launchers.ranks import RankLauncher

LAUNCHERS = ("local", "slurm", "ray")


def get_launcher(name: str, *, workers: int, folder: Path, options: Mapping[str, Any] | None = None) -> "Launcher":
    """The launcher of that name; `UsageError` if it cannot serve here. Nothing is written before it runs.

    Args:
        workers: calls at once.
        folder: where a cluster's scripts and logs go, in a folder of the launcher's name; shared by all its machines.
        options: what to ask of a cluster, by the names in launchers/options.py; values may be strings.
    """
    # slurm and ray are imported when they are asked for: neither is needed by the other or by anybody else.
    if name == "local":
        from deltaproduct.launchers.local import Local  # imports PyTorch, as the others do

        typed(options or {}, {}, name)
        return Local(workers)
    if name == "slurm":
        settings = typed(options or {}, SLURM_OPTIONS, name)
        need("submitit")
        from deltaproduct.launchers.slurm import Slurm

        return Slurm(workers, folder / name, settings)
    if name == "ray":
        settings = typed(options or {}, RAY_OPTIONS, name)
        need("ray.tune")
        from deltaproduct.launchers.ray_tune import Ray

        return Ray(workers, folder / name, settings)
    near = did_you_mean(name, LAUNCHERS)
    raise UsageError(f"There is no launcher {name!r}{near}; choose from {', '.join(LAUNCHERS)}.")


def get_rank_launcher(name: str, folder: Path, options: Mapping[str, Any] | None = None) -> "RankLauncher | None":
    """The launcher of that name, None for "local": this process. `UsageError` if it cannot serve; nothing is written.

    Args:
        folder: where a cluster's scripts and logs go, in a folder of the launcher's name; shared by all its machines.
        options: what to ask of a cluster, by the names in launchers/options.py; values may be strings.
    """
    if name == "local":
        typed(options or {}, {}, name)
        return None
    if name == "slurm":
        settings = typed(options or {}, SLURM_RANK_OPTIONS, name)
        need("submitit")
        from deltaproduct.launchers.slurm_ranks import SlurmRanks

        return SlurmRanks(folder / name, settings)
    if name == "ray":
        settings = typed(options or {}, RAY_RANK_OPTIONS, name)
        need("ray.train")
        from deltaproduct.launchers.ray_train import RayRanks

        return RayRanks(folder / name, settings)
    near = did_you_mean(name, LAUNCHERS)
    raise UsageError(f"There is no launcher {name!r}{near}; choose from {', '.join(LAUNCHERS)}.")


def need(module: str) -> None:
    """`UsageError` unless the module can be imported."""
    try:
        import_module(module)
    except ImportError as e:
        raise UsageError(f"This launcher needs {module}: pip install 'deltaproduct[dist]'.") from e


def default_workers(jobs: int, launcher: str = "local", options: Mapping[str, Any] | None = None) -> int:
    """Here a process per GPU, or per core where there is none: several runs on one thread each finish sooner than one
    after the other on all. On a cluster all at once, for it has a queue of its own."""
    if launcher != "local" and (options or {}).get("cluster") != "local":
        return max(1, jobs)
    import torch

    return max(1, min(torch.cuda.device_count() or os.cpu_count() or 1, jobs))
