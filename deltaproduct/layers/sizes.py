"""Checks of the sizes that mixers are built with: each message names the field."""

import math

from deltaproduct.errors import UsageError


def require_positive(**values: float) -> None:
    """`UsageError` unless every value is above 0; they are given under their fields' names."""
    for name, value in values.items():
        if not value > 0:
            raise UsageError(f"{name} must be positive, not {value}.")


def value_dim(head_dim: int, expand_v: float) -> int:
    """V = head_dim · expand_v; `UsageError` unless it is a whole number of at least 1."""
    size = head_dim * expand_v
    if not math.isfinite(size) or round(size) < 1 or abs(size - round(size)) > 1e-6:
        raise UsageError(f"head_dim={head_dim} times expand_v={expand_v} is not a whole number of at least 1.")
    return round(size)
