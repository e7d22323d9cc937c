"""The optimiser of checkpoints by earlier versions, which torch.distributed.checkpoint wrote: read, never written.

Its index, `.metadata`, is a pickle, and so are the entries of its files that are no tensors. PyTorch runs what such
pickles say. Here they can only name the few classes that PyTorch itself writes.
"""

import io
import pickle
import warnings
from collections.abc import Container
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from deltaproduct.errors import UsageError
from deltaproduct.training.checkpoint import OPTIONS, PICKLED, State
from deltaproduct.training.loop import OneProcess

_NAMES = ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
          "_MEM_FORMAT_ENCODING", "MetadataIndex", "StorageMeta")  # fmt: skip
_KNOWN: dict[tuple[str, str], Any] = {
    **{(metadata.__name__, name): getattr(metadata, name) for name in _NAMES},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,  # of "torch.strided" and the like
    **{("torch", str(x).removeprefix("torch.")): x for x in vars(torch).values() if isinstance(x, torch.dtype)},
    # Where the checkpoint once was; nothing is read from there.
    **{(module, f"{system}Path"): PurePosixPath for module in ("pathlib", "pathlib._local")
       for system in ("Posix", "Windows")},
}  # fmt: skip


def load_pickled_optimizer(
    folder: Path, files: Container[str], wrapped: nn.Module, optimizer: torch.optim.Optimizer, ranks: OneProcess
) -> tuple[list[dict[str, Any]], State]:
    """Give the optimiser the state in a folder.

    Returns:
        The groups and the state as they are stored, which nobody has compared with the run's.

    Args:
        files: which of the folder's files may be read, those that were verified.
        wrapped: what `Ranks.wrap` made of a module whose `model` is the model.

    Raises:
        UsageError: it cannot be read, or holds more than an optimiser does. The message names no rank where there is
            only one.
    """
    state = get_optimizer_state_dict(wrapped, optimizer)
    planner = _Planner()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load({"optimizer": state}, storage_reader=_Reader(folder, files), planner=planner,
                     no_dist=ranks.size == 1)  # fmt: skip
    except CheckpointException as e:
        rank, (error, _) = next(iter(e.failures.items()))
        where = f"rank {rank}: " if ranks.size > 1 else ""
        said = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"The optimiser in {folder} cannot be read: {where}{said}.") from e
    set_optimizer_state_dict(wrapped, optimizer, state)
    groups = [_group(planner.numbers, f"optimizer.param_groups.{n}.") for n in range(len(optimizer.param_groups))]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return groups, {n: dict(optimizer.state[p]) for n, p in enumerate(parameters)}


def _group(entries: dict[str, Any], prefix: str) -> dict[str, Any]:
    """A group as the format of today has it."""
    params, betas, *others = (entries.get(f"{prefix}{name}") for name in ("params", "betas", "lr", *OPTIONS[1:]))
    names = [str(name).removeprefix("model.") for name in params] if isinstance(params, list) else None
    own = dict(zip(("lr", *OPTIONS[1:]), others))
    return {"params": names, "betas": list(betas) if isinstance(betas, tuple) else betas, **own}


class _Unpickler(pickle.Unpickler):
    """Knows the classes of PyTorch's index and no others, none of which does anything when it is made."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"its index names {module}.{name}, which is not PyTorch's, and was not run")
        return _KNOWN[module, name]


class _Reader(FileSystemReader):
    def __init__(self, folder: Path, files: Container[str]):
        super().__init__(folder)
        self._folder, self._files = folder, files

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        with open(self._folder / PICKLED, "rb") as f:
            found = _Unpickler(f).load()
        if not isinstance(found, metadata.Metadata) or not isinstance(found.storage_data, dict):
            raise pickle.UnpicklingError("its index is none of PyTorch's")
        for place in found.storage_data.values():
            if not isinstance(place, _StorageInfo) or place.relative_path not in self._files:
                raise pickle.UnpicklingError("its index names a file that the manifest does not list")
            if place.transform_descriptors:
                raise pickle.UnpicklingError("its index asks for extensions")
        found.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return found


class _Planner(DefaultLoadPlanner):
    """Has the tensors read in place, and what is no tensor put into `numbers`."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[str, Any] = {}

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            self.numbers[name] = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as e:
            # PyTorch's own message is a page of advice, some of it to run the pickle after all.
            raise pickle.UnpicklingError(f"{name} is damaged or holds more than numbers, and was not run") from e
