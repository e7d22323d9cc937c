"""A run's checkpoint: model, optimiser and progress in one folder that is replaced in one step.

The folder is also an ordinary checkpoint for `SequenceModel.from_pretrained`, which ignores the rest of it.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch

from deltaproduct.errors import UsageError
from deltaproduct.files import read_json, replaced_folder, verified_folder, write_json
from deltaproduct.models import SequenceModel
from deltaproduct.models.sequence_model import write_tensors
from deltaproduct.training.config import RunConfig

OPTIMISER = "optimizer.safetensors"
TRAINING = "training.json"


@dataclass
class Progress:
    """How far a run is. Batches are a pure function of (seed, step), so this and the tensors are all its state."""

    step: int = 0  # steps done
    stage: int = 0
    stage_start: int = 0  # the step at which the stage began
    loss_mean: float = 0.0  # running mean of the loss within the stage, uncorrected
    seconds: float = 0.0  # time spent training, over all sittings


def save_checkpoint(
    folder: Path, model: SequenceModel, optimizer: torch.optim.Optimizer, progress: Progress, config: RunConfig
) -> None:
    """Replace `folder`; whatever happens, either the old or the new checkpoint is whole."""
    tensors = {
        f"{index}.{key}": value.detach().cpu().contiguous()
        for index, entries in optimizer.state_dict()["state"].items()
        for key, value in entries.items()
    }
    with replaced_folder(folder) as fresh:
        model.write_files(fresh)
        write_tensors(fresh / OPTIMISER, tensors)
        write_json(fresh / TRAINING, {"progress": asdict(progress), "config": config.to_dict()})


def load_checkpoint(folder: Path, model: SequenceModel, optimizer: torch.optim.Optimizer) -> Progress:
    """Restore the model's weights and the optimiser in place; `UsageError` if the folder is not a run's checkpoint."""
    files = verified_folder(folder, "checkpoint")
    for name in (OPTIMISER, TRAINING):
        if name not in files:
            raise UsageError(f"The checkpoint {folder} has no {name}, so no run can be resumed from it.")
    saved = SequenceModel.read_files(folder, files)
    if saved.config != model.config:
        raise UsageError(f"The checkpoint {folder} is of another model than the run's configuration says.")
    model.load_state_dict(saved.state_dict())
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in safetensors.torch.load_file(folder / OPTIMISER).items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return Progress(**read_json(folder / TRAINING)["progress"])


def checkpoint_config(folder: Path) -> RunConfig | None:
    """The configuration of the run that a checkpoint came from; None if it did not come from one."""
    return RunConfig.from_dict(read_json(folder / TRAINING)["config"]) if (folder / TRAINING).is_file() else None
