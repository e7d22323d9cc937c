"""Regular expressions, parsed: their symbols, how automata-lib is asked for them, and whether its answer is right.

The syntax is automata-lib's, and this file reads all of it: one character is one symbol; ( ), |, *, +, ?, {m,n}; & for
words in both languages, ^ for words of both shuffled; `.`, [a-c], [^ab], \\d, \\w, \\s, \\D, \\W and \\S for one of
several symbols; a backslash before what else is to be a symbol. |, & and ^ bind equally, from left to right.

The library does not get the expression as it stands, because it takes what is inside { } and [ ] for symbols, and a{0}
for a. It gets the parsed one, with a character of its own for every symbol and without what it misreads. Its answer is
compared with derivatives (Brzozowski, Derivatives of Regular Expressions, 1964): the derivative of R by a holds what
follows a first a in the words of R, and a word is in R if and only if the derivative by all of its symbols holds the
empty word. An expression has finitely many derivatives, so that comparing a state with each of them compares all words.
"""

import re
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

MAX_REPEATS = 999
MAX_WRITTEN = 10_000  # symbols of an expression, its repetitions written out
MAX_NESTED = 50
MAX_COMPARED = 300_000  # parts of derivatives that are gone through, which takes a second or two
FIRST_PRIVATE = 0xF0000  # of Unicode's private use, with room for 65,000 symbols

CONTROL = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v"}
NAMED = {"d": string.digits, "w": string.ascii_letters + string.digits + "_", "s": " \t\n\r\f\v"}
COUNT = re.compile(r"\{(\d*)(,?)(\d*)\}", re.ASCII)


class NoExpression(Exception):
    """The text is no regular expression, and why."""


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


# --- Reading --------------------------------------------------------------------------------------------------------


class Token(NamedTuple):
    """A piece of an expression.

    Attributes:
        text: as it stands.
        kind: "one" for a set of symbols, "count" for how often, else the sign itself.
        symbols: of a set, those that it names.
        others: whether it is all symbols but those.
        least, most: of a count.
        optional: whether a symbol that is named need not be in the alphabet.
    """

    text: str
    kind: str
    symbols: frozenset[str] = frozenset()
    others: bool = False
    least: int = 0
    most: int | None = None
    optional: bool = False


def tokens_of(regex: str) -> list[Token]:
    """The expression's pieces. Raises NoExpression."""
    found: list[Token] = []
    at = 0
    if any("\ud800" <= sign <= "\udfff" for sign in regex):
        raise NoExpression("it is not text in UTF-8")
    while at < len(regex):
        sign = regex[at]
        if sign == "\\":
            token = _escaped(regex, at)
        elif sign == "[":
            token = _bracketed(regex, at)
        elif sign == "{":
            token = _counted(regex, at)
        elif sign == ".":
            token = Token(sign, "one", others=True)
        elif sign in "*+?":
            token = Token(sign, "count", least=int(sign == "+"), most=1 if sign == "?" else None)
        elif sign in "()|&^":
            token = Token(sign, sign)
        elif sign == "$":
            raise NoExpression("whole words are read, and $ is not needed; the symbol is \\$")
        elif sign in "}]":
            raise NoExpression(f"{sign} closes nothing; the symbol is \\{sign}")
        else:
            token = Token(sign, "one", frozenset(sign))
        if token.text in ("?", "+") and found and found[-1].kind == "count":
            # Elsewhere that is how to search; for the library it is a repetition of a repetition.
            twice = found[-1].text
            raise NoExpression(f"{twice}{sign} has two meanings; write (a{twice}){sign} for one of them")
        found.append(token)
        at += len(token.text)
    return found


def symbols_of(tokens: Iterable[Token]) -> set[str]:
    """All symbols that are named."""
    return {symbol for token in tokens for symbol in token.symbols}


def language_of(tokens: Sequence[Token], alphabet: Iterable[str]) -> Language:
    """The language of an expression's pieces. Raises NoExpression."""
    everything = frozenset(alphabet)
    for token in tokens:
        missing = token.symbols - everything
        if missing and not token.optional and not token.others:
            raise NoExpression(f"{min(missing)!r} is not in the alphabet")
    reader = _Reader(tokens, everything)
    language = reader.several(0)
    if reader.at < len(tokens):
        raise NoExpression("a ) closes nothing")
    return language


class _Reader:
    """Recursive descent: several = row ([|&^] row)*, row = item+, item = ("(" several? ")" | one) count*."""

    def __init__(self, tokens: Sequence[Token], alphabet: frozenset[str]):
        self.tokens, self.alphabet, self.at = tokens, alphabet, 0

    def next_kind(self) -> str:
        return self.tokens[self.at].kind if self.at < len(self.tokens) else ""

    def several(self, depth: int) -> Language:
        if depth > MAX_NESTED:
            raise NoExpression(f"more than {MAX_NESTED} brackets are inside one another")
        found = [self.row(depth)]
        while (sign := self.next_kind()) in ("|", "&", "^"):
            self.at += 1
            if sign != "|":
                make = all_of if sign == "&" else shuffle
                found = [_small_enough(make((_small_enough(any_of(found)), self.row(depth))))]
            else:  # all at once at the end: a set that grows one by one is copied each time
                found.append(self.row(depth))
        return _small_enough(any_of(found))

    def row(self, depth: int) -> Language:
        found: list[Language] = []
        while (kind := self.next_kind()) in ("one", "("):
            token = self.tokens[self.at]
            self.at += 1
            if kind == "one":
                item = one(self.alphabet - token.symbols if token.others else self.alphabet & token.symbols)
            elif self.next_kind() == ")":
                self.at += 1
                item = EMPTY
            else:
                item = self.several(depth + 1)
                if self.next_kind() != ")":
                    raise NoExpression("a ( is never closed")
                self.at += 1
            while self.next_kind() == "count":
                count = self.tokens[self.at]
                self.at += 1
                item = _small_enough(repeat(item, count.least, count.most))
            found.append(item)
        if not found:
            here = self.tokens[self.at].text if self.at < len(self.tokens) else "its end"
            raise NoExpression(f"something is missing before {here}; the empty word is ()")
        return _small_enough(chain(found))


def _small_enough(language: Language) -> Language:
    if language.written > MAX_WRITTEN:
        raise NoExpression(f"written out it has {language.written:,} parts, and at most {MAX_WRITTEN:,} are possible")
    if language.nested > 2 * MAX_NESTED:
        raise NoExpression(f"it is nested more than {2 * MAX_NESTED} deep")
    return language


def _escaped(regex: str, at: int) -> Token:
    text = regex[at : at + 2]
    if len(text) < 2:
        raise NoExpression("a backslash ends it; the symbol is \\\\")
    sign = text[1]
    if sign.lower() in NAMED:
        return Token(text, "one", frozenset(NAMED[sign.lower()]), others=sign.isupper(), optional=True)
    return Token(text, "one", frozenset(_plain(text)))


def _plain(text: str) -> str:
    """The symbol that a backslash and a character stand for."""
    sign = text[1]
    if sign in CONTROL:
        return CONTROL[sign]
    if sign.isalnum() or sign == "_":
        raise NoExpression(f"{text} means nothing here")
    return sign


def _counted(regex: str, at: int) -> Token:
    match = COUNT.match(regex, at)
    if not match or match[0] == "{}":
        raise NoExpression("after { there must be how often, as in {2}, {2,} or {2,5}; the symbol is \\{")
    if any(len(number.lstrip("0")) > len(str(MAX_REPEATS)) for number in (match[1], match[3])):
        raise NoExpression(f"it repeats something more than {MAX_REPEATS} times")
    least = int(match[1] or 0)
    most = (int(match[3]) if match[3] else None) if match[2] else least
    if max(least, most or 0) > MAX_REPEATS:
        raise NoExpression(f"it repeats something more than {MAX_REPEATS} times")
    if most is not None and most < least:
        raise NoExpression(f"{match[0]} goes from {least} down to {most}")
    return Token(match[0], "count", least=least, most=most)


def _bracketed(regex: str, at: int) -> Token:
    """[…] as in Python: one of these symbols, or after [^ one of the others; a-c is a range, and - at an end itself."""
    place = at + 1
    others = regex[place : place + 1] == "^"
    place += others
    symbols: set[str] = set()
    optional, first = False, place
    while regex[place : place + 1] != "]" or place == first:
        low, place, named = _in_brackets(regex, place)
        if named:
            if regex[place : place + 1] == "-" and regex[place + 1 : place + 2] not in ("]", ""):
                raise NoExpression(f"{regex[at : place + 1]} has a range that is none")
            symbols |= set(low)
            optional = True
        elif regex[place : place + 1] == "-" and regex[place + 1 : place + 2] not in ("]", ""):
            high, place, named = _in_brackets(regex, place + 1)
            if named or ord(high) < ord(low):
                raise NoExpression(f"{regex[at : place + 1]} has a range that is none")
            if ord(high) - ord(low) >= MAX_WRITTEN:
                raise NoExpression(f"{regex[at : place + 1]} has a range of more than {MAX_WRITTEN:,} symbols")
            symbols |= {chr(code) for code in range(ord(low), ord(high) + 1)}
        else:
            symbols.add(low)
    return Token(regex[at : place + 1], "one", frozenset(symbols), others, optional=optional)


def _in_brackets(regex: str, place: int) -> tuple[str, int, bool]:
    """What stands at a place inside [ ]: its symbols, the place after it, and whether it is a named set."""
    sign = regex[place : place + 1]
    if not sign:
        raise NoExpression("a [ is never closed")
    if sign == "]":
        raise NoExpression("[] has no symbols; the symbol ] is \\]")
    if sign != "\\":
        return sign, place + 1, False
    text = regex[place : place + 2]
    if len(text) < 2:
        raise NoExpression("a [ is never closed")
    if text[1] in NAMED:
        return NAMED[text[1]], place + 2, True
    return _plain(text), place + 2, False


# --- For the library, and beside it ----------------------------------------------------------------------------------


def private(alphabet: Sequence[str]) -> dict[str, str]:
    """A character for each symbol that means nothing to the library."""
    return {symbol: chr(FIRST_PRIVATE + i) for i, symbol in enumerate(alphabet)}


def for_library(language: Language, names: dict[str, str]) -> str:
    """An expression of the language, which is not NOTHING, in what automata-lib reads rightly."""
    if language.kind == "one":
        return "(" + "|".join(sorted(names[symbol] for symbol in language.symbols)) + ")"
    parts = [for_library(part, names) for part in language.parts]
    if language.kind == "chain":
        return "(" + "".join(parts) + ")"
    if language.kind == "repeat":
        if language.least == 0 and language.most is None:
            return f"({parts[0]})*"
        return f"({parts[0]}){{{language.least},{'' if language.most is None else language.most}}}"
    return "(" + {"any": "|", "all": "&", "shuffle": "^"}[language.kind].join(sorted(parts)) + ")"


class Derivatives:
    """The derivative of a language by a symbol: what follows the symbol in the words that begin with it.

    Attributes:
        work: how many parts of languages have been gone through.
    """

    def __init__(self) -> None:
        self.known: dict[tuple[Language, str], Language] = {}
        self.work = 0

    def __call__(self, language: Language, symbol: str) -> Language:
        found = self.known.get((language, symbol))
        if found is None:
            self.work += 1 + len(language.parts)
            found = self.known[language, symbol] = self._of(language, symbol)
        return found

    def _of(self, language: Language, symbol: str) -> Language:
        if language.kind == "one":
            return EMPTY if symbol in language.symbols else NOTHING
        parts = language.parts
        if language.kind == "repeat":
            most = None if language.most is None else language.most - 1
            return chain((self(parts[0], symbol), repeat(parts[0], max(0, language.least - 1), most)))
        options: list[Language] = []
        for i, part in enumerate(parts):
            after = self(part, symbol)
            if language.kind == "chain":
                options.append(chain((after, *parts[i + 1 :])))
                if not part.empty_word:
                    break
            elif language.kind == "shuffle":
                options.append(shuffle((*parts[:i], after, *parts[i + 1 :])))
            else:
                options.append(after)
        return all_of(options) if language.kind == "all" else any_of(options)


def first_difference(
    language: Language,
    alphabet: Sequence[str],
    start: Any,
    step: Callable[[Any, str], Any],
    accepts: Callable[[Any], bool],
) -> str | None:
    """A shortest word that is in the language or accepted, and not both; None if none is found.

    States and derivatives are compared in pairs, as words lead to them. That is every word, unless there is so much of
    derivatives that it stops at `MAX_COMPARED` of their parts; then it is every word up to some length.
    """
    by_symbol = Derivatives()
    words: dict[tuple[Any, Language], str] = {(start, language): ""}
    queue = list(words)
    for state, rest in queue:  # grows while it is gone through
        word = words[state, rest]
        if rest.empty_word != accepts(state):
            return word
        if by_symbol.work > MAX_COMPARED:
            continue  # what has been found is still compared
        for symbol in alphabet:
            pair = (step(state, symbol), by_symbol(rest, symbol))
            if pair not in words:
                words[pair] = word + symbol
                queue.append(pair)
    return None
