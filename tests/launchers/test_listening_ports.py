"""What is started on one machine listens on its loopback address alone.

Ray is started here by what is tested, in a process of its own, as it is not in the tests of launchers.
"""

import os
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from listening import elsewhere, family, listening
from ranks import LIMIT, PROCESSES

from deltaproduct.errors import UsageError
from deltaproduct.launchers import get_launcher, get_rank_launcher
from deltaproduct.training.distributed import Ranks

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"), pytest.mark.timeout(170)]


def with_path() -> dict[str, str]:
    """The environment of a process that imports what this one does."""
    left_out = ("TORCHELASTIC_USE_AGENT_STORE", "GLOO_SOCKET_IFNAME", "RAY_ADDRESS")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return kept | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_that_a_port_is_seen():
    for address, seen in (("127.0.0.1", {}), ("0.0.0.0", {"0.0.0.0": [os.getpid()]})):
        with socket.socket() as s:
            s.bind((address, 0))
            s.listen()
            assert os.getpid() in listening([os.getpid()])[address]
            assert elsewhere([os.getpid()]) == seen


def rank_of_two(rank: int, port: int, answer: Any) -> None:
    """A process with the variables that torchrun and submitit set: what it listens on, as one of two."""
    os.environ |= {"MASTER_ADDR": socket.gethostname(), "MASTER_PORT": str(port), "WORLD_SIZE": "2",
                   "LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}  # fmt: skip
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "GLOO_SOCKET_IFNAME"):
        os.environ.pop(name, None)
    with Ranks.started("cpu", context_parallel=2) as ranks:
        assert float(ranks.summed(torch.ones(()))) == 2
        answer.send((listening([os.getpid()]), elsewhere([os.getpid()]), os.environ["GLOO_SOCKET_IFNAME"]))
        ranks.wait()
    assert "GLOO_SOCKET_IFNAME" not in os.environ


@pytest.mark.slow("ranks")
def test_ranks_of_one_machine():
    port = free_port()
    ends = [PROCESSES.Pipe(duplex=False) for _ in range(2)]
    ranks = [
        PROCESSES.Process(target=rank_of_two, args=(rank, port, answer), daemon=True)
        for rank, (_, answer) in enumerate(ends)
    ]
    for rank in ranks:
        rank.start()
    for rank, (end, _) in zip(ranks, ends, strict=True):
        assert end.poll(LIMIT)
        found, others, interface = end.recv()
        rank.join(LIMIT)
        assert list(found) == ["127.0.0.1"] and others == {} and interface == "lo" and rank.exitcode == 0


def test_a_port_that_is_taken_is_one_line(monkeypatch):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        ports = (s.getsockname()[1], 10**6)
        for port in ports:
            values = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
            for name, value in values.items():
                monkeypatch.setenv(name, str(value))
            for name in ("TORCHELASTIC_USE_AGENT_STORE", "GLOO_SOCKET_IFNAME"):
                monkeypatch.delenv(name, raising=False)
            words = f"on port {port}: .* Set MASTER_PORT to another"
            with pytest.raises(UsageError, match=words), Ranks.started("cpu"):
                pass
            assert "GLOO_SOCKET_IFNAME" not in os.environ


def seen(folder: Path) -> dict:
    """A call that lasts until somebody has looked at its process."""
    (folder / f"{os.getpid()}.began").touch()
    deadline = time.monotonic() + 60
    while not (folder / "seen").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return {}


def seen_ranks(folder: Path) -> dict:
    with Ranks.started("cpu") as ranks:
        assert float(ranks.summed(torch.ones(()))) == ranks.size == 2
        return seen(folder)


def look_at_ray(folder: Path, ranks: bool) -> None:
    """Have a launcher start Ray, and say on what its processes listen while it works."""
    wanted = 2 if ranks else 1

    def tick() -> None:
        if len(list(folder.glob("*.began"))) == wanted and not (folder / "seen").exists():
            found = listening(family(os.getpid()))
            print(sorted(found), elsewhere(family(os.getpid())), file=sys.stderr, flush=True)
            (folder / "seen").touch()

    if ranks:
        launcher = get_rank_launcher("ray", folder, {"num_workers": 2})
        assert launcher is not None
        launcher.run(partial(seen_ranks, folder), tick)
    else:
        get_launcher("ray", workers=1, folder=folder).run({"a": partial(seen, folder)}, lambda _, end: end(), tick)


@pytest.mark.slow("ray")
@pytest.mark.parametrize("ranks", [False, True])
def test_a_ray_that_is_started_here(tmp_path, ranks):
    pytest.importorskip("ray.train" if ranks else "ray.tune", reason="Ray is not installed")
    program = f"import pathlib, {__name__} as t; t.look_at_ray(pathlib.Path({str(tmp_path)!r}), {ranks})"
    done = subprocess.run([sys.executable, "-c", program], env=with_path(), capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "['127.0.0.1'] {}", done.stderr
