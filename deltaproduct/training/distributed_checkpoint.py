"""A language run's checkpoint: every rank writes its share of the optimiser, and any number of ranks goes on from it.

The folder is an ordinary checkpoint for `SequenceModel.from_pretrained` with the optimiser beside it. The optimiser's
tensors are in safetensors, one file of each rank, and its numbers are in optimizer.json. No file is a pickle, which
could hide code. The folder is replaced in one step, when all ranks have written.

Each file has some rows of a parameter's moments. The rows follow each other in the order in which optimizer.json names
the files. That is how FSDP cuts a parameter. A parameter that every rank has whole is written by one of them.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor, Shard

from deltaproduct.errors import UsageError
from deltaproduct.files import beside, read_json, replaced_folder, verified_folder, write_json
from deltaproduct.models import SequenceModel
from deltaproduct.models.weights import write_tensors
from deltaproduct.training.checkpoint import TRAINING, is_finite_number, progress_from
from deltaproduct.training.config import LanguageRun
from deltaproduct.training.distributed import Ranks

OPTIMISER = "optimizer.json"
FORMAT = 1
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of every parameter, beside its number of steps
OPTIONS = ("betas", "eps", "weight_decay", "amsgrad", "maximize")  # what AdamW computes with; the learning rate changes
COUNTED = 2**24  # AdamW counts steps in float32, where one more is no more from here on
PICKLED = ".metadata"  # of torch.distributed.checkpoint, which wrote the optimiser once


@dataclass
class LanguageProgress:
    """How far a run is; batches are a function of (seed, step, rank), so these and the tensors are all its state."""

    step: int = 0  # steps done
    seconds: float = 0.0  # time spent training, over all sittings
    loss_mean: float | None = None  # running mean
    lowest_mean: float | None = None  # the lowest that it has been
    metrics: str = ""  # sha256 of the lines of metrics.jsonl, so that a resumed run knows them again


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
        optimizer: AdamW of the model's parameters.

    Raises:
        UsageError: a rank cannot write, for instance because a disk is full; the old checkpoint is untouched.
    """
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = {_own_name(name): cast(Tensor, x) for name, x in get_model_state_dict(wrapped, options=whole).items()}
    names = [f"optimizer-{rank}-of-{ranks.size}.safetensors" for rank in range(ranks.size)]
    with _fresh(folder, ranks) as fresh, ranks.together():
        write_tensors(fresh / names[ranks.rank], _pieces(model, optimizer, ranks))
        if ranks.first:
            state = {"format": FORMAT, "files": names, "groups": _groups(model, optimizer),
                     "steps": {name: _steps(optimizer, p) for name, p in model.named_parameters()}}  # fmt: skip
            write_json(fresh / OPTIMISER, state)
            model.write_files(fresh, weights)
            write_json(fresh / TRAINING, {"progress": asdict(progress), "config": config.to_dict()})


def load_shards(
    folder: Path,
    wrapped: nn.Module,
    model: SequenceModel,
    optimizer: torch.optim.Optimizer,
    config: LanguageRun,
    ranks: Ranks,
    *,
    allow_pickled_optimizer: bool = False,
) -> LanguageProgress:
    """Restore weights and optimiser in place, on as many ranks as there are now; every rank calls this.

    Args:
        config: of the run, whose steps the checkpoint cannot have passed.
        allow_pickled_optimizer: read what an earlier version wrote by torch.distributed.checkpoint too.

    Raises:
        UsageError: the folder is no such checkpoint, is damaged, is of another model or optimiser, or holds pickles
            that are not to be read.
    """
    files = _verified(folder, ranks)
    with ranks.together():
        pickled = OPTIMISER not in files and PICKLED in files
        for name in (PICKLED if pickled else OPTIMISER, TRAINING):
            if name not in files:
                raise UsageError(f"The checkpoint {folder} has no {name}, so no language run can be resumed from it.")
        if pickled and not allow_pickled_optimizer:
            raise UsageError(
                f"The optimiser in {folder} was saved by an earlier version as pickles. Reading pickles can run code "
                "that is hidden in them. Add --allow-pickled-optimizer if you trust those who could write there; the "
                "next checkpoint is then saved without pickles."
            )
        progress = _read_progress(folder / TRAINING, config.training.steps)
        saved = SequenceModel.read_files(folder, files)
        if saved.config != model.config:
            raise UsageError(f"The checkpoint {folder} is of another model than the run's configuration says.")
    names = {_own_name(name): name for name in get_model_state_dict(wrapped)}
    weights = {names[name]: x for name, x in saved.state_dict().items() if name in names}
    set_model_state_dict(wrapped, weights, options=StateDictOptions(full_state_dict=True))
    if pickled:
        from deltaproduct.training.pickled_checkpoint import load_pickled_optimizer

        groups = load_pickled_optimizer(folder, files, wrapped, optimizer, ranks)
    with ranks.together():
        if not pickled:
            groups = _read_optimizer(folder, files, model, optimizer)
        _check_groups(folder, groups, _groups(model, optimizer))
        _check_state(folder, model, optimizer, progress.step)
    for group, stored in zip(optimizer.param_groups, groups):
        group["lr"] = stored["lr"]
    return progress


def _own_name(name: str) -> str:
    """A parameter's name in the model, from its name in the module around it."""
    return name.removeprefix("model.")


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


def _pieces(model: SequenceModel, optimizer: torch.optim.Optimizer, ranks: Ranks) -> dict[str, Tensor]:
    """The rows of the moments that this rank writes, by moment and parameter."""
    pieces = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if not isinstance(parameter, DTensor) and number % ranks.size != ranks.rank:
            continue  # another rank has it as well, and writes it
        for moment in MOMENTS:
            known = parameter in optimizer.state
            _, rows = _my_rows(optimizer.state[parameter][moment] if known else torch.zeros_like(parameter))
            if len(rows):
                pieces[f"{moment}.{name}"] = rows.detach().cpu().contiguous()
    return pieces


def _my_rows(x: Tensor) -> tuple[int, Tensor]:
    """Which row of a parameter's tensor is this rank's first, and this rank's rows of it; a number is one row."""
    if not isinstance(x, DTensor):
        return 0, x if x.dim() else x[None]
    assert x.placements == (Shard(0),)  # as `Ranks.wrap` has FSDP cut
    each = -(-len(x) // x.device_mesh.size())
    first = min(each * x.device_mesh.get_local_rank(), len(x))
    rows = x.to_local()
    assert len(rows) == min(each, len(x) - first)
    return first, rows


def _read_optimizer(
    folder: Path, files: Sequence[str], model: SequenceModel, optimizer: torch.optim.Optimizer
) -> list[dict[str, Any]]:
    """Give the optimiser the state in a folder; returns the groups as they are stored, which nobody has checked."""
    stored = read_json(folder / OPTIMISER)
    wanted = {"format": int, "files": list, "groups": list, "steps": dict}
    if not isinstance(stored, dict) or {k: type(v) for k, v in stored.items()} != wanted or stored["format"] != FORMAT:
        raise UsageError(f"{folder / OPTIMISER} is damaged or of another version: it has no format {FORMAT}.")
    parameters = dict(model.named_parameters())
    steps = stored["steps"]
    if steps.keys() != parameters.keys():
        raise UsageError(f"{folder / OPTIMISER} is of other parameters: {_difference(steps, parameters)}.")
    if bad := next((name for name, step in steps.items() if type(step) is not int or step < 0), None):
        raise UsageError(f"{folder / OPTIMISER} has no number of steps for {bad}.")
    names = stored["files"]
    for name in names:
        if not isinstance(name, str) or name not in files or names.count(name) > 1:
            raise UsageError(f"{folder / OPTIMISER} names the file {name!r} twice, or there is none in the manifest.")
    moments = _read_moments([folder / name for name in names], parameters)
    numbers = {id(p): n for n, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state = {
        numbers[id(parameter)]: {"step": torch.tensor(float(min(steps[name], COUNTED)))} | moments[name]
        for name, parameter in parameters.items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return stored["groups"]


def _read_moments(paths: Sequence[Path], parameters: dict[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    """This rank's share of every parameter's moments, from the pieces in files."""
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
    """Fill this rank's rows of a moment, x, from its pieces."""
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


def _check_state(folder: Path, model: SequenceModel, optimizer: torch.optim.Optimizer, step: int) -> None:
    """`UsageError` unless this rank's share of the state can be one of AdamW after so many steps."""
    for name, parameter in model.named_parameters():
        entries = optimizer.state[parameter]
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


def _read_progress(path: Path, steps: int) -> LanguageProgress:
    """How far the run of a checkpoint was; `UsageError` if its file does not say so."""
    stored = read_json(path)
    values = stored.get("progress") if isinstance(stored, dict) else None
    progress = progress_from(values, LanguageProgress, path, steps=steps)
    if progress.step and None in (progress.loss_mean, progress.lowest_mean):
        raise UsageError(f"{path} has no loss_mean or lowest_mean of {progress.step} steps.")
    return progress


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _difference(stored: dict[str, Any], own: dict[str, Any]) -> str:
    """A name that one of the two has alone."""
    lacking = [name for name in own if name not in stored]
    return f"it lacks {lacking[0]}" if lacking else f"it has {next(_short(name) for name in stored if name not in own)}"


def _verified(folder: Path, ranks: Ranks) -> list[str]:
    """The files of a checkpoint; the first rank checks them, since they may be many gigabytes, and tells the others."""
    with ranks.together():
        files = verified_folder(folder, "checkpoint") if ranks.first else []
    return json.loads(ranks.texts(json.dumps(files))[0])


@contextmanager
def _fresh(folder: Path, ranks: Ranks) -> Iterator[Path]:
    """`replaced_folder` for several processes: the first opens and closes it, the others write while it is open."""
    with ExitStack() as stack:
        with ranks.together():
            fresh = stack.enter_context(replaced_folder(folder)) if ranks.first else beside(folder.resolve(), "new")
        yield fresh
        with ranks.together():  # which also waits until it is in place
            stack.close()
