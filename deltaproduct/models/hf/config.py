"""ModelConfig as a configuration of transformers'."""

from dataclasses import fields
from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME

from deltaproduct.errors import UsageError, did_you_mean
from deltaproduct.models.config import MODEL_FIELDS, ModelConfig, every_option, is_earlier, own_values
from deltaproduct.models.hf.manifest import check_against_manifest
from deltaproduct.models.sequence_model import MODEL_TYPE

OWN = (*MODEL_FIELDS, "mixer")  # beside vocab_size and num_labels
# What transformers takes or writes beside a class's own fields, in this version or an earlier one. (It would also take
# the parameters of `generate`, and drop them without a word.)
THEIRS = {
    *(f.name for f in fields(PreTrainedConfig)),
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "gradient_checkpointing",
    "model_type",
    "name_or_path",
    "output_attentions",
    "per_layer_config",
    "quantization_config",
    "sep_token_id",
    "task_specific_params",
    "tie_last_hidden_states",
    "tokenizer_class",
    "torch_dtype",
    "transformers_weights",
    "use_bfloat16",
}
# Of `from_pretrained`, for the hub, which it does not take out by itself.
HUB = {"adapter_kwargs", "code_revision", "gguf_file", "revision", "trust_remote_code", "weights_only"}


class DeltaProductConfig(PreTrainedConfig):
    """`ModelConfig`'s fields, as attributes of the same names, beside those that transformers adds to every model.

    `mixer` is what `ModelConfig.to_dict` has there: a mapping with the mixer's name and options, or a list of one for
    each layer. Its options can be given, read and set by their names too (`config.num_heads`); they are kept in `mixer`
    alone, and one in which layers differ can be read only there. `num_attention_heads` is `num_heads`.

    Args:
        vocab_size: tokens; the default is that of text in bytes and a document token.
        num_labels: as many, since a language model labels every position with the next token.
        use_cache: return a `DeltaProductCache` unless a call says otherwise, except in training.
        bos_token_id, eos_token_id, pad_token_id: what `generate` starts, stops and pads with.
        kwargs: what `ModelConfig.build` takes, and `PreTrainedConfig`'s fields.

    Raises:
        UsageError: a value is impossible, num_labels differs from vocab_size, or neither the model nor its mixer has
            such a field.
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
        for theirs, ours in self.attribute_map.items():
            if theirs in kwargs and kwargs.setdefault(ours, kwargs[theirs]) != kwargs[theirs]:
                values = f"{kwargs[theirs]} and {kwargs[ours]}"
                raise UsageError(f"{theirs} and {ours} are one field, and they are set to {values}.")
            kwargs.pop(theirs, None)
        own = {name: kwargs.pop(name) for name in (*OWN, *every_option()) if name in kwargs}
        _check_known(kwargs)
        config = ModelConfig.build(vocab_size, vocab_size if num_labels is None else num_labels, **own)
        _check_is_language_model(config.vocab_size, config.num_labels)
        for name, value in config.to_dict().items():
            if name != "num_labels":
                setattr(self, name, value)
        self.use_cache = use_cache
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        super().__init__(**kwargs)

    # PreTrainedConfig is a dataclass and would compare its own fields alone.
    __eq__ = PreTrainedConfig.__eq__

    def __getattr__(self, name: str) -> Any:
        name = self.attribute_map.get(name, name)
        found = [options[name] for options in self._options() if name in options] if name in every_option() else []
        if not found:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.")
        if any(value != found[0] for value in found):
            raise AttributeError(f"The layers differ in {name}; `mixer` has each one's.")
        return found[0]

    def __setattr__(self, name: str, value: Any) -> None:
        name = self.attribute_map.get(name, name)
        if name not in every_option():
            return super().__setattr__(name, value)
        having = [options for options in self._options() if name in options]
        if not having:
            raise UsageError(f"No mixer of this model has an option {name!r}.")
        for options in having:
            options[name] = value
        return None

    def _options(self) -> list[dict[str, Any]]:
        """The mapping of each mixer in `mixer`."""
        mixer = self.__dict__.get("mixer")
        return [x for x in (mixer if isinstance(mixer, list) else [mixer]) if isinstance(x, dict)]

    @property
    def num_labels(self) -> int:
        """Outputs per position: as many as there are tokens, also after `resize_token_embeddings`."""
        return self.vocab_size

    @num_labels.setter
    def num_labels(self, value: int) -> None:
        _check_is_language_model(self.vocab_size, value)

    def model_config(self) -> ModelConfig:
        """The configuration of the `SequenceModel` that this one describes; `UsageError` if it is impossible."""
        config = ModelConfig.from_dict({name: getattr(self, name) for name in ("vocab_size", "num_labels", *OWN)})
        _check_is_language_model(config.vocab_size, config.num_labels)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `SequenceModel.from_pretrained` reads them too."""
        return super().to_dict() | {"num_labels": self.num_labels}

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing: it would have transformers copy this package's source into the folders that it saves."""

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """What `from_pretrained` reads; `UsageError` if a folder's manifest says that it was changed."""
        name = kwargs.get("_configuration_file") or CONFIG_NAME
        check_against_manifest(
            pretrained_model_name_or_path, kwargs.get("subfolder"), is_read=lambda file: file == name
        )
        return super().get_config_dict(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """From JSON's values, also those that earlier versions wrote, with the options of all mixers beside the model's
        fields; `UsageError` if they describe another architecture, or there is no such field."""
        kind = config_dict.get("model_type", MODEL_TYPE)
        if kind != MODEL_TYPE:
            raise UsageError(f"This checkpoint is of model type {kind!r}, not {MODEL_TYPE!r}.")
        if place := kwargs.get("name_or_path"):  # AutoConfig has read the file by itself and says where
            check_against_manifest(place, is_read=lambda file: file == CONFIG_NAME)
        config_dict = _in_this_layout(config_dict)
        also_unused = kwargs.pop("return_unused_kwargs", False)
        config, unused = super().from_dict(config_dict, return_unused_kwargs=True, **kwargs)
        if also_unused:  # whoever asks for them has a use for them: `from_pretrained` of a model
            return config, unused
        _check_known({name: value for name, value in unused.items() if name not in HUB})
        return config


def _check_known(given: dict[str, Any]) -> None:
    for name in given:
        if name not in THEIRS and not name.startswith("_"):  # the others are transformers' own notes
            own = (*OWN, *every_option(), "use_cache", "bos_token_id", "eos_token_id", "pad_token_id")
            raise UsageError(f"A configuration of this model has no field {name!r}{did_you_mean(name, own)}.")


def _in_this_layout(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration's values with the options in `mixer`."""
    if not is_earlier(values):
        for name in values:
            if name in every_option():
                raise UsageError(f"A configuration of this model has no field {name!r} beside its mixer, which has it.")
        return values
    own = own_values(values)
    vocabulary = {"vocab_size": own.get("vocab_size", 257), "num_labels": own.get("vocab_size", 257)}
    return {k: v for k, v in values.items() if k not in own} | ModelConfig.from_dict(vocabulary | own).to_dict()


def _check_is_language_model(vocab_size: int, num_labels: int) -> None:
    if vocab_size != num_labels:
        raise UsageError(
            f"A language model predicts its own tokens, but this one has vocab_size={vocab_size} and "
            f"num_labels={num_labels}; SequenceModel.from_pretrained loads such a model."
        )
