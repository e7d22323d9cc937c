"""The syntax of Graphviz's DOT language, read in one pass: time and memory grow as the text does.

It follows the language's published grammar, except that what an edge may join is one node and one other: a group in
braces as an end of an edge is refused, since it says nothing of an automaton. A word that is no keyword, a string or
an HTML-like string is a name; strings may be joined by "+". Beside the grammar an attribute may lack its value.
"""

import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

TOKEN = re.compile(
    r"""(?P<skip>[\s﻿]++|//[^\n]*+|\#[^\n]*+|/\*.*?\*/)
      |(?P<string>"[^"\\]*+(?:\\.[^"\\]*+)*+")
      |(?P<edge>->|--)
      |(?P<word>-?[\w.]++)
      |(?P<sign>[{}\[\]=,;:+])
      |(?P<html><)""",
    re.DOTALL | re.VERBOSE,
)
KEYWORDS = {"strict", "graph", "digraph", "subgraph", "node", "edge"}
ESCAPES = {"n": "\n", "l": "\n", "r": "\r"}


class NoDot(Exception):
    """The text is not DOT, and why."""


class Grouped(Exception):
    """An edge has a group of nodes at one of its ends."""


class Html(str):
    """An HTML-like string."""

    __slots__ = ()


class Statement(NamedTuple):
    """One of a graph's.

    Attributes:
        kind: "node", "edge", "default" (of all nodes or edges that follow in these braces), "set" (of an attribute of
            the graph), "open" and "close" (of braces within the graph).
        names: of the node, of the edge's two; what the default is of; the attribute that is set.
        attributes: by their names; of "set" the one.
    """

    kind: str
    names: tuple[str, ...] = ()
    attributes: dict[str, str] | None = None


class Graph(NamedTuple):
    """A graph, and whether its edges have directions."""

    directed: bool
    statements: list[Statement]


def graphs_of(text: str) -> list[Graph]:
    """All graphs in a text. Raises NoDot, and Grouped."""
    reader = _DotReader(text)
    graphs = []
    while reader.kind != "end":
        graphs.append(reader.graph())
    return graphs


class _DotReader:
    """One token is looked at; braces within the graph are counted and not recursed into."""

    def __init__(self, text: str):
        self.text = text
        self._tokens = self._scan()
        self.advance()

    def _scan(self) -> Iterator[tuple[str, str, int]]:
        text, at = self.text, 0
        while at < len(text):
            match = TOKEN.match(text, at)
            if match is None:
                what = "a string is never closed" if text[at] == '"' else f"{text[at]!r} has no meaning here"
                raise self.error(what, at)
            kind, begin, at = str(match.lastgroup), at, match.end()
            if kind == "html":
                at = self._html_end(begin)
            if kind != "skip":
                yield kind, text[begin:at], begin
        yield "end", "", len(text)

    def _html_end(self, begin: int) -> int:
        depth = 0
        for match in re.compile("[<>]").finditer(self.text, begin):
            depth += 1 if match[0] == "<" else -1
            if depth == 0:
                return match.end()
        raise self.error("a < is never closed", begin)

    def error(self, what: str, at: int) -> NoDot:
        line = self.text.count("\n", 0, at)
        return NoDot(f"{what} (at char {at}), (line:{line + 1}, col:{at - self.text.rfind(chr(10), 0, at)})")

    def advance(self) -> None:
        self.kind, self.token, self.at = next(self._tokens)

    def takes(self, sign: str) -> bool:
        """Go beyond this sign, if it comes next."""
        if self.kind != "sign" or self.token != sign:
            return False
        self.advance()
        return True

    @property
    def keyword(self) -> str:
        """The keyword that comes next, in small letters, or nothing."""
        word = self.token.lower() if self.kind == "word" and len(self.token) <= 8 else ""
        return word if word in KEYWORDS else ""

    def name(self, what: str, *, at: int | None = None) -> str:
        if self.kind == "word" and not self.keyword:
            name = self.token
            self.advance()
            return name
        if self.kind == "html":
            name = Html(self.token)
            self.advance()
            return name
        if self.kind != "string":
            raise self.error(f"{what} is missing", self.at if at is None else at)
        parts = [self.token[1:-1]]
        self.advance()
        while self.takes("+"):
            if self.kind != "string":
                raise self.error("a string after + is missing", self.at)
            parts.append(self.token[1:-1])
            self.advance()
        joined = "".join(parts)
        if "\\" not in joined:
            return joined
        joined = joined.replace("\\\r\n", "").replace("\\\n", "")
        return re.sub(r"\\(.)", lambda match: ESCAPES.get(match[1], match[1]), joined, flags=re.DOTALL)

    def graph(self) -> Graph:
        if self.keyword == "strict":
            self.advance()
        if self.keyword not in ("graph", "digraph"):
            raise self.error("a graph begins with digraph", self.at)
        directed = self.keyword == "digraph"
        self.advance()
        if self.kind in ("word", "string", "html"):
            self.name("a graph's name")
        begin = self.at
        if not self.takes("{"):
            raise self.error("a { is missing", self.at)
        statements: list[Statement] = []
        open_at = [begin]
        while open_at:
            if self.kind == "end":
                raise self.error("a { is never closed", open_at[-1])
            if self.takes(";"):
                continue
            begin = self.at
            if self.takes("}"):
                open_at.pop()
                if open_at:
                    statements.append(Statement("close"))
                    if self.kind == "edge":
                        raise Grouped
            elif self._opens_group():
                statements.append(Statement("open"))
                open_at.append(begin)
            else:
                self._statement(statements)
        return Graph(directed, statements)

    def _opens_group(self) -> bool:
        """Go beyond `{`, `subgraph {` or `subgraph NAME {`, if that comes next."""
        if self.keyword == "subgraph":
            self.advance()
            if self.kind in ("word", "string", "html"):
                self.name("a subgraph's name")
            if not self.takes("{"):
                raise self.error("a { is missing", self.at)
            return True
        return self.takes("{")

    def _statement(self, statements: list[Statement]) -> None:
        if self.keyword in ("graph", "node", "edge"):
            kind = self.keyword
            self.advance()
            statements.append(Statement("default", (kind,), self._attributes()))
            return
        name = self.name("a statement")
        if self.takes("="):
            statements.append(Statement("set", (name,), {name: self.name("a value")}))
            return
        names = [self._without_port(name)]
        while self.kind == "edge":
            at = self.at
            self.advance()
            if self.keyword == "subgraph" or (self.kind == "sign" and self.token == "{"):
                raise Grouped
            names.append(self._without_port(self.name("a node at the end of an edge", at=at)))
        attributes = self._attributes()
        if len(names) == 1:
            statements.append(Statement("node", (names[0],), attributes))
        statements += (Statement("edge", pair, attributes) for pair in itertools.pairwise(names))

    def _without_port(self, name: str) -> str:
        while self.takes(":"):
            self.name("a port")
        return name

    def _attributes(self) -> dict[str, str]:
        """Of lists in [ ], of which there may be none."""
        found: dict[str, str] = {}
        while self.takes("["):
            while not self.takes("]"):
                name = self.name("an attribute or a ]")
                found[name] = self.name("a value") if self.takes("=") else ""
                if not self.takes(","):
                    self.takes(";")
        return found
