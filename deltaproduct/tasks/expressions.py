"""Regular expressions, parsed.

The syntax is automata-lib's, and this file reads all of it: one character is one symbol; ( ), |, *, +, ?, {m,n}; & for
words in both languages, ^ for words of both shuffled; `.`, [a-c], [^ab], \\d, \\w, \\s, \\D, \\W and \\S for one of
several symbols; a backslash before what else is to be a symbol. |, & and ^ bind equally, from left to right.
"""

import re
import string
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from deltaproduct.tasks.languages import EMPTY, Language, all_of, any_of, chain, one, repeat, shuffle

MAX_REPEATS = 999
MAX_WRITTEN = 10_000  # symbols of an expression, its repetitions written out
MAX_NESTED = 50

CONTROL = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v"}
NAMED = {"d": string.digits, "w": string.ascii_letters + string.digits + "_", "s": " \t\n\r\f\v"}
COUNT = re.compile(r"\{(\d*)(,?)(\d*)\}", re.ASCII)


class NoExpression(Exception):
    """The text is no regular expression, and why."""


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
    reader = _ExpressionReader(tokens, everything)
    language = reader.several(0)
    if reader.at < len(tokens):
        raise NoExpression("a ) closes nothing")
    return language


class _ExpressionReader:
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
