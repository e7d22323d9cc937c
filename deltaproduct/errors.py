"""The one exception that stands for a mistake of the user's, and the words that such a message is made of.

It sits below every other room, because all of them raise it: the command line turns it into one line on standard
error and exit status 2, and a Python caller can catch it as the `ValueError` that it is.
"""

import difflib
import json
from collections.abc import Iterable

QUOTED = 80  # characters of a value that a message repeats


class UsageError(ValueError):
    """Something the caller asked for cannot be done; the message is one full sentence that says why."""


def nearest(name: str, known: Iterable[str], most: int = 1) -> list[str]:
    """The known names that are near to one that does not exist, the nearest first; upper and lower case are alike."""
    by_lower: dict[str, str] = {}
    for candidate in known:
        by_lower.setdefault(candidate.lower(), candidate)
    # Comparing takes time that grows with the square of the length: nobody means a name of hundreds of characters.
    found = difflib.get_close_matches(name[:200].lower(), list(by_lower), n=most)
    return [by_lower[lower] for lower in found]


def did_you_mean(name: str, known: Iterable[str], most: int = 1) -> str:
    """A question in brackets that asks for the nearest known names, or nothing where none is near."""
    near = nearest(name, known, most)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


def shown(text: str) -> str:
    """A text as it may reach a terminal: what is no visible character is written as its escape, such as \\x1b.

    Names come from files, arguments and checkpoints of other people. An escape sequence in one could change what the
    screen shows, a mark of direction could reverse it, and a lone surrogate cannot be written at all.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def shortened(text: str, most: int) -> str:
    """A text of at most `most` characters: the end of a longer one is an ellipsis."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def quoted(value: object) -> str:
    """A value as a message repeats it: a text in quotes, with what a terminal would obey escaped; of a long one its
    beginning and its length."""
    if not isinstance(value, str):
        return shortened(ascii(value), QUOTED)
    return repr(value) if len(value) <= QUOTED else f"{value[: QUOTED - 20]!r}… ({len(value):,} characters)"


def as_json(value: object) -> str:
    """A value of a JSON file as a message repeats it: as JSON, the end of a long one left out."""
    return shortened(json.dumps(value, ensure_ascii=False, default=str), QUOTED // 2)


def first_line(error: BaseException, *, with_kind: bool = False) -> str:
    """An exception in one line: the first of its message (`with_kind`: behind its kind), or its kind where there is
    no message."""
    lines, kind = str(error).strip().splitlines(), type(error).__name__
    if not lines:
        return kind
    return f"{kind}: {lines[0]}" if with_kind else lines[0]
