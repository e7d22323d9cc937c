"""Which modules compute what their weights alone say, so that the weights may be read without a call of the module.

The native decoder and the loss without logits read weights where the modules have them. An adapter, a hook, a
parametrization, a quantised or replaced module computes something else than the weight inside it.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from deltaproduct.layers.parts import GateProjection, ShortConvolution

METHODS = ("forward", "hidden", "mix", "project")  # what says how a module computes
# Modules that have no `emit` and need none.
LEAVES = (nn.Linear, GateProjection, nn.Embedding, nn.ModuleList, ShortConvolution)
GLOBAL_HOOKS = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)  # of all modules
BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


def unusual(module: nn.Module, owner: type[nn.Module] | None = None) -> str | None:
    """Why the weights inside a module do not say what it computes, as the rest of a sentence; None if they do.

    Known are the classes of LEAVES and every class that has a `emit` of its own: whoever overrides its
    forward without its `emit` is not known.

    Args:
        owner: a class without `emit` whose `METHODS` the caller knows.
    """
    kind = type(module)
    if kind not in LEAVES:
        if owner is None:
            owner = next((base for base in kind.__mro__ if "emit" in vars(base)), None)
        if owner is None or not issubclass(kind, owner):
            return f"is of the class {kind.__name__}, whose weights alone do not say what it computes"
        for base in kind.__mro__[: kind.__mro__.index(owner)]:
            if own := [name for name in METHODS if name in vars(base)]:
                return f"is of the class {kind.__name__}, which has a {own[0]} of its own"
    if own := [name for name in vars(module) if callable(getattr(kind, name, None))]:
        return f"has a {own[0]} that was put in the place of its class's"
    if any(map(len, _hooks(module))):
        return "has a hook, which may change what it computes"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "has a max_norm, which changes its weight when it is called"
    for name, x in module.named_parameters(recurse=False):
        if type(x) not in (nn.Parameter, Tensor):
            return f"has a {name} that is a {type(x).__name__}"
    if isinstance(module, nn.Linear | nn.Embedding) and "weight" not in module._parameters:
        return "has a weight that is no parameter"
    return None


def first_unusual(model: nn.Module, owner: type[nn.Module]) -> str | None:
    """`unusual` of the first module of a model for which there is something, as a whole clause with its name."""
    for name, module in model.named_modules():
        if reason := unusual(module, owner if module is model else None):
            return f"{name or 'the model'} {reason}"
    return None


def runs_as_written(module: nn.Module, owner: type[nn.Module] | None = None) -> bool:
    """Whether forward and backward of a module may be replaced by what its weights say: `unusual` finds nothing, and no
    hook sees its gradients."""
    return unusual(module, owner) is None and not any(getattr(module, name) for name in BACKWARD_HOOKS)


class Watch:
    """Notices that modules are no longer what they were: replaced, wrapped, hooked, moved, or with other options.

    New values in the same tensors are no change. `changed` takes a few microseconds a layer, and may say True where
    nothing that matters was changed.

    Args:
        model: all of its modules are watched.
        weights: what was read of them; kept alive, so that no other tensor can get the address of one.
    """

    def __init__(self, model: nn.Module, weights: Iterable[Tensor]):
        modules = list(model.modules())
        self._alive = [x.detach() for x in weights]
        self._modules, self._types = modules, list(map(type, modules))
        self._attributes = list(map(vars, modules))
        self._sizes = list(map(len, self._attributes))
        self._hooks = [hooks for module in modules for hooks in _hooks(module)[:2]] + list(GLOBAL_HOOKS)
        self._parents = [module._modules for module in modules if module._modules]
        self._children = self._current_children()
        parameters = [(module._parameters, name) for module in modules for name in module._parameters]
        self._holders, self._names = [holder for holder, _ in parameters], [name for _, name in parameters]
        self._holders_sizes = list(map(len, self._holders))
        self._addresses = self._current_addresses()
        self._owners: list[dict[str, Any]] = []
        self._fields: list[str] = []
        for module in modules:
            if type(module) in LEAVES and not isinstance(module, nn.Embedding):
                continue
            for name, value in vars(module).items():
                if (
                    name != "training"
                    and not name.startswith("_")
                    and isinstance(value, bool | int | float | str | None)
                ):
                    self._owners.append(vars(module))
                    self._fields.append(name)
        self._values = list(map(dict.get, self._owners, self._fields))

    def changed(self) -> bool:
        """Whether what was read may no longer be what the model computes."""
        return not (
            list(map(len, self._attributes)) == self._sizes
            and not any(self._hooks)
            and self._current_children() == self._children
            and list(map(type, self._modules)) == self._types
            and list(map(len, self._holders)) == self._holders_sizes
            and self._current_addresses() == self._addresses
            and list(map(dict.get, self._owners, self._fields)) == self._values
        )

    def _current_children(self) -> list[list[nn.Module | None]]:
        return list(map(list, map(dict.values, self._parents)))

    def _current_addresses(self) -> list[tuple[int, torch.dtype, torch.Size] | None]:
        found = map(dict.get, self._holders, self._names)
        return [None if x is None else (x.data_ptr(), x.dtype, x.shape) for x in found]


def _hooks(module: nn.Module) -> tuple[dict[int, Any], ...]:
    return (module._forward_hooks, module._forward_pre_hooks, *GLOBAL_HOOKS)
