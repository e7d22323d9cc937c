"""Which precision a mixer's states have and where they lie: both follow the mixer's inputs x, not its weights.

Weights may be quantised, offloaded or wrapped by another library, so that they say little about what is computed.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from deltaproduct.errors import UsageError
from deltaproduct.ops.inputs import DTYPES


def input_options(
    module: nn.Module, dtype: torch.dtype | None, device: torch.device | str | None
) -> tuple[torch.dtype, torch.device]:
    """The dtype and device of x: the given ones, and for None those of the module's floating-point parameters.

    Parameters on "meta" say nothing of x's device: offloading keeps them there until they are used. Where no parameter
    helps, as in a module whose weights are quantised, PyTorch's defaults are taken.

    Raises:
        UsageError: x cannot have this dtype.
    """
    floating = [p for p in module.parameters() if p.is_floating_point()] if dtype is None or device is None else []
    if dtype is None:
        dtype = floating[0].dtype if floating else torch.get_default_dtype()
    if dtype not in DTYPES:
        raise UsageError(f"Inputs of {dtype} have no state; use float64, float32, bfloat16 or float16.")
    if device is None:
        device = next((p.device for p in floating if not p.is_meta), torch.get_default_device())
    return dtype, torch.device(device)


def device_of(module: nn.Module) -> torch.device:
    """Where a module takes its inputs: its weights' device. The CPU where it has none to go by, as with some
    quantisation, or has them elsewhere until it uses them, as with offloading."""
    return next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))


def recurrent_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what is carried through a recurrence, for x of `dtype`: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def copied(state: Any) -> Any:
    """The same state in tensors of its own."""
    return tree_map(lambda s: s.clone() if isinstance(s, Tensor) else s, state)
