"""Calls as trials of Ray Tune: on this machine, or on a Ray cluster."""

import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayActorError

from deltaproduct.errors import UsageError
from deltaproduct.launchers.launcher import KILLED, PAUSE, Call, Settle, carry_out, last_line, opened
from deltaproduct.launchers.ray_cluster import address_of, with_ray

NAME, END = "name", "end"


class Ray:
    """One trial per call, `workers` at once."""

    def __init__(self, workers: int, folder: Path, options: Mapping[str, Any]):
        """
        Args:
            folder: what Tune keeps of its own; made when needed, on a file system that every machine shares.
            options: RAY_OPTIONS.
        """
        self.workers, self.folder = workers, folder.absolute()
        self.address = address_of(options)
        self.cpu, self.gpu = options.get("cpu", 1), options.get("gpu")

    def run(self, calls: Mapping[str, Call], settle: Settle, tick: Callable[[], None]) -> None:
        listener = Listener(settle, tick)
        with with_ray(self.address, self.folder):
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
