"""flash-linear-attention's configurations of DeltaNet, Gated DeltaNet and Gated DeltaProduct, read as ours and back.

The names and defaults are those of version 0.6.0's configuration classes (`fla/models/KIND/configuration_KIND.py`). Its
layers have other defaults (Gated DeltaProduct's layer: two Householder steps, a forget gate, negative eigenvalues; its
configuration: one, none, none), which never count in a checkpoint. Fields that only choose a kernel, a loss or a cache
are left aside. The releases from 0.1 on have the same defaults, but for initializer_range (0.006 until 0.2.1).

A config.json does not say which release wrote it, and one field has changed its meaning: releases before 0.5.0
(delta_net) and 0.3.0 (gated_deltanet) kept `allow_neg_eigval` without using it. It is read as 0.6.0 reads it, and
refused where the other fields are those of such a release.

D hidden size · H query/key heads · HV value heads · K, V sizes of a head.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NoReturn, get_args

from deltaproduct.errors import UsageError
from deltaproduct.layers import (
    AttentionOptions,
    DeltaNetOptions,
    DeltaProduct,
    DeltaProductOptions,
    GatedDeltaNetOptions,
    MixerOptions,
    get_mixer,
)
from deltaproduct.layers.options import option_names
from deltaproduct.models.config import ModelConfig

Layout = Literal["fused", "per-step", "0.2.1"]

ARCHITECTURES = {
    "delta_net": "DeltaNetForCausalLM",
    "gated_deltanet": "GatedDeltaNetForCausalLM",
    "gated_deltaproduct": "GatedDeltaProductForCausalLM",
}

_SHARED: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_short_conv": True,
    "conv_size": 4,
    "allow_neg_eigval": False,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "delta_net": {
        "num_hidden_layers": 24,
        "num_heads": 16,
        "expand_k": 1.0,
        "expand_v": 1.0,
        "use_gate": False,
        **_SHARED,
    },
    "gated_deltanet": {
        "num_hidden_layers": 21,
        "num_heads": 6,
        "head_dim": 256,
        "num_v_heads": None,
        "expand_v": 2.0,
        "use_gate": True,
        **_SHARED,
    },
    "gated_deltaproduct": {
        "num_hidden_layers": 21,
        "num_heads": 6,
        "head_dim": 256,
        "num_v_heads": None,  # an argument of the layer in 0.6.0, which its model does not hand on; see `to_fla_config`
        "expand_v": 2.0,
        "use_output_gate": None,  # None: what the versions of the per-step layout call use_gate
        "use_gate": True,
        "use_forget_gate": False,
        "num_householder": 1,
        **_SHARED,
    },
}
_MAY_BE_NONE = {"hidden_ratio": int, "intermediate_size": int, "num_v_heads": int, "use_output_gate": bool}

# Fields that change what is computed, and the values for which our layer computes the same.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("swish", "silu"),
    "output_gate_activation": ("swish", "silu"),
    "qk_activation": ("silu",),
    "qk_norm": ("l2",),
    "use_beta": (True,),
    "conv_bias": (False,),
    "attnres_block_size": (None,),
    # In configurations of the paper's own repository, for code that was never released.
    "norm_first": (False,),
    "clamp_min": (None,),
    "use_beta_conv1d": (False,),
}

# The release whose model of a kind first uses allow_neg_eigval, and a field that the configuration class of this kind
# has had since then (delta_net's since the next release). A class writes all its fields; each of them has fuse_swiglu.
USES_NEG_EIGVAL = {"delta_net": "0.5.0", "gated_deltanet": "0.3.0"}
_NEG_EIGVAL_MARK = {"delta_net": "attnres_block_size", "gated_deltanet": "use_l2warp"}


def from_fla_config(values: Any) -> ModelConfig:
    """The model that a config.json of flash-linear-attention describes, `values` being its content.

    Raises:
        UsageError: it is of another model type, a value is impossible, or our layers cannot compute what it asks for.
    """
    kind = values.get("model_type") if isinstance(values, Mapping) else None
    if kind not in tuple(ARCHITECTURES):
        raise UsageError(f"model_type {kind!r} cannot be read; known are {', '.join(ARCHITECTURES)}.")
    for name, served in _ONLY.items():
        if (value := values.get(name, served[0])) not in served:
            wanted = " or ".join(map(repr, served))
            raise UsageError(f"The {kind} configuration has {name}={value!r}; this library computes only {wanted}.")
    _check_neg_eigval(kind, values)
    given = {name: _typed(kind, name, values.get(name, default), default) for name, default in DEFAULTS[kind].items()}
    shared = ("vocab_size", "hidden_size", "num_hidden_layers", "norm_eps", "initializer_range", "tie_word_embeddings")
    recurrence = _recurrence(kind, given)
    attention = _attention_layers(values.get("attn"), given["hidden_size"], given["num_hidden_layers"])
    return ModelConfig(
        num_labels=given["vocab_size"],
        intermediate_size=_mlp_size(given),
        mixer=tuple(attention.get(i, recurrence) for i in range(given["num_hidden_layers"]))
        if attention
        else recurrence,
        **{name: given[name] for name in shared},
    )


def _check_neg_eigval(kind: str, values: Mapping[str, Any]) -> None:
    """`UsageError` where a release may have written allow_neg_eigval=True that did not use it."""
    field = _NEG_EIGVAL_MARK.get(kind)
    if values.get("allow_neg_eigval") and field and "fuse_swiglu" in values and field not in values:
        raise UsageError(
            f"The {kind} configuration has allow_neg_eigval=True and no {field}, as if written before version "
            f"{USES_NEG_EIGVAL[kind]} of flash-linear-attention, which did not use it. Set it to false in config.json "
            f"if such a version trained the model; otherwise add {field}."
        )


def _typed(kind: str, name: str, value: Any, default: Any) -> Any:
    """`value` if it has its field's type; whole numbers pass for floats, as JSON may write them so."""
    wanted = _MAY_BE_NONE.get(name, type(default))
    if value is None and name in _MAY_BE_NONE:
        return None
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted or (isinstance(value, float) and not math.isfinite(value)):
        raise UsageError(f"The {kind} configuration has {name}={value!r}, which should be of type {wanted.__name__}.")
    return value


def _mlp_size(given: Mapping[str, Any]) -> int:
    if given["intermediate_size"] is not None:
        return given["intermediate_size"]
    ratio = 4 if given["hidden_ratio"] is None else given["hidden_ratio"]
    return -(-(2 * given["hidden_size"] * ratio // 3) // 256) * 256


def _recurrence(kind: str, given: Mapping[str, Any]) -> MixerOptions:
    """The options of the recurrent layers, which the kinds set each in its own way."""
    shared = {name: given[name] for name in ("num_heads", "use_short_conv", "conv_size", "allow_neg_eigval")}
    if kind == "delta_net":
        key_size, value_size = (_head_size(given, expand) for expand in ("expand_k", "expand_v"))
        return DeltaNetOptions(
            head_dim=key_size, expand_v=value_size / key_size, use_output_gate=given["use_gate"], **shared
        )
    shared |= {name: given[name] for name in ("head_dim", "expand_v", "num_v_heads")}
    if kind == "gated_deltanet":  # our preset of it always has the output gate
        return GatedDeltaNetOptions(**shared) if given["use_gate"] else DeltaNetOptions(use_forget_gate=True, **shared)
    gate = given["use_gate"] if given["use_output_gate"] is None else given["use_output_gate"]
    steps, forgets = given["num_householder"], given["use_forget_gate"]
    return DeltaProductOptions(num_householder=steps, use_forget_gate=forgets, use_output_gate=gate, **shared)


def _head_size(given: Mapping[str, Any], expand: str) -> int:
    """K or V of DeltaNet, whose configuration gives all heads together as a multiple of D."""
    total, heads = given["hidden_size"] * given[expand], given["num_heads"]
    whole = round(total)
    if heads < 1 or whole < 1 or whole % heads or not math.isclose(total, whole):
        raise UsageError(f"hidden_size={given['hidden_size']} times {expand}={given[expand]} does not divide into "
                         f"{heads} heads.")  # fmt: skip
    return whole // heads


def _attention_layers(attn: Any, hidden_size: int, num_layers: int) -> dict[int, MixerOptions]:
    """The options of the layers that `attn`, a specification or a list of them, makes attention, by their numbers."""
    specs = [] if attn is None else attn if isinstance(attn, list) else [attn]
    found: dict[int, MixerOptions] = {}
    for spec in specs:
        if not isinstance(spec, Mapping) or not isinstance(spec.get("layers"), list):
            raise UsageError(f"attn={spec!r} does not say in which layers there is attention.")
        if spec.get("qkv_bias"):
            raise UsageError("attn has qkv_bias=True; this library's attention has no biases.")
        if spec.get("window_size") is not None:
            raise UsageError(f"attn has window_size={spec['window_size']}; this library's attention has no window.")
        heads, theta = spec.get("num_heads"), spec.get("rope_theta", 10_000.0)
        if type(heads) is not int or heads < 1 or hidden_size % heads:
            raise UsageError(f"attn has num_heads={heads!r}, which should divide hidden_size={hidden_size}.")
        if type(theta) not in (int, float) or not math.isfinite(theta):
            raise UsageError(f"attn has rope_theta={theta!r}, which should be a number.")
        kv_heads = heads if spec.get("num_kv_heads") is None else spec["num_kv_heads"]
        if type(kv_heads) is not int or kv_heads < 1 or heads % kv_heads:
            raise UsageError(f"attn has num_kv_heads={kv_heads!r}, which should divide num_heads={heads}.")
        for layer in spec["layers"]:
            if type(layer) is not int or not 0 <= layer < num_layers or layer in found:
                raise UsageError(f"attn names layer {layer!r} wrongly or twice; layers are 0 … {num_layers - 1}.")
            found[layer] = AttentionOptions(
                num_heads=heads, head_dim=hidden_size // heads, num_kv_heads=kv_heads, rope_theta=float(theta)
            )
    return found


def to_fla_config(config: ModelConfig, layout: Layout = "fused") -> dict[str, Any]:
    """The content of a config.json with which flash-linear-attention builds the same model.

    `deltanet` becomes delta_net, or gated_deltanet where it has a forget gate; `gated_deltanet` becomes gated_deltanet
    and `deltaproduct` gated_deltaproduct, as everything does in the other layouts, which no other kind ever had.
    Grouped value heads are written as num_v_heads; of version 0.6.0's models only gated_deltanet takes it, and a
    gated_deltaproduct with it is refused there by the shapes of its weights. Layout 0.2.1 has no place for them, nor
    for attention of two kinds. What only initialisation needs
    (embedding_init_std, an initializer_range of None) is left out.

    Raises:
        UsageError: flash-linear-attention has no field for what this model does.
    """
    if layout not in get_args(Layout):
        *others, last = get_args(Layout)
        raise UsageError(f"The layout must be {', '.join(others)} or {last}, not {layout!r}.")
    _refuse_what_fla_lacks(config)
    attention = {i: options for i, options in enumerate(config.mixers) if options.name == "attention"}
    recurrent = next(options for options in config.mixers if options.name != "attention")
    own = _settings(recurrent)
    kind = _kind(recurrent.name, own, layout)
    attn = _attention_specs(attention)
    if layout == "0.2.1":
        if own["num_v_heads"] != own["num_heads"]:
            _cannot_hold("its value heads are grouped, and version 0.2.1 has as many of them as of the others")
        if isinstance(attn, list):
            _cannot_hold("its attention layers differ from one another, and version 0.2.1 has one kind of them")
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "intermediate_size": config.mlp_size,
        "norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attn": attn,
        **{name: own[name] for name in ("num_heads", "use_short_conv", "conv_size", "allow_neg_eigval")},
    }
    if config.initializer_range is not None:
        values["initializer_range"] = config.initializer_range
    if kind == "delta_net":
        key_size = own["num_heads"] * own["head_dim"]
        value_size = own["num_heads"] * round(own["head_dim"] * own["expand_v"])
        return values | {"expand_k": _ratio(key_size, config.hidden_size),
                         "expand_v": _ratio(value_size, config.hidden_size),
                         "use_gate": own["use_output_gate"]}  # fmt: skip
    value_size = round(own["head_dim"] * own["expand_v"])
    values |= {"head_dim": own["head_dim"], "expand_v": _ratio(value_size, own["head_dim"], own["expand_v"])}
    if own["num_v_heads"] != own["num_heads"]:
        values["num_v_heads"] = own["num_v_heads"]
    if kind == "gated_deltanet":
        return values | {"use_gate": own["use_output_gate"]}
    values["use_output_gate" if layout == "fused" else "use_gate"] = own["use_output_gate"]
    return values | {name: own[name] for name in ("use_forget_gate", "num_householder")}


def _ratio(part: int, whole: int, near: float | None = None) -> float:
    """part/whole, or the next float above: its product with `whole` is cut off to a whole number by most releases."""
    ratio = part / whole if near is None else near
    return ratio if int(whole * ratio) == part else math.nextafter(part / whole, math.inf)


def _cannot_hold(why: str) -> NoReturn:
    raise UsageError(f"flash-linear-attention cannot hold this model: {why}.")


def _settings(options: MixerOptions) -> dict[str, Any]:
    """The options of `DeltaProduct` with which a layer's mixer is built, presets applied."""
    fixed = get_mixer(options.name).fixed
    settings = {
        name: fixed[name] if name in fixed else getattr(options, name) for name in option_names(DeltaProductOptions)
    }
    return settings | {"num_v_heads": settings["num_v_heads"] or settings["num_heads"]}


def _kind(mixer: str, own: Mapping[str, Any], layout: Layout) -> str:
    grouped = own["num_v_heads"] != own["num_heads"]
    if layout != "fused":
        return "gated_deltaproduct"
    if own["num_householder"] == 1 and own["use_forget_gate"] and (grouped or mixer != "deltaproduct"):
        return "gated_deltanet"
    return "delta_net" if mixer == "deltanet" and not grouped else "gated_deltaproduct"


def _refuse_what_fla_lacks(config: ModelConfig) -> None:
    if config.vocab_size != config.num_labels:
        _cannot_hold(f"it is no language model, with vocab_size={config.vocab_size} and num_labels={config.num_labels}")
    for i, options in enumerate(config.mixers):
        if (size := config.layer(i).mlp_size) == 0:
            _cannot_hold(f"layer {i} has no MLP")
        if size != config.layer(0).mlp_size:
            _cannot_hold(f"layer {i} has another intermediate_size than layer 0")
        if isinstance(options, AttentionOptions):
            if options.num_heads * options.head_dim != config.hidden_size:
                _cannot_hold(f"attention in layer {i} has num_heads · head_dim ≠ hidden_size")
            if options.rope_theta is None:
                _cannot_hold(f"attention in layer {i} has no rotary positions")
        elif not issubclass(get_mixer(options.name), DeltaProduct):
            _cannot_hold(f"layer {i} is {options.name}")
    recurrent = [_settings(options) for options in config.mixers if options.name != "attention"]
    if not recurrent:
        _cannot_hold("all its layers are attention")
    if any(settings != recurrent[0] for settings in recurrent):
        _cannot_hold("its recurrent layers differ from one another")
    if recurrent[0]["qkv_activation"] != "silu":
        _cannot_hold(f"qkv_activation is {recurrent[0]['qkv_activation']!r} and has to be 'silu'")
    if recurrent[0]["beta_bias_init"] is not None:
        _cannot_hold("the projection of β has a bias")


def _attention_specs(layers: Mapping[int, MixerOptions]) -> dict[str, Any] | list[dict[str, Any]] | None:
    """`attn`: one specification for all layers that are alike, a list only where there are several."""
    specs: list[dict[str, Any]] = []
    for i, options in layers.items():
        spec = {"num_heads": options.num_heads, "num_kv_heads": options.num_kv_heads or options.num_heads,
                "qkv_bias": False, "window_size": None, "rope_theta": options.rope_theta}  # fmt: skip
        alike = next((s for s in specs if s == spec | {"layers": s["layers"]}), None)
        if alike is None:
            specs.append(spec | {"layers": [i]})
        else:
            alike["layers"].append(i)
    return specs if len(specs) > 1 else specs[0] if specs else None
