"""Whether a row computes what it should: nothing is timed before it does."""

import math
from typing import Any

import torch
from torch import Tensor

ERROR_LIMIT = 1e-3  # relative to max|·|; far above float32's rounding here (1e-6 to 3e-4), far below a wrong formula
SHORT_ERROR_LIMIT = 0.05  # of kernels that multiply bfloat16 or float16
HARD_ERROR_LIMIT = 0.5


def judge(got: dict[str, Tensor], wanted: dict[str, Tensor], limit: float) -> dict[str, Any]:
    """How far tensors are from what they should be: a row's `status`, `reason`, `error` and `worst`."""
    errors: dict[str, float] = {}
    for name, want in wanted.items():
        have = got[name]
        if have.shape != want.shape:
            reason = f"{name} has shape {list(have.shape)} and should have {list(want.shape)}"
            return {"status": "wrong", "reason": reason, "worst": name}
        size = max(want.abs().max().item(), torch.finfo(torch.float32).tiny)
        errors[name] = (have.double() - want).abs().max().item() / size
        if not math.isfinite(errors[name]):
            return {"status": "wrong", "reason": f"{name} is not finite", "worst": name}
    worst = max(errors, key=lambda name: errors[name])
    found: dict[str, Any] = {"status": "timed", "reason": None, "worst": worst, "error": errors[worst]}
    if errors[worst] > limit:
        reason = f"the error of {worst} is {errors[worst]:.1e}, above {limit:.1e}"
        found |= {"status": "wrong", "reason": reason}
    return found


def error_limit(dtype: torch.dtype, device: torch.device) -> float:
    """The largest error at which a row is still timed: ERROR_LIMIT, plus the rounding of results in a short dtype.

    On a GPU, kernels for short dtypes multiply in them, as users choose them for: that loses a percent or so.
    """
    if dtype == torch.float64:
        return 1e-9  # to tell a row that works in float32 although its inputs are float64
    if dtype == torch.float32:
        return ERROR_LIMIT
    return ERROR_LIMIT + torch.finfo(dtype).eps if device.type == "cpu" else SHORT_ERROR_LIMIT
