"""Ray itself, for the launchers on it: the caller's, one that an address leads to, or one that is started here."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants

from deltaproduct.errors import UsageError
from deltaproduct.files import make_folder

SAID = "said.log"  # what Ray prints, in the launcher's folder
CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
RAY_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # or every result is written three times over
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is to end this program, and not Tune alone
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def address_of(options: Mapping[str, Any]) -> str:
    """Where Ray is to be found; "local": nowhere yet, so that it is started here."""
    return options.get("address") or os.environ.get("RAY_ADDRESS") or "local"


@contextmanager
def with_ray(address: str, folder: Path) -> Iterator[bool]:
    """With Ray, which says what it has to say into a file of the folder; yields as `connected`."""
    make_folder(folder)
    with quiet(folder / SAID), connected(address) as started:
        yield started


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
    level, before = logger.level, {name: os.environ.get(name) for name in RAY_ENVIRONMENT}
    os.environ.update(RAY_ENVIRONMENT)
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
