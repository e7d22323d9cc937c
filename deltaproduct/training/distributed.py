"""Several processes that train one model: who they are, how the model lies on them, and what they tell each other.

`torchrun` starts them, on one machine or on many, and says to each in its environment which of them it is. Without it
there is one process, and none of this costs anything.

Where all processes are on one machine, what they open to find each other listens on its loopback address alone: who can
reach it could take part in the training. torchrun and NCCL open ports of their own.
"""

import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from deltaproduct.errors import UsageError
from deltaproduct.machine import choose_device
from deltaproduct.ops.context_parallel import ContextParallel

PARALLEL = ("ddp", "fsdp")
LOOPBACK = "127.0.0.1"
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
PATIENCE = timedelta(minutes=30)  # for a rank that writes a large checkpoint, or prepares its device


@dataclass(frozen=True)
class Ranks:
    """This process among those that train one model. Ranks that hold spans of the same sequences are neighbours.

    Attributes:
        rank, size: which process of how many.
        device: where it computes.
        context_parallel: the ranks that each sequence is divided over; None where each rank has whole sequences.
    """

    rank: int
    size: int
    device: torch.device
    context_parallel: ContextParallel | None = None

    @classmethod
    @contextmanager
    def started(cls, device: str = "auto", *, context_parallel: int = 1) -> Iterator["Ranks"]:
        """What `torchrun` says this process is, for the time of a `with`; alone where nobody says anything.

        Args:
            device: "auto", "cpu" or "cuda"; on a machine with several GPUs each process takes its own.
            context_parallel: ranks that divide each sequence among them.

        Raises:
            UsageError: there is no such device, or `context_parallel` does not divide the number of processes.
        """
        where = choose_device(device)
        begun = "RANK" in os.environ and not dist.is_initialized()  # or by another launcher, whose processes they are
        if begun and where.type == "cuda":
            where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
            torch.cuda.set_device(where)
        with _group("nccl" if where.type == "cuda" else "gloo") if begun else nullcontext():
            rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
            if context_parallel < 1 or size % context_parallel:
                raise UsageError(
                    f"context_parallel must divide the number of processes, {size}; {context_parallel} does not."
                )
            yield cls(rank, size, where, _context_parallel(size, context_parallel))

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes what is written once."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of a batch this rank works on; those who divide its sequences have the same one."""
        return self.rank // self.per_sequence

    @property
    def data_size(self) -> int:
        """Into how many shares a batch is divided."""
        return self.size // self.per_sequence

    @property
    def per_sequence(self) -> int:
        """Ranks that each sequence is divided over."""
        return 1 if self.context_parallel is None else self.context_parallel.size

    def my_span(self, x: Tensor) -> Tensor:
        """This rank's tokens of sequences x [b,T]; `UsageError` unless they can be divided evenly."""
        if self.context_parallel is None:
            return x
        if x.shape[1] % self.per_sequence:
            raise UsageError(
                f"A context of {x.shape[1]} tokens cannot be divided evenly over {self.per_sequence} ranks."
            )
        return x.chunk(self.per_sequence, 1)[self.context_parallel.rank]

    def wrap(self, module: nn.Module, parallel: str, *, blocks: Iterable[nn.Module], precision: str) -> nn.Module:
        """The module with gradients that are averaged over all ranks.

        Args:
            parallel: "ddp", every rank has all parameters, or "fsdp" (FSDP2), each has a share of every parameter and
                gathers those of one block at a time.
            blocks: the parts of the module that are gathered one by one.
            precision: "bfloat16" has FSDP gather and multiply in it; sums of gradients are float32 in any case.
        """
        if parallel not in PARALLEL:
            raise UsageError(f"parallel must be one of {', '.join(PARALLEL)}, not {parallel!r}.")
        if self.size == 1:
            return module
        if parallel == "ddp":
            return DistributedDataParallel(module, gradient_as_bucket_view=True)
        mesh = DeviceMesh(self.device.type, list(range(self.size)))
        low = torch.bfloat16 if precision == "bfloat16" and self.device.type == "cuda" else None
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(module, mesh=mesh, mp_policy=policy)  # in place: the module's class is another from here on
        return module

    def summed(self, x: Tensor) -> Tensor:
        """The sum of the ranks' tensors."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def any(self, here: bool) -> bool:
        """Whether something holds on any of the ranks."""
        return here if self.size == 1 else bool(self.summed(torch.tensor(float(here), device=self.device)))

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier()

    def texts(self, text: str) -> list[str]:
        """Every rank's text, by rank. They travel as bytes: PyTorch's own exchange of objects would unpickle them."""
        if self.size == 1:
            return [text]
        own = torch.tensor(list(text.encode("utf-8", "backslashreplace")), dtype=torch.uint8, device=self.device)
        length = torch.tensor([len(own)], device=self.device)
        lengths = [torch.zeros_like(length) for _ in range(self.size)]
        dist.all_gather(lengths, length)
        longest = max(int(n) for n in lengths)
        padded = nn.functional.pad(own, (0, longest - len(own)))
        found = [torch.zeros_like(padded) for _ in range(self.size)]
        if longest:
            dist.all_gather(found, padded)
        return [bytes(x[: int(n)].tolist()).decode() for x, n in zip(found, lengths)]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails on one rank fails on all of them, so that none waits for another that has gone. Every rank enters.

        Raises:
            UsageError: the first error of any rank, with the rank's number unless all say the same.
        """
        error = None
        try:
            yield
        except Exception as e:
            error = e
        said = self.texts("" if error is None else str(error) or type(error).__name__)
        if error is not None and (self.size == 1 or not isinstance(error, UsageError)):
            raise error
        rank = next((rank for rank, text in enumerate(said) if text), None)
        if rank is not None:
            same = len(set(said)) == 1
            raise UsageError(" ".join((said[rank] if same else f"Rank {rank}: {said[rank]}").split())) from error


@contextmanager
def _group(backend: str) -> Iterator[None]:
    """The process group that the variables of `torchrun` describe, for the time of a `with`."""
    # Where a variable is missing, PyTorch says so.
    here = {"LOCAL_WORLD_SIZE", "WORLD_SIZE", "MASTER_PORT"} <= os.environ.keys() and (
        os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]
    )
    interface = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    added = here and interface is not None and GLOO_INTERFACE not in os.environ
    if added and interface is not None:
        os.environ[GLOO_INTERFACE] = interface  # or gloo takes the address of the machine's name
    try:
        if here and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            rank, size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
            handle = _listening(port) if rank == 0 else None  # what PyTorch opens by itself listens on every address
            store = dist.TCPStore(LOOPBACK, port, size, rank == 0, PATIENCE, master_listen_fd=handle)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        else:  # torchrun has opened a port for it, or there are other machines
            dist.init_process_group(backend, timeout=PATIENCE)
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        if added:
            os.environ.pop(GLOO_INTERFACE, None)


def _listening(port: int) -> int:
    """A handle that listens to this machine, which PyTorch will close; `UsageError` if the port is taken."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((LOOPBACK, port))
            s.listen(1024)
        except (OSError, OverflowError) as e:
            raise UsageError(f"Ranks cannot find each other on port {port}: {e}. Set MASTER_PORT to another.") from e
        return s.detach()


def _context_parallel(size: int, per_sequence: int) -> ContextParallel | None:
    """The group of neighbours that this rank divides sequences with. Every rank has to make every group."""
    if per_sequence == 1:
        return None
    groups = [dist.new_group(range(at, at + per_sequence)) for at in range(0, size, per_sequence)]
    return ContextParallel(groups[dist.get_rank() // per_sequence])
