"""What is too large ends at a count, in one line, before it takes memory or time; what is large and fine works."""

import itertools
import json
import random
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
import torch

from deltaproduct import memory
from deltaproduct.errors import QUOTED, UsageError, quoted
from deltaproduct.tasks import automata, automaton_format, automaton_task, get_task, minimization, regex_automaton
from deltaproduct.tasks.automata import Automaton
from deltaproduct.tasks.automaton_task import lively_symbols, random_automaton, states_within_reach
from deltaproduct.tasks.dot import automaton_from_dot, automaton_to_dot
from deltaproduct.tasks.minimization import coarsest
from deltaproduct.tasks.regex_automaton import from_regex


def ring(n, step=1):
    """A ring of n states that one symbol turns by `step`."""
    return Automaton(("a",), tuple(f"s{i}" for i in range(n)), 0, (0,), tuple(((i + step) % n,) for i in range(n)))


def refused(call, *words, most=None):
    """The one line that a call ends in; where `most` is given, before it has taken so many bytes."""
    if most is not None:
        tracemalloc.start()
    try:
        with pytest.raises(UsageError) as e:
            call()
        peak = tracemalloc.get_traced_memory()[1] if most is not None else 0
    finally:
        tracemalloc.stop()
    line = str(e.value)
    assert "\n" not in line and len(line) < 1000 and all(word in line for word in words), line
    assert most is None or peak < most, f"{peak:,} bytes"
    return line


# --- Regular expressions


@pytest.fixture
def small_budgets(monkeypatch):
    """A thousandth of the limits, so that what goes beyond them does so at once."""
    monkeypatch.setattr(regex_automaton, "MAX_SUBSETS", 100)
    monkeypatch.setattr(regex_automaton, "MAX_VISITED", 20_000)


@pytest.mark.parametrize(
    ("regex", "limit"),
    [("(a|b)*a(a|b){20}", "more than 100 states"), ("((a|b)*a(a|b)){99}", "more than 100 states"),
     ("(a{1,30}){1,30}", "subsets of more than 20,000 states"), ("(a?){300}", "subsets of more than 20,000 states")],
)  # fmt: skip
def test_subsets_end_at_a_count(regex, limit, small_budgets):
    pytest.importorskip("automata")
    refused(lambda: from_regex(regex), "is too large", limit, "repetitions")


def test_the_issues_expressions_are_refused_with_the_real_limits():
    pytest.importorskip("automata")
    refused(lambda: from_regex("(a{1,999}){1,999}"), "998,001", "10,000")
    assert (
        regex_automaton.MAX_SUBSETS >= 10 * automaton_format.MAX_STATES
    )  # what is merged later may be more than what is left
    with pytest.raises(UsageError, match="too large"):
        from_regex("(a|b)*a(a|b){20}")


def test_large_expressions_still_work():
    pytest.importorskip("automata")
    assert len(from_regex("(a|b)*a(a|b){9}").states) == 2**10
    assert len(from_regex("a{1,300}").states) == 302
    assert len(from_regex("(a?){100}").states) == 102
    words = ["".join(w) for w in itertools.product("abc", repeat=5)]
    listed = from_regex("|".join(words))
    assert len(listed.states) == 7 and all(listed.accepts(["abc".index(x) for x in w]) for w in words[::40])
    assert len(from_regex("[^ab]", "ab").states) == 1  # no word at all


def test_a_long_name_is_shown_in_short():
    name = "S3_x_" * 5_000 + "S3"
    assert len(refused(lambda: get_task(name), "more than 10^18 elements")) < 300
    assert len(refused(lambda: get_task("q" * 100_000), "100,000 characters")) < 300
    assert quoted("a\x1b[2J") == repr("a\x1b[2J") and len(quoted("x" * 10**6)) < QUOTED + 30


@pytest.mark.parametrize(
    "name",
    ["S20", "D99999999", "Z999999999", "A30", "S3_x_S3_x_S3_x_S3_x_S3", "Z10000000000", "Z" + "9" * 5_000,
     "random_automaton:999999999x26:0", "random_automaton:10x999999999:0", "code_swaps_999999999", "chess_999999999",
     "entities_999999999_text", "mqar_999999999_999999999", "mqar_8_" + "9" * 5_000],
)  # fmt: skip
def test_names_of_impossible_sizes(name):
    refused(lambda: get_task(name), most=16 << 20)


# --- Automata


@pytest.mark.parametrize("step", [1, -1])
def test_a_large_ring_is_a_task_whatever_the_order_of_its_states(step):
    """Round after round over the states in one order would take n rounds of one of these."""
    n = 9_999
    automaton = ring(n, step)
    assert set(map(int.bit_count, states_within_reach(automaton))) == {n}
    assert automaton.minimal() == automaton


def test_a_monoid_that_is_too_large(monkeypatch):
    monkeypatch.setattr(automata, "MAX_IMAGES", 200_000)
    refused(ring(2_000).monoid, "more than 100 elements of 2,000 states each", most=16 << 20)


def reached(automaton, start):
    """By looking."""
    found, queue = {start}, [start]
    for q in queue:
        for to in automaton.transitions[q]:
            if to not in found:
                found.add(to)
                queue.append(to)
    return found


def test_states_within_reach_by_looking():
    rng = random.Random(0)
    for _ in range(60):
        n, s = rng.randint(1, 12), rng.randint(1, 3)
        rows = tuple(tuple(rng.randrange(n) for _ in range(s)) for _ in range(n))
        automaton = Automaton(tuple("abc"[:s]), tuple(map(str, range(n))), 0, (0,), rows)
        within = states_within_reach(automaton)
        assert within == [sum(1 << q for q in reached(automaton, p)) for p in range(n)]
    table = np.array(random_automaton(300, 2, 1).transitions)
    order, count = lively_symbols(random_automaton(300, 2, 1))
    assert (count >= 1).all() and order.shape == table.shape


def by_rounds(table, block):
    """Moore's refinement, as it is defined."""
    while True:
        kinds = {}
        finer = [kinds.setdefault((block[q], *(block[to] for to in row)), len(kinds)) for q, row in enumerate(table)]
        if len(kinds) == len(set(block)):
            return finer
        block = finer


@pytest.mark.parametrize("rounds", [0, 1, 32])
def test_the_coarsest_partition_is_that_of_rounds(rounds, monkeypatch):
    monkeypatch.setattr(minimization, "ROUNDS", rounds + 1)
    rng = random.Random(rounds)
    for case in range(200):
        n, s = rng.randint(1, 14), rng.randint(1, 3)
        spread = n if case % 2 else 2  # next states far off, or near
        table = [[min(n - 1, q // 2 + rng.randrange(spread)) for _ in range(s)] for q in range(n)]
        block = [rng.randrange(3) for _ in range(n)]
        found = coarsest(np.array(table), np.array(block)).tolist()
        want = by_rounds(table, block)
        assert len(set(zip(found, want, strict=True))) == len(set(found)) == len(set(want))


def test_a_chain_is_minimised_without_as_many_rounds_as_states(monkeypatch):
    n = 5_000
    rows = tuple((min(q + 1, n - 1),) for q in range(n))
    chain = Automaton(("a",), tuple(map(str, range(n))), 0, (n - 1,), rows)
    rounds = []
    column_stack = np.column_stack
    monkeypatch.setattr(np, "column_stack", lambda parts: rounds.append(1) or column_stack(parts))
    assert chain.minimal() == chain and len(rounds) <= minimization.ROUNDS


def test_a_monoid_is_what_it_was():
    """The order of its elements is that of shortest words; and equal symbols are looked at once."""
    automaton = Automaton(("a", "b", "c"), ("0", "1", "2"), 0, (0,), ((1, 0, 1), (2, 0, 2), (0, 2, 0)))
    maps, found = automaton.maps, [(0, 1, 2)]
    for element in found:
        for f in maps:
            if (product := tuple(f[x] for x in element)) not in found:
                found.append(product)
    assert automaton.monoid() == found
    assert automaton.of_monoid().transitions == tuple(
        tuple(found.index(tuple(f[x] for x in e)) for f in maps) for e in found
    )


def test_json_of_hostile_sizes():
    table = {f"s{i}": {"a": f"s{i + 1}"} for i in range(20_000)}
    refused(lambda: Automaton.from_dict({"initial": "s0", "accepting": [], "transitions": table}), "20,001 states")
    sparse = {f"s{i}": {f"a{i}": f"s{i + 1}"} for i in range(5_000)}
    refused(lambda: Automaton.from_dict({"initial": "s0", "accepting": [], "transitions": sparse}), "5,001", "5,000",
            "4,000,000", most=16 << 20)  # fmt: skip
    twice = {"alphabet": ["a"], "states": [*(f"s{i}" for i in range(5_000)), "s4999"], "initial": 0, "accepting": [],
             "transitions": [[0]] * 5_001}  # fmt: skip
    refused(lambda: Automaton.from_dict(twice), "'s4999' is named twice")
    wide = {"alphabet": [f"a{i}" for i in range(50_000)], "states": ["x", "y"], "initial": 0, "accepting": [0],
            "transitions": [[1] * 50_000, [0] * 50_000]}  # fmt: skip
    assert len(Automaton.from_dict(wide).minimal().alphabet) == 50_000


def test_a_task_of_too_many_next_states_is_refused(monkeypatch):
    monkeypatch.setattr(automaton_task, "MAX_FLOWS", 100)
    refused(lambda: automaton_task.automaton_task("t", "t", random_automaton(60, 3)), "next states", "100")
    assert automaton_task.automaton_task("t", "t", ring(60)).num_labels == 60


# --- DOT


def test_dot_of_many_edges_is_read_in_one_pass():
    n = 2_500
    edges = "".join(f's{i} -> s{(i + 1) % n} [label="a"]; s{i} -> s0 [label="b"];\n' for i in range(n))
    text = "digraph { begin [shape=point]; begin -> s0; s0 [shape=doublecircle];" + edges + "}"
    automaton = automaton_from_dot(text)
    assert len(automaton.states) == n and automaton.transitions[n - 1] == (0, 0)
    assert automaton_from_dot(automaton_to_dot(automaton)) == automaton


HOSTILE_DOT = {
    "20,000 edges": ("init -> s0;" + "".join(f"s{i} -> s{i + 1} [label=a];" for i in range(20_000)), "20,001 states"),
    "nested": ("subgraph x {" * 10_000 + "}" * 10_000, "no initial state"),
    "never closed": ("{" * 20_000, "is never closed"),
    "a long name": ("b" * 1_000_000 + " [shape=hexagon]", "1,000,000 characters"),
    "many attributes": ("s0 [" + " k=v," * 20_000, "not DOT"),
    "many symbols": ('init -> s; s -> s [label="' + ",".join(map(str, range(9_999))) + '"]; s -> t [label=0]', "not d"),
    "blank lines": ('s0 -> s0 [label="' + "\\n" * 50_000 + '"]', "no symbols"),
    "quotes": ('s0 -> s0 [label="' + "\\\\" * 500_000 + "x]", "string is never closed"),
    "many starts": ("".join(f"p{i} [shape=point]; p{i} -> t{i};" for i in range(2_000)), "2000 initial states"),
    "a comment": ("/*" + "*" * 1_000_000, "has no meaning"),
    "wide and long": ("".join(f"s{i} -> s{i + 1} [label=a{i}];" for i in range(2_500)) + "init -> s0", "4,000,000"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_DOT)
def test_hostile_dot(name):
    body, word = HOSTILE_DOT[name]
    closed = "" if name in ("never closed", "many attributes", "a comment") else "}"
    refused(lambda: automaton_from_dot("digraph {" + body + closed), word)


def test_dot_is_read_as_pydot_reads_it():
    """Names, strings, ports, comments and joined strings, beside another reader of the language."""
    pydot = pytest.importorskip("pydot")
    text = """/* c */ strict digraph "g" { // x
        a:n -> "b c":s [label="x" + "y"]; # z
        node [shape=doublecircle]; "b c" -> a [label=-1.5,color=red]
        subgraph cluster_1 { d; a -> d [label="\\"q\\""] } init -> a }"""
    (graph,) = pydot.graph_from_dot_data(text)
    theirs = {(e.get_source().split(":")[0], e.get_destination().split(":")[0]) for e in graph.get_edge_list()}
    assert theirs == {("a", '"b c"'), ('"b c"', "a"), ("init", "a")}
    automaton = automaton_from_dot(text)
    assert automaton.states == ("a", "b c", "d", "sink") and automaton.alphabet == ("-1.5", "q", "xy")
    assert automaton.accepting == (2,) and automaton.transitions[0] == (3, 2, 1)


# --- Samples


def test_samples_that_cannot_fit_are_refused_before_they_are_drawn(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda device=None: 1 << 30)
    task = get_task("S3")
    for batch, length in ((10**12, 8), (1, 10**15), (10**9, 10**9)):
        refused(lambda b=batch, t=length: task.sample(b, t, generator=torch.Generator()), "memory", "1.0 GiB",
                most=1 << 20)  # fmt: skip
    assert task.sample(64, 8, generator=torch.Generator())[0].shape == (64, 9)
    refused(lambda: task.worked_example(10**8), "at most 100,000 tokens")
    refused(lambda: get_task("S3_100000000_tokens").worked_example(), "at most 100,000 tokens")


# --- Ctrl-C

ENDLESS = {
    "subsets": "from deltaproduct.tasks import regex_automaton as regex\n"
    "regex.MAX_VISITED = regex.MAX_SUBSETS = regex.MAX_TRANSITIONS = 10**12\n"
    "start(); regex.from_regex('(a|b)*a(a|b){40}')",
    "monoid": "from deltaproduct.tasks import automata; automata.MAX_ELEMENTS = 10**12\n"
    "automata.MAX_IMAGES = automata.MAX_COMPOSED = 10**18\n"
    "a = automata.Automaton(('a', 'b', 'c'), tuple(map(str, range(12))), 0, (0,), tuple(\n"
    "    ((i + 1) % 12, [1, 0, *range(2, 12)][i], 0 if i == 1 else i) for i in range(12)))\nstart(); a.monoid()",
    "evaluation": "import torch; from deltaproduct.models import ModelConfig, SequenceModel\n"
    "from deltaproduct.evaluation import evaluate_lengths; from deltaproduct.tasks import get_task\n"
    "m = SequenceModel(ModelConfig.build(vocab_size=7, num_labels=6, hidden_size=8, num_heads=1, head_dim=4))\n"
    "start(); evaluate_lengths(m, get_task('S3'), [100], sequences=10**9)",
}


@pytest.mark.slow("kills")
@pytest.mark.parametrize("name", ENDLESS)
def test_ctrl_c_ends_what_runs(name):
    if name == "subsets":
        pytest.importorskip("automata")
    code = "def start():\n    print('started', flush=True)\n" + ENDLESS[name]
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "started\n"
        time.sleep(0.5)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)  # it takes well under a second; a busy machine may need some more
    finally:
        child.kill()
        child.wait()
    assert child.returncode != 0 and "KeyboardInterrupt" in err


def test_numbers_of_thousands_of_digits():
    """Python refuses to read them as integers, with an exception of its own."""
    pytest.importorskip("automata")
    refused(lambda: from_regex("a{" + "9" * 5_000 + "}"))
    text = json.dumps({"alphabet": ["a"], "states": ["x"], "initial": 0, "accepting": [], "transitions": [[0]]})
    assert Automaton.from_dict(json.loads(text)).states == ("x",)
