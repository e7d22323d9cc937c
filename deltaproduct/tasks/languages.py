"""Regular languages as what they are made of: symbols, chains, choices, intersections, shuffles and repetitions."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Language:
    """A set of words, by its `kind` and what that is made of. The functions below make them; they keep few that look
    different and are the same.

    * "one": the words of one symbol out of `symbols`, which may be none
    * "chain": a word of each of `parts` after the other; of no parts the empty word
    * "any", "all": words in some, or in every one, of `parts` (a frozenset)
    * "shuffle": words of each of `parts`, shuffled
    * "repeat": from `least` to `most` words (None: any number) of the only part

    Attributes:
        empty_word: whether the empty word is one of them.
        written: how many symbols there are when repetitions are written out; products for "all" and "shuffle".
        nested: how deep.
    """

    kind: str
    parts: Any = ()
    symbols: frozenset[str] = frozenset()
    least: int = 0
    most: int | None = None
    empty_word: bool = False
    written: int = 1
    nested: int = 0
    hashed: int = 0

    def __hash__(self) -> int:
        return self.hashed


def _language(kind: str, parts: Any = (), symbols: frozenset[str] = frozenset(), least: int = 0,
              most: int | None = None, *, empty_word: bool, written: int) -> Language:  # fmt: skip
    nested = 1 + max((part.nested for part in parts), default=0)
    hashed = hash((kind, parts, symbols, least, most))
    return Language(kind, parts, symbols, least, most, empty_word, written, nested, hashed)


def one(symbols: Iterable[str]) -> Language:
    """The words of one of these symbols."""
    symbols = frozenset(symbols)
    return _language("one", symbols=symbols, empty_word=False, written=max(1, len(symbols)))


def chain(parts: Iterable[Language]) -> Language:
    """A word of each part, one after the other."""
    flat: list[Language] = []
    for part in parts:
        if part == NOTHING:
            return NOTHING
        flat += part.parts if part.kind == "chain" else [part]
    if len(flat) == 1:
        return flat[0]
    return _language("chain", tuple(flat), empty_word=all(part.empty_word for part in flat),
                     written=sum(part.written for part in flat))  # fmt: skip


def any_of(parts: Iterable[Language]) -> Language:
    """Words in some part."""
    flat: set[Language] = set()
    symbols: frozenset[str] = frozenset()
    for part in parts:
        for own in part.parts if part.kind == "any" else [part]:
            if own.kind == "one":
                symbols |= own.symbols
            else:
                flat.add(own)
    if symbols or not flat:
        flat.add(one(symbols))
    if len(flat) == 1:
        return flat.pop()
    return _language("any", frozenset(flat), empty_word=any(part.empty_word for part in flat),
                     written=sum(part.written for part in flat))  # fmt: skip


def all_of(parts: Iterable[Language]) -> Language:
    """Words in every part."""
    flat: set[Language] = set()
    for part in parts:
        flat |= part.parts if part.kind == "all" else {part}
    if NOTHING in flat:
        return NOTHING
    if len(flat) == 1:
        return flat.pop()
    return _language("all", frozenset(flat), empty_word=all(part.empty_word for part in flat), written=_product(flat))


def shuffle(parts: Iterable[Language]) -> Language:
    """The symbols of a word of each part, each word's in its order."""
    flat: list[Language] = []
    for part in parts:
        flat += part.parts if part.kind == "shuffle" else [part]
    if NOTHING in flat:
        return NOTHING
    flat = [part for part in flat if part != EMPTY]
    if len(flat) < 2:
        return flat[0] if flat else EMPTY
    return _language("shuffle", tuple(flat), empty_word=all(part.empty_word for part in flat), written=_product(flat))


def repeat(part: Language, least: int, most: int | None) -> Language:
    """From `least` to `most` words of a part; None is any number."""
    if most == 0 or part == EMPTY or (part == NOTHING and least == 0):
        return EMPTY
    if part == NOTHING or (least, most) == (1, 1):
        return part
    copies = max(1, least if most is None else most)
    return _language("repeat", (part,), least=least, most=most, empty_word=least == 0 or part.empty_word,
                     written=part.written * copies)  # fmt: skip


def _product(parts: Iterable[Language]) -> int:
    size = 1
    for part in parts:
        size *= part.written + 1
    return size


EMPTY = _language("chain", empty_word=True, written=1)
NOTHING = one(())
