"""What transformers loads from a folder, held against the manifest that we wrote beside it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from deltaproduct.errors import UsageError
from deltaproduct.files import MANIFEST, check_listed, is_model_file, read_json
from deltaproduct.models.folders import CONFIG
from deltaproduct.models.weights import read_index

ADAPTER = "adapter_config.json"  # of PEFT: it names the folder of the model that the adapter is for


def check_against_manifest(
    name_or_path: Any, subfolder: str | None = None, *, is_read: Callable[[str], bool] | None = None
) -> None:
    """Check what transformers is about to load from a folder of this machine against the folder's manifest.

    Args:
        name_or_path, subfolder: as transformers takes them; a model of a hub, or None, has nothing to check.
        is_read: which files it will read; by default those of a model and of an adapter.

    Raises:
        UsageError: a file is missing or not what was written.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        return
    folder = Path(name_or_path) / (subfolder or "")
    if not folder.is_dir():
        return
    check_listed(folder, "checkpoint", is_read or _is_read)
    if (folder / MANIFEST).is_file():
        _check_contents(folder, is_read or _is_read)
    adapter = folder / ADAPTER
    if is_read is None and adapter.is_file() and not (folder / CONFIG).is_file():
        values = read_json(adapter)
        base = values.get("base_model_name_or_path") if isinstance(values, dict) else None
        if isinstance(base, str) and Path(base) != folder:
            check_against_manifest(base, is_read=_is_read)


def _check_contents(folder: Path, is_read: Callable[[str], bool]) -> None:
    """`UsageError` where transformers would end in an error of Python's, or load what no model can be: files that hold
    no objects, odd indices, weights that are no floating-point numbers (but for quantised ones)."""
    for file in sorted(folder.glob("*.json")):
        if file.name == MANIFEST or not is_read(file.name):
            continue
        if file.name.endswith(".index.json"):
            read_index(file)
        elif not isinstance(values := read_json(file, finite=False), dict):
            raise UsageError(f"{file} is damaged: it holds no entries by name.")
        elif file.name == CONFIG and "quantization_config" in values:
            return
    for file in sorted(folder.glob("model*.safetensors")):
        if is_read(file.name):
            _check_kinds(file)


def _check_kinds(file: Path) -> None:
    try:
        with safe_open(file, "pt") as tensors:
            kinds = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as e:
        raise UsageError(f"{file} is not a safetensors file: {e}.") from e
    if odd := [name for name, kind in kinds.items() if kind not in ("F32", "BF16", "F16", "F64")]:
        raise UsageError(f"{file} has {odd[0]} of {kinds[odd[0]]}; weights are floating-point numbers.")


def _is_read(name: str) -> bool:
    return is_model_file(name) or name.startswith("adapter_")
