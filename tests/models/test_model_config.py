"""A configuration's options are its mixers': by record, by name, for hybrids, and as earlier versions wrote them."""

import dataclasses
import json
import pickle
import warnings
from functools import partial
from typing import Any

import pytest

from deltaproduct.errors import UsageError
from deltaproduct.layers import AttentionOptions, DeltaProductOptions, LSTMOptions, MambaOptions
from deltaproduct.models import ModelConfig

V = 5


def refused(call, match):
    with pytest.raises(UsageError, match=match) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_name_or_a_record_or_fields_by_name():
    assert (
        ModelConfig(V, V) == ModelConfig(V, V, mixer="deltaproduct") == ModelConfig(V, V, mixer=DeltaProductOptions())
    )
    built = ModelConfig.build(V, 3, mixer="lstm", num_heads=2, hidden_size=8)
    assert built == ModelConfig(V, 3, hidden_size=8, mixer=LSTMOptions(num_heads=2))
    assert built == ModelConfig.build(vocab_size=V, num_labels=3, mixer=LSTMOptions(), num_heads=2, hidden_size=8)
    assert built.mixer.head_dim == 16 and not built.is_hybrid and built.mixer_names == "lstm"
    assert hash(built) == hash(pickle.loads(pickle.dumps(built))) and not hasattr(LSTMOptions(), "num_householder")


def test_what_neither_the_model_nor_its_mixer_has_is_refused():
    """The case of the issue first."""
    for make in (ModelConfig.build, ModelConfig):
        for given, says in (
            ({"mixer": "lstm", "num_householder": 4}, "'num_householder' is no field .* no option of the mixer lstm"),
            ({"mixer": "gru", "num_haeds": 4}, r"\(did you mean 'num_heads'\?\)"),
            ({"hiden_size": 4}, r"\(did you mean 'hidden_size'\?\)"),
            ({"mixer": ["lstm", "gru"], "expand": 4}, "no option of any of the mixers lstm, gru"),
        ):
            refused(partial(make, V, V, **given), says)
    with pytest.raises(TypeError, match="num_householder"):
        LSTMOptions(num_householder=4)
    refused(lambda: ModelConfig.build(V, V).changed(rope_theta=1.0), "no option of the mixer deltaproduct")
    refused(lambda: ModelConfig(V, V, mixer={"num_heads": 4}), "need its name")
    refused(lambda: ModelConfig(V, V, mixer=7), "mixer must be a mixer's name or its options")


def test_hybrids():
    config = ModelConfig.build(
        V,
        V,
        mixer=["deltaproduct", MambaOptions(expand=3), {"name": "attention", "num_heads": 2}],
        num_heads=8,
        head_dim=4,
    )
    assert config.num_hidden_layers == 3 and config.is_hybrid and config.mixer_names == "deltaproduct,mamba,attention"
    assert config.mixers == config.mixer == (
        DeltaProductOptions(num_heads=8, head_dim=4), MambaOptions(expand=3), AttentionOptions(num_heads=2, head_dim=4)
    )  # fmt: skip
    assert config.layer(1) == ModelConfig(V, V, num_hidden_layers=3, mixer=MambaOptions(expand=3))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    refused(lambda: config.changed(num_hidden_layers=4), "mixer has 3 entries for num_hidden_layers=4")
    deeper = config.changed(mixer=["gru"] * 2, intermediate_size=[4, 8])
    assert deeper.mixer.name == "gru" and deeper.num_hidden_layers == 2 and deeper.mlp_size == 8
    assert [(layer.mlp_size, count) for layer, count in deeper.kinds_of_layers()] == [(4, 1), (8, 1)]


def test_entries_that_are_all_equal_are_one():
    one = ModelConfig(V, V, num_hidden_layers=2, mixer="gru", intermediate_size=8)
    assert ModelConfig(V, V, num_hidden_layers=2, mixer=("gru", "gru"), intermediate_size=(8, 8)) == one
    assert one.kinds_of_layers() == [(one, 2)] and one.layer(1) is one and one.mixers == (one.mixer,) * 2


def test_changed_keeps_what_another_mixer_has_too():
    config = ModelConfig.build(V, V, num_heads=2, allow_neg_eigval=False, beta_bias_init=3.0)
    mamba = config.changed(mixer="mamba", hidden_size=32)
    assert mamba.mixer == MambaOptions(allow_neg_eigval=False) and mamba.hidden_size == 32
    assert config.changed(mixer="deltanet").mixer.beta_bias_init == 3.0
    assert config.changed(mixer=LSTMOptions()).mixer == LSTMOptions()
    assert config.changed(num_heads=4).mixer == dataclasses.replace(config.mixer, num_heads=4)


def test_defaults_are_for_whichever_mixer_has_them():
    recipe = {"hidden_size": 8, "num_heads": 2, "beta_bias_init": 4.0, "mixer": "gated_deltanet"}
    assert ModelConfig.build(V, V, defaults=recipe).mixer.beta_bias_init == 4.0
    assert ModelConfig.build(V, V, defaults=recipe, mixer="mamba", expand=3).mixer == MambaOptions(expand=3)
    assert ModelConfig.build(V, V, defaults=recipe, mixer="lstm", num_heads=4).mixer.num_heads == 4


def test_differences_are_told_by_field_and_by_option():
    one = ModelConfig.build(V, V, mixer=["deltaproduct", "attention"], num_heads=2)
    assert one.differences(one) == {}
    assert one.differences(one.changed(num_heads=4, hidden_size=8)) == {"hidden_size": (64, 8), "num_heads": (2, 4)}
    assert one.differences(one.changed(mixer=["gla", "attention"])) == {
        "mixer": ("deltaproduct,attention", "gla,attention")
    }  # fmt: skip


FLAT: dict[str, Any] = {
    "vocab_size": V,
    "num_labels": V,
    "hidden_size": 8,
    "num_heads": 2,
    "head_dim": 4,
    "num_householder": 3,
}
FLAT |= {"mixer": "deltaproduct", "expand": 3, "rope_theta": 7.0, "feature_map": "elu", "intermediate_size": 16}


def test_the_layout_of_earlier_versions():
    """They wrote every mixer's options; those of the others are left out."""
    assert ModelConfig.from_dict(FLAT) == ModelConfig.build(
        V, V, hidden_size=8, num_heads=2, head_dim=4, num_householder=3, intermediate_size=16
    )
    assert ModelConfig.from_dict(FLAT | {"mixer": "lstm", "layer_overrides": {}}).mixer == LSTMOptions(
        num_heads=2, head_dim=4
    )
    overrides = {"0": {"mixer": "attention", "num_heads": 1}, "2": {"num_householder": 1, "intermediate_size": 0}}
    hybrid = ModelConfig.from_dict(FLAT | {"num_hidden_layers": 3, "layer_overrides": overrides})
    heads = {"num_heads": 2, "head_dim": 4}
    assert hybrid.mixer == (
        AttentionOptions(num_heads=1, head_dim=4, rope_theta=7.0),
        DeltaProductOptions(num_householder=3, **heads),
        DeltaProductOptions(num_householder=1, **heads),
    )
    assert hybrid.intermediate_size == (16, 16, 0)
    assert ModelConfig.from_dict(FLAT | {"layer_overrides": {"0": {"norm_eps": 1e-5}}}) == ModelConfig.from_dict(FLAT)
    refused(lambda: ModelConfig.from_dict(FLAT | {"layer_overrides": {"0": {"norm_eps": 1e-3}}}), "another norm_eps")
    refused(lambda: ModelConfig.from_dict(FLAT | {"nonsense": 1}), "no field 'nonsense'")


def test_the_earlier_call_works_with_a_warning():
    config = ModelConfig.build(V, V, hidden_size=8, num_heads=2)
    with pytest.warns(DeprecationWarning, match="ModelConfig.build takes them by name"):
        assert ModelConfig(V, V, hidden_size=8, num_heads=2) == config
    with pytest.warns(DeprecationWarning):
        flat = ModelConfig(V, num_labels=V, num_hidden_layers=2, num_heads=2, layer_overrides={"1": {"mixer": "lstm"}})
    assert flat == ModelConfig.build(V, V, mixer=["deltaproduct", "lstm"], num_heads=2)
    with pytest.warns(DeprecationWarning, match=r"ModelConfig.num_heads is now ModelConfig.mixer.num_heads"):
        assert config.num_heads == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not hasattr(config, "rope_theta") and not hasattr(flat, "_anything")
        ModelConfig(V, V, mixer="lstm")


def test_changed_takes_every_field_of_the_model():
    config = ModelConfig(V, V).changed(
        vocab_size=11, num_labels=11, hidden_size=8, tie_word_embeddings=True, num_heads=2
    )
    assert (config.vocab_size, config.num_labels, config.hidden_size, config.mixer.num_heads) == (11, 11, 8, 2)
