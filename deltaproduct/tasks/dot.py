"""Automata from and to Graphviz's DOT language (dot_syntax.py).

The field's conventions. A state is a node, its name the node's own (not its label). Accepting states have the shape
doublecircle, or two peripheries. To the initial state leads an edge from a node that is no state: one of the shape
point, none, plain or plaintext, or one called "", init, start or __start0 with no label on that edge. Without such an
edge it is the only state, the only one with the attribute initial=true or start=true, or the only one called start,
init or initial. The label of any other edge holds its symbols, with commas or line breaks between them; a symbol with a
comma, a quote, a line break or space at an end stands in double quotes, as a JSON string.

Of a Moore machine, whose states are records with the label "name|output" (so AALpy writes them), the states with the
output 1, true, yes or accept are the accepting ones, if all others have 0, false, no or reject.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from deltaproduct.errors import UsageError, quoted
from deltaproduct.tasks.automata import Automaton
from deltaproduct.tasks.automaton_format import SINK, check_table, new_name
from deltaproduct.tasks.dot_syntax import Graph, Grouped, Html, NoDot, graphs_of

DOT_EXAMPLE = (
    'digraph { begin [shape=point]; begin -> even; even [shape=doublecircle]; even -> even [label="0"]; '
    'even -> odd [label="1"]; odd -> odd [label="0"]; odd -> even [label="1"] }'
)
RECORDS = {"record", "mrecord"}
STATES = {"circle", "ellipse", "oval", "box", "rect", "rectangle", "square", "doublecircle"} | RECORDS
OF_NODES = ("label", "shape", "peripheries", "initial", "start")
NO_STATES = {"point", "none", "plain", "plaintext"}
STARTS = {"", "init", "start", "__start0"}
MOST_NAMED = 3  # in a message
# A piece of a label, up to the next comma or line break; no space is looked at twice.
QUOTED_PIECE = re.compile(r'[^\S\n\r]*+("[^"\\]*+(?:\\.[^"\\]*+)*+")[^\S\n\r]*+(?:[,\n\r]|$)')
PIECE = re.compile(r"([^,\n\r]*+)(?:[,\n\r]|$)")
INITIAL = {"start", "init", "initial"}  # names of an initial state
OUTPUTS = {"1": True, "true": True, "yes": True, "accept": True, "accepted": True,
           "0": False, "false": False, "no": False, "reject": False, "rejected": False}  # fmt: skip


def automaton_to_dot(automaton: Automaton) -> str:
    """The automaton as DOT text, which `automaton_from_dot` reads back as it was."""
    taken, accepting = set(automaton.states), set(automaton.accepting)
    start = next(name for i in range(len(taken) + 1) if (name := f"__start{i}") not in taken)
    lines = [
        "digraph automaton {",
        f"  alphabet={_quoted(', '.join(map(_symbol, automaton.alphabet)))};",  # for the order; Graphviz ignores it
        "  rankdir=LR;",
        f'  {_quoted(start)} [label="", shape=none];',
    ]
    for state, name in enumerate(automaton.states):
        lines.append(f"  {_quoted(name)} [shape={'doublecircle' if state in accepting else 'circle'}];")
    lines.append(f"  {_quoted(start)} -> {_quoted(automaton.states[automaton.initial])};")
    for state, row in enumerate(automaton.transitions):
        symbols: dict[int, list[str]] = {}
        for symbol, to in zip(automaton.alphabet, row, strict=True):
            symbols.setdefault(to, []).append(_symbol(symbol))
        for to, names in symbols.items():
            ends = f"{_quoted(automaton.states[state])} -> {_quoted(automaton.states[to])}"
            lines.append(f"  {ends} [label={_quoted(', '.join(names))}];")
    return "\n".join([*lines, "}"]) + "\n"


def automaton_from_dot(text: str) -> Automaton:
    """The automaton in a DOT text, by the conventions above.

    States are in the order in which the text first names them, symbols in that of the graph's attribute `alphabet`,
    else sorted. Transitions that are missing lead to one more state, "sink", which nothing leaves.

    Raises UsageError, in one line with an example, when the text is no DOT or does not describe one deterministic
    automaton, or one that is too large.
    """
    try:
        return _automaton(text)
    except _NoAutomaton as e:
        raise UsageError(f"{e} For example: {DOT_EXAMPLE}.") from e


def _automaton(text: str) -> Automaton:
    """Raises _NoAutomaton for what an example helps with."""
    drawing = _Drawing()
    drawing.read(_parsed(text))
    drawing.count_edges()
    starts = {name for name in drawing.nodes if drawing.is_start(name)}
    initial = drawing.initial(starts)
    states = [name for name in drawing.nodes if name not in starts]
    symbols: dict[str, None] = {}
    steps: dict[tuple[str, str], str] = {}
    for begin, end, label in drawing.edges:
        if begin in starts:
            continue
        names = _symbols(label)
        if not names:
            raise _NoAutomaton(f"The edge from {quoted(begin)} to {quoted(end)} has no symbols as its label.")
        for symbol in names:
            symbols[symbol] = None
            if steps.setdefault((begin, symbol), end) != end:
                raise UsageError(f"The automaton is not deterministic: from {quoted(begin)}, {quoted(symbol)} "
                                 f"leads to {quoted(steps[begin, symbol])} and to {quoted(end)}.")  # fmt: skip
    given = _symbols(drawing.alphabet)
    known = set(given)
    if given and (unknown := [symbol for symbol in symbols if symbol not in known]):
        raise UsageError(f"The symbol {quoted(unknown[0])} is not in the alphabet that the graph gives.")
    alphabet = given or sorted(symbols)
    accepting = drawing.accepting(states)
    check_table(len(states), len(alphabet))
    number = {name: i for i, name in enumerate(states)}
    place = {symbol: i for i, symbol in enumerate(alphabet)}
    sink, missing = len(states), len(states) * len(alphabet) - len(steps)
    rows = [[sink] * len(alphabet) for _ in range(len(states) + bool(missing))]
    for (state, symbol), to in steps.items():
        rows[number[state]][place[symbol]] = number[to]
    return Automaton(
        alphabet=tuple(alphabet),
        states=(*states, new_name(SINK, states)) if missing else tuple(states),
        initial=number[initial],
        accepting=tuple(number[name] for name in accepting),
        transitions=tuple(map(tuple, rows)),
    )


class _NoAutomaton(Exception):
    """The text is DOT, and draws no automaton by these conventions."""


def _parsed(text: str) -> Graph:
    try:
        graphs = graphs_of(text)
    except NoDot as e:
        raise _NoAutomaton(f"This is not DOT: {e}.") from e
    except Grouped as e:
        raise UsageError("An edge of an automaton goes from one node to one other, not to a group of them.") from e
    if not graphs:
        raise _NoAutomaton("This is not DOT: nothing in it.")
    if len(graphs) > 1:
        raise UsageError(f"There are {len(graphs)} graphs in it; one automaton is one graph.")
    if not graphs[0].directed:
        raise _NoAutomaton("An automaton is a directed graph (digraph); this one is not.")
    return graphs[0]


@dataclass
class _Drawing:
    """What a graph shows: nodes and their attributes, edges and their labels."""

    nodes: dict[str, dict[str, str]] = field(default_factory=dict)
    edges: list[tuple[str, str, str]] = field(default_factory=list)
    alphabet: str = ""

    entered: set[str] = field(default_factory=set)  # nodes that an edge leads to
    labelled: dict[str, bool] = field(default_factory=dict)  # whether an edge that leaves a node has a label

    def read(self, graph: Graph) -> None:
        """Add a graph's statements in their order."""
        scopes: list[tuple[dict[str, str], dict[str, str]]] = [({}, {})]  # of nodes and edges, within each brace
        for kind, names, attributes in graph.statements:
            nodes, edges = scopes[-1]
            attributes = attributes or {}
            if kind == "open":
                scopes.append((dict(nodes), dict(edges)))
            elif kind == "close":
                scopes.pop()
            elif kind == "set" and names[0] == "alphabet":
                self.alphabet = self.alphabet or _plain(attributes["alphabet"])
            elif kind == "default" and names[0] == "node":
                nodes.update(_of_node(attributes))
            elif kind == "default" and names[0] == "edge":
                edges.update(_attributes(attributes, "label"))
            elif kind == "node":
                self._node(names[0], nodes).update(_of_node(attributes))
            elif kind == "edge":
                begin, end = names
                self._node(begin, nodes)
                self._node(end, nodes)
                self.edges.append((begin, end, (edges | _attributes(attributes, "label")).get("label", "")))

    def _node(self, name: str, defaults: dict[str, str]) -> dict[str, str]:
        """A node's attributes; of one that was not named before, the defaults."""
        return self.nodes.setdefault(_plain(name), dict(defaults))

    def count_edges(self) -> None:
        """Note what edges there are, for `is_start`."""
        self.entered = {end for _, end, _ in self.edges}
        for begin, _, label in self.edges:
            self.labelled[begin] = self.labelled.get(begin, False) or bool(label)

    def is_start(self, name: str) -> bool:
        """Whether a node is no state, but where the edge to the initial state comes from."""
        shape = self.nodes[name].get("shape", "ellipse").lower()
        if shape not in STATES | NO_STATES:
            raise UsageError(f"The node {quoted(name)} has the shape {quoted(shape)}; states are circles or "
                             "doublecircles, and a point marks the start.")  # fmt: skip
        if shape in NO_STATES:
            if name in self.entered:
                raise UsageError(
                    f"An edge leads to the node {quoted(name)}, whose shape {shape!r} is that of no state."
                )
            return True
        return name in STARTS and self.labelled.get(name) is False and name not in self.entered

    def accepting(self, states: list[str]) -> list[str]:
        """Which of these states are marked as accepting ones."""
        shapes = {name: self.nodes[name].get("shape", "").lower() for name in states}
        if not any(shape in RECORDS for shape in shapes.values()):
            return [
                name for name in states if shapes[name] == "doublecircle" or self.nodes[name].get("peripheries") == "2"
            ]
        outputs = {name: self.nodes[name].get("label", "").rpartition("|")[2].strip() for name in states}
        if unknown := [name for name in states if outputs[name].lower() not in OUTPUTS or shapes[name] not in RECORDS]:
            raise _NoAutomaton(
                f"The state {quoted(unknown[0])} has no output that says whether it accepts: beside states that are "
                'records all must be such, with a label like "name|1" or "name|0".'
            )
        return [name for name in states if OUTPUTS[outputs[name].lower()]]

    def initial(self, starts: set[str]) -> str:
        """The state that the start's edge leads to, or that is the initial one by its attribute or name."""
        found = {end for begin, end, _ in self.edges if begin in starts}
        states = [name for name in self.nodes if name not in starts]
        marked = [name for name in states if "true" in (self.nodes[name].get("initial", "").lower(),
                                                        self.nodes[name].get("start", "").lower())]  # fmt: skip
        found |= set(marked)
        if not found:
            known = [name for name in states if name.lower() in INITIAL] if len(states) > 1 else states
            found |= set(known)
        if not found:
            raise _NoAutomaton('There is no initial state: an edge from a node of shape "point" or "none" marks it.')
        if len(found) > 1:
            some = sorted(found)[:MOST_NAMED]
            more = " and others" if len(found) > len(some) else ""
            raise UsageError(f"There are {len(found)} initial states: {' and '.join(map(quoted, some))}{more}.")
        return found.pop()


def _attributes(given: dict[str, str], *names: str) -> dict[str, str]:
    return {name: _plain(given[name]) for name in names if name in given}


def _of_node(given: dict[str, str]) -> dict[str, str]:
    """A node's attributes; a label in HTML is only how it looks."""
    return _attributes(given, *OF_NODES[isinstance(given.get("label"), Html) :])


def _plain(text: str) -> str:
    """Raises UsageError for an HTML-like string."""
    if isinstance(text, Html):
        raise UsageError("The graph has an HTML-like string; plain ones are understood.")
    return text


def _quoted(text: str) -> str:
    """As a DOT string."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\r", "\\r").replace("\n", "\\n") + '"'


def _symbol(name: str) -> str:
    """As it stands in a label."""
    plain = name and name == name.strip() and not re.search(r'[",\n\r]', name)
    return name if plain else json.dumps(name, ensure_ascii=False)


def _symbols(label: str) -> list[str]:
    """The symbols in a label, each once."""
    return list(dict.fromkeys(_pieces(label)))


def _pieces(label: str) -> Iterator[str]:
    at = 0
    while at < len(label):
        match = QUOTED_PIECE.match(label, at)
        if match:
            try:
                yield json.loads(match[1])
            except ValueError as e:
                raise UsageError(f"The label {quoted(label)} has a quoted symbol that is no JSON string.") from e
            at = match.end()
            continue
        match = PIECE.match(label, at)
        assert match is not None  # it matches anything
        if match[1].strip():
            yield match[1].strip()
        at = match.end()
