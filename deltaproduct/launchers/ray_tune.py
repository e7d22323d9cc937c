"""Calls as trials of Ray Tune: on this machine, or on a Ray cluster."""

import logging
import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray._private import ray_constants
from ray.exceptions import RayActorError

from deltaproduct.errors import UsageError
from deltaproduct.files import make_folder
from deltaproduct.launchers.launcher import KILLED, PAUSE, Call, Settle, carry_out, last_line, opened

NAME, END = "name", "end"
SAID = "said.log"
CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # or every result is written three times over
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is to end this program, and not Tune alone
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Ray:
    """One trial per call, `workers` at once."""

    def __init__(self, workers: int, folder: Path, options: Mapping[str, Any]):
        """
        Args:
            folder: what Tune keeps of its own; made when needed, on a file system that every machine shares.
            options: RAY_OPTIONS.
        """
        self.workers, self.folder = workers, folder.absolute()
        self.address = options.get("address") or os.environ.get("RAY_ADDRESS") or "local"
        self.cpu, self.gpu = options.get("cpu", 1), options.get("gpu")

    def run(self, calls: Mapping[str, Call], settle: Settle, tick: Callable[[], None]) -> None:
        make_folder(self.folder)
        listener = Listener(settle, tick)
        with quiet(self.folder / SAID), connected(self.address):
            tuner = tune.Tuner(
                tune.with_resources(tune.with_parameters(trial, calls=dict(calls), threads=self.cpu), self._share()),
                param_space={NAME: tune.grid_search(list(calls))},
                tune_config=tune.TuneConfig(max_concurrent_trials=self.workers),
                run_config=tune.RunConfig(storage_path=str(self.folder), callbacks=[listener], verbose=0),
            )
            try:
                tuner.fit()
            except BaseException:
                listener.stop()
                raise
        for name in calls.keys() - listener.settled:
            settle(name, partial(refused, "Ray ended without carrying it out"))

    def _share(self) -> dict[str, float]:
        """What each trial gets; `UsageError` if Ray was started here and has less: it would wait for more for ever."""
        there = ray.cluster_resources()
        share = {"cpu": self.cpu, "gpu": self.gpu if self.gpu is not None else float(there.get("GPU", 0) >= 1)}
        for name, amount in share.items():
            if self.address == "local" and amount > there.get(name.upper(), 0):
                raise UsageError(f"A run was to have {name}={amount}, but Ray has {there.get(name.upper(), 0)} here.")
        return share


def trial(config: dict[str, Any], calls: Mapping[str, Call], threads: int) -> dict[str, Any]:
    """What Tune carries out, in a process of its own."""
    return {END: carry_out(calls[config[NAME]], max(1, threads))}


class Listener(tune.Callback):
    """Passes on what Tune says of its trials."""

    def __init__(self, settle: Settle, tick: Callable[[], None]):
        self.settled: set[str] = set()
        self._settle, self._tick, self._last = settle, tick, 0.0
        self._ends: dict[str, bytes] = {}
        self._trials: Sequence[Any] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its callbacks to restore them one day, which is not done here

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        if END in result:
            self._ends[trial.config[NAME]] = result[END]

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._ended(trial, lambda: "Ray ended it without a result")

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._ended(trial, lambda: reason(trial))

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        self._trials = trials
        if time.monotonic() - self._last >= PAUSE:
            self._last = time.monotonic()
            self._tick()

    def stop(self) -> None:
        """End the processes of the trials, which outlive an interrupted Tune where Ray goes on."""
        for trial in self._trials:
            if (actor := trial.temporary_state.ray_actor) is not None:
                ray.kill(actor)

    def _ended(self, trial: Any, why_not: Callable[[], str]) -> None:
        name = trial.config[NAME]
        end = self._ends.pop(name, None)
        self.settled.add(name)
        self._settle(name, partial(opened, end) if end is not None else partial(refused, why_not()))


def reason(trial: Any) -> str:
    """Why a trial ended badly: not by its call, whose errors are in its end."""
    try:
        error = pickle.loads(Path(trial.pickled_error_file).read_bytes())
    except (OSError, TypeError, pickle.UnpicklingError):
        return "Ray could not carry it out and does not say why"
    if isinstance(error, RayActorError):
        return KILLED
    return f"Ray could not carry it out: {last_line(str(error))}"


def refused(why: str) -> dict[str, Any]:
    raise UsageError(why)


@contextmanager
def connected(address: str) -> Iterator[bool]:
    """With Ray: the caller's if it is there already, else one that is left, or stopped if it was started here.

    Yields whether it was started here. Then its processes listen on this machine's loopback address alone, since Ray
    does whatever those who reach it ask for.
    """
    if ray.is_initialized():
        yield False
        return
    here = address == "local"
    with _on_loopback() if here else nullcontext():
        try:
            settings = {"include_dashboard": False} if here else {}
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **settings)
        except (ConnectionError, RuntimeError, ValueError) as e:
            raise UsageError(f"Ray cannot be reached or started at {address!r}: {' '.join(str(e).split())}") from e
        try:
            if here and not ip_address(node := ray.util.get_node_ip_address()).is_loopback:
                raise UsageError(
                    f"Ray {ray.__version__} listens on {node} although it was started for this machine alone. Start it "
                    "yourself (ray start --head) behind a firewall, and give its address with the option address."
                )
            yield here
        finally:
            ray.shutdown()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Ray starting clusters that listen on 127.0.0.1.

    It takes every address of this machine for one that others are to reach, `_node_ip_address="127.0.0.1"` too, except
    where it believes that clusters are not supported, as on macOS. It asks this variable on its import, and its
    processes ask it again.
    """
    before = os.environ.get(CLUSTERS), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[CLUSTERS], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before[1]
        os.environ.pop(CLUSTERS)
        if before[0] is not None:
            os.environ[CLUSTERS] = before[0]


@contextmanager
def quiet(said: Path) -> Iterator[None]:
    """Ray saying and writing no more than has to be, and into a file, so that the lines of progress stay whole."""
    logger = logging.getLogger("ray")
    level, before = logger.level, {name: os.environ.get(name) for name in SETTINGS}
    os.environ.update(SETTINGS)
    logger.setLevel(logging.CRITICAL)
    try:
        # Its threads print what became of processes, whatever the level; nothing else here uses standard output.
        with open(said, "a", encoding="utf-8") as file, redirect_stdout(file):
            yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
