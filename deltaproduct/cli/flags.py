"""Flags made from configurations: one flat flag per field, named as the field, with the field's own help; of options,
those of the mixers that a command line names."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, asdict, field, fields, make_dataclass
from typing import Annotated, Any, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from deltaproduct.errors import UsageError, did_you_mean
from deltaproduct.layers.options import declared
from deltaproduct.layers.registry import MIXERS, check_mixer_name
from deltaproduct.models.config import MODEL_FIELDS, ModelConfig
from deltaproduct.ops.names import BACKEND_NAMES

LARGEST_INT = 2**63 - 1  # what PyTorch can count to


# A backend of the operator.
BackendName = Annotated[str, tyro.conf.arg(help=f"auto, {', '.join(BACKEND_NAMES[:-1])} or {BACKEND_NAMES[-1]}")]


def parts_of(text: str) -> list[str]:
    """ "a,b" → ["a", "b"]; ValueError where a comma has nothing on one side. An empty text is an empty list."""
    parts = [part.strip() for part in text.split(",")]
    if parts == [""]:
        return []
    if not all(parts):
        right = ",".join(filter(None, parts))
        raise ValueError(f"a comma of {text!r} has nothing beside it{f'; {right} may be meant' if right else ''}")
    return parts


def _parse_ints(words: list[str]) -> tuple[int, ...]:
    parts = parts_of(words[0])
    try:
        numbers = tuple(int(part) for part in parts)
    except ValueError:
        split = words[0].replace(",", " ").split()
        right = ",".join(split) if all(part.isdecimal() for part in split) else "128,512"
        raise ValueError(f"{words[0]!r} is not a list of whole numbers with commas, such as {right}") from None
    if any(abs(number) > LARGEST_INT for number in numbers):
        raise ValueError(f"{words[0]!r} holds a number beyond {LARGEST_INT:,}")
    return numbers


IntList = Annotated[
    tuple[int, ...],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="N,N,…",
        instance_from_str=_parse_ints,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value))],
    ),
]


def _parse_names(words: list[str]) -> tuple[str, ...]:
    names = tuple(parts_of(words[0]))
    for name in names:
        if name not in MIXERS:
            raise ValueError(f"there is no mixer {name!r}{did_you_mean(name, MIXERS)}")
    return names


MixerList = Annotated[
    tuple[str, ...],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="NAME,NAME,…",
        instance_from_str=_parse_names,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(value)],
    ),
]


def config_flags(
    name: str, config: type, defaults: Mapping[str, Any], *, group: str, leave_out: tuple[str, ...] = ()
) -> type:
    """A dataclass with a flag for every field of `config` but those left out; `defaults` overrides its own defaults.

    group: under which help shows them.
    """
    flags: list[Any] = []
    for f in fields(config):
        if f.name in leave_out:
            continue
        kind = IntList if f.type == tuple[int, ...] else _KINDS.get(f.name, f.type)
        flags.append(_flag(f.name, kind, f.metadata.get("help", ""), defaults.get(f.name, f.default), group))
    return make_dataclass(name, flags, kw_only=True)


def _flag(name: str, kind: Any, help: str, default: Any, group: str) -> tuple[str, Any, Any]:
    return name, Annotated[kind, tyro.conf.arg(help=help)], field(default=default, metadata={"group": group})


def values_of(flags: Any, config: type) -> dict[str, Any]:
    """The flags' values that are fields of `config`."""
    return {f.name: getattr(flags, f.name) for f in fields(config) if hasattr(flags, f.name)}


def value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """What a flag is given on the command line, before that is parsed; None if it is not given."""
    for i, word in enumerate(arguments):
        spelt, sign, value = word.partition("=")
        if spelt.replace("_", "-") == flag:
            return value if sign else arguments[i + 1] if i + 1 < len(arguments) else None
    return None


# ------------------------------------------------------------------------------------------- a model and its mixers

# Of fields that can also differ from layer to layer.
_KINDS: dict[str, Any] = {"mixer": str, "intermediate_size": int | None}


def model_flags(defaults: Mapping[str, Any]) -> type:
    """Flags for what a model has whatever its mixers are, and which mixers these are; `with_options` adds theirs."""
    own = config_flags("ModelFields", ModelConfig, defaults, group="model", leave_out=("vocab_size", "num_labels"))
    hybrids = [
        _flag("layers", MixerList, "a hybrid: the mixer of each layer, such as deltaproduct,attention", (), "model"),
        _flag("attention_every", int | None, "a hybrid: every so many layers, one of attention", None, "model"),
    ]
    return make_dataclass("ModelFlags", hybrids, bases=(own,), kw_only=True)


def chosen_mixers(arguments: Sequence[str], default: Sequence[str]) -> tuple[str, ...]:
    """The names of the mixers that the arguments ask for, each once; those of `default` where they ask for none.

    Raises:
        UsageError: they ask for mixers in two ways, or for one that there is not.
    """
    mixer, layers, every = (value_of(flag, arguments) for flag in ("--mixer", "--layers", "--attention-every"))
    if layers is not None:
        for flag, given in (("--mixer", mixer), ("--attention-every", every)):
            if given is not None:
                raise UsageError(f"--layers names the mixer of every layer; leave out {flag}.")
        try:
            names = list(_parse_names([layers]))
        except ValueError:
            return tuple(default)  # the parser says what is wrong
        depth = value_of("--num-hidden-layers", arguments)
        if names and depth is not None and depth.isdecimal() and int(depth) != len(names):
            raise UsageError(f"--layers names {len(names)} layers and --num-hidden-layers says {depth}; leave it out.")
    else:
        names = list(default) if mixer is None else [mixer]
        if mixer is None and every is not None and len(set(names)) > 1:
            names = names[:1]
        names += ["attention"] if every is not None else []
    for name in names:
        check_mixer_name(name)
    return tuple(dict.fromkeys(names)) or tuple(default)


def with_options(
    command: type, mixers: Sequence[str], defaults: Mapping[str, Any], leave_out: Collection[str] = ()
) -> type:
    """The command with a flag for every option that one of the mixers has; of an option that several have, there is one
    flag, whose default is the first one's.

    Args:
        defaults: values in place of the options' own defaults.
        leave_out: options without a flag.
    """
    flags = {
        option.name: _flag(option.name, option.kind, option.help, defaults.get(option.name, option.default), "mixer")
        for name in reversed(mixers)
        for option in reversed(declared(name))
        if option.name not in leave_out
    }
    own = {
        "__doc__": command.__doc__,
        "__module__": command.__module__,
        "__reduce__": _reduced,
        "made_of": (command, tuple(mixers), tuple(leave_out)),
        "option_names": tuple(flags),
    }
    return make_dataclass(command.__name__, list(flags.values())[::-1], bases=(command,), namespace=own, kw_only=True)


def _reduced(command: Any) -> Any:
    """For pickles: another process makes the class anew."""
    return _remade, (*command.made_of, dict(vars(command)))


def _remade(command: type, mixers: Sequence[str], leave_out: Sequence[str], values: dict[str, Any]) -> Any:
    return with_options(command, mixers, {}, leave_out)(**values)


def check_given(mixers: Sequence[str], arguments: Sequence[str]) -> None:
    """`UsageError` where a flag was given that no mixer of the model has a use for, such as an n_h for an LSTM."""
    used = tuple(dict.fromkeys(option.name for mixer in mixers for option in declared(mixer)))
    elsewhere = {option.name for mixer in MIXERS for option in declared(mixer)}.difference(used)
    which = f"mixer {mixers[0]}, which takes" if len(mixers) == 1 else f"mixers {', '.join(mixers)}, which take"
    for word in arguments:
        flag = word.split("=", 1)[0]
        name = flag.removeprefix("--").replace("-", "_").removeprefix("no_")
        if flag.startswith("--") and name in elsewhere:
            raise UsageError(f"{flag} means nothing to the {which} {', '.join(used)}.")


def model_of(flags: Any, vocab_size: int, num_labels: int, stored: ModelConfig | None = None) -> ModelConfig:
    """The model that the flags of `model_flags` and `with_options` describe.

    stored: of the run that is continued, for what flags cannot say: options that differ from layer to layer.

    Raises:
        UsageError: a value is impossible, or --attention-every makes no layer one of attention.
    """
    values = {name: getattr(flags, name) for name in (*MODEL_FIELDS, *getattr(flags, "option_names", ()))}
    mixer: Any = flags.mixer
    if flags.layers:
        mixer, values["num_hidden_layers"] = list(flags.layers), len(flags.layers)
    elif (every := flags.attention_every) is not None:
        layers = values["num_hidden_layers"]
        if not 2 <= every <= layers:
            raise UsageError(
                f"attention_every must be at least 2 and at most the number of layers, {layers}, not {every}; "
                "--mixer attention makes all layers attention."
            )
        mixer = ["attention" if (i + 1) % every == 0 else mixer for i in range(layers)]
    if stored is not None:
        names = mixer if isinstance(mixer, list) else [mixer] * values["num_hidden_layers"]
        mixer = stored.mixers if names == [options.name for options in stored.mixers] else mixer
        if isinstance(stored.intermediate_size, tuple) and values["intermediate_size"] is None:
            values["intermediate_size"] = stored.intermediate_size
    return ModelConfig.build(vocab_size, num_labels, mixer=mixer, **values)


def stored_values(model: ModelConfig, arguments: Sequence[str]) -> dict[str, Any]:
    """What the flags of `model_flags` and `with_options` are for a stored model: defaults with --resume. Other mixers
    that the arguments ask for are not mixed with the stored ones, and are then refused as a change."""
    values = {name: getattr(model, name) for name in MODEL_FIELDS}
    if isinstance(values["intermediate_size"], tuple):
        values["intermediate_size"] = None
    asked = any(value_of(flag, arguments) is not None for flag in ("--mixer", "--attention-every"))
    if model.is_hybrid and not asked:
        values["layers"] = tuple(options.name for options in model.mixers)
    options = {name: value for record in reversed(model.mixers) for name, value in asdict(record).items()}
    return values | {"mixer": model.mixers[0].name} | options


def differing_options(model: ModelConfig) -> set[str]:
    """The options of which a hybrid's layers have several values, which one flag cannot say."""
    seen: dict[str, Any] = {}
    return {
        name
        for record in model.mixers
        for name, value in asdict(record).items()
        if seen.setdefault(name, value) != value
    }


# ------------------------------------------------------------------------------------------------------------- groups


def grouped(command: type) -> type | None:
    """A dataclass of dataclasses, one for each group of the command's flags, which help shows as such; None where the
    flags have no groups. `flattened` and `nested` lead from one to the other."""
    flags = fields(command)
    if not any("group" in f.metadata for f in flags):
        return None
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, list[Any]] = {name: [] for name in GROUPS}
    for f in flags:
        default = {"default": f.default} if f.default is not MISSING else {}
        groups[f.metadata.get("group", "run")].append((f.name, hints[f.name], field(**default)))
    mixers = getattr(command, "made_of", (command, ()))[1]
    parts = []
    for name, own in groups.items():
        part = make_dataclass(name, own, kw_only=True)
        part.__doc__ = f"Of {' and '.join(mixers)}." if name == "mixer" else " "
        parts.append((name, part))
    whole = make_dataclass(command.__name__, parts, kw_only=True)
    whole.__doc__ = command.__doc__
    return whole


GROUPS = ("model", "mixer", "training", "run")


def flattened(groups: Any, command: type) -> Any:
    """The command from the values of its groups."""
    return command(**{name: value for group in GROUPS for name, value in vars(getattr(groups, group)).items()})


def nested(command: Any, groups: type) -> Any:
    """The inverse of `flattened`."""
    parts = {f.name: f.type for f in fields(groups)}
    return groups(**{name: part(**values_of(command, part)) for name, part in parts.items()})  # type: ignore[operator, arg-type]


def check_lengths(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """`UsageError` unless there is at least one length and all are at least 1."""
    if not lengths or min(lengths) < 1:
        shown = ",".join(map(str, lengths)) or "nothing"
        raise UsageError(f"lengths must be one or more numbers of at least 1, such as 128,512, not {shown}.")
    return lengths
