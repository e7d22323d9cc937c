"""What is wrong with a command's arguments that the parser refused, in one line that names the right thing to type.

The parser's own answers take several lines, and those to a misspelt name are taken from other commands too.
"""

import re
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from tyro import MISSING as NOT_GIVEN
from tyro.conf import Positional
from tyro.constructors import PrimitiveConstructorSpec

from deltaproduct.cli.flags import LARGEST_INT
from deltaproduct.errors import nearest, shortened

MAX_REPEATED = 60  # characters of a value that a message repeats
LARGEST_FLOAT = 3.4028234663852886e38  # of float32: (2 − 2⁻²³) · 2¹²⁷
_POSITIONAL = typing.get_args(Positional[str])[1]
_WANTED = {int: "a whole number", float: "a number"}


@dataclass(frozen=True)
class Flag:
    """A field of a command as the command line knows it.

    Attributes:
        spelt: "--out"; a positional argument has its name in capitals.
        kind: of one value, without None.
        choices: all values, where there are only some.
        count: values that follow it: 0 for a switch, 1, or None for any number.
    """

    spelt: str
    kind: Any
    choices: tuple[str, ...]
    count: int | None
    positional: bool
    required: bool
    optional: bool  # takes the word None too
    help: str
    parser: PrimitiveConstructorSpec | None  # its own, in place of the kind's


def flags_of(command: type) -> list[Flag]:
    """Every field of a command's dataclass that is set on the command line."""
    hints = typing.get_type_hints(command, include_extras=True)
    found = []
    for f in fields(command):
        kind, marks, optional = _bare(hints[f.name])
        positional = _POSITIONAL in marks
        several = typing.get_origin(kind) is tuple
        parser = next((mark for mark in marks if isinstance(mark, PrimitiveConstructorSpec)), None)
        if several:
            kind = typing.get_args(kind)[0]
        found.append(
            Flag(
                f.name.upper() if positional else "--" + f.name.replace("_", "-"),
                kind,
                tuple(map(str, typing.get_args(kind))) if typing.get_origin(kind) is Literal else (),
                0 if kind is bool else None if several and parser is None else 1,
                positional,
                f.default is MISSING and f.default_factory is MISSING,
                optional,
                next((mark.help for mark in marks if getattr(mark, "help", None)), ""),
                parser,
            )
        )
    return found


def what_is_wrong(
    name: str, command: type, arguments: Sequence[str], default: Any = None, *, only_values: bool = False
) -> str | None:
    """One sentence about the first mistake in a command's arguments; None if none is found.

    Args:
        name: of the command, such as "lm train".
        default: a command whose values are the flags' defaults, if there is one.
        only_values: look at values alone, before anything is made of them: one may mean nothing to any command.
    """
    flags = flags_of(command)
    by_name = {f.spelt: f for f in flags if not f.positional}
    by_name |= {"--no-" + f.spelt[2:]: f for f in flags if f.count == 0}
    places = [f for f in flags if f.positional]
    given: set[str] = set()
    previous: tuple[str, str] | None = None  # the flag before this word, with its value
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        spelt, sign, value = word.partition("=")
        spelt = spelt if not spelt.startswith("--") else "--" + spelt[2:].replace("_", "-")
        if spelt not in by_name:
            if word.startswith("-") and not _is_number(word) and not only_values:
                return f"{name} has no flag {_as_typed(spelt)}{_did_you_mean(spelt, by_name, name)}"
            if not places and only_values:
                continue
            if not places:
                return _surplus(name, word, previous, by_name)
            if wrong := _value(places[0], word, name):
                return wrong
            given.add(places.pop(0).spelt)
            continue
        flag, previous = by_name[spelt], None
        given.add(flag.spelt)
        if flag.count == 0:
            if sign and not only_values:
                return f"{spelt} takes no value; write {flag.spelt} or --no-{flag.spelt[2:]}."
            continue
        values = [value] if sign else []
        while not sign and waiting and (flag.count is None or not values) and _known(waiting[0]) not in by_name:
            values.append(waiting.pop(0))
        if not values and flag.count == 1 and not only_values:
            return f"{spelt} needs a value: {flag.help}." if flag.help else f"{spelt} needs a value."
        for one in values:
            if wrong := _value(flag, one, name):
                return wrong
            previous = (spelt, one)
    missing = [f for f in flags if f.required and f.spelt not in given and not _is_set(f, default)]
    if missing and not only_values:
        asked = "; ".join(f"{f.spelt} ({f.help})" if f.help else f.spelt for f in missing)
        return f"{name} needs {asked}; for help: deltaproduct {name} --help"
    return None


def _is_set(flag: Flag, default: Any) -> bool:
    return default is not None and getattr(default, flag.spelt.lstrip("-").replace("-", "_").lower()) is not NOT_GIVEN


def no_command(word: str, known: Iterable[str], group: str = "") -> str:
    """What to answer to a command that does not exist."""
    within = f"{group} has" if group else "there is"
    known = list(known)
    near = nearest(word, known)
    advice = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}."
    return f"{within} no command {_as_typed(word)}; {advice}"


def _value(flag: Flag, value: str, name: str) -> str | None:
    """What is wrong with a value, if anything is."""
    if flag.optional and value == "None":
        return None
    if flag.choices:
        if value in flag.choices:
            return None
        near = nearest(value, flag.choices)
        advice = f"did you mean {near[0]}? " if near else ""
        return f"{flag.spelt} of {name} cannot be {_as_typed(value)}; {advice}It is one of {', '.join(flag.choices)}."
    if flag.parser is not None:
        try:
            flag.parser.instance_from_str([value])
        except ValueError as e:
            return f"{flag.spelt}: {e}."
    elif flag.kind in _WANTED:
        try:
            number = flag.kind(value)
        except ValueError:
            return f"{flag.spelt} must be {_WANTED[flag.kind]}, not {_as_typed(value)}."
        if flag.kind is float and not abs(number) <= LARGEST_FLOAT:  # nan too
            return f"{flag.spelt} must be a number that float32 can hold, not {_as_typed(value)}."
        if flag.kind is int and not -LARGEST_INT <= number <= LARGEST_INT:
            return f"{flag.spelt} must be a whole number of at most {LARGEST_INT:,}, not {_as_typed(value)}."
    elif flag.kind is Path and not value:  # which would be the current folder
        return f"{flag.spelt} must name a file or a folder, and is empty."
    return None


def _surplus(name: str, word: str, previous: tuple[str, str] | None, flags: dict[str, Flag]) -> str:
    if previous is not None:
        spelt, value = previous
        if flags[spelt].parser is not None:
            return (
                f"{name} does not know what to do with {_as_typed(word)}: a list has commas and no spaces, such as "
                f"{spelt} {_as_typed(value).strip(',')},{_as_typed(word).strip(',')}."
            )
        has = f"{spelt} takes one value, and has {_as_typed(value)}"
        return f"{name} does not know what to do with {_as_typed(word)}: {has}."
    return f"{name} does not know what to do with {_as_typed(word)}; for help: deltaproduct {name} --help"


def _did_you_mean(word: str, known: Iterable[str], name: str) -> str:
    near = nearest(word, known)
    return f"; did you mean {near[0]}?" if near else f"; for help: deltaproduct {name} --help"


def _bare(hint: Any) -> tuple[Any, list[Any], bool]:
    """A type without its annotations and without None; the annotations; and whether None was there."""
    marks: list[Any] = []
    optional = False
    while True:
        if typing.get_origin(hint) is Annotated:
            marks += hint.__metadata__
            hint = hint.__origin__
        elif typing.get_origin(hint) in (Union, types.UnionType):
            optional = True
            hint = next(part for part in typing.get_args(hint) if part is not type(None))
        else:
            return hint, marks, optional


def _known(word: str) -> str:
    """A word as the flag that it would be."""
    spelt = word.partition("=")[0]
    return "--" + spelt[2:].replace("_", "-") if spelt.startswith("--") else spelt


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _as_typed(word: str) -> str:
    """A word as a message repeats it: with quotes only where it would be hard to tell from the text around."""
    word = shortened(word, MAX_REPEATED)
    return word if re.fullmatch(r"[\w.…=/+-]+", word) else repr(word)
