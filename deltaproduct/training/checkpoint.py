"""A run's checkpoint: model, optimiser and progress in one folder that is replaced in one step, of one process or many.

Every process writes its share of the optimiser, and any number of processes goes on from it. The folder is also an
ordinary checkpoint for `SequenceModel.from_pretrained`, which ignores the rest of it. The optimiser's tensors are in
safetensors, one file of each process, and its numbers are in optimizer.json. None is a pickle, which could hide code.

Each file has some rows of a parameter's moments. The rows follow each other in the order in which optimizer.json names
the files. That is how FSDP cuts a parameter. A parameter that every process has whole is written by one of them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import safetensors
import torch
from torch import Tensor, nn

from deltaproduct.errors import UsageError
from deltaproduct.files import beside, read_json, replaced_folder, verified_folder, write_json
from deltaproduct.models import SequenceModel
from deltaproduct.models.weights import write_tensors
from deltaproduct.training.config import Run
from deltaproduct.training.folder_kinds import TRAINING

if TYPE_CHECKING:
    from deltaproduct.training.loop import OneProcess

OPTIMIZER = "optimizer.json"
EARLIER_OPTIMIZER = "optimizer.safetensors"  # of a task's run, once
PICKLED = ".metadata"  # of torch.distributed.checkpoint, which wrote the optimiser of a language run once
FORMAT = 1
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of every parameter, beside its number of steps
OPTIONS = ("betas", "eps", "weight_decay", "amsgrad", "maximize")  # what AdamW computes with; the learning rate changes
COUNTED = 2**24  # AdamW counts steps in float32, where one more is no more from here on

Kept = TypeVar("Kept")
State = dict[int, dict[str, Tensor]]  # AdamW's, by the parameter's number in its groups


@dataclass
class Progress(Generic[Kept]):
    """How far a run is. Batches are a pure function of (seed, step, rank), so this and the tensors are all its state.

    Attributes:
        kept: what the objective keeps: a dataclass of whole numbers and floats, whose `problem(settings, step)` says
            why no run of these settings can be there.
        step: steps done.
        seconds: time spent training, over all sittings.
        metrics: sha256 of the lines of metrics.jsonl, so that a resumed run knows them again.
    """

    kept: Kept
    step: int = 0
    seconds: float = 0.0
    metrics: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = asdict(self)
        return {"step": values.pop("step"), **values.pop("kept"), **values}


def save_checkpoint(
    folder: Path,
    model: SequenceModel,
    optimizer: torch.optim.Optimizer,
    progress: Progress[Any],
    run: Run[Any],
    ranks: "OneProcess",
    module: nn.Module | None = None,
) -> None:
    """Replace `folder`, which all processes have to see under this name; every one of them calls this.

    Whatever happens, either the old or the new checkpoint is whole.

    Args:
        optimizer: AdamW of the model's parameters.
        module: of many processes: what `Ranks.wrap` made of the model, or of a module whose `model` it is.

    Raises:
        UsageError: a process cannot write, for instance because a disk is full; the old checkpoint is untouched.
    """
    weights = ranks.whole_weights(model, module) if ranks.size > 1 else None  # the model writes its own
    names = [f"optimizer-{rank}-of-{ranks.size}.safetensors" for rank in range(ranks.size)]
    with _fresh(folder, ranks) as fresh, ranks.together():
        write_tensors(fresh / names[ranks.rank], _pieces(model, optimizer, ranks))
        if ranks.first:
            state = {"format": FORMAT, "files": names, "groups": _groups(model, optimizer),
                     "steps": {name: _steps(optimizer, p) for name, p in model.named_parameters()}}  # fmt: skip
            write_json(fresh / OPTIMIZER, state)
            model.write_files(fresh, weights)
            write_json(fresh / TRAINING, {"progress": progress.to_dict(), "config": run.to_dict()})


def load_checkpoint(
    folder: Path,
    model: SequenceModel,
    optimizer: torch.optim.Optimizer,
    kept: type[Kept],
    run: Run[Any],
    ranks: "OneProcess",
    module: nn.Module | None = None,
    *,
    allow_pickled_optimizer: bool = False,
) -> Progress[Kept]:
    """Restore weights and optimiser in place, on as many processes as there are now; every one of them calls this.

    Args:
        kept: what the objective keeps.
        run: whose steps the checkpoint cannot have passed.
        module: as for `save_checkpoint`.
        allow_pickled_optimizer: read what an earlier version wrote by torch.distributed.checkpoint too.

    Raises:
        UsageError: the folder is not a run's checkpoint, is damaged, or is of another model or optimiser; what it holds
            is no state that a run of its configuration can be in; or it holds pickles that are not to be read. The
            message names the file. Nothing was restored, but perhaps what was pickled.
    """
    with ranks.together():
        files = verified_folder(folder, "checkpoint") if ranks.first else []  # by one, as they may be many gigabytes
    files = json.loads(ranks.texts(json.dumps(files))[0])
    with ranks.together():
        earlier = next((name for name in (EARLIER_OPTIMIZER, PICKLED) if OPTIMIZER not in files and name in files), "")
        for name in (earlier or OPTIMIZER, TRAINING):
            if name not in files:
                raise UsageError(f"The checkpoint {folder} has no {name}, so no run can be resumed from it.")
        if earlier == PICKLED and not allow_pickled_optimizer:
            raise UsageError(
                f"The optimiser in {folder} was saved by an earlier version as pickles. Reading pickles can run code "
                "that is hidden in them. Add --allow-pickled-optimizer if you trust those who could write there; the "
                "next checkpoint is then saved without pickles."
            )
        progress = progress_from(_training_of(folder, run).get("progress"), kept, run.training, folder / TRAINING)
        saved = SequenceModel.read_files(folder, files)
        if saved.config != model.config:
            raise UsageError(f"The checkpoint {folder} is of another model than the run's configuration says.")
        weights = saved.state_dict()
        for name, x in weights.items():
            if not bool(x.isfinite().all()):
                raise UsageError(f"The weights in {folder} are not finite ({name}), so no run can go on from them.")
    if earlier == PICKLED:
        from deltaproduct.training.pickled_checkpoint import load_pickled_optimizer

        groups, state = load_pickled_optimizer(folder, files, module or model, optimizer, ranks)
    with ranks.together():
        if earlier == EARLIER_OPTIMIZER:
            from deltaproduct.training.earlier_optimizer import read_earlier_optimizer

            groups = _groups(model, optimizer)
            state = read_earlier_optimizer(folder / earlier, optimizer, progress.step)
        else:
            if not earlier:
                groups, state = _read_optimizer(folder, files, model, optimizer)
            _check_groups(folder, groups, _groups(model, optimizer))
            _check_state(folder, model, optimizer, state, progress.step)
    ranks.restore_weights(model, module, weights)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for group, stored in zip(optimizer.param_groups, groups):
        group["lr"] = stored["lr"]
    return progress


def progress_from(values: Any, kept: type[Kept], settings: Any, where: Path) -> Progress[Kept]:
    """What a file says of how far a run is.

    Args:
        kept: what the objective keeps. Fields that default to a number have to hold one, and those that default to null
            may hold it.
        settings: of the run, so that no more steps can be done.
        where: the file, for messages.

    Raises:
        UsageError: a field is unknown, missing, of another kind, negative (where it counts steps or seconds) or not
            finite; or no run can be there.
    """
    if not isinstance(values, dict):
        raise UsageError(f"{where} does not say how far the run is: it has no progress.")
    own = {f.name: f.default for f in fields(Progress) if f.name != "kept"}
    known = own | {f.name: f.default for f in fields(cast(Any, kept))}
    values = {"metrics": ""} | values  # which the first versions did not write
    if differing := sorted(values.keys() ^ known.keys()):
        what = "no" if differing[0] in known else "the unknown entry"
        raise UsageError(f"{where} does not say how far the run is: its progress has {what} {differing[0]!r:.40}.")
    found: dict[str, Any] = {}
    for name, default in known.items():
        value = found[name] = values[name]
        if value is None and default is None:
            continue
        if isinstance(default, str):
            good, wanted = isinstance(value, str), "a string"
        elif isinstance(default, int):
            good = isinstance(value, int) and 0 <= value <= settings.steps
            wanted = f"a whole number from 0 to {settings.steps}"
        else:
            good, wanted = is_finite_number(value), "a finite number"
            if name == "seconds":
                good, wanted = good and value >= 0, "0 or more"
        if isinstance(value, bool) or not good:
            raise UsageError(f"{where} does not say how far the run is: {name} must be {wanted}, not {value!r:.40}.")
        if not isinstance(default, int | str):
            found[name] = float(value)
    of_objective = cast(Any, kept)(**{name: value for name, value in found.items() if name not in own})
    if problem := of_objective.problem(settings, found["step"]):
        raise UsageError(f"{where} is damaged: {problem}.")
    return Progress(of_objective, **{name: found[name] for name in own})


def is_finite_number(value: Any) -> bool:
    """Whether a value from JSON is a number, and not one that leaves the range of floats when it is computed with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def training_entries(folder: Path) -> dict[str, Any]:
    """What training.json in a run's checkpoint holds; `UsageError` if it is damaged."""
    values = read_json(folder / TRAINING)
    if not isinstance(values, dict):
        raise UsageError(f"{folder / TRAINING} is damaged: it holds no entries by name.")
    return values


def trained_run(folder: Path, entries: Mapping[str, Any]) -> Run[Any]:
    """The run that a checkpoint came from, from what `training_entries` holds; `UsageError` if it is damaged."""
    try:
        return Run.from_dict(entries.get("config"))
    except UsageError as e:
        raise UsageError(f"{folder / TRAINING} is damaged. {e}") from e


def _groups(model: SequenceModel, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The optimiser's groups as JSON has them: names of parameters, and options."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [
        {"params": [names[id(p)] for p in group["params"]], "lr": float(group["lr"])}
        | {option: list(group[option]) if option == "betas" else group[option] for option in OPTIONS}
        for group in optimizer.param_groups
    ]


def _steps(optimizer: torch.optim.Optimizer, parameter: Tensor) -> int:
    """How often a parameter was changed: of one that never had a gradient, AdamW keeps nothing."""
    return int(optimizer.state[parameter]["step"]) if parameter in optimizer.state else 0


def _numbered(optimizer: torch.optim.Optimizer) -> dict[int, int]:
    """The number that an optimiser's state has a parameter under, by the parameter's id."""
    return {id(p): n for n, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}


def _pieces(model: SequenceModel, optimizer: torch.optim.Optimizer, ranks: "OneProcess") -> dict[str, Tensor]:
    """The rows of the moments that this process writes, by moment and parameter."""
    pieces = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if not _is_cut(parameter) and number % ranks.size != ranks.rank:
            continue  # another process has it as well, and writes it
        for moment in MOMENTS:
            known = parameter in optimizer.state
            _, rows = _my_rows(optimizer.state[parameter][moment] if known else torch.zeros_like(parameter))
            if len(rows):
                pieces[f"{moment}.{name}"] = rows.detach().cpu().contiguous()
    return pieces


def _is_cut(x: Tensor) -> bool:
    """Whether a tensor is FSDP's (a DTensor), of which each process has some rows."""
    return hasattr(x, "device_mesh")


def _my_rows(x: Any) -> tuple[int, Tensor]:
    """Which row of a parameter's tensor is this process's first, and its rows of it; a number is one row."""
    if not _is_cut(x):
        return 0, x if x.dim() else x[None]
    assert [p.is_shard(0) for p in x.placements] == [True]  # as `Ranks.wrap` has FSDP cut
    each = -(-len(x) // x.device_mesh.size())
    first = min(each * x.device_mesh.get_local_rank(), len(x))
    rows = x.to_local()
    assert len(rows) == min(each, len(x) - first)
    return first, rows


def _read_optimizer(
    folder: Path, files: Sequence[str], model: SequenceModel, optimizer: torch.optim.Optimizer
) -> tuple[list[dict[str, Any]], State]:
    """The groups and the state in a folder as they are stored, which nobody has compared with the run's."""
    stored = read_json(folder / OPTIMIZER)
    wanted = {"format": int, "files": list, "groups": list, "steps": dict}
    if not isinstance(stored, dict) or {k: type(v) for k, v in stored.items()} != wanted or stored["format"] != FORMAT:
        raise UsageError(f"{folder / OPTIMIZER} is damaged or of another version: it has no format {FORMAT}.")
    parameters = dict(model.named_parameters())
    steps = stored["steps"]
    if steps.keys() != parameters.keys():
        raise UsageError(f"{folder / OPTIMIZER} is of other parameters: {_difference(steps, parameters)}.")
    if bad := next((name for name, step in steps.items() if type(step) is not int or step < 0), None):
        raise UsageError(f"{folder / OPTIMIZER} has no number of steps for {bad}.")
    names = stored["files"]
    for name in names:
        if not isinstance(name, str) or name not in files or names.count(name) > 1:
            raise UsageError(f"{folder / OPTIMIZER} names the file {name!r} twice, or there is none in the manifest.")
    moments, numbers = _read_moments([folder / name for name in names], parameters), _numbered(optimizer)
    return stored["groups"], {
        numbers[id(parameter)]: {"step": torch.tensor(float(min(steps[name], COUNTED)))} | moments[name]
        for name, parameter in parameters.items()
    }


def _read_moments(paths: Sequence[Path], parameters: dict[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    """This process's share of every parameter's moments, from the pieces in files."""
    moments: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    with ExitStack() as stack:
        try:
            opened = [(path, stack.enter_context(safetensors.safe_open(path, framework="pt"))) for path in paths]
            pieces: dict[str, list[tuple[Path, Any]]] = {f"{m}.{name}": [] for name in parameters for m in MOMENTS}
            for path, file in opened:
                for key in file.keys():  # noqa: SIM118 (a file of safetensors cannot be iterated over)
                    if key not in pieces:
                        raise UsageError(f"{path} holds {key!r}, which the run's optimiser does not have.")
                    pieces[key].append((path, file.get_slice(key)))
            for name, parameter in parameters.items():
                for moment in MOMENTS:
                    moments[name][moment] = torch.zeros_like(parameter, requires_grad=False)
                    _read_rows(f"{moment}.{name}", pieces[f"{moment}.{name}"], paths, moments[name][moment])
        except (safetensors.SafetensorError, OSError) as e:
            where = ", ".join(path.name for path in paths)
            raise UsageError(f"A file of the optimiser ({where} in {paths[0].parent}) cannot be read: {e}.") from e
    return moments


def _read_rows(key: str, pieces: Sequence[tuple[Path, Any]], paths: Sequence[Path], x: Tensor) -> None:
    """Fill this process's rows of a moment, x, from its pieces."""
    shape = list(x.shape) or [1]
    for path, piece in pieces:
        if len(piece.get_shape()) != len(shape) or piece.get_shape()[1:] != shape[1:]:
            raise UsageError(f"{path} has {key} of shape {piece.get_shape()}, which is no part of {shape}.")
    there = sum(piece.get_shape()[0] for _, piece in pieces)
    if there != shape[0]:
        where = f"{paths[0].parent}" if paths else "no file"
        raise UsageError(f"The optimiser in {where} has {there} rows of {key}, which has {shape[0]}.")
    first, rows = _my_rows(x)
    at = 0  # the piece's first row
    for path, piece in pieces:
        count = piece.get_shape()[0]
        low, high = max(first, at), min(first + len(rows), at + count)
        if low < high:
            found = piece[low - at : high - at]
            if found.dtype != rows.dtype:
                raise UsageError(f"{path} has {key} as {found.dtype}, not {rows.dtype}.")
            rows[low - first : high - first] = found
        at += count


def _check_groups(folder: Path, stored: Any, own: list[dict[str, Any]]) -> None:
    """`UsageError` unless groups that were read are the optimiser's own, but for the learning rate."""
    if not isinstance(stored, list) or len(stored) != len(own):
        raise UsageError(f"The optimiser in {folder} does not have the {len(own)} groups of parameters of the run's.")
    for number, (theirs, ours) in enumerate(zip(stored, own)):
        if not isinstance(theirs, dict) or theirs.keys() != ours.keys():
            raise UsageError(f"Group {number} of the optimiser in {folder} does not have {', '.join(ours)}.")
        for option, value in ours.items():
            if option == "lr":
                if not is_finite_number(theirs[option]) or theirs[option] < 0:
                    raise UsageError(f"Group {number} of the optimiser in {folder} has no learning rate.")
            elif option == "params" and theirs[option] != value:
                raise UsageError(f"Group {number} of the optimiser in {folder} is of other parameters.")
            elif repr(theirs[option]) != repr(value):
                raise UsageError(
                    f"Group {number} of the optimiser in {folder} has another {option} than the run's, {value}."
                )


def _check_state(folder: Path, model: SequenceModel, optimizer: torch.optim.Optimizer, state: State, step: int) -> None:
    """`UsageError` unless this process's share of the state can be one of AdamW after so many steps."""
    numbers = _numbered(optimizer)
    for name, parameter in model.named_parameters():
        entries = state[numbers[id(parameter)]]
        rows = {moment: _my_rows(entries[moment])[1] for moment in MOMENTS}
        changed = float(entries["step"])
        unused = changed == 0 and not any(x.any() for x in rows.values())  # it never had a gradient
        if changed != min(step, COUNTED) and not unused:
            raise UsageError(
                f"The optimiser in {folder} has changed {name} {changed:g} times, but the run has done {step} steps."
            )
        for moment, x in rows.items():
            if not x.isfinite().all() or (moment == "exp_avg_sq" and (x < 0).any()):
                raise UsageError(f"The optimiser in {folder} has impossible numbers in {moment} of {name}.")


def _training_of(folder: Path, run: Run[Any]) -> dict[str, Any]:
    """What training.json holds, of a checkpoint of the run; `UsageError` if it is damaged."""
    entries = training_entries(folder)
    trained_run(folder, entries)
    return entries


def _difference(stored: dict[str, Any], own: dict[str, Any]) -> str:
    """A name that one of the two has alone."""
    lacking = [name for name in own if name not in stored]
    if lacking:
        return f"it lacks {lacking[0]}"
    text = json.dumps(next(name for name in stored if name not in own))
    return f"it has {text if len(text) <= 40 else f'{text[:40]}…'}"


@contextmanager
def _fresh(folder: Path, ranks: "OneProcess") -> Iterator[Path]:
    """`replaced_folder` for several processes: the first opens and closes it, the others write while it is open."""
    with ExitStack() as stack:
        with ranks.together():
            fresh = stack.enter_context(replaced_folder(folder)) if ranks.first else beside(folder.resolve(), "new")
        yield fresh
        with ranks.together():  # which also waits until it is in place
            stack.close()
