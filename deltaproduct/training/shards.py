"""A language run's checkpoint: every rank writes its share of the optimiser, and any number of ranks goes on from it.

The folder is an ordinary checkpoint for `SequenceModel.from_pretrained` with the optimiser's shards beside it, as
torch.distributed.checkpoint writes them. It is replaced in one step, when all ranks have written.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from deltaproduct.errors import UsageError
from deltaproduct.files import beside, read_json, replaced_folder, verified_folder, write_json
from deltaproduct.models import SequenceModel
from deltaproduct.training.checkpoint import TRAINING
from deltaproduct.training.config import LanguageRun
from deltaproduct.training.distributed import Ranks

METADATA = ".metadata"  # of torch.distributed.checkpoint: which file has which piece of which tensor


@dataclass
class LanguageProgress:
    """How far a run is; batches are a function of (seed, step, rank), so these and the tensors are all its state."""

    step: int = 0  # steps done
    seconds: float = 0.0  # time spent training, over all sittings
    loss_mean: float | None = None  # running mean
    lowest_mean: float | None = None  # the lowest that it has been


def save_shards(
    folder: Path,
    wrapped: nn.Module,
    model: SequenceModel,
    optimizer: torch.optim.Optimizer,
    progress: LanguageProgress,
    config: LanguageRun,
    ranks: Ranks,
) -> None:
    """Replace `folder`, which all ranks have to see under this name; every rank calls this.

    Args:
        wrapped: what `Ranks.wrap` made of a module whose `model` is the model.

    Raises:
        UsageError: it cannot be written, for instance because a disk is full; the old checkpoint is untouched.
    """
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = {_own_name(name): cast(Tensor, x) for name, x in get_model_state_dict(wrapped, options=whole).items()}
    with _fresh(folder, ranks) as fresh:
        try:
            shards = {"optimizer": get_optimizer_state_dict(wrapped, optimizer)}
            with _alone(ranks) as alone:
                dcp.save(shards, checkpoint_id=fresh, no_dist=alone)
        except CheckpointException as e:
            rank, (error, _) = next(iter(e.failures.items()))
            raise UsageError(f"The checkpoint {folder} cannot be written (rank {rank}: {error}).") from e
        if ranks.first:
            model.write_files(fresh, weights)
            write_json(fresh / TRAINING, {"progress": asdict(progress), "config": config.to_dict()})


def load_shards(
    folder: Path, wrapped: nn.Module, model: SequenceModel, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> LanguageProgress:
    """Restore weights and optimiser in place, on as many ranks as there are now.

    Raises:
        UsageError: the folder is no such checkpoint, is damaged, or is of another model.
    """
    if ranks.first:
        verified_folder(folder, "checkpoint")  # by one rank: sums of many gigabytes
    ranks.wait()
    files = [path.name for path in folder.iterdir()]
    for name in (METADATA, TRAINING):
        if name not in files:
            raise UsageError(f"The checkpoint {folder} has no {name}, so no language run can be resumed from it.")
    saved = SequenceModel.read_files(folder, files)
    if saved.config != model.config:
        raise UsageError(f"The checkpoint {folder} is of another model than the run's configuration says.")
    names = {_own_name(name): name for name in get_model_state_dict(wrapped)}
    weights = {names[name]: x for name, x in saved.state_dict().items() if name in names}
    set_model_state_dict(wrapped, weights, options=StateDictOptions(full_state_dict=True))
    shards = {"optimizer": get_optimizer_state_dict(wrapped, optimizer)}
    try:
        with _alone(ranks) as alone:
            dcp.load(shards, checkpoint_id=folder, no_dist=alone)
    except CheckpointException as e:
        _, (error, _) = next(iter(e.failures.items()))
        raise UsageError(f"The optimiser in {folder} cannot be read: {error}.") from e
    set_optimizer_state_dict(wrapped, optimizer, shards["optimizer"])
    return LanguageProgress(**read_json(folder / TRAINING)["progress"])


def _own_name(name: str) -> str:
    """A parameter's name in the model, from its name in the module around it."""
    return name.removeprefix("model.")


@contextmanager
def _alone(ranks: Ranks) -> Iterator[bool]:
    """Whether this is the only process, of which torch.distributed.checkpoint need not warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield ranks.size == 1


@contextmanager
def _fresh(folder: Path, ranks: Ranks) -> Iterator[Path]:
    """`replaced_folder` for several processes: the first opens and closes it, the others write while it is open."""
    if not ranks.first:
        ranks.wait()  # until it is there
        yield beside(folder, "new")
        ranks.wait()  # until it is in place
        return
    with replaced_folder(folder) as fresh:
        ranks.wait()
        yield fresh
    ranks.wait()
