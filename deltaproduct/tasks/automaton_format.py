"""What an automaton is read from: the fields of a JSON object or of a table, and how large they may be."""

from collections.abc import Sequence
from typing import Any

from deltaproduct.errors import UsageError, as_json

MAX_STATES = 10_000
MAX_TRANSITIONS = 4_000_000  # of what is read or built: states times symbols, a second or two to go through

JSON_EXAMPLE = (
    '{"alphabet": ["0", "1"], "states": ["even", "odd"], "initial": "even", "accepting": ["even"], '
    '"transitions": {"even": {"0": "even", "1": "odd"}, "odd": {"0": "odd", "1": "even"}}}'
)
FIELDS = ("alphabet", "states", "initial", "accepting", "transitions")
ALSO_CALLED = {
    "input_symbols": "alphabet", "symbols": "alphabet", "initial_state": "initial", "start": "initial",
    "final_states": "accepting", "final": "accepting",
}  # fmt: skip
SINK = "sink"


class FormatError(Exception):
    """What is wrong with a JSON value, without a full stop."""


def fields(value: Any) -> dict[str, Any]:
    """The fields of an automaton. Raises FormatError."""
    if not isinstance(value, dict):
        raise FormatError(f"An automaton is a JSON object, not {as_json(value)}")
    given: dict[str, Any] = {}
    for name, content in value.items():
        field = ALSO_CALLED.get(name, name)
        if field not in FIELDS:
            raise FormatError(f"An automaton has no {as_json(name)}; it has {', '.join(FIELDS)}")
        if field in given:
            raise FormatError(f"The automaton has its {field} twice")
        given[field] = content
    if (listed := _listed(given)) is not None:
        given["transitions"] = listed
    named = isinstance(given.get("transitions"), dict)  # by which states and symbols are known
    if missing := [name for name in FIELDS if name not in given and not (named and name in ("states", "alphabet"))]:
        raise FormatError(f"The automaton lacks {' and '.join(missing)}")
    if named:
        _name_all(given)
    states = _names("states", given["states"])
    if any(type(name) is int for name in given["states"]) and states != tuple(map(str, range(len(states)))):
        raise FormatError(
            "States that are numbers must be 0, 1, 2, … in this order, so that a number means one of them"
        )
    alphabet = _names("alphabet", given["alphabet"])
    check_table(len(states), len(alphabet))
    number = {name: i for i, name in enumerate(states)}

    def numbered(what: str, state: Any) -> int:
        if type(state) is int:
            return state
        if type(state) is str and state in number:
            return number[state]
        if type(state) is str:
            raise FormatError(f"The automaton's {what} names {as_json(state)}, which is none of its states")
        raise FormatError(f"The automaton's {what} must be a state's name or number, not {as_json(state)}")

    if not isinstance(given["accepting"], list):
        raise FormatError(f"The automaton's accepting must be a list of states, not {as_json(given['accepting'])}")
    rows = given["transitions"]
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise FormatError(f"The automaton's transitions must be a list of lists of states, not {as_json(rows)}")
    return {
        "alphabet": alphabet,
        "states": states,
        "initial": numbered("initial", given["initial"]),
        "accepting": tuple(sorted({numbered("accepting", state) for state in given["accepting"]})),
        "transitions": tuple(tuple(numbered("transitions", to) for to in row) for row in rows),
    }


def _listed(given: dict[str, Any]) -> dict[str, dict[str, str]] | None:
    """Transitions in a list of [state, symbol, state], as {state: {symbol: state}}; None where they are no such list.
    What is a table by its size is a table."""
    rows = given.get("transitions")
    if not isinstance(rows, list) or not rows:
        return None
    if not all(isinstance(row, list) and len(row) == 3 and all(isinstance(name, str) for name in row) for row in rows):
        return None
    sizes = [len(given[name]) if isinstance(given.get(name), list) else None for name in ("states", "alphabet")]
    if sizes == [len(rows), 3]:
        return None
    table: dict[str, dict[str, str]] = {}
    for state, symbol, to in rows:
        if table.setdefault(state, {}).setdefault(symbol, to) != to:
            raise FormatError(f"The automaton is not deterministic: from {as_json(state)}, {as_json(symbol)} leads to "
                               f"{as_json(table[state][symbol])} and to {as_json(to)}")  # fmt: skip
    return table


def _name_all(given: dict[str, Any]) -> None:
    """Turn {state: {symbol: state}} into a table, with states and symbols where they are not said."""
    table = given["transitions"]
    for state, row in table.items():
        if not isinstance(row, dict):
            raise FormatError(f"The automaton's transitions from {as_json(state)} must be {{symbol: state}}, not "
                               f"{as_json(row)}")  # fmt: skip
    if "states" not in given:
        everywhere = [*table, *(to for row in table.values() for to in row.values()), given["initial"]]
        more = given["accepting"] if isinstance(given["accepting"], list) else []
        given["states"] = list(dict.fromkeys(name for name in (*everywhere, *more) if isinstance(name, str)))
    if "alphabet" not in given:
        given["alphabet"] = sorted({symbol for row in table.values() for symbol in row})
    states, alphabet = _names("states", given["states"]), _names("alphabet", given["alphabet"])
    check_table(len(states), len(alphabet))
    known_states, known_symbols = set(states), set(alphabet)
    for state, row in table.items():
        if state not in known_states:
            raise FormatError(f"There are transitions from {as_json(state)}, which is none of the states")
        if unknown := [symbol for symbol in row if symbol not in known_symbols]:
            raise FormatError(f"There is a transition by {as_json(unknown[0])}, which is not in the alphabet")
    sink = new_name(SINK, states)
    rows = [[table.get(state, {}).get(symbol, sink) for symbol in alphabet] for state in states]
    if any(to == sink for row in rows for to in row):
        given["states"], rows = [*states, sink], [*rows, [sink] * len(alphabet)]
    given["transitions"] = rows


def new_name(name: str, taken: Sequence[str]) -> str:
    """The name, or with a number after it if there is one already."""
    names = set(taken)
    return next(new for i in range(len(names) + 1) if (new := f"{name}{i or ''}") not in names)


def check_table(states: int, symbols: int) -> None:
    """UsageError if a table of so many states and symbols is larger than what is read."""
    if states > MAX_STATES:
        raise UsageError(f"{states:,} states are more than {MAX_STATES:,}.")
    if states * symbols > MAX_TRANSITIONS:
        raise UsageError(
            f"{states:,} states by {symbols:,} symbols are more than {MAX_TRANSITIONS:,} transitions; name fewer."
        )


def _names(what: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(type(name) in (str, int) for name in value):
        raise FormatError(f"The automaton's {what} must be a list of names, not {as_json(value)}")
    return tuple(map(str, value))
