"""What a model is made of: a frozen, validated record that is saved beside the weights.

A model has one mixer for all of its layers, or one for each; a mixer's options are a record in the mixer's own file.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import cattrs

from deltaproduct.errors import UsageError, did_you_mean
from deltaproduct.layers.options import (
    LARGEST_SIZE,
    MixerOptions,
    check_known,
    check_values,
    is_of,
    option,
    option_names,
)
from deltaproduct.layers.registry import MIXERS, get_mixer

LARGEST_VOCABULARY = 2**31
MOST_LAYERS = 2**16
DEFAULT_MIXER = "deltaproduct"
WHAT = "model configuration"
Sizes = int | None | tuple[int | None, ...]


class _TakesFlatOptions(type):
    """For one release, `ModelConfig(…, num_heads=4)` is `ModelConfig.build(…, num_heads=4)`, with a warning."""

    def __call__(cls, *args: Any, **values: Any) -> Any:
        if values.keys() <= cls.__dataclass_fields__.keys():  # type: ignore[attr-defined]
            return super().__call__(*args, **values)
        config = _from_earlier(dict(zip(("vocab_size", "num_labels"), args, strict=False)) | values, strict=True)
        warnings.warn(
            "ModelConfig takes a mixer's options in the mixer's own record, mixer=DeltaProductOptions(num_heads=4); "
            "ModelConfig.build takes them by name. Options given to ModelConfig go with the next release.",
            DeprecationWarning,
            stacklevel=2,
        )
        return config


@dataclass(frozen=True)
class ModelConfig(metaclass=_TakesFlatOptions):
    """A sequence model's configuration; the names are flash-linear-attention's where it has the field.

    `mixer` is one mixer's record of options, or a tuple of one for each layer; a name stands for that mixer's defaults.
    `intermediate_size` can be a tuple too. Entries that are all equal become one, so that equal models have equal
    configurations.

    Raises:
        UsageError: a value is impossible; the message names the field.
    """

    vocab_size: int = option(help="input symbols, BOS included", at_least=1, below=LARGEST_VOCABULARY)
    num_labels: int = option(help="outputs per position", at_least=1, below=LARGEST_VOCABULARY)
    hidden_size: int = option(64, "D, the width of the residual stream", at_least=1)
    num_hidden_layers: int = option(1, "blocks", at_least=1, below=MOST_LAYERS)
    intermediate_size: Sizes = option(  # noqa: RUF009
        None, "width of the MLP; None: 8/3·D rounded up to 256; 0: no MLP"
    )
    # MixerOptions, or a tuple of them.
    mixer: Any = option(DEFAULT_MIXER, "sequence mixer of every block; see `deltaproduct mixers list`")  # noqa: RUF009
    norm_eps: float = option(1e-5, "eps of every RMSNorm", positive=True)
    initializer_range: float | None = option(
        0.02, "std of linear weights; None: PyTorch's own initialisation", at_least=0
    )
    embedding_init_std: float | None = option(None, "std of the embedding; None: initializer_range, else 1", at_least=0)
    tie_word_embeddings: bool = option(False, "share the embedding with the head")

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the record is frozen for everybody else
        set_field(self, "mixer", _mixer_of(self.mixer))
        sizes = self.intermediate_size
        if isinstance(sizes, Sequence) and not isinstance(sizes, str):
            set_field(self, "intermediate_size", tuple(sizes))
        check_values(self)
        _check_sizes(self.intermediate_size)
        for name in ("mixer", "intermediate_size"):
            value = getattr(self, name)
            if isinstance(value, tuple):
                if len(value) != self.num_hidden_layers:
                    raise UsageError(
                        f"{name} has {len(value)} entries for num_hidden_layers={self.num_hidden_layers}; give one for "
                        "each layer, or one for all."
                    )
                if all(entry == value[0] for entry in value):
                    set_field(self, name, value[0])
        for options in dict.fromkeys(self.mixers if self.is_hybrid else (self.mixer,)):
            widest = options.widest(self.hidden_size)
            if not widest < LARGEST_SIZE:
                raise UsageError(
                    f"A layer would have {widest:,.3g} keys or values (heads · head_dim · expand_v · num_householder, "
                    f"or hidden_size · expand); it can have fewer than {LARGEST_SIZE:,}."
                )
        if self.tie_word_embeddings and self.vocab_size != self.num_labels:
            raise UsageError(
                f"tie_word_embeddings needs vocab_size={self.vocab_size} and num_labels={self.num_labels} to be equal."
            )

    if not TYPE_CHECKING:  # for one release

        def __getattr__(self, name: str) -> Any:
            mixer = self.__dict__.get("mixer")
            if name.startswith("_") or mixer is None:
                raise AttributeError(name)
            found = {getattr(x, name) for x in (mixer if isinstance(mixer, tuple) else (mixer,)) if hasattr(x, name)}
            if len(found) != 1:
                raise AttributeError(f"{type(self).__name__} has no attribute {name!r}; its mixer has the options.")
            warnings.warn(
                f"ModelConfig.{name} is now ModelConfig.mixer.{name}; the old name goes with the next release.",
                DeprecationWarning,
                stacklevel=2,
            )
            return found.pop()

    # ------------------------------------------------------------------------------------------------- by name

    @classmethod
    def build(
        cls,
        vocab_size: int,
        num_labels: int,
        *,
        mixer: "str | MixerOptions | Mapping[str, Any] | Sequence[Any] | None" = None,
        defaults: Mapping[str, Any] | None = None,
        **values: Any,
    ) -> "ModelConfig":
        """A configuration from fields of the model and options of its mixers, all by their names.

        Args:
            mixer: a mixer's name, its record, or a mapping with its name and some options; or a list of them, one for
                each layer (then num_hidden_layers is optional).
            defaults: values for what is not given, `mixer` included; those that this mixer does not have are left out.
            values: fields of the model; options, which go to each of the mixers that has them. What a mapping in
                `mixer` says itself stays.

        Raises:
            UsageError: neither the model nor any of its mixers has such a field, or a value is impossible.
        """
        defaults = {} if defaults is None else defaults
        mixer = defaults.get("mixer", DEFAULT_MIXER) if mixer is None else mixer
        values = known_fields(mixer, defaults) | values
        own = {name: values.pop(name) for name in MODEL_FIELDS if name in values}
        records = _with_options(mixer, values)
        if isinstance(records, tuple):
            own.setdefault("num_hidden_layers", len(records))
        return cls(vocab_size=vocab_size, num_labels=num_labels, mixer=records, **own)

    def changed(self, *, mixer: Any = None, **values: Any) -> "ModelConfig":
        """The same with other fields of the model and other options, given as to `build`.

        With another `mixer` by its name, options that the earlier one has under the same names keep their values.

        Raises:
            UsageError: as `build`.
        """
        own = {name: values.pop(name) for name in ("vocab_size", "num_labels", *MODEL_FIELDS) if name in values}
        if isinstance(mixer, str) and not self.is_hybrid:
            kept = set(option_names(self.mixer)).intersection(option_names(get_mixer(mixer).options))
            values = {name: getattr(self.mixer, name) for name in kept} | values
        records = _with_options(self.mixer if mixer is None else mixer, values)
        if mixer is not None and isinstance(records, tuple):
            own.setdefault("num_hidden_layers", len(records))
        return replace(self, mixer=records, **own)

    # ------------------------------------------------------------------------------------------------- by layer

    @property
    def is_hybrid(self) -> bool:
        """Whether layers have mixers of several kinds or with several options."""
        return isinstance(self.mixer, tuple)

    @property
    def mixers(self) -> tuple[MixerOptions, ...]:
        """Every layer's options."""
        return self.mixer if self.is_hybrid else (self.mixer,) * self.num_hidden_layers

    @property
    def mixer_names(self) -> str:
        """The mixer's name, or for a hybrid each layer's, with commas."""
        return ",".join(options.name for options in self.mixer) if self.is_hybrid else self.mixer.name

    def layer(self, index: int) -> "ModelConfig":
        """The configuration that layer `index` is built from: one mixer and one MLP."""
        sizes = self.intermediate_size
        if not self.is_hybrid and not isinstance(sizes, tuple):
            return self
        return replace(
            self,
            mixer=self.mixers[index],
            intermediate_size=sizes[index] if isinstance(sizes, tuple) else sizes,
        )

    def kinds_of_layers(self) -> list[tuple["ModelConfig", int]]:
        """`layer` for one layer of each kind, and how many there are of that kind."""
        sizes = self.intermediate_size
        if not self.is_hybrid and not isinstance(sizes, tuple):
            return [(self, self.num_hidden_layers)]
        counts: dict[tuple[MixerOptions, int | None], list[int]] = {}
        each = sizes if isinstance(sizes, tuple) else (sizes,) * self.num_hidden_layers
        for i, kind in enumerate(zip(self.mixers, each, strict=True)):
            counts.setdefault(kind, []).append(i)
        return [(self.layer(layers[0]), len(layers)) for layers in counts.values()]

    @property
    def mlp_size(self) -> int:
        """The MLP's width, 0 for none; of the widest layer."""
        sizes = self.intermediate_size if isinstance(self.intermediate_size, tuple) else (self.intermediate_size,)
        return max(-(-8 * self.hidden_size // (3 * 256)) * 256 if size is None else size for size in sizes)

    def differences(self, other: "ModelConfig") -> dict[str, tuple[Any, Any]]:
        """The fields and options in which two differ, by name: (this one's value, the other's). Options are compared
        where the layers have the same mixers, and the first layer in which they differ counts."""
        found = {
            f.name: (mine, theirs)
            for f in fields(self)
            if f.name != "mixer" and (mine := getattr(self, f.name)) != (theirs := getattr(other, f.name))
        }
        if self.mixer_names != other.mixer_names:
            return found | {"mixer": (self.mixer_names, other.mixer_names)}
        for one, another in zip(self.mixers, other.mixers, strict=False):
            for name in option_names(one) if one.name == another.name else ():
                mine, theirs = getattr(one, name), getattr(another, name)
                if mine != theirs:
                    found.setdefault(name, (mine, theirs))
        return found

    # -------------------------------------------------------------------------------------------------- as JSON

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; a mixer is its name and its options, in one mapping."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        mixer = [x.to_dict() for x in self.mixer] if self.is_hybrid else self.mixer.to_dict()
        sizes = self.intermediate_size
        return own | {"mixer": mixer, "intermediate_size": list(sizes) if isinstance(sizes, tuple) else sizes}

    @classmethod
    def from_dict(cls, values: Any) -> "ModelConfig":
        """The inverse of `to_dict`; `UsageError` on unknown, missing or mistyped fields.

        It also reads what earlier versions wrote, in which `mixer` was a name, the options of all mixers lay beside the
        model's fields, and `layer_overrides` had what differed in single layers.
        """
        if is_earlier(values):
            return _from_earlier(values)
        if isinstance(values, Mapping):
            _check_fields(values, [f.name for f in fields(cls)])
        return _structured_as(cls, values, WHAT)


MODEL_FIELDS = tuple(f.name for f in fields(ModelConfig) if f.name not in ("vocab_size", "num_labels", "mixer"))


def _check_sizes(sizes: Any) -> None:
    """`UsageError` unless intermediate_size is one width, or several."""
    for size in sizes if isinstance(sizes, tuple) else (sizes,):
        if size is not None and not is_of(size, int):
            raise UsageError(f"intermediate_size must be a whole number or none, not {size!r:.40}.")
        if size is not None and not 0 <= size < LARGEST_SIZE:
            wanted = "0 or more" if size < 0 else f"below {LARGEST_SIZE:,}"
            raise UsageError(f"intermediate_size must be {wanted}, not {size}.")


# ----------------------------------------------------------------------------------------------------- mixers, by name


def _mixer_of(given: Any) -> MixerOptions | tuple[MixerOptions, ...]:
    """A mixer's options from its record, its name or its mapping, or a tuple of them from a list."""
    if isinstance(given, MixerOptions):
        return given
    if isinstance(given, str):
        return get_mixer(given).options()
    if isinstance(given, Mapping):
        return _options_from(given)
    if isinstance(given, Sequence) and given and not any(isinstance(x, list | tuple) for x in given):
        return tuple(_mixer_of(x) for x in given)  # type: ignore[misc]
    raise UsageError(
        f"mixer must be a mixer's name or its options, or a list of them for the layers, not {given!r:.40}."
    )


def _options_from(values: Mapping[str, Any]) -> MixerOptions:
    """A record from what its `to_dict` gave."""
    name = values.get("name")
    if not isinstance(name, str):
        raise UsageError(f"A mixer's options need its name, a string, beside them, not {name!r:.40}.")
    kind = get_mixer(name).options
    own = {key: value for key, value in values.items() if key != "name"}
    check_known(own, [kind()])
    return _structured_as(kind, own, f"record of the options of {name}")


def _with_options(given: Any, values: Mapping[str, Any]) -> MixerOptions | tuple[MixerOptions, ...]:
    """`_mixer_of` with these options in all mixers that have them, but for those that a mapping sets by itself;
    `UsageError` for what none has."""
    records = _mixer_of(given)
    each = dict.fromkeys(records if isinstance(records, tuple) else (records,))
    known = {name for record in each for name in option_names(record)}
    for name in values:
        if name not in known:
            near = did_you_mean(name, [*known, *MODEL_FIELDS, "mixer"])
            mixers = list(dict.fromkeys(record.name for record in each))
            which = f"the mixer {mixers[0]}" if len(mixers) == 1 else f"any of the mixers {', '.join(mixers)}"
            raise UsageError(f"{name!r:.60} is no field of a model and no option of {which}{near}.")

    left = set(values)

    def changed(record: MixerOptions, entry: Any) -> MixerOptions:
        own = entry if isinstance(entry, Mapping) else ()
        mine = {k: v for k, v in values.items() if k in option_names(record) and k not in own}
        left.difference_update(mine)
        return replace(record, **mine)

    result = tuple(map(changed, records, given)) if isinstance(records, tuple) else changed(records, given)
    if left:
        raise UsageError(f"{min(left)} is given beside the mixer, which sets it by itself; give it once.")
    return result


def known_fields(mixer: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Of the values, those that are fields of a model or options of a mixer, or of one of several."""
    records = _mixer_of(mixer)
    each = set(records) if isinstance(records, tuple) else {records}
    known = set(MODEL_FIELDS).union(*map(option_names, each))
    return {name: value for name, value in values.items() if name in known}


# ------------------------------------------------------------------------------------------------ the earlier layout


def _check_fields(values: Mapping[str, Any], known: list[str]) -> None:
    """`UsageError` where a name is none of those that are known."""
    for name in values:
        if name not in known:
            is_option = name in every_option()
            near = " beside its mixer; options belong into that" if is_option else did_you_mean(str(name), known)
            raise UsageError(f"A model configuration has no field {name!r:.60}{near}.")


def is_earlier(values: Any) -> bool:
    """Whether values are in the layout of earlier versions, in which `mixer` is a name, or left out."""
    return isinstance(values, Mapping) and not isinstance(values.get("mixer"), Mapping | list | tuple)


def own_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """What `ModelConfig.from_dict` reads of values with which others have put theirs."""
    names = {f.name for f in fields(ModelConfig)}
    if is_earlier(values):
        names |= {*every_option(), "layer_overrides"}
    return {name: value for name, value in values.items() if name in names}


def _from_earlier(values: Mapping[str, Any], *, strict: bool = False) -> ModelConfig:
    """From the flat layout of earlier versions: options of all mixers lie beside the model's fields.

    strict: refuse options that no mixer of the model has, as in a call; a file has those of every mixer.
    """
    own = {f.name: values[f.name] for f in fields(ModelConfig) if f.name in values}
    name, overrides = own.pop("mixer", DEFAULT_MIXER), values.get("layer_overrides", {})
    flat = {key: value for key, value in values.items() if key not in own.keys() | {"mixer", "layer_overrides"}}
    if strict and not overrides:
        return ModelConfig.build(**own, mixer=name, **flat)
    if not isinstance(name, str):
        raise UsageError(f"mixer must be a string, not {name!r:.40}.")
    get_mixer(name)
    if not strict:
        _check_fields(flat, [*(f.name for f in fields(ModelConfig)), *every_option()])
    if not isinstance(overrides, Mapping):
        raise UsageError(f"layer_overrides must be a mapping, not {overrides!r:.40}.")
    if not overrides:
        options = get_mixer(name).options
        kept = {key: x for key, x in flat.items() if key in option_names(options)}
        record = _options_from({"name": name, **kept})
        return _structured_as(ModelConfig, own | {"mixer": record}, WHAT)
    base = _structured_as(ModelConfig, own, WHAT)
    layers = base.num_hidden_layers
    sizes, used = [base.intermediate_size] * layers, set[str]()
    records = [_layer_from(name, flat, {}, used)] * layers if len(overrides) < layers else [base.mixer] * layers
    for layer, override in overrides.items():
        _check_override(base, layer, override)
        records[int(layer)] = _layer_from(name, flat, override, used)
        sizes[int(layer)] = override.get("intermediate_size", base.intermediate_size)
    if strict:
        _with_options(records, {key: x for key, x in flat.items() if key not in used})
    return replace(base, mixer=tuple(records), intermediate_size=tuple(sizes))


def _layer_from(name: str, flat: Mapping[str, Any], override: Mapping[str, Any], used: set[str]) -> MixerOptions:
    """A layer's record: the model's options with the layer's own, those of other mixers left out."""
    if not isinstance(name := override.get("mixer", name), str):
        raise UsageError(f"A layer's mixer must be a string, not {name!r:.40}.")
    kind = get_mixer(name).options
    mine = {key: x for key, x in (dict(flat) | dict(override)).items() if key in option_names(kind)}
    used |= mine.keys()
    return _options_from({"name": kind.name, **mine})


def _check_override(base: ModelConfig, layer: Any, override: Any) -> None:
    """`UsageError` unless an entry of `layer_overrides` is one that says what a layer is."""
    if layer not in map(str, range(base.num_hidden_layers)):
        raise UsageError(f"layer_overrides names layer {layer!r}; layers are 0 … {base.num_hidden_layers - 1}.")
    if not isinstance(override, Mapping):
        raise UsageError(f"layer_overrides must give layer {layer} a mapping of fields, not {override!r:.40}.")
    known = {*MODEL_FIELDS, "mixer", *every_option()} - {"hidden_size"}
    if unknown := set(override) - known:
        raise UsageError(f"layer_overrides sets what no layer {layer} has: {', '.join(sorted(map(str, unknown)))}.")
    if override.get("norm_eps", base.norm_eps) != base.norm_eps:
        raise UsageError(f"layer_overrides gives layer {layer} another norm_eps; a model has one for all its layers.")


@cache
def every_option() -> tuple[str, ...]:
    """The options of all mixers that earlier versions had."""
    return tuple(dict.fromkeys(name for mixer in MIXERS.values() for name in option_names(mixer.options)))


# ------------------------------------------------------------------------------------------------------------ reading


def strict_converter() -> cattrs.Converter:
    """Reads dataclasses from JSON's values: no unknown fields, and nothing is turned into another kind ("64" or 64.5
    into 64), as cattrs does by itself."""
    converter = cattrs.Converter(forbid_extra_keys=True)
    for kind in (int, float, str, bool):
        converter.register_structure_hook(kind, _structured)
    converter.register_structure_hook_func(lambda hint: hint == tuple[int, ...], _structured_tuple)
    converter.register_structure_hook_func(lambda hint: hint == Sizes, lambda value, _: value)  # ModelConfig checks it
    return converter


def _structured_as(kind: Any, values: Any, what: str) -> Any:
    """A record from JSON's values; `UsageError` says why they are none of `what`."""
    try:
        return _CONVERTER.structure(values, kind)
    except UsageError:
        raise
    except Exception as e:
        if found := usage_error(e):
            raise found from e
        raise UsageError(f"This is not a {what}: {reasons(e, 'config')}.") from e


def _structured(value: Any, kind: type) -> Any:
    if not is_of(value, kind):
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
