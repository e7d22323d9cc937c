"""One call on many ranks by Ray Train: on this machine, or on a Ray cluster."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train import RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.backend import Backend
from ray.train.torch import TorchConfig, TorchTrainer

from deltaproduct.errors import UsageError
from deltaproduct.launchers.launcher import KILLED, PAUSE, Call, last_line, opened
from deltaproduct.launchers.ranks import LostRank, RankCall, Tick, at_least_one, cause, mistaken
from deltaproduct.launchers.ray_cluster import address_of, with_ray
from deltaproduct.training.distributed import LOOPBACK


class RayRanks:
    """One worker of Ray Train per rank; the process group is nccl where ranks have GPUs, gloo elsewhere.

    On a cluster it is Ray's own, on a Ray that was started here one that no other machine can reach.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any]):
        """
        Args:
            folder: what Ray keeps of its own; made when needed, on a file system that every machine shares.
            options: RAY_RANK_OPTIONS.
        """
        at_least_one(options, "num_workers", "cpu")
        self.folder = folder.absolute()
        self.address = address_of(options)
        self.workers, self.gpu = options.get("num_workers"), options.get("gpu")
        self.cpu, self.max_failures = options.get("cpu", 1), options.get("max_failures", 0)

    def run(self, call: Call, tick: Tick) -> None:
        with with_ray(self.address, self.folder) as started:
            scaling = self._scaling()
            for left in reversed(range(self.max_failures + 1)):
                # Not Ray's own FailureConfig, which would start again also what failed by a mistake of the user's.
                port = _free_port() if started else None
                trainer = TorchTrainer(
                    _on_worker,
                    train_loop_config={"call": RankCall(call, sys.argv, self.cpu), "port": port},
                    torch_config=_OwnGroup() if started else None,
                    scaling_config=scaling,
                    run_config=RunConfig(storage_path=str(self.folder)),
                )
                try:
                    with _ticking(tick), _interruptible():
                        trainer.fit()
                    return
                except TrainingFailedError as e:
                    error = _reason(e)
                    if left == 0 or mistaken(error):
                        raise error from None

    def _scaling(self) -> ScalingConfig:
        """How many ranks with what; `UsageError` if Ray was started here and has less: it would wait for more."""
        there = ray.cluster_resources()
        gpus = int(there.get("GPU", 0))
        gpu = self.gpu if self.gpu is not None else int(gpus > 0)
        workers = self.workers or max(1, gpus // gpu if gpu else 1)
        for name, amount in {"cpu": self.cpu, "gpu": gpu}.items():
            if self.address == "local" and workers * amount > there.get(name.upper(), 0):
                raise UsageError(
                    f"{workers} ranks were to have {name}={amount} each, but Ray has {there.get(name.upper(), 0):g} "
                    "here in all; ask for fewer with num_workers."
                )
        share = {"CPU": self.cpu} | ({"GPU": gpu} if gpu else {})
        return ScalingConfig(num_workers=workers, use_gpu=gpu > 0, resources_per_worker=share)


def _on_worker(config: dict[str, Any]) -> None:
    """What every worker carries out, in a process of its own that is in a process group already, unless there is a port
    to begin one on."""
    if config["port"] is not None:
        context = ray.train.get_context()
        os.environ.update(
            RANK=str(context.get_world_rank()),
            WORLD_SIZE=str(context.get_world_size()),
            LOCAL_RANK=str(context.get_local_rank()),
            LOCAL_WORLD_SIZE=str(context.get_local_world_size()),
            MASTER_ADDR=LOOPBACK,
            MASTER_PORT=str(config["port"]),
        )
    opened(config["call"]())


class _OwnGroup(TorchConfig):
    """Ray beginning no process group, as the port for one of its own listens on every address of the machine."""

    @property
    def backend_cls(self) -> type[Backend]:
        return Backend


def _free_port() -> int:
    with socket.socket() as s:
        s.bind((LOOPBACK, 0))
        return s.getsockname()[1]


def _reason(error: TrainingFailedError) -> Exception:
    """What explains best why Ray ended a run."""
    if not isinstance(error, WorkerGroupError):
        return UsageError(f"Ray could not carry it out: {last_line(str(error))}")
    return cause({rank: _of_worker(rank, e) for rank, e in error.worker_failures.items()})


def _of_worker(rank: int, error: Exception) -> Exception:
    within = getattr(error, "health_check_failure", error)
    return LostRank(f"Rank {rank}: {KILLED}.") if isinstance(within, RayActorError) else error


@contextmanager
def _ticking(tick: Tick) -> Iterator[None]:
    """Tick in a thread of its own, as Ray lets nothing else be done while it waits."""
    over = threading.Event()

    def keep() -> None:
        while not over.wait(PAUSE):
            tick()

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        tick()


@contextmanager
def _interruptible() -> Iterator[None]:
    """KeyboardInterrupt on Ctrl-C: Ray's own handler ends the workers, but then the program as well, and stays."""
    if threading.current_thread() is not threading.main_thread():  # where Ray installs none
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)
