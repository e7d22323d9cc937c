"""The model of this checkpoint for transformers: the classes of the installed Python package deltaproduct.

`save_pretrained` puts this file into every folder; `trust_remote_code=True` runs it where nobody has imported
deltaproduct.models.hf before.
"""

try:
    from deltaproduct.models.hf import DeltaProductConfig, DeltaProductForCausalLM, DeltaProductModel
except ImportError as e:
    raise ImportError(
        "This checkpoint needs the Python package deltaproduct, which defines its model: install it together with its "
        f"extra [lm] and try again ({e})."
    ) from e

__all__ = ["DeltaProductConfig", "DeltaProductForCausalLM", "DeltaProductModel"]
