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
    assert DeltaProductConfig(VOCAB, num_attention_heads=2, num_heads=2).model_config().num_heads == 2
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
    assert unused == {"foo": 1} and config.model_config() == ModelConfig(VOCAB, VOCAB, **TINY)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", output_hidden_states=True)
    assert loaded.config.output_hidden_states
