"""The backend "triton": GPU kernels. Nothing here imports Triton before it is used."""

import os
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

INSTALLED = find_spec("triton") is not None  # asked once: it is too slow for every token
MAX_STEPS, MAX_KEY_DIM = 32, 256  # of what a chunk's accumulators leave room for
OLDEST = (8, 0)  # compute capability: bfloat16 on tensor cores


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """None if the kernels can serve, else the reason why not. Triton's interpreter, for tests, needs no GPU."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted:
        if not torch.cuda.is_available():
            return "it needs a GPU and PyTorch sees none"
        if device.type != "cuda":
            return f"it computes on a GPU, not on {device.type}"
        if (found := torch.cuda.get_device_capability(device)) < OLDEST:
            return f"it needs compute capability {OLDEST[0]}.{OLDEST[1]}, and this GPU has {found[0]}.{found[1]}"
    if not INSTALLED:
        return "Triton is not installed"
    return "it computes in float32, not in float64" if dtype == torch.float64 else None


def unsupported_size_reason(steps: int, key_dim: int) -> str | None:
    """The same, by N and K."""
    if steps > MAX_STEPS:
        return f"it takes at most {MAX_STEPS} Householder steps per token, not {steps}"
    return f"it takes keys of at most {MAX_KEY_DIM}, not {key_dim}" if key_dim > MAX_KEY_DIM else None


@dataclass(frozen=True)
class Kernels:
    """The operator in kernels, which are imported when they first run.

    Attributes:
        precise: operands keep all their bits.
    """

    precise: bool

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None,
        cu_seqlens: Tensor | None, scale: float, qk_l2norm: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """See `operator.fused`."""
        from deltaproduct.ops.triton import operator

        return operator.fused(q, k, v, beta, g, initial_state, cu_seqlens, scale, qk_l2norm, precise=self.precise)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, scale: float,
        qk_l2norm: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """See `operator.decode`."""
        from deltaproduct.ops.triton import operator

        return operator.decode(q, k, v, beta, g, state, scale, qk_l2norm, precise=self.precise)


def step_inplace(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, scale: float, qk_l2norm: bool
) -> Tensor:
    """See `operator.triton_step_inplace`."""
    from deltaproduct.ops.triton import operator

    return operator.triton_step_inplace(q, k, v, beta, g, state, scale, qk_l2norm)
