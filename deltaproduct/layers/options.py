"""What a mixer can be told: one frozen record in the mixer's own file, with every option's default, limits and help.

Whatever builds, saves, prints or parses options reads that record. The command line reads it without PyTorch, which the
mixers' files import: `declared` finds the record in the file's source.
"""

import ast
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self, Union, cast, get_args, get_origin, get_type_hints

from deltaproduct.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from deltaproduct.layers.mixer import Mixer

LARGEST_SIZE = 2**28  # of a width or a number of heads or steps, and of a layer's keys or values: no model comes near


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    at_least: int | None = None,
    below: int = LARGEST_SIZE,
    positive: bool = False,
    one_of: tuple[str, ...] = (),
) -> Any:
    """A field of a record, with the meaning that --help shows and the limits that `check_values` holds it to.

    Of a mixer's record, all of it has to be literals, as `declared` reads it from the source.
    """
    limits = {"at_least": at_least, "below": below, "positive": positive, "one_of": one_of}
    return field(default=default, metadata={"help": help} | limits)


@dataclass(frozen=True, kw_only=True)
class MixerOptions:
    """The options of a mixer; a subclass has a field for each of them, declared with `option`.

    Raises:
        UsageError: a value is of another kind than its field, or beyond its limits; the message names the field.
    """

    name: ClassVar[str]  # under which the mixer is registered

    def __post_init__(self) -> None:
        check_values(self)

    if TYPE_CHECKING:  # an option that only some mixers have

        def __getattr__(self, name: str) -> Any: ...

    def build(self, hidden_size: int, norm_eps: float = 1e-5) -> "Mixer":
        """The mixer, with weights drawn from PyTorch's generator.

        Args:
            hidden_size: D.
            norm_eps: of the mixer's norms, where it has any.

        Raises:
            UsageError: the options do not go together.
        """
        from deltaproduct.layers.registry import get_mixer

        return get_mixer(self.name).from_options(hidden_size, self, norm_eps=norm_eps)

    def changed(self, **values: Any) -> Self:
        """The same with other values; `UsageError` for an option that there is not."""
        check_known(values, [self])
        return replace(self, **values) if values else self

    def widest(self, hidden_size: int) -> float:
        """The most keys or values that a layer of width D has for a token."""
        heads = max(getattr(self, name, None) or 0 for name in ("num_heads", "num_v_heads", "num_kv_heads"))
        keys = heads * getattr(self, "head_dim", 0) * max(1.0, getattr(self, "expand_v", 1.0))
        return max(keys * getattr(self, "num_householder", 1), hidden_size * getattr(self, "expand", 0))

    def to_dict(self) -> dict[str, Any]:
        """The mixer's name and every option, as plain values."""
        return {"name": self.name} | asdict(self)


def option_names(options: MixerOptions | type[MixerOptions]) -> tuple[str, ...]:
    """The names of a record's options."""
    return tuple(f.name for f in fields(options))


def check_known(given: Mapping[str, Any], options: list[MixerOptions]) -> None:
    """`UsageError` where none of these mixers has an option of that name."""
    known = dict.fromkeys(name for record in options for name in option_names(record))
    for name in given:
        if name not in known:
            mixers = list(dict.fromkeys(record.name for record in options))
            which = f"mixer {mixers[0]}" if len(mixers) == 1 else f"mixers {', '.join(mixers)}"
            raise UsageError(f"The {which} has no option {name!r:.60}{did_you_mean(str(name), known)}; there are "
                             f"{', '.join(known)}.")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- checking


def check_values(record: Any) -> None:
    """`UsageError` unless every field of a dataclass has a value of its kind, within the limits of its `option`."""
    check_kinds(record)
    for f in fields(record):
        value, limits = getattr(record, f.name), f.metadata
        if value is None or not limits or isinstance(value, tuple | MixerOptions):
            continue
        lowest, one_of = limits["at_least"], limits["one_of"]
        if lowest is not None:
            require(record, f.name, value >= lowest, f"at least {lowest}" if lowest else "0 or more")
        if limits["positive"]:
            require(record, f.name, value > 0, "positive")
        if one_of:
            require(record, f.name, value in one_of, f"one of {', '.join(one_of)}")
        if isinstance(value, Integral):
            require(record, f.name, value < limits["below"], f"below {limits['below']:,}")


def require(record: Any, name: str, holds: bool, wanted: str) -> None:
    """`UsageError` about a field of a record unless something holds of it."""
    if not holds:
        raise UsageError(f"{name} must be {wanted}, not {getattr(record, name)}.")


def check_kinds(config: Any) -> None:
    """`UsageError` unless every field of a dataclass has a value of the kind that it is declared with, and every number
    is finite. Whole numbers serve as floats."""
    for name, kinds in _kinds(cast(Any, type(config))).items():
        value = getattr(config, name)
        if not any(is_of(value, kind) for kind in kinds):
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


def is_of(value: Any, kind: type) -> bool:
    """Whether a value is of a kind that fields are declared with: no bool is a number, and no number is infinite."""
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if kind is float:
        # A whole number of 400 digits is none that math can take.
        return (isinstance(value, Real) and not isinstance(value, bool)
                and (abs(int(value)) < 2**1000 if isinstance(value, Integral) else math.isfinite(value)))  # fmt: skip
    if kind is tuple:
        return isinstance(value, tuple) and all(is_of(x, int) and abs(x) < 2**63 for x in value)
    return isinstance(value, kind)


_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a finite number",
    str: "a string",
    bool: "true or false",
    tuple: "whole numbers",
    types.NoneType: "none",
}


# ------------------------------------------------------------------------------------------------ reading the source


class Declared(NamedTuple):
    """An option as its record's source declares it."""

    name: str
    kind: Any  # int, float, str or bool, perhaps with None: `int | None`
    default: Any
    help: str


_ANNOTATIONS: dict[str, Any] = {
    f"{kind.__name__}{end}": kind | None if end else kind for kind in (int, float, str, bool) for end in ("", " | None")
}


def declared(name: str) -> tuple[Declared, ...]:
    """The options of a registered mixer, from the source of its file, which is not imported.

    Raises:
        UsageError: there is no such mixer.
        TypeError: the record is not written as `option` says: a mistake of ours.
    """
    from deltaproduct.layers.registry import MIXERS, place_of

    if (own := MIXERS.registered(name)) is not None:
        hints = get_type_hints(own.options)
        return tuple(Declared(f.name, hints[f.name], f.default, f.metadata["help"]) for f in fields(own.options))
    place = place_of(name)
    return tuple(_declared_in(Path(__file__).with_name(f"{place.module}.py"))[place.options].values())


@cache
def _declared_in(source: Path) -> dict[str, dict[str, Declared]]:
    """The records that a file declares, by name, each with its options by name; those of a base come first."""
    found: dict[str, dict[str, Declared]] = {MixerOptions.__name__: {}}
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        bases = [base.id for base in node.bases if isinstance(base, ast.Name)] if isinstance(node, ast.ClassDef) else []
        if isinstance(node, ast.ClassDef) and bases and all(base in found for base in bases):
            own = {x.name: x for x in map(_option_in, node.body) if x is not None}
            found[node.name] = {k: v for base in bases for k, v in found[base].items()} | own
    return found


def _option_in(node: ast.stmt) -> Declared | None:
    """The option that a statement in a record's body declares; None for other statements."""
    if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name) or node.value is None:
        return None
    kind = ast.unparse(node.annotation)
    if kind.startswith("ClassVar"):
        return None
    call = node.value
    if kind not in _ANNOTATIONS or not isinstance(call, ast.Call) or len(call.args) != 2:
        raise TypeError(f"Line {node.lineno}: {ast.unparse(node)} is not `name: kind = option(default, help, …)`.")
    default, help = map(ast.literal_eval, call.args)
    return Declared(node.target.id, _ANNOTATIONS[kind], default, help)
