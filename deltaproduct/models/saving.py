"""What a checkpoint can hold: a configuration, and the tensors of the model that it describes.

A model can be changed after it was built: parts replaced, layers added, options set, adapters put around its
projections. Its configuration knows nothing of that, so that a checkpoint would come back as another model.
"""

import sys
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deltaproduct.errors import UsageError
from deltaproduct.layers.plain import METHODS

RUNTIME = ("training", "backend", "gradient_checkpointing")  # how a model runs, which is nobody's option


def check_is_its_configuration(model: nn.Module, described: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """`UsageError` unless a model is `described`, the one that its configuration makes, up to the values of `tensors`.

    Classes of all modules, their options, and the names and shapes of all tensors are compared. Hooks are code and are
    not saved; a warning says so where there are some.
    """
    if problem := _modules_problem(model, described) or tensors_problem(tensors, described):
        raise UsageError(
            f"The model is no longer what its configuration describes, so that a checkpoint would come back as another "
            f"one: {problem}. Undo or merge that change, or set model.config to what the model is now, and save again."
        )
    hooked = [
        name or "the model"
        for name, module in model.named_modules()
        if (module._forward_hooks or module._forward_pre_hooks) and not _is_fsdp(module)
    ]
    if hooked:
        warnings.warn(f"The model has hooks (of {hooked[0]}), which a checkpoint does not hold.", stacklevel=3)


def tensors_problem(tensors: Mapping[str, Tensor], described: nn.Module) -> str | None:
    """What is wrong with the names, shapes or kinds of tensors that are to be a model's, as a clause."""
    wanted = described.state_dict()
    for name, x in tensors.items():
        if name not in wanted:
            return f"its configuration has no place for {name}"
        if x.shape != wanted[name].shape:
            return f"{name} has shape {list(x.shape)} and its configuration makes it {list(wanted[name].shape)}"
        if type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided:
            return f"{name} is a {type(x).__name__}, which no file of plain tensors can hold"
        if x.is_meta:
            return f"{name} has no values; it is on the device meta"
    if missing := wanted.keys() - tensors.keys():
        return f"{min(missing)} is missing"
    return None


def without_sharing(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU that lie in one piece, each in memory of its own, as the format of the files needs them."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, x in tensors.items():
        x = x.detach().cpu().contiguous()
        address = x.untyped_storage().data_ptr()
        found[name] = x.clone() if address in seen else x
        seen.add(address)
    return found


def shares_memory(tensors: Mapping[str, Tensor]) -> bool:
    """Whether two of them lie in the same memory, a head tied to its embedding apart."""
    storages = [x.untyped_storage().data_ptr() for name, x in tensors.items() if name != "head.weight"]
    return len(set(storages)) < len(storages)


def _modules_problem(model: nn.Module, described: nn.Module) -> str | None:
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, wanted in described.named_modules():
        if name not in modules:
            return f"it has no {name}"
        module = modules[name]
        if name and own_class(module) is not type(wanted):
            found, right = type(module), type(wanted)
            at = "" if found.__name__ != right.__name__ else f" of {found.__module__}"
            return f"{name} is of the class {found.__name__}{at} and not {right.__name__}"
        if not hasattr(module, "_hf_hook"):  # accelerate's, which moves what a module is given from device to device
            for method in METHODS:
                if method in vars(module):
                    return f"{name or 'the model'} has a {method} that was put in the place of its class's"
        if not name:
            continue
        for field, value in vars(wanted).items():
            if field.startswith("_") or field in RUNTIME or not isinstance(value, bool | int | float | str | None):
                continue
            if (given := vars(module).get(field)) != value:
                return f"{name}.{field} is {given!r} and its configuration makes it {value!r}"
    return None


def own_class(module: nn.Module) -> type:
    """A module's class, without what FSDP has put before it."""
    return type(module).__mro__[2] if _is_fsdp(module) else type(module)


def _is_fsdp(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # where nobody has imported it, nobody uses it
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)
