"""ModelConfig as a configuration of transformers'."""

from dataclasses import fields
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from deltaproduct.errors import UsageError
from deltaproduct.models.config import ModelConfig
from deltaproduct.models.sequence_model import MODEL_TYPE


class DeltaProductConfig(PreTrainedConfig):
    """`ModelConfig`'s fields, as attributes of the same names, beside those that transformers adds to every model.

    Args:
        vocab_size: tokens; the default is that of text in bytes and a document token.
        num_labels: as many, since a language model labels every position with the next token.
        use_cache: return a `DeltaProductCache` unless a call says otherwise, except in training.
        bos_token_id, eos_token_id, pad_token_id: what `generate` starts, stops and pads with.
        kwargs: other fields of `ModelConfig`, and `PreTrainedConfig`'s.

    Raises:
        UsageError: a value is impossible, or num_labels differs from vocab_size.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {"num_attention_heads": "num_heads"}

    def __init__(
        self,
        vocab_size: int = 257,
        num_labels: int | None = None,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ):
        own = {f.name: kwargs.pop(f.name) for f in fields(ModelConfig) if f.name in kwargs}
        labels = vocab_size if num_labels is None else num_labels
        for name, value in _validated(own | {"vocab_size": vocab_size, "num_labels": labels}).to_dict().items():
            if name != "num_labels":
                setattr(self, name, value)
        self.use_cache = use_cache
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        super().__init__(**kwargs)

    # PreTrainedConfig is a dataclass and would compare its own fields alone.
    __eq__ = PreTrainedConfig.__eq__

    @property
    def num_labels(self) -> int:
        """Outputs per position: as many as there are tokens, also after `resize_token_embeddings`."""
        return self.vocab_size

    @num_labels.setter
    def num_labels(self, value: int) -> None:
        _check_is_language_model(self.vocab_size, value)

    def model_config(self) -> ModelConfig:
        """The configuration of the `SequenceModel` that this one describes; `UsageError` if it is impossible."""
        return _validated({f.name: getattr(self, f.name) for f in fields(ModelConfig)})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `SequenceModel.from_pretrained` reads them too."""
        return super().to_dict() | {"num_labels": self.num_labels}

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing: it would have transformers copy this package's source into the folders that it saves."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """From JSON's values; `UsageError` if they describe another architecture."""
        kind = config_dict.get("model_type", MODEL_TYPE)
        if kind != MODEL_TYPE:
            raise UsageError(f"This checkpoint is of model type {kind!r}, not {MODEL_TYPE!r}.")
        return super().from_dict(config_dict, **kwargs)


def _validated(values: dict[str, Any]) -> ModelConfig:
    config = ModelConfig.from_dict(values)
    _check_is_language_model(config.vocab_size, config.num_labels)
    return config


def _check_is_language_model(vocab_size: int, num_labels: int) -> None:
    if vocab_size != num_labels:
        raise UsageError(
            f"A language model predicts its own tokens, but this one has vocab_size={vocab_size} and "
            f"num_labels={num_labels}; SequenceModel.from_pretrained loads such a model."
        )
