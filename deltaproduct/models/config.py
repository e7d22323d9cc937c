"""What a model is made of: a frozen, validated record that is saved beside the weights."""

import math
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from numbers import Integral, Real
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

import cattrs

from deltaproduct.errors import UsageError

LARGEST_SIZE = 2**28  # of a width or a number of heads or steps, and of a layer's keys or values: no model comes near
LARGEST_VOCABULARY = 2**31
MOST_LAYERS = 2**16


def described(default: Any, help: str) -> Any:
    """A field whose meaning also serves the command line's --help."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class ModelConfig:
    """A sequence model's configuration; the names are flash-linear-attention's where it has the field.

    Raises:
        UsageError: a value is impossible; the message names the field.
    """

    vocab_size: int = field(metadata={"help": "input symbols, BOS included"})
    num_labels: int = field(metadata={"help": "outputs per position"})
    hidden_size: int = described(64, "D, the width of the residual stream")
    num_hidden_layers: int = described(1, "blocks")
    intermediate_size: int | None = described(None, "width of the MLP; None: 8/3·D rounded up to 256; 0: no MLP")
    mixer: str = described("deltaproduct", "sequence mixer of every block")
    num_heads: int = described(4, "H, query/key heads")
    head_dim: int = described(16, "K, key dimension of a head")
    num_householder: int = described(2, "N, Householder steps per token")
    expand_v: float = described(1.0, "V/K, value over key dimension")
    num_v_heads: int | None = described(None, "HV, value heads; None: as many as query/key heads")
    num_kv_heads: int | None = described(None, "attention's key/value heads; None: as many as query heads")
    rope_theta: float | None = described(10_000.0, "base of attention's rotary positions; None: no positions")
    allow_neg_eigval: bool = described(True, "β in [0,2] and eigenvalues in [-1,1], in place of [0,1]")
    use_forget_gate: bool = described(False, "gated recurrence")
    use_output_gate: bool = described(False, "gate the normalised output")
    use_short_conv: bool = described(True, "causal convolution on q, k and v")
    conv_size: int = described(4, "width of that convolution")
    qkv_activation: str = described("silu", "what q, k and v pass through: silu, relu or identity")
    norm_eps: float = described(1e-5, "eps of every RMSNorm")
    beta_bias_init: float | None = described(None, "initial bias of β's projection; None: no bias")
    feature_map: str = described("elu", "of linear_attention: elu or identity")
    gate_low_rank_dim: int = described(16, "of gla: rank of the gate's projection")
    gate_logit_normalizer: int = described(16, "of gla: root that is taken of the gate")
    expand: int = described(2, "of mamba and mamba2: inner size over D")
    ssm_state_size: int = described(16, "of mamba and mamba2: N, states per channel")
    time_step_rank: int | None = described(None, "of mamba: rank of the step sizes' projection; None: D/16, rounded up")
    ttt_chunk_size: int = described(16, "of ttt_linear: tokens in an inner mini-batch")
    ttt_base_lr: float = described(1.0, "of ttt_linear: largest inner step size, times K")
    initializer_range: float | None = described(0.02, "std of linear weights; None: PyTorch's own initialisation")
    embedding_init_std: float | None = described(None, "std of the embedding; None: initializer_range, else 1")
    tie_word_embeddings: bool = described(False, "share the embedding with the head")
    layer_overrides: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict, metadata={"help": "fields that differ in single layers, by layer number: hybrids"}
    )

    def __post_init__(self) -> None:
        check_kinds(self)
        # Here, as both import PyTorch, for which the help of a command that has this record's fields need not wait.
        from deltaproduct.layers import get_mixer
        from deltaproduct.layers.linear_attention import FEATURE_MAPS
        from deltaproduct.layers.parts import ACTIVATIONS

        for name in ("vocab_size", "num_labels", "hidden_size", "num_hidden_layers", "num_heads", "head_dim"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("gate_low_rank_dim", "gate_logit_normalizer", "expand", "ssm_state_size", "ttt_chunk_size"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("time_step_rank", self.time_step_rank is None or self.time_step_rank >= 1, "at least 1")
        self._require("feature_map", self.feature_map in FEATURE_MAPS, f"one of {', '.join(FEATURE_MAPS)}")
        activations = ", ".join(ACTIVATIONS)
        self._require("qkv_activation", self.qkv_activation in ACTIVATIONS, f"one of {activations}")
        for name in ("num_householder", "conv_size"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("num_kv_heads", self.num_kv_heads is None or self.num_kv_heads >= 1, "at least 1")
        self._require("rope_theta", self.rope_theta is None or self.rope_theta > 0, "positive")
        self._require("intermediate_size", self.intermediate_size is None or self.intermediate_size >= 0, "0 or more")
        self._require("norm_eps", self.norm_eps > 0, "positive")
        self._require("ttt_base_lr", self.ttt_base_lr > 0, "positive")
        self._require("expand_v", self.expand_v > 0, "positive")
        for name in ("initializer_range", "embedding_init_std"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 0, "0 or more")
        self._check_sizes()
        if self.tie_word_embeddings and self.vocab_size != self.num_labels:
            raise UsageError(
                f"tie_word_embeddings needs vocab_size={self.vocab_size} and num_labels={self.num_labels} to be equal."
            )
        get_mixer(self.mixer)
        names = {f.name for f in fields(self)} - {"vocab_size", "num_labels", "hidden_size", "layer_overrides"}
        layers = {str(i) for i in range(self.num_hidden_layers)} if self.layer_overrides else set()
        for layer, override in self.layer_overrides.items():
            if layer not in layers:
                raise UsageError(f"layer_overrides names layer {layer!r}; layers are 0 … {self.num_hidden_layers - 1}.")
            if not isinstance(override, Mapping):
                raise UsageError(f"layer_overrides must give layer {layer} a mapping of fields, not {override!r:.40}.")
            if unknown := set(override) - names:
                raise UsageError(f"layer_overrides sets what no layer {layer} has: {', '.join(sorted(unknown))}.")
            self.layer(int(layer))

    def _check_sizes(self) -> None:
        """That sizes can be multiplied with each other: PyTorch counts the bytes of a tensor in 63 bits."""
        for name in ("vocab_size", "num_labels"):
            self._require(name, getattr(self, name) < LARGEST_VOCABULARY, f"below {LARGEST_VOCABULARY:,}")
        self._require("num_hidden_layers", self.num_hidden_layers < MOST_LAYERS, f"below {MOST_LAYERS:,}")
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Integral) and f.name not in ("vocab_size", "num_labels", "num_hidden_layers"):
                self._require(f.name, value < LARGEST_SIZE, f"below {LARGEST_SIZE:,}")
        heads = max(self.num_heads, self.num_v_heads or 0, self.num_kv_heads or 0)
        widest = max(heads * self.head_dim * max(1.0, self.expand_v) * self.num_householder,
                     self.hidden_size * self.expand)  # fmt: skip
        if not widest < LARGEST_SIZE:
            raise UsageError(
                f"A layer would have {widest:,.3g} keys or values (heads · head_dim · expand_v · num_householder, or "
                f"hidden_size · expand); it can have fewer than {LARGEST_SIZE:,}."
            )

    def _require(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise UsageError(f"{name} must be {wanted}, not {getattr(self, name)}.")

    def layer(self, index: int) -> "ModelConfig":
        """The configuration that layer `index` is built from."""
        override = self.layer_overrides.get(str(index), {})
        return replace(self, layer_overrides={}, **override) if override else self

    @property
    def mlp_size(self) -> int:
        """The MLP's width, 0 for none."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return -(-8 * self.hidden_size // (3 * 256)) * 256

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> "ModelConfig":
        """The inverse of `to_dict`; `UsageError` on unknown, missing or mistyped fields."""
        try:
            return _CONVERTER.structure(values, cls)
        except UsageError:
            raise
        except Exception as e:
            if found := usage_error(e):
                raise found from e
            raise UsageError(f"This is not a model configuration: {reasons(e, 'config')}.") from e


def check_kinds(config: Any) -> None:
    """`UsageError` unless every field of a dataclass has a value of the kind that it is declared with, and every number
    is finite. Whole numbers serve as floats."""
    for name, kinds in _kinds(cast(Any, type(config))).items():
        value = getattr(config, name)
        if not any(_is_of(value, kind) for kind in kinds):
            wanted = " or ".join(_KINDS[kind] for kind in kinds)
            raise UsageError(f"{name} must be {wanted}, not {value!r:.40}.")


@cache
def _kinds(cls: type) -> dict[str, tuple[Any, ...]]:
    """The kinds that a dataclass declares its fields to be of, where they are simple ones."""
    found = {}
    hints = get_type_hints(cls)
    for f in fields(cls):
        hint = hints[f.name]
        kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        if get_origin(hint) is tuple:
            kinds = (tuple,)
        if all(kind in _KINDS for kind in kinds):
            found[f.name] = kinds
    return found


def _is_of(value: Any, kind: type) -> bool:
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if kind is float:
        # A whole number of 400 digits is none that math can take.
        return (isinstance(value, Real) and not isinstance(value, bool)
                and (abs(int(value)) < 2**1000 if isinstance(value, Integral) else math.isfinite(value)))  # fmt: skip
    if kind is tuple:
        return isinstance(value, tuple) and all(_is_of(x, int) and abs(x) < 2**63 for x in value)
    return isinstance(value, kind)


_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a finite number",
    str: "a string",
    bool: "true or false",
    tuple: "whole numbers",
    types.NoneType: "none",
}


def strict_converter() -> cattrs.Converter:
    """Reads dataclasses from JSON's values: no unknown fields, and nothing is turned into another kind ("64" or 64.5
    into 64), as cattrs does by itself."""
    converter = cattrs.Converter(forbid_extra_keys=True)
    for kind in (int, float, str, bool):
        converter.register_structure_hook(kind, _structured)
    converter.register_structure_hook_func(lambda hint: hint == tuple[int, ...], _structured_tuple)
    return converter


def _structured(value: Any, kind: type) -> Any:
    if not _is_of(value, kind):
        raise ValueError
    return kind(value)


def _structured_tuple(value: Any, hint: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError
    return tuple(_structured(x, int) for x in value)


def reasons(e: BaseException, path: str) -> str:
    """What cattrs found wrong with the values at `path`, the first three of it."""
    found = cattrs.transform_error(e, path=path)
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    return "; ".join(text if len(text) < 200 else f"{text[:200]} …" for text in found[:3]) + more


def usage_error(e: BaseException) -> UsageError | None:
    """cattrs wraps what a constructor raises into groups; the user's mistake is inside."""
    if isinstance(e, UsageError):
        return e
    inner = e.exceptions if isinstance(e, BaseExceptionGroup) else ()
    return next((found for x in inner if (found := usage_error(x))), None)


_CONVERTER = strict_converter()
