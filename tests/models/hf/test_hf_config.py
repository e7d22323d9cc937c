"""models.hf: a configuration takes its own fields and transformers', and no others."""

import json

import pytest
from torch import float32

from deltaproduct.errors import UsageError
from deltaproduct.models import ModelConfig

pytest.importorskip("transformers", minversion="5.17")

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging

from deltaproduct.models.hf import DeltaProductConfig, DeltaProductForCausalLM

pytestmark = pytest.mark.neighbours

logging.set_verbosity_error()
logging.disable_progress_bar()

VOCAB = 7
TINY = {"hidden_size": 16, "num_heads": 2, "head_dim": 8}
# name → what was probably meant
MISSPELT = {
    "num_housholder": "num_householder", "allow_neg_eigvals": "allow_neg_eigval", "hiden_size": "hidden_size",
    "use_cahce": "use_cache", "eos_tokn_id": "eos_token_id", "tie_word_embedding": "tie_word_embeddings",
}  # fmt: skip


def refusal(match: str, call, *args, **kwargs) -> None:
    with pytest.raises(UsageError, match=match) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", MISSPELT)
def test_a_misspelt_field_is_refused_wherever_it_is_set(name, tmp_path):
    match = f"no field '{name}' .did you mean '{MISSPELT[name]}'"
    refusal(match, DeltaProductConfig, VOCAB, **{name: 3})
    refusal(match, AutoConfig.for_model, "deltaproduct", vocab_size=VOCAB, **{name: 3})
    config = DeltaProductConfig(VOCAB, **TINY)
    refusal(match, DeltaProductConfig.from_dict, config.to_dict() | {name: 3})
    config.save_pretrained(tmp_path)
    refusal(match, AutoConfig.from_pretrained, tmp_path, **{name: 3})
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {name: 3}))
    refusal(match, AutoConfig.from_pretrained, tmp_path)


def test_fields_that_nobody_knows():
    refusal("no field 'xyzzy'[.]", DeltaProductConfig, VOCAB, xyzzy=1)
    refusal("no field 'temperature'", DeltaProductConfig, VOCAB, temperature=0.5)  # of generate
    refusal("num_attention_heads and num_heads are one field", DeltaProductConfig, VOCAB, num_heads=2,
            num_attention_heads=4)  # fmt: skip
    assert DeltaProductConfig(VOCAB, num_attention_heads=2).num_heads == 2
    assert DeltaProductConfig(VOCAB, num_attention_heads=2, num_heads=2).model_config().mixer.num_heads == 2
    refusal("num_heads must be", DeltaProductConfig, VOCAB, num_attention_heads=0)


def test_what_transformers_writes_is_taken(tmp_path):
    theirs = {
        "architectures": ["DeltaProductForCausalLM"], "torch_dtype": "float32", "transformers_version": "5.17.0",
        "_name_or_path": "somewhere", "problem_type": None, "quantization_config": {"quant_method": "none"},
        "output_hidden_states": True, "return_dict": True, "chunk_size_feed_forward": 0, "auto_map": {},
        "name_or_path": "there",
    }  # fmt: skip
    config = DeltaProductConfig(VOCAB, **TINY, **theirs)
    assert config.dtype == float32 and config.output_hidden_states and config.architectures == theirs["architectures"]
    assert DeltaProductConfig(VOCAB, **PreTrainedConfig().to_dict()).vocab_size == VOCAB
    model = DeltaProductForCausalLM(DeltaProductConfig(VOCAB, **TINY, bos_token_id=1, use_cache=False))
    model.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path, num_householder=3, trust_remote_code=True)
    assert (again.num_householder, again.bos_token_id, again.use_cache) == (3, 1, False)
    config, unused = AutoConfig.from_pretrained(tmp_path, return_unused_kwargs=True, foo=1)
    assert unused == {"foo": 1} and config.model_config() == ModelConfig.build(VOCAB, VOCAB, **TINY)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", output_hidden_states=True)
    assert loaded.config.output_hidden_states


def test_options_are_the_mixers_own():
    """They can be given, read and set by name, and lie in `mixer` alone; one that the mixer has not is refused."""
    config = DeltaProductConfig(VOCAB, mixer="mamba", expand=4)
    assert config.mixer == {"name": "mamba", "expand": 4, "ssm_state_size": 16, "time_step_rank": None, "conv_size": 4,
                            "allow_neg_eigval": True}  # fmt: skip
    assert config.expand == 4 and "expand" not in vars(config) and "expand" not in config.to_dict()
    config.expand = 3
    assert config.mixer["expand"] == 3 and config.model_config().mixer.expand == 3
    assert not hasattr(config, "num_heads") and not hasattr(config, "num_attention_heads")
    refusal("No mixer of this model has an option 'num_heads'", setattr, config, "num_heads", 4)
    refusal("'num_householder' is no field of a model and no option of the mixer lstm", DeltaProductConfig, VOCAB,
            mixer="lstm", num_householder=2)  # fmt: skip
    refusal("no option of any of the mixers lstm, gru", DeltaProductConfig, VOCAB, mixer=["lstm", "gru"], expand=2)
    refusal("num_heads is given beside the mixer", DeltaProductConfig, VOCAB, mixer={"name": "gru", "num_heads": 2},
            num_heads=4)  # fmt: skip


def test_a_hybrid_says_what_its_layers_share():
    config = DeltaProductConfig(VOCAB, mixer=["deltaproduct", {"name": "attention", "num_heads": 2}], head_dim=8)
    assert config.num_hidden_layers == 2 and config.head_dim == 8 and config.num_householder == 2
    with pytest.raises(AttributeError, match="The layers differ in num_heads"):
        _ = config.num_heads
    config.num_attention_heads = 1
    assert [options["num_heads"] for options in config.mixer] == [1, 1] and config.num_heads == 1
    again = DeltaProductConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict() and again.model_config() == config.model_config()


def test_the_layout_of_earlier_versions_is_read(tmp_path):
    """All options of all mixers beside the model's fields, and what differs in single layers apart."""
    flat = {"model_type": "deltaproduct", "architectures": ["DeltaProductForCausalLM"], "vocab_size": VOCAB,
            "num_labels": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "mixer": "deltanet", "num_heads": 2,
            "head_dim": 8, "num_householder": 2, "feature_map": "elu", "use_cache": False, "bos_token_id": 1,
            "layer_overrides": {"1": {"mixer": "attention", "num_kv_heads": 1}}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(flat))
    config = AutoConfig.from_pretrained(tmp_path)
    attention = {"name": "attention", "num_heads": 2, "head_dim": 8, "num_kv_heads": 1}
    assert config.model_config() == ModelConfig.build(
        VOCAB, VOCAB, hidden_size=16, mixer=["deltanet", attention], defaults={"num_heads": 2, "head_dim": 8}
    )
    assert (config.use_cache, config.bos_token_id) == (False, 1) and not hasattr(config, "layer_overrides")
    (tmp_path / "config.json").write_text(json.dumps(flat | {"num_haeds": 2}))
    refusal("no field 'num_haeds' .did you mean 'num_heads'", AutoConfig.from_pretrained, tmp_path)
