"""The recurrence: one operator, several backends, one specification."""

from deltaproduct.ops.dispatch import (
    BACKENDS,
    delta_product,
    delta_product_states,
    delta_product_step,
    resolve_backend,
)

__all__ = ["BACKENDS", "delta_product", "delta_product_states", "delta_product_step", "resolve_backend"]
