"""The optimiser of a task's checkpoint by earlier versions, in one file of safetensors: read, never written."""

from pathlib import Path

import torch
from torch import Tensor

from deltaproduct.errors import UsageError
from deltaproduct.models.weights import read_tensors
from deltaproduct.training.checkpoint import COUNTED, MOMENTS


def read_earlier_optimizer(path: Path, optimizer: torch.optim.Optimizer, step: int) -> dict[int, dict[str, Tensor]]:
    """AdamW's state of every parameter after `step` steps; `UsageError` if the file holds anything else."""
    tensors, parameters = read_tensors(path), [p for group in optimizer.param_groups for p in group["params"]]
    wanted = {f"{i}.{key}": p for i, p in enumerate(parameters) for key in ("step", *MOMENTS)} if step else {}
    if differing := sorted(wanted.keys() ^ tensors.keys()):
        what = f"{'lacks' if differing[0] in wanted else 'has'} {differing[0]}"
        raise UsageError(f"{path} is not the state of this run's optimiser after step {step}: it {what}.")
    state: dict[int, dict[str, Tensor]] = {}
    for name, parameter in wanted.items():
        index, key = name.split(".")
        x = tensors[name]
        shape, dtype = (parameter.shape, parameter.dtype) if key in MOMENTS else (torch.Size(), torch.float32)
        if x.shape != shape or x.dtype != dtype:
            raise UsageError(f"{path} has {name} of {x.dtype} {list(x.shape)}; it has to be {dtype} {list(shape)}.")
        if not bool(x.isfinite().all()) or (key != "exp_avg" and bool((x < 0).any())):
            raise UsageError(f"{path} is damaged: {name} has numbers that no optimiser comes to.")
        if key == "step" and x.item() != min(step, COUNTED):
            raise UsageError(f"{path} is not of this checkpoint: {name} is {x.item():g}, and {step} steps are done.")
        state.setdefault(int(index), {})[key] = x
    return state
