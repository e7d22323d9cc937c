"""Automata from and to Graphviz's DOT language, parsed by pydot.

The field's conventions. A state is a node, its name the node's own (not its label). Accepting states have the shape
doublecircle, or two peripheries. To the initial state leads an edge from a node that is no state: one of the shape
point, none, plain or plaintext, or one called "", init, start or __start0 with no label on that edge. Without such an
edge it is the only state, the only one with the attribute initial=true or start=true, or the only one called start,
init or initial. The label of any other edge holds its symbols, with commas or line breaks between them; a symbol with a
comma, a quote, a line break or space at an end stands in double quotes, as a JSON string.

Of a Moore machine, whose states are records with the label "name|output" (so AALpy writes them), the states with the
output 1, true, yes or accept are the accepting ones, if all others have 0, false, no or reject.
"""

import contextlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from deltaproduct.errors import UsageError
from deltaproduct.tasks.automata import SINK, Automaton, new_name

DOT_EXAMPLE = (
    'digraph { begin [shape=point]; begin -> even; even [shape=doublecircle]; even -> even [label="0"]; '
    'even -> odd [label="1"]; odd -> odd [label="0"]; odd -> even [label="1"] }'
)
RECORDS = {"record", "mrecord"}
STATES = {"circle", "ellipse", "oval", "box", "rect", "rectangle", "square", "doublecircle"} | RECORDS
OF_NODES = ("label", "shape", "peripheries", "initial", "start")
NO_STATES = {"point", "none", "plain", "plaintext"}
STARTS = {"", "init", "start", "__start0"}
INITIAL = {"start", "init", "initial"}  # names of an initial state
OUTPUTS = {"1": True, "true": True, "yes": True, "accept": True, "accepted": True,
           "0": False, "false": False, "no": False, "reject": False, "rejected": False}  # fmt: skip


def automaton_to_dot(automaton: Automaton) -> str:
    """The automaton as DOT text, which `automaton_from_dot` reads back as it was."""
    start = next(name for i in range(len(automaton.states) + 1) if (name := f"__start{i}") not in automaton.states)
    lines = [
        "digraph automaton {",
        f"  alphabet={_quoted(', '.join(map(_symbol, automaton.alphabet)))};",  # for the order; Graphviz ignores it
        "  rankdir=LR;",
        f'  {_quoted(start)} [label="", shape=none];',
    ]
    for state, name in enumerate(automaton.states):
        lines.append(f"  {_quoted(name)} [shape={'doublecircle' if state in automaton.accepting else 'circle'}];")
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
    automaton; or when pydot is not installed.
    """
    try:
        return _automaton(text)
    except _FormatError as e:
        raise UsageError(f"{e} For example: {DOT_EXAMPLE}.") from e


def _automaton(text: str) -> Automaton:
    """Raises _FormatError for what an example helps with."""
    graph = _parsed(text)
    drawing = _Drawing()
    drawing.read(graph, {}, {})
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
            raise _FormatError(f"The edge from {begin!r} to {end!r} has no symbols as its label.")
        for symbol in names:
            symbols[symbol] = None
            if steps.setdefault((begin, symbol), end) != end:
                raise UsageError(f"The automaton is not deterministic: from {begin!r}, {symbol!r} leads to "
                                 f"{steps[begin, symbol]!r} and to {end!r}.")  # fmt: skip
    given = _symbols(drawing.alphabet)
    if given and (unknown := [symbol for symbol in symbols if symbol not in given]):
        raise UsageError(f"The symbol {unknown[0]!r} is not in the alphabet that the graph gives.")
    alphabet = given or sorted(symbols)
    accepting = drawing.accepting(states)
    if any((state, symbol) not in steps for state in states for symbol in alphabet):
        sink = new_name(SINK, states)
        states.append(sink)
        steps = {(state, symbol): sink for state in states for symbol in alphabet} | steps
    number = {name: i for i, name in enumerate(states)}
    return Automaton(
        alphabet=tuple(alphabet),
        states=tuple(states),
        initial=number[initial],
        accepting=tuple(number[name] for name in accepting),
        transitions=tuple(tuple(number[steps[state, symbol]] for symbol in alphabet) for state in states),
    )


class _FormatError(Exception):
    """The text is DOT, and draws no automaton by these conventions."""


def _parsed(text: str) -> Any:
    """pydot's graph."""
    try:
        import pydot
    except ImportError as e:
        raise UsageError("DOT files need pydot: pip install 'deltaproduct[formal]'.") from e
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):  # where pydot reports mistakes
            graphs = pydot.graph_from_dot_data(text)
    except Exception as e:  # on odd input it fails in more ways than it documents, deep nesting among them
        raise UsageError(f"This is not DOT ({type(e).__name__} in pydot).") from e
    if not graphs:
        reason = (said.getvalue().strip().splitlines() or ["nothing in it"])[-1]
        raise _FormatError(f"This is not DOT: {reason}.")
    if len(graphs) > 1:
        raise UsageError(f"There are {len(graphs)} graphs in it; one automaton is one graph.")
    if graphs[0].get_type() != "digraph":
        raise _FormatError("An automaton is a directed graph (digraph); this one is not.")
    return graphs[0]


@dataclass
class _Drawing:
    """What a graph shows: nodes and their attributes, edges and their labels."""

    nodes: dict[str, dict[str, str]] = field(default_factory=dict)
    edges: list[tuple[str, str, str]] = field(default_factory=list)
    alphabet: str = ""

    def read(self, graph: Any, nodes: dict[str, str], edges: dict[str, str]) -> None:
        """Add a graph's or subgraph's statements in their order; `nodes` and `edges` are the defaults so far."""
        nodes, edges = dict(nodes), dict(edges)
        self.alphabet = self.alphabet or _unquoted(graph.get_attributes().get("alphabet", ""))
        statements = [*graph.get_node_list(), *graph.get_edge_list(), *graph.get_subgraph_list()]
        for statement in sorted(statements, key=lambda x: x.get_sequence()):
            if hasattr(statement, "get_subgraph_list"):
                self.read(statement, nodes, edges)
            elif hasattr(statement, "get_destination"):
                begin, end = (self._node(name, nodes) for name in (statement.get_source(), statement.get_destination()))
                self.edges.append((begin, end, (edges | _attributes(statement, "label")).get("label", "")))
            elif statement.get_name() == "edge":
                edges |= _attributes(statement, "label")
            elif statement.get_name() == "node":
                nodes |= _of_node(statement)
            elif statement.get_name() != "graph":
                self.nodes[self._node(statement.get_name(), nodes)] |= _of_node(statement)

    def _node(self, name: Any, defaults: dict[str, str]) -> str:
        if not isinstance(name, str):
            raise UsageError("An edge of an automaton goes from one node to one other, not to a group of them.")
        match = re.fullmatch(r'("(?:[^"\\]|\\.)*"|[^":]*)(:.*)?', name, re.DOTALL)  # without a port
        known = _unquoted(match[1] if match else name)
        self.nodes.setdefault(known, dict(defaults))
        return known

    def is_start(self, name: str) -> bool:
        """Whether a node is no state, but where the edge to the initial state comes from."""
        shape = self.nodes[name].get("shape", "ellipse").lower()
        if shape not in STATES | NO_STATES:
            raise UsageError(f"The node {name!r} has the shape {shape!r}; states are circles or doublecircles, and a "
                             "point marks the start.")  # fmt: skip
        entered = any(end == name for _, end, _ in self.edges)
        leaving = [label for begin, _, label in self.edges if begin == name]
        if shape in NO_STATES:
            if entered:
                raise UsageError(f"An edge leads to the node {name!r}, whose shape {shape!r} is that of no state.")
            return True
        return name in STARTS and bool(leaving) and not any(leaving) and not entered

    def accepting(self, states: list[str]) -> list[str]:
        """Which of these states are marked as accepting ones."""
        shapes = {name: self.nodes[name].get("shape", "").lower() for name in states}
        if not any(shape in RECORDS for shape in shapes.values()):
            double = [name for name in states if self.nodes[name].get("peripheries") == "2"]
            return [name for name in states if shapes[name] == "doublecircle" or name in double]
        outputs = {name: self.nodes[name].get("label", "").rpartition("|")[2].strip() for name in states}
        if unknown := [name for name in states if outputs[name].lower() not in OUTPUTS or shapes[name] not in RECORDS]:
            raise _FormatError(
                f"The state {unknown[0]!r} has no output that says whether it accepts: beside states that are records "
                'all must be such, with a label like "name|1" or "name|0".'
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
            raise _FormatError('There is no initial state: an edge from a node of shape "point" or "none" marks it.')
        if len(found) > 1:
            raise UsageError(f"There are {len(found)} initial states: {' and '.join(map(repr, sorted(found)))}.")
        return found.pop()


def _attributes(statement: Any, *names: str) -> dict[str, str]:
    given = statement.get_attributes()
    return {name: _unquoted(given[name]) for name in names if name in given}


def _of_node(statement: Any) -> dict[str, str]:
    """A node's attributes; a label in HTML is only how it looks."""
    html = str(statement.get_attributes().get("label", "")).startswith("<")
    return _attributes(statement, *OF_NODES[html:])


def _quoted(text: str) -> str:
    """As a DOT string."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\r", "\\r").replace("\n", "\\n") + '"'


def _unquoted(text: Any) -> str:
    """What a DOT identifier or string stands for."""
    text = "" if text is None else str(text)
    if len(text) < 2 or not text.startswith('"'):
        if text.startswith("<"):
            raise UsageError("The graph has an HTML-like string; plain ones are understood.")
        return text
    escapes = {"n": "\n", "l": "\n", "r": "\r"}
    return re.sub(r"\\(.)", lambda match: escapes.get(match[1], match[1]), text[1:-1], flags=re.DOTALL)


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
        match = re.compile(r'\s*("(?:[^"\\]|\\.)*")\s*(?:[,\n\r]|$)').match(label, at)
        if match:
            try:
                yield json.loads(match[1])
            except ValueError as e:
                raise UsageError(f"The label {label!r} has a quoted symbol that is no JSON string.") from e
            at = match.end()
            continue
        match = re.compile(r"([^,\n\r]*)(?:[,\n\r]|$)").match(label, at)
        assert match is not None  # it matches anything
        if match[1].strip():
            yield match[1].strip()
        at = match.end()
