"""Several processes that talk to each other, for tests of what is distributed."""

import multiprocessing
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

# A server that has imported what takes long, and that every rank is a fork of: a rank is there in a moment.
PROCESSES = multiprocessing.get_context("forkserver")
PRELOADED = [
    "pytest",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "deltaproduct.training.distributed",
    "deltaproduct.training.objectives.language",
    "deltaproduct.corpus.writer",
]
PROCESSES.set_forkserver_preload(PRELOADED)
LIMIT = 120  # seconds


def start_ranks(size: int, work: Callable[..., Any], *arguments: Any) -> tuple[list[Any], list[Any]]:
    """So many processes that call `work(*arguments)` as ranks of one group (gloo), and where their answers arrive."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ends = [PROCESSES.Pipe(duplex=False) for _ in range(size)]
    ranks = [
        PROCESSES.Process(target=_rank, args=(rank, size, port, sender, work, arguments), daemon=True)
        for rank, (_, sender) in enumerate(ends)
    ]
    for rank in ranks:
        rank.start()
    return ranks, [receiver for receiver, _ in ends]


def on_ranks(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returns on each rank; an error on any of them is raised here."""
    ranks, ends = start_ranks(size, work, *arguments)
    try:
        found = [pickle.loads(end.recv_bytes()) if end.poll(LIMIT) else (None, "no answer") for end in ends]
    finally:
        for rank in ranks:
            rank.kill()
    for number, (_, error) in enumerate(found):
        assert error is None, f"rank {number} of {size}: {error}"
    return [value for value, _ in found]


def _rank(rank: int, size: int, port: int, sender: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    try:
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
        # As bytes: multiprocessing would leave tensors in memory that is gone when this process is.
        sender.send_bytes(pickle.dumps((work(*arguments), None)))
        dist.barrier()  # nobody leaves while another still needs to be heard
    except Exception:
        sender.send_bytes(pickle.dumps((None, traceback.format_exc())))
