"""Several processes that train one model: who they are, how the model lies on them, and what they tell each other.

`torchrun` starts them, on one machine or on many, and says to each in its environment which of them it is. Without it
there is one process, `OneProcess`. What only FSDP needs is imported when it is used, as that takes a second.

Where all processes are on one machine, what they open to find each other listens on its loopback address alone: who can
reach it could take part in the training. torchrun and NCCL open ports of their own.
"""

import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from deltaproduct.errors import UsageError
from deltaproduct.machine import choose_device
from deltaproduct.models import SequenceModel
from deltaproduct.ops.context_parallel import ContextParallel
from deltaproduct.training.loop import OneProcess

LOOPBACK = "127.0.0.1"
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
PATIENCE = timedelta(minutes=30)  # for a rank that writes a large checkpoint, or prepares its device


class Ranks(OneProcess):
    """This process among those that train one model. Ranks that hold spans of the same sequences are neighbours."""

    def __init__(self, rank: int, size: int, device: torch.device, context_parallel: ContextParallel | None = None):
        super().__init__(device)
        self.rank, self.size, self.first = rank, size, rank == 0
        self.context_parallel = context_parallel
        self.per_sequence = 1 if context_parallel is None else context_parallel.size
        self.data_rank, self.data_size = rank // self.per_sequence, size // self.per_sequence

    @classmethod
    @contextmanager
    def started(cls, device: str = "auto", *, context_parallel: int = 1) -> Iterator[OneProcess]:
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
            yield cls(rank, size, where, _context_parallel(size, context_parallel)) if size > 1 else OneProcess(where)

    def my_span(self, x: Tensor) -> Tensor:
        if self.context_parallel is None:
            return x
        if x.shape[1] % self.per_sequence:
            raise UsageError(
                f"A context of {x.shape[1]} tokens cannot be divided evenly over {self.per_sequence} ranks."
            )
        return x.chunk(self.per_sequence, 1)[self.context_parallel.rank]

    def wrap(self, module: nn.Module, parallel: str, *, blocks: Iterable[nn.Module], precision: str) -> nn.Module:
        if parallel == "ddp":
            return DistributedDataParallel(module, gradient_as_bucket_view=True)
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = DeviceMesh(self.device.type, list(range(self.size)))
        low = torch.bfloat16 if precision == "bfloat16" and self.device.type == "cuda" else None
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(module, mesh=mesh, mp_policy=policy)  # in place: the module's class is another from here on
        return module

    @contextmanager
    def accumulating(self, module: nn.Module) -> Iterator[None]:
        if isinstance(module, DistributedDataParallel):
            with module.no_sync():
                yield
            return
        synchronise = cast(Any, module).set_requires_gradient_sync  # of FSDP's module
        synchronise(False)
        yield
        synchronise(True)

    def summed(self, x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x

    def any(self, here: bool) -> bool:
        return bool(self.summed(torch.tensor(float(here), device=self.device)))

    def wait(self) -> None:
        dist.barrier()

    def whole_weights(self, model: SequenceModel, module: nn.Module | None) -> dict[str, Tensor]:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        assert module is not None
        whole = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return {_own_name(name): cast(Tensor, x) for name, x in whole.items()}

    def restore_weights(self, model: SequenceModel, module: nn.Module | None, weights: dict[str, Tensor]) -> None:
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_model_state_dict,
            set_model_state_dict,
        )

        assert module is not None
        names = {_own_name(name): name for name in get_model_state_dict(module)}
        found: dict[str, Any] = {names[name]: x for name, x in weights.items() if name in names}
        set_model_state_dict(module, found, options=StateDictOptions(full_state_dict=True))

    def texts(self, text: str) -> list[str]:
        # As bytes: PyTorch's own exchange of objects would unpickle them.
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
        error = None
        try:
            yield
        except Exception as e:
            error = e
        said = self.texts("" if error is None else str(error) or type(error).__name__)
        if error is not None and not isinstance(error, UsageError):
            raise error
        rank = next((rank for rank, text in enumerate(said) if text), None)
        if rank is not None:
            same = len(set(said)) == 1
            raise UsageError(" ".join((said[rank] if same else f"Rank {rank}: {said[rank]}").split())) from error


def _own_name(name: str) -> str:
    """A parameter's name in the model, from its name in the module around it."""
    return name.removeprefix("model.")


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
