"""The recurrence: one operator, several backends, one specification."""

from typing import TYPE_CHECKING

from deltaproduct.late import late

if TYPE_CHECKING:
    from deltaproduct.ops.dispatch import (
        BACKENDS,
        delta_product,
        delta_product_states,
        delta_product_step,
        resolve_backend,
    )

__all__ = ["BACKENDS", "delta_product", "delta_product_states", "delta_product_step", "resolve_backend"]

__getattr__, __dir__ = late(
    __name__,
    {
        "dispatch": ("BACKENDS", "delta_product", "delta_product_states", "delta_product_step", "resolve_backend"),
    },
)
