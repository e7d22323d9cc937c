"""SequenceModel as one of transformers' models: importing this package registers it under model_type "deltaproduct".

    import deltaproduct.models.hf
    model = AutoModelForCausalLM.from_pretrained(folder)  # one that SequenceModel.save_pretrained wrote goes as well

It needs transformers 5.17 or newer, which nothing else of the library does.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from deltaproduct.models.hf.cache import DeltaProductCache
from deltaproduct.models.hf.config import DeltaProductConfig
from deltaproduct.models.hf.model import DeltaProductForCausalLM, DeltaProductModel

AutoConfig.register(DeltaProductConfig.model_type, DeltaProductConfig, exist_ok=True)
AutoModel.register(DeltaProductConfig, DeltaProductModel, exist_ok=True)
AutoModelForCausalLM.register(DeltaProductConfig, DeltaProductForCausalLM, exist_ok=True)

__all__ = ["DeltaProductCache", "DeltaProductConfig", "DeltaProductForCausalLM", "DeltaProductModel"]
