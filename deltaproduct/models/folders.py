"""Folders that are taken for a checkpoint, and what to type for those that are something else."""

from pathlib import Path
from typing import Any

from deltaproduct.errors import UsageError
from deltaproduct.files import MANIFEST, read_json
from deltaproduct.models.fla.config import ARCHITECTURES
from deltaproduct.models.weights import PICKLED_WEIGHTS

CONFIG = "config.json"
MODEL_TYPE = "deltaproduct"


def why_no_checkpoint(folder: Path) -> str | None:
    """Why `SequenceModel.from_pretrained` cannot load a folder, and what to do; None if it is to be tried."""
    if not folder.exists():
        return (
            f"{folder} is not a folder of this machine, so there is no checkpoint to load. Give the folder that "
            "save_pretrained wrote; a model of a hub has to be downloaded first."
        )
    if not folder.is_dir():
        return f"{folder} is a file and not a folder; load the folder that holds a checkpoint's files, {folder.parent}."
    if found := _other_kind(folder):
        return found
    if (folder / MANIFEST).exists():
        return None
    kind = _model_type(folder / CONFIG)
    if kind == MODEL_TYPE and any(
        (folder / name).is_file() for name in (PICKLED_WEIGHTS, f"{PICKLED_WEIGHTS}.index.json")
    ):
        return (
            f"{folder} holds its weights in {PICKLED_WEIGHTS}, which is not read here. Write them anew: import "
            f"deltaproduct.models.hf, then transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})"
            ".save_pretrained(another folder)."
        )
    if kind == MODEL_TYPE:
        return (
            f"{folder} has no {MANIFEST}, without which its files cannot be checked. Copy the whole folder that "
            f"save_pretrained wrote, {MANIFEST} included."
        )
    if kind is not None:
        return f"{folder} is a checkpoint of model type {kind!r}, not {MODEL_TYPE!r}."
    return f"{folder} has no {MANIFEST}, so it is not a checkpoint of this library."


def _other_kind(folder: Path) -> str | None:
    kind = _model_type(folder / CONFIG)
    if kind in ARCHITECTURES:
        return (
            f"{folder} is a checkpoint of flash-linear-attention, of model type {kind!r}. Load it with "
            f"deltaproduct.models.fla.checkpoint.read_fla, or convert it: deltaproduct lm convert {folder} --to ours "
            "--out NEW_FOLDER."
        )
    if kind is not None:
        return None
    within = [path for path in sorted(folder.iterdir()) if _model_type(path / CONFIG) == MODEL_TYPE]
    if within:
        newest = max(within, key=lambda path: (path / CONFIG).stat().st_mtime)
        return f"{folder} is no checkpoint itself and holds {_listed(within)}; load {newest}."
    if (folder / "adapter_config.json").is_file():
        return (
            f"{folder} holds an adapter and no model. Load the model that it was trained on, then "
            f"peft.PeftModel.from_pretrained(model, {str(folder)!r})."
        )
    if (folder / "stream.json").is_file():
        return f"{folder} holds a saved conversation: deltaproduct lm generate RUN --load-state {folder} continues it."
    if (folder / "step.json").is_file():
        return f"{folder} holds an exported program and no model; load the checkpoint that it was exported from."
    return None


def _listed(paths: list[Path]) -> str:
    names = [path.name for path in paths]
    return names[0] if len(names) == 1 else f"{len(names)} of them, {names[0]} to {names[-1]}"


def _model_type(path: Path) -> str | None:
    """The model type in a config.json; None if there is none, or no such file."""
    try:
        values: Any = read_json(path)
    except UsageError:
        return None
    kind = values.get("model_type") if isinstance(values, dict) else None
    return kind if isinstance(kind, str) else None
