"""A run's checkpoint: model, optimiser and progress in one folder that is replaced in one step.

The folder is also an ordinary checkpoint for `SequenceModel.from_pretrained`, which ignores the rest of it.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from deltaproduct.errors import UsageError
from deltaproduct.files import read_folder, read_json, replaced_folder, write_json
from deltaproduct.models import SequenceModel
from deltaproduct.models.weights import read_tensors, write_tensors
from deltaproduct.training.config import RunConfig

OPTIMISER = "optimizer.safetensors"
TRAINING = "training.json"

P = TypeVar("P")


@dataclass
class Progress:
    """How far a run is. Batches are a pure function of (seed, step), so this and the tensors are all its state."""

    step: int = 0  # steps done
    stage: int = 0
    stage_start: int = 0  # the step at which the stage began
    loss_mean: float = 0.0  # running mean of the loss within the stage, uncorrected
    seconds: float = 0.0  # time spent training, over all sittings
    metrics: str = ""  # sha256 of the lines of metrics.jsonl, so that a resumed run knows them again


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
    """Restore the model's weights and the optimiser in place.

    Raises:
        UsageError: the folder is not a run's checkpoint, is damaged, or is of another model; or what it holds is no
            state that a run of its configuration can be in. The message names the file. Nothing was restored.
    """

    def read(whole: Path, files: list[str]) -> Any:
        return _read(whole, files, model, optimizer)

    weights, state, progress = read_folder(folder, "checkpoint", read)
    model.load_state_dict(weights)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return progress


def _read(
    folder: Path, files: list[str], model: SequenceModel, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[int, dict[str, torch.Tensor]], Progress]:
    for name in (OPTIMISER, TRAINING):
        if name not in files:
            raise UsageError(f"The checkpoint {folder} has no {name}, so no run can be resumed from it.")
    saved = SequenceModel.read_files(folder, files)
    if saved.config != model.config:
        raise UsageError(f"The checkpoint {folder} is of another model than the run's configuration says.")
    weights = saved.state_dict()
    for name, x in weights.items():
        if not bool(x.isfinite().all()):
            raise UsageError(f"The weights in {folder} are not finite ({name}), so that no run can go on from them.")
    entries = training_entries(folder)
    config = _config(folder, entries)
    progress = progress_from(entries.get("progress"), Progress, folder / TRAINING, steps=config.training.steps)
    _check_stage(progress, config, folder / TRAINING)
    return weights, _optimiser_state(folder / OPTIMISER, optimizer, progress.step), progress


def progress_from(values: Any, kind: type[P], where: Path, *, steps: int) -> P:
    """What a file says of how far a run is, as a dataclass of whole numbers and floats.

    Args:
        kind: the dataclass. Fields that default to a number have to hold one, those that default to null may hold it,
            and a string may be missing, as earlier versions wrote none.
        where: the file, for messages.
        steps: of the whole run, so that no more can be done.

    Raises:
        UsageError: a field is unknown, missing, of another kind, negative (where it counts steps or seconds) or not
            finite.
    """
    if not isinstance(values, dict):
        raise UsageError(f"{where} does not say how far the run is: it has no progress.")
    known = {f.name: f.default for f in fields(cast(Any, kind))}
    values = {name: default for name, default in known.items() if isinstance(default, str)} | values
    if differing := sorted(values.keys() ^ known.keys()):
        what = "no" if differing[0] in known else "the unknown entry"
        raise UsageError(f"{where} does not say how far the run is: its progress has {what} {differing[0]!r:.40}.")
    found = {}
    for name, default in known.items():
        value = found[name] = values[name]
        if value is None and default is None:
            continue
        if isinstance(default, str):
            good, wanted = isinstance(value, str), "a string"
        elif isinstance(default, int):
            good, wanted = isinstance(value, int) and 0 <= value <= steps, f"a whole number from 0 to {steps}"
        else:
            good, wanted = is_finite_number(value), "a finite number"
            if name == "seconds":
                good, wanted = good and value >= 0, "0 or more"
        if isinstance(value, bool) or not good:
            raise UsageError(f"{where} does not say how far the run is: {name} must be {wanted}, not {value!r:.40}.")
        if not isinstance(default, int | str):
            found[name] = float(value)
    return kind(**found)


def is_finite_number(value: Any) -> bool:
    """Whether a value from JSON is a number, and not one that leaves the range of floats when it is computed with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def training_entries(folder: Path) -> dict[str, Any]:
    """What training.json in a run's checkpoint holds; `UsageError` if it is damaged."""
    values = read_json(folder / TRAINING)
    if not isinstance(values, dict):
        raise UsageError(f"{folder / TRAINING} is damaged: it holds no entries by name.")
    return values


def _config(folder: Path, entries: dict[str, Any]) -> RunConfig:
    try:
        return RunConfig.from_dict(entries.get("config"))
    except UsageError as e:
        raise UsageError(f"{folder / TRAINING} is damaged. {e}") from e


def _check_stage(progress: Progress, config: RunConfig, where: Path) -> None:
    stages = len(config.training.lengths)
    if progress.stage >= stages:
        raise UsageError(
            f"{where} is damaged: the run is in stage {progress.stage}, and it has stages 0 to {stages - 1}."
        )
    if not progress.stage <= progress.stage_start <= progress.step:
        raise UsageError(
            f"{where} is damaged: stage {progress.stage} is said to begin at step {progress.stage_start} of "
            f"{progress.step}."
        )
    if progress.loss_mean < 0:
        raise UsageError(f"{where} is damaged: loss_mean is {progress.loss_mean}, and no loss is negative.")


def _optimiser_state(path: Path, optimizer: torch.optim.Optimizer, step: int) -> dict[int, dict[str, torch.Tensor]]:
    """AdamW's state of every parameter after `step` steps; `UsageError` if the file holds anything else."""
    tensors, parameters = read_tensors(path), [p for group in optimizer.param_groups for p in group["params"]]
    moments = ("exp_avg", "exp_avg_sq")
    wanted = {f"{i}.{key}": p for i, p in enumerate(parameters) for key in ("step", *moments)} if step else {}
    if differing := sorted(wanted.keys() ^ tensors.keys()):
        what = f"{'lacks' if differing[0] in wanted else 'has'} {differing[0]}"
        raise UsageError(f"{path} is not the state of this run's optimiser after step {step}: it {what}.")
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, parameter in wanted.items():
        index, key = name.split(".")
        x = tensors[name]
        # A step is counted in float32, which stops at 2²⁴.
        shape, dtype = (parameter.shape, parameter.dtype) if key in moments else (torch.Size(), torch.float32)
        if x.shape != shape or x.dtype != dtype:
            raise UsageError(f"{path} has {name} of {x.dtype} {list(x.shape)}; it has to be {dtype} {list(shape)}.")
        if not bool(x.isfinite().all()) or (key != "exp_avg" and bool((x < 0).any())):
            raise UsageError(f"{path} is damaged: {name} has numbers that no optimiser comes to.")
        if key == "step" and x.item() != min(step, 2**24):
            raise UsageError(f"{path} is not of this checkpoint: {name} is {x.item():g}, and {step} steps are done.")
        state.setdefault(int(index), {})[key] = x
    return state
