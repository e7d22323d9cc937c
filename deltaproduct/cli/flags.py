"""Flags made from configurations: one flat flag per field, named as the field, with the field's own help."""

from collections.abc import Sequence
from dataclasses import field, fields, make_dataclass
from typing import Annotated, Any

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from deltaproduct.errors import UsageError
from deltaproduct.ops.names import BACKEND_NAMES

LARGEST_INT = 2**63 - 1  # what PyTorch can count to
_OF_EVERY_BLOCK = ("norm_eps",)  # a block's own norms have it, whatever its mixer has


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


def config_flags(name: str, config: type, defaults: dict[str, Any], *, leave_out: tuple[str, ...] = ()) -> type:
    """A dataclass with a flag for every field of `config` but those left out; `defaults` overrides its own defaults."""
    flags = []
    for f in fields(config):
        if f.name in leave_out:
            continue
        kind = IntList if f.type == tuple[int, ...] else f.type
        help = tyro.conf.arg(help=f.metadata.get("help", ""))
        flags.append((f.name, Annotated[kind, help], field(default=defaults.get(f.name, f.default))))
    return make_dataclass(name, flags, kw_only=True)


def values_of(flags: Any, config: type) -> dict[str, Any]:
    """The flags' values that are fields of `config`."""
    return {f.name: getattr(flags, f.name) for f in fields(config) if hasattr(flags, f.name)}


def value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """What a flag is given on the command line, before that is parsed; None if it is not given."""
    for i, word in enumerate(arguments):
        if word == flag and i + 1 < len(arguments):
            return arguments[i + 1]
        if word.startswith(flag + "="):
            return word.split("=", 1)[1]
    return None


def check_given(mixer: str, arguments: Sequence[str]) -> None:
    """`UsageError` where a flag was given that the mixer has no use for, such as an n_h for an LSTM."""
    from deltaproduct.layers import MIXERS, get_mixer

    used = get_mixer(mixer).arguments()
    elsewhere = {name for other in MIXERS.values() for name in other.arguments()}.difference(used, _OF_EVERY_BLOCK)
    for word in arguments:
        flag = word.split("=", 1)[0]
        name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
        if flag.startswith("--") and name in elsewhere:
            raise UsageError(f"{flag} means nothing to the mixer {mixer}, which takes {', '.join(used)}.")


def check_lengths(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """`UsageError` unless there is at least one length and all are at least 1."""
    if not lengths or min(lengths) < 1:
        shown = ",".join(map(str, lengths)) or "nothing"
        raise UsageError(f"lengths must be one or more numbers of at least 1, such as 128,512, not {shown}.")
    return lengths
