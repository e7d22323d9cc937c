"""The tensors of a checkpoint's folder: in one file or in shards with an index, as safetensors or as pickles."""

import pickle
import warnings
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from deltaproduct.errors import UsageError, first_line
from deltaproduct.files import is_plain_name, read_json

WEIGHTS = "model.safetensors"
PICKLED_WEIGHTS = "pytorch_model.bin"
COMPUTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KINDS = ", ".join(str(dtype).removeprefix("torch.") for dtype in COMPUTED)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file; `UsageError` if that fails, for instance on a full disk."""
    try:
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as e:
        raise UsageError(f"{path} cannot be written: {e}.") from e


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; `UsageError` if it is missing or damaged."""
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is not a safetensors file: it is not a file.")
    try:
        if any("\ud800" <= c <= "\udfff" for c in str(path)):  # stand for bytes that are no text
            return safetensors.torch.load(path.read_bytes())  # the library opens no name that is not UTF-8
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, RuntimeError, ValueError, TypeError, LookupError) as e:
        # Beside its own error: a kind of number that this PyTorch does not know, sizes that overflow.
        raise UsageError(f"{path} is not a safetensors file: {first_line(e)}.") from e


def check_weights(tensors: Mapping[str, Any], where: Path) -> None:
    """`UsageError` unless all of them are floating-point tensors of precisions that layers compute in."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or x.dtype not in COMPUTED:
            what = str(x.dtype).removeprefix("torch.") if isinstance(x, Tensor) else type(x).__name__
            raise UsageError(f"The checkpoint {where} has {name} of {what}; weights are of {KINDS}.")


def read_weights(folder: Path, files: Container[str] | None = None, *, pickles: bool = True) -> dict[str, Any]:
    """All tensors of a checkpoint, from the first of the four ways of storing them that is there.

    Args:
        files: which of the folder's files may be read, those that were verified; None: all.
        pickles: whether pickles are looked at too. What they contain is not run.

    Raises:
        UsageError: there are none, a shard is missing or does not hold what the index says, or a file is damaged.
    """
    for whole in (WEIGHTS, PICKLED_WEIGHTS)[: 1 + pickles]:
        if _there(folder, whole, files):
            return _read_file(folder / whole)
        if _there(folder, f"{whole}.index.json", files):
            return _read_shards(folder, f"{whole}.index.json", files)
    if not pickles:
        raise UsageError(f"The checkpoint {folder} has no {WEIGHTS}, whole or with an index of shards.")
    raise UsageError(f"{folder} has neither {WEIGHTS} nor {PICKLED_WEIGHTS}, whole or with an index of shards.")


def _there(folder: Path, name: str, files: Container[str] | None) -> bool:
    return (folder / name).is_file() and (files is None or name in files)


def read_index(path: Path) -> dict[str, str]:
    """Which file of its folder has which tensor, as an index of shards says; `UsageError` if it is damaged."""
    values = read_json(path)
    places = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise UsageError(f"{path} has no weight_map from tensors to files.")
    if not isinstance(values.get("metadata", {}), dict):
        raise UsageError(f"{path} is damaged: its metadata are no entries by name.")
    for file in sorted(set(places.values())):
        if not is_plain_name(file):
            raise UsageError(f"{path} names the file {file!r:.80}, which is not in its own folder.")
    return places


def _read_shards(folder: Path, index: str, files: Container[str] | None) -> dict[str, Any]:
    places, shards = read_index(folder / index), {}
    for file in sorted(set(places.values())):
        if not (folder / file).is_file():
            raise UsageError(f"The checkpoint {folder} is incomplete: {file} is missing.")
        if not _there(folder, file, files):
            raise UsageError(f"The checkpoint {folder} has {file}, which its manifest does not list; it was not read.")
        shards[file] = _read_file(folder / file)
    for name, file in places.items():
        if name not in shards[file]:
            raise UsageError(f"The checkpoint {folder} is incomplete: {file} does not hold {name}.")
    return {name: shards[file][name] for name, file in places.items()}


def _read_file(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file or, going by its ending, of a pickle."""
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns of pickles that others wrote
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as e:
        # PyTorch's own message is a page of advice, some of it to run the pickle after all.
        raise UsageError(
            f"{path} is damaged, or holds more than tensors and was not read. If you trust it, load it "
            "with the library that wrote it and save it there as safetensors (save_pretrained does that)."
        ) from e
    if not isinstance(tensors, dict):
        raise UsageError(f"{path} holds a {type(tensors).__name__}, not tensors by name.")
    return tensors
