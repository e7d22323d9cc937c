"""The tasks of the Chomsky hierarchy against oracles: Python's eval and integers, automata-lib, sympy; and ranges."""

import inspect
import math
import pickle
import random
import re
from itertools import pairwise
from types import SimpleNamespace

import pytest
import sympy
import torch

from deltaproduct.errors import UsageError
from deltaproduct.evaluation import evaluate_length, evaluate_range
from deltaproduct.seeds import evaluation_generator
from deltaproduct.tasks import context_free, context_sensitive, get_task, regular
from deltaproduct.tasks.chomsky import Transduction
from deltaproduct.tasks.context_free import expressions, mod_arithmetic_brackets_task
from deltaproduct.tasks.regular import mod_arithmetic_task

TASKS = {**regular.TASKS, **context_free.TASKS, **context_sensitive.TASKS}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def samples(name: str, length: int, batch: int = 200, seed: int = 0) -> list[tuple[list[str], list[str]]]:
    """(names of the tokens after BOS, names of the scored labels) of each sequence."""
    task = get_task(name)
    tokens, labels, mask = task.sample(batch, length, generator=seeded(seed))
    return [
        ([task.token_name(i) for i in row], [task.label_name(i) for i, s in zip(answer, scored, strict=True) if s])
        for row, answer, scored in zip(tokens[:, 1:].tolist(), labels.tolist(), mask.tolist(), strict=True)
    ]


# -------------------------------------------------------------------------------------------------------------- oracles
# Each takes the symbols of the input, without "=" and placeholders, and gives the symbols of the answer.


def by_automaton(transitions, answers):
    """By automata-lib: the name of the state that it ends in."""

    def oracle(symbols):
        dfa = pytest.importorskip("automata.fa.dfa").DFA(
            states=set(transitions), input_symbols=set(transitions[next(iter(transitions))]), transitions=transitions,
            initial_state=next(iter(transitions)), final_states=set(),
        )  # fmt: skip
        *_, last = dfa.read_input_stepwise(symbols, ignore_rejection=True)
        return [answers[last]]

    return oracle


def value(symbols):
    return [str(eval("".join(symbols)) % 5)]


def solution(symbols):
    left, right = "".join(symbols).split("=")
    found = [x for x in "01234" if eval(left.replace("x", x)) % 5 == int(right)]
    assert len(found) == 1 and left.count("x") == 1
    return found


def stack(symbols):
    content = []
    for symbol in symbols:
        if symbol != "POP":
            content.append(symbol[-1])
        elif content:
            content.pop()
    return [*content[::-1], "end"]


def binary(symbols):
    a, sign, b = re.fullmatch(r"([01]+)([+*])([01]+)", "".join(symbols)).groups()
    a, b = (sum(2**i for i, bit in enumerate(bits) if bit == "1") for bits in (a, b))
    assert a > 0 and b > 0
    result = a + b if sign == "+" else a * b
    return [*(str(result >> i & 1) for i in range(result.bit_length())), "end"]


def root(symbols):
    number = int("".join(symbols), 2)
    assert number > 0
    return list(f"{int(sympy.integer_nthroot(number, 2)[0]):0{math.ceil(len(symbols) / 2)}b}")


def missing(symbols):
    symbols = symbols[:-1] if symbols[-1] == "_" else symbols
    half = len(symbols) // 2
    place = symbols.index("?")
    found = symbols[place + half if place < half else place - half]
    symbols[place] = found
    assert symbols[:half] == symbols[half:]
    return [found]


def interlocked(symbols):
    assert re.fullmatch("0+1+|1+0+", "".join(symbols))
    return symbols + [{"0": "1", "1": "0"}[symbol] for symbol in symbols]


PARITY = {"even": {"0": "even", "1": "odd"}, "odd": {"0": "odd", "1": "even"}}
PAIRS = {"": {"0": "00", "1": "11"}} | {a + b: {"0": a + "0", "1": a + "1"} for a in "01" for b in "01"}
CYCLE = {i: {"-1": (i - 1) % 5, "0": i, "+1": (i + 1) % 5} for i in range(5)}
ORACLES = {
    "parity": by_automaton(PARITY, {"even": "even", "odd": "odd"}),
    "even_pairs": by_automaton(PAIRS, {"00": "even", "11": "even", "01": "odd", "10": "odd"}),
    "cycle_navigation": by_automaton(CYCLE, {i: str(i) for i in CYCLE}),
    "mod_arithmetic": value,
    "mod_arithmetic_no_star": value,
    "mod_arithmetic_brackets": value,
    "mod_arithmetic_brackets_no_star": value,
    "solve_equation": solution,
    "reverse_string": lambda symbols: symbols[::-1],
    "stack_manipulation": stack,
    "odds_first": lambda symbols: [symbols[i] for i in sorted(range(len(symbols)), key=lambda i: (i % 2, i))],
    "bucket_sort": lambda symbols: [d for d in "01234" for _ in range(symbols.count(d))],
    "binary_addition": binary,
    "binary_multiplication": binary,
    "compute_sqrt": root,
    "duplicate_string": lambda symbols: list("".join(symbols) * 2),
    "missing_duplicate": missing,
    "interlocked_pairing": interlocked,
}


def answer(name: str, tokens: list[str]) -> list[str]:
    if name == "solve_equation":
        return ORACLES[name](tokens)
    end = len(tokens) - 1 - tokens[::-1].index("=")
    assert set(tokens[end + 1 :]) <= {"_"} and "=" not in tokens[:end]
    return ORACLES[name](tokens[:end])


def test_every_task_has_an_oracle():
    assert set(TASKS) == set(ORACLES)
    assert all(get_task(name) is task for name, task in TASKS.items())


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("more", [0, 1, 2, 3, 4, 5, 8, 13, 40, 91])
def test_answers_are_the_oracles(name, more):
    length = get_task(name).min_length + more
    for tokens, scored in samples(name, length, batch=60, seed=more):
        assert len(tokens) == length
        assert scored == answer(name, tokens), tokens


@pytest.mark.parametrize("length", [3, 4, 40, 101])
def test_even_pairs_counts_pairs(length):
    """The definition, which the automaton above does not use."""
    for tokens, scored in samples("even_pairs", length):
        bits = "".join(tokens[:-1])
        changes = sum(a != b for a, b in pairwise(bits))
        assert scored == [("even", "odd")[changes % 2]]


EXAMPLE = re.compile(r"^ +(?:(\w+): )?(\S.*) → (\S.*)$", re.MULTILINE)


def test_the_docstrings_examples():
    seen = set()
    for module in (regular, context_free, context_sensitive):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ != module.__name__:
                continue
            for task, tokens, output in EXAMPLE.findall(function.__doc__ or ""):
                assert answer(task or name, tokens.split()) == output.split(), tokens
                spelt = get_task(task or name)
                assert {*tokens.split()} <= set(spelt.symbols) and {*output.split()} <= set(spelt.answers)
                seen.add(task or name)
    assert seen == {name for name in TASKS if not name.endswith("_no_star")}


# --------------------------------------------------------------------------------------------------------------- format


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("more", [0, 1, 2, 3, 30])
def test_format(name, more):
    task = get_task(name)
    length = task.min_length + more
    tokens, labels, mask = task.sample(50, length, generator=seeded(more))
    assert tokens.shape == labels.shape == mask.shape == (50, 1 + length)
    assert tokens.dtype == labels.dtype == torch.int64 and mask.dtype == torch.bool
    assert (tokens[:, 0] == task.bos_id).all() and (tokens[:, 1:] != task.bos_id).all()
    assert tokens.min() >= 0 and tokens.max() < task.vocab_size
    assert labels.min() >= 0 and labels.max() < task.num_labels
    assert (labels[~mask] == 0).all() and mask.any(dim=1).all()
    names = [task.token_name(i) for i in range(task.vocab_size)]
    assert len(set(names)) == len(names) and names[-1] == "[BOS]"
    if not isinstance(task, Transduction):
        assert mask.nonzero()[:, 1].tolist() == [length] * 50  # the last token, once in each
        return
    equals = names.index("=")
    n = int((tokens[0] == equals).nonzero()) - 1
    assert (tokens[:, n + 1] == equals).all() and not mask[:, : n + 2].any()
    assert (tokens[:, n + 2 :] == names.index("_")).all()
    assert (mask[:, n + 2 :].int().diff(dim=1) <= 0).all()  # scored without gaps from the first placeholder
    if task.num_labels != 3:  # the output's length is fixed, and one symbol more of input would not fit
        m = int(mask[0].sum())
        assert mask.sum(dim=1).tolist() == [m] * 50 and n + 1 + m <= length
        longer = task.sample(1, 3 * length + 20, generator=seeded())
        assert task.input_length(length) == n < longer[0].shape[1]
        assert length - (n + 1 + m) < {"duplicate_string": 3, "interlocked_pairing": 3}.get(name, 2)


SHORTEST = {"parity": 2, "even_pairs": 2, "cycle_navigation": 2, "mod_arithmetic": 2, "mod_arithmetic_brackets": 2,
            "solve_equation": 3, "reverse_string": 3, "stack_manipulation": 4, "missing_duplicate": 3,
            "binary_addition": 7, "compute_sqrt": 3, "duplicate_string": 4, "interlocked_pairing": 7}  # fmt: skip


@pytest.mark.parametrize("name", SHORTEST)
def test_shortest_lengths_and_ranges(name):
    task = get_task(name)
    assert task.min_length == SHORTEST[name]
    assert task.train_lengths == (max(3, SHORTEST[name]), 40) and task.test_lengths == (40, 256)
    with pytest.raises(UsageError, match=f"length must be at least {SHORTEST[name]}"):
        task.sample(1, SHORTEST[name] - 1, generator=seeded())
    assert get_task("S3").train_lengths is None and get_task("S3").test_lengths is None


def test_scaled_accuracy():
    assert get_task("parity").scaled(0.5) == 0 and get_task("parity").scaled(1.0) == 1
    assert get_task("mod_arithmetic").scaled(0.6) == pytest.approx(0.5)
    assert get_task("mod_arithmetic").scaled(0.0) == pytest.approx(-0.25)


# -------------------------------------------------------------------------------------------------------- distributions


def off_by(counts: list[int]) -> float:
    """How many standard deviations χ² is from its mean, under uniformity."""
    expected = sum(counts) / len(counts)
    freedom = len(counts) - 1
    return abs(sum((c - expected) ** 2 / expected for c in counts) - freedom) / math.sqrt(2 * freedom)


def texts(name: str, length: int, batch: int = 6000) -> list[str]:
    return ["".join(tokens) for tokens, _ in samples(name, length, batch)]


ALL_OF = {  # what a task can draw at one length, each as likely as another
    ("parity", 5): 2**4,
    ("cycle_navigation", 4): 3**3,
    ("mod_arithmetic", 4): 5 * 3 * 5,
    ("mod_arithmetic", 5): 5 * 3 * 5,
    ("mod_arithmetic_no_star", 4): 5 * 2 * 5,
    ("mod_arithmetic_brackets", 6): 5 * 3 * 5,
    ("mod_arithmetic_brackets", 4): 5,
    ("mod_arithmetic_brackets", 7): 2 * 5 * 3 * 5,  # (-d op d) and (d op -d)
    ("mod_arithmetic_brackets_no_star", 6): 5 * 2 * 5,
    ("reverse_string", 9): 2**4,
    ("bucket_sort", 7): 5**3,
    ("missing_duplicate", 5): 2**2 * 4,
    ("compute_sqrt", 7): 2**4 - 1,
    ("interlocked_pairing", 16): 2 * 4,
    ("stack_manipulation", 6): 2 * 3,
}


@pytest.mark.parametrize(("name", "length"), ALL_OF)
def test_inputs_are_uniform(name, length):
    found = texts(name, length)
    assert len(set(found)) == ALL_OF[name, length]
    assert off_by([found.count(text) for text in set(found)]) < 6


def test_sizes_are_uniform():
    """How far the left part of an expression, the stack and the first number reach."""
    text, _ = expressions(8000, 15, seeded(1), operators="+-")
    names = "01234+-*()"
    sizes = []
    for row in text.tolist():
        depth = 0
        for place, symbol in enumerate(names[i] for i in row):
            depth += {"(": 1, ")": -1}.get(symbol, 0)
            # An operator at depth 1 with something before it, which is no sign: the only one of the outermost brackets.
            if depth == 1 and symbol in "+-" and names[row[place - 1]] not in "(+-":
                sizes.append(place - 1)
                break
    assert len(sizes) == 8000
    assert sorted(set(sizes)) == list(range(1, 12))
    assert off_by([sizes.count(size) for size in range(1, 12)]) < 6
    stacks = [re.match("[01]*", text)[0] for text in texts("stack_manipulation", 20)]
    lengths = [len(s) for s in stacks]
    # PUSH0 and PUSH1 begin with P, so the digits at the beginning are the stack
    assert off_by([lengths.count(n) for n in range(1, 9)]) < 6 and set(lengths) == set(range(1, 9))
    first = [len(text.split("+")[0]) for text in texts("binary_addition", 25)]
    assert off_by([first.count(n) for n in range(1, 11)]) < 6 and set(first) == set(range(1, 11))


@pytest.mark.parametrize("name", TASKS)
def test_chance(name):
    """The most frequent answer at length 120, beside the papers' value; brackets with * are the exception."""
    task = get_task(name)
    _, labels, mask = task.sample(4000, 120, generator=seeded(3))
    share = labels[mask].bincount().double() / mask.sum()
    best = float(share.max())
    # 4,000 answers, or more that hang together: a deviation is at most .5/sqrt(4000) = .008
    if name == "mod_arithmetic_brackets":
        assert task.chance == 0.2 and int(share.argmax()) == 0 and 0.27 < best < 0.34
    elif name == "compute_sqrt":  # 37 bits, of which the first is 1 in 3 of 4 cases
        assert task.chance == 0.5 and abs(best - 0.5) < 0.04
    elif task.num_labels == 3:  # the end is one output of many, and a product begins with zeros
        assert task.chance == 0.5 and 0.42 < best < 0.54
    else:
        assert abs(best - task.chance) < 5 * 0.008


@pytest.mark.parametrize("name", TASKS)
def test_tasks_can_go_to_another_process(name):
    task, copy = get_task(name), pickle.loads(pickle.dumps(get_task(name)))
    ours, theirs = (x.sample(3, 20, generator=seeded()) for x in (task, copy))
    assert copy is not task and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", TASKS)
def test_the_generator_is_the_only_source_of_randomness(name):
    task = get_task(name)
    torch.manual_seed(1)
    random.seed(1)
    states = torch.random.get_rng_state(), random.getstate()
    first = task.sample(4, 40, generator=seeded(7))
    assert torch.equal(torch.random.get_rng_state(), states[0]) and random.getstate() == states[1]
    again = task.sample(4, 40, generator=seeded(7))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    generator = seeded(7)
    task.sample(4, 40, generator=generator)
    assert not torch.equal(first[0], task.sample(4, 40, generator=generator)[0])


# ------------------------------------------------------------------------------------------------------------ operators


@pytest.mark.parametrize("operators", ["+", "-", "+*", "-*"])
@pytest.mark.parametrize("build", [mod_arithmetic_task, mod_arithmetic_brackets_task])
@pytest.mark.parametrize("length", [9, 10])
def test_operators_and_modulus_can_be_chosen(operators, build, length):
    task = build("chosen", 7, operators)
    tokens, labels, _ = task.sample(300, length, generator=seeded())
    used = set()
    for row, value in zip(tokens[:, 1:-1].tolist(), labels[:, -1].tolist(), strict=True):
        text = "".join(task.token_name(i) for i in row)
        assert eval(text) % 7 == value
        used |= set(text)
    assert used - set("()") == set("0123456") | set(operators) | ({"-"} if "(" in used else set())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: mod_arithmetic_task("x", operators="*"), "One of the operators must be"),
        (lambda: mod_arithmetic_task("x", operators="/"), "some of"),
        (lambda: mod_arithmetic_task("x", 11), "from 2 to 10"),
        (lambda: mod_arithmetic_brackets_task("x", operators=""), "some of"),
        (lambda: mod_arithmetic_brackets_task("x", operators="+/"), "some of"),
        (lambda: mod_arithmetic_brackets_task("x", 1), "from 2 to 10"),
    ],
)
def test_bad_arithmetic(build, message):
    with pytest.raises(UsageError, match=message):
        build()


# --------------------------------------------------------------------------------------------------------------- ranges


class Counter(torch.nn.Module):
    """Says the parity of the bits so far, rightly up to position `until` and wrongly after it."""

    def __init__(self, until=10**9):
        super().__init__()
        self.embedding = torch.nn.Embedding(1, 1)
        self.config = SimpleNamespace(vocab_size=4, num_labels=2)
        self.until, self.modes, self.seen = until, [], []

    def forward(self, tokens, state=None):
        self.modes.append(self.training)
        self.seen.append(tokens)
        count = (tokens == 1).cumsum(dim=1)
        position = torch.arange(tokens.shape[1])
        odd = (count + (position > self.until)) % 2
        return torch.nn.functional.one_hot(odd, 2).float(), None


def test_a_range_is_its_lengths():
    task, model = get_task("parity"), Counter(until=100)
    model.train()
    result = evaluate_range(model, task, sequences=3000, seed=5)
    assert model.training and not any(model.modes)
    assert result.lengths == (40, 256) and result.sequences == 3000
    drawn = {length: r.sequences for length, r in result.by_length.items()}
    assert sum(drawn.values()) == 3000 and set(drawn) == set(range(40, 257))
    assert off_by(list(drawn.values())) < 6
    assert all(r.accuracy == (length <= 100) for length, r in result.by_length.items())
    right = sum(count for length, count in drawn.items() if length <= 100) / 3000
    assert result.accuracy == pytest.approx(right) and result.sequence_accuracy == pytest.approx(right)
    assert result.scaled_accuracy == pytest.approx(2 * right - 1)


def test_a_ranges_data_are_of_the_evaluation_stream():
    task, model = get_task("parity"), Counter()
    evaluate_range(model, task, (7, 7), sequences=20, seed=3)
    assert torch.equal(model.seen[0], task.sample(20, 7, generator=evaluation_generator(3, 7))[0])
    again = evaluate_range(Counter(until=6), task, (3, 9), sequences=50, seed=3)
    assert again.accuracy == evaluate_range(Counter(until=6), task, (3, 9), sequences=50, seed=3).accuracy
    other = evaluate_range(Counter(until=6), task, (3, 9), sequences=50, seed=4)
    assert {n: r.sequences for n, r in other.by_length.items()} != {n: r.sequences for n, r in again.by_length.items()}
    one = evaluate_length(Counter(until=6), task, 8, sequences=again.by_length[8].sequences, seed=3)
    assert again.by_length[8].accuracy == one.accuracy == 0


@pytest.mark.parametrize(
    ("task", "lengths", "sequences", "message"),
    [
        ("S3", None, 10, "no test lengths"),
        ("parity", (1, 5), 10, "begins at 2"),
        ("parity", (9, 8), 10, "9 to 8"),
        ("parity", (3, 8), 0, "sequences must be at least 1"),
        ("even_pairs", (3, 8), 10, None),
        ("mod_arithmetic", (3, 8), 10, "vocab_size"),
    ],
)
def test_bad_ranges(task, lengths, sequences, message):
    model = Counter()
    if message is None:  # the same sizes: no mistake
        assert 0 <= evaluate_range(model, get_task(task), lengths, sequences=sequences).accuracy <= 1
        return
    with pytest.raises(UsageError, match=message):
        evaluate_range(model, get_task(task), lengths, sequences=sequences)
    assert not model.seen
