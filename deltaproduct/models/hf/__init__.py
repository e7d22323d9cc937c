"""SequenceModel as one of transformers' models: importing this package registers it under model_type "deltaproduct".

    import deltaproduct.models.hf
    model = AutoModelForCausalLM.from_pretrained(folder)  # one that SequenceModel.save_pretrained wrote goes as well

It needs transformers 5.17 or newer, which nothing else of the library does.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

try:
    from deltaproduct.models.hf.cache import DeltaProductCache
    from deltaproduct.models.hf.config import DeltaProductConfig
    from deltaproduct.models.hf.model import DeltaProductForCausalLM, DeltaProductModel
except RuntimeError as e:  # transformers imports what it finds, and no model of it works beside a broken one
    raise ImportError(
        f"transformers' models cannot be imported here ({e}). A torchvision of another PyTorch than the installed one "
        "does that: uninstall it, or install the one that belongs to this PyTorch."
    ) from e

AutoConfig.register(DeltaProductConfig.model_type, DeltaProductConfig, exist_ok=True)
AutoModel.register(DeltaProductConfig, DeltaProductModel, exist_ok=True)
AutoModelForCausalLM.register(DeltaProductConfig, DeltaProductForCausalLM, exist_ok=True)
# The Auto classes find a class by what is registered above. The Trainer's label smoothing, which has to know that
# labels are shifted, the pipelines, the server and the model cards go by this name.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[DeltaProductConfig.model_type] = DeltaProductForCausalLM.__name__

__all__ = ["DeltaProductCache", "DeltaProductConfig", "DeltaProductForCausalLM", "DeltaProductModel"]
