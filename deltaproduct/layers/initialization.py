"""Drawing weights: what mixers begin with, and how a module draws all of them a second time.

A module with parameters of its own has PyTorch's `reset_parameters`, which draws those and not its modules', so that
other libraries can call it on every module of a model that was built on "meta". `draw_weights` calls it in the order in
which constructors do.
"""

import torch
from torch import Tensor, nn

from deltaproduct.errors import UsageError


def draw_weights(module: nn.Module) -> None:
    """Draw every parameter in `module` as constructors do: the same numbers from the same state of PyTorch's generator.

    Raises:
        UsageError: a module has parameters and no way of drawing them, or they have no memory.
    """
    children = dict(module.named_children())
    own = list(module.parameters(recurse=False))
    if any(p.is_meta for p in own):
        raise UsageError(
            f'{type(module).__name__} is on "meta", where its weights have no memory; call to_empty(device=…) first.'
        )
    reset = getattr(module, "reset_parameters", None)
    if own and reset is None:
        raise UsageError(f"{type(module).__name__} has parameters and no reset_parameters, which would draw them.")
    after = getattr(module, "drawn_after", None)
    if after not in children and reset is not None:
        reset()
    for name, child in children.items():
        draw_weights(child)
        if name == after and reset is not None:
            reset()


def fill(parameter: Tensor, values: Tensor) -> None:
    """Overwrite a parameter with values [...] of its shape, also one that FSDP has divided over processes."""
    if type(parameter) not in (Tensor, nn.Parameter):
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(parameter, DTensor):
            values = distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
    with torch.no_grad():
        parameter.copy_(values)


@torch.no_grad()
def draw_time_steps(dt_bias: Tensor) -> None:
    """Draw dt_bias such that softplus(dt_bias) is log-uniform in [1e-3, 0.1], as in the Mamba papers."""
    dt = dt_bias.uniform_(-6.907755, -2.302585).exp()
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))


@torch.no_grad()
def draw_rates(a_log: Tensor) -> None:
    """Draw A_log such that exp(A_log) is uniform in [1, 16], as in Mamba-2's code."""
    a_log.uniform_(1, 16).log_()
