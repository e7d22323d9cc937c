"""Exact weights (theory/compiler.py): groups as matrices and in one layer, automata as stacks of layers."""

import json
import random

import pytest
import torch
from automaton_cases import random_automaton, wrong_labels
from compiled_sizes import most_steps

from deltaproduct.evaluation import evaluate_length
from deltaproduct.models import Decoder, SequenceModel
from deltaproduct.ops import BACKENDS, cpu
from deltaproduct.tasks import get_task
from deltaproduct.tasks.automata import Automaton
from deltaproduct.tasks.regex_automaton import from_regex
from deltaproduct.theory.compiler import compile_automaton, compile_group
from deltaproduct.theory.representations import representations, simplex

pytestmark = pytest.mark.numerical

# Name, Householder factors per token (P1: n − 1 for S_n, 2 for subgroups of SO(3) and for Z_m, D_m), heads
GROUPS = {
    "Z2": (1, 1), "Z3": (2, 2), "Z8": (2, 2), "Z60": (2, 6), "D3": (2, 2), "D12": (2, 4), "S2": (1, 1), "S3": (2, 2),
    "S4": (2, 3), "S5": (4, 4), "A3": (2, 2), "A4": (2, 3), "A5": (2, 3), "A6": (4, 5), "S3_x_Z2": (2, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
def test_representations_are_faithful(name):
    """Orthogonal matrices that multiply as the group's elements do, and no two elements alike."""
    group, found = representations(name)
    n, table = len(group.elements), group.table
    for representation in found:
        r = representation.matrices
        identity = torch.eye(representation.size, dtype=torch.float64).expand_as(r)
        torch.testing.assert_close(r @ r.mT, identity, rtol=0, atol=1e-12)
        for g in range(n):
            torch.testing.assert_close(r[g] @ r, r[table[g]], rtol=0, atol=1e-12)
        assert all(len(f.betas) <= GROUPS[name][0] for f in representation.factors())
    flat = torch.cat([r.matrices.flatten(1) for r in found], 1)
    assert (torch.cdist(flat, flat) + torch.eye(n)).min() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", GROUPS)
def test_one_layer_is_right_on_every_token(name, dtype):
    compiled = compile_group(name)
    config, task = compiled.model.config, get_task(name)
    steps, heads = GROUPS[name]
    assert (config.num_hidden_layers, most_steps(config), config.mixer.num_heads) == (1, steps, heads)
    assert config.mlp_size == 0
    result = evaluate_length(compiled.model.to(dtype), task, 2000, sequences=4)
    assert result.accuracy == result.sequence_accuracy == 1


@pytest.mark.slow("exhaustive")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["S3", "S4", "S5", "A5", "Z60", "D12"])
def test_one_layer_is_right_at_length_100_000(name):
    compiled = compile_group(name)
    result = evaluate_length(compiled.model, get_task(name), 100_000, sequences=100)
    assert result.accuracy == 1


@pytest.mark.parametrize("name", ["A5", "S5"])
def test_every_backend_gives_the_same_labels(name):
    model, task = compile_group(name).model, get_task(name)
    tokens, labels, mask = task.sample(2, 300, generator=torch.Generator().manual_seed(0))
    device = torch.device("cpu")
    for backend in BACKENDS.values():
        if backend.unsupported_reason(device, torch.float32) is None:
            with torch.no_grad():
                logits, _ = model.use_backend(backend.name)(tokens)
            assert torch.equal(logits.argmax(-1)[mask], labels[mask]), backend.name


def test_the_automaton_is_the_task():
    automaton, task = compile_group("S3").automaton, get_task("S3")
    tokens, labels, _ = task.sample(1, 50, generator=torch.Generator().manual_seed(0))
    assert automaton.trace(tokens[0, 1:].tolist()) == labels[0, 1:].tolist()
    assert automaton.alphabet == automaton.states and automaton.states[0] == "e"
    assert automaton.alphabet == tuple(task.token_name(i) for i in range(6)) and task.bos_id == 6


def test_saved_and_loaded(tmp_path):
    compiled = compile_group("S4")
    compiled.save(tmp_path / "s4")
    model = SequenceModel.from_pretrained(tmp_path / "s4")
    tokens, _, _ = get_task("S4").sample(2, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(tokens)[0], compiled.model(tokens)[0])
    stored = json.loads((tmp_path / "s4" / "automaton.json").read_text())
    assert Automaton.from_dict(stored) == compiled.automaton


# --- Automata ---------------------------------------------------------------------------------------------------------


def assert_compiles(automaton: Automaton, words: int = 4, length: int = 400, dtype=torch.float32) -> None:
    compiled, n = compile_automaton(automaton), len(automaton.states)
    config = compiled.model.config
    assert config.num_hidden_layers <= max(1, 2 * n - 3) and most_steps(config) <= max(n - 1, 2)
    rng = random.Random(0)
    drawn = [[rng.randrange(len(automaton.alphabet)) for _ in range(length)] for _ in range(words)]
    assert wrong_labels(compiled.model.to(dtype), automaton, drawn) == 0


@pytest.mark.parametrize("seed", range(30))
def test_random_automata_are_compiled(seed):
    rng = random.Random(seed)
    assert_compiles(random_automaton(rng, rng.randint(2, 6), rng.randint(2, 5)))


@pytest.mark.slow("exhaustive")
@pytest.mark.timeout(1200)
def test_two_hundred_random_automata_are_compiled():
    rng = random.Random(1)
    for _ in range(200):
        assert_compiles(random_automaton(rng, rng.randint(2, 6), rng.randint(2, 5)), words=20, length=1000)


@pytest.mark.parametrize("n", [1, 2, 6])
def test_float64_and_every_size(n):
    assert_compiles(random_automaton(random.Random(n), n, 3), dtype=torch.float64)


def test_permutations_resets_and_joins():
    """Every kind of action at the first level: of five states all are swapped, rotated, joined and set."""
    rows = zip((1, 0, 2, 3, 4), (1, 2, 3, 4, 0), (0, 0, 2, 3, 4), (3, 3, 3, 3, 3), (0, 1, 2, 3, 4), strict=True)
    assert_compiles(Automaton(tuple("srjci"), tuple("01234"), 2, (0,), tuple(rows)), length=2000)


@pytest.mark.parametrize("n", [2, 3, 7, 20])
def test_permutations_take_one_layer(n):
    """Also of more states than a cascade may have; with as many factors as the longest permutation has swaps."""
    rng = random.Random(n)
    columns = [list(range(n)), [*range(1, n), 0], rng.sample(range(n), n)]
    rows = tuple(zip(*columns, strict=True))
    automaton = Automaton(("i", "c", "r"), tuple(map(str, range(n))), n // 2, (0,), rows)
    model = compile_automaton(automaton).model
    assert (model.config.num_hidden_layers, most_steps(model.config)) == (1, n - 1)
    words = [[rng.randrange(3) for _ in range(2000)] for _ in range(3)]
    assert wrong_labels(model, automaton, words) == 0


def test_what_does_not_permute_takes_a_cascade():
    rows = ((1, 0, 2), (2, 0, 1), (3, 1, 1), (0, 2, 3))  # a turns, b joins, c swaps some
    automaton = Automaton(("a", "b", "c"), tuple("0123"), 0, (0,), rows)
    assert compile_automaton(automaton).model.config.num_hidden_layers == 5
    assert compile_automaton(Automaton(("a",), ("0",), 0, (), ((0,),))).model.config.num_hidden_layers == 1


@pytest.mark.parametrize("regex", ["(ab)*", "(b*ab*a)*b*", "((a|b)(a|b)a)*", "a{2,4}b?", "(a|b)*abb(a|b)*"])
def test_regular_expressions_are_compiled(regex):
    pytest.importorskip("automata")
    automaton = from_regex(regex, "ab")
    assert_compiles(automaton)
    # Where random words soon leave the language for good, so do others not.
    words = [[0, 1] * 50, [1, 0, 0] * 33 + [0], [0, 0, 0, 1] * 25, [0] * 100]
    assert wrong_labels(compile_automaton(automaton).model, automaton, words) == 0


@pytest.mark.parametrize(
    "build", [lambda: from_regex("a{2,4}b?", "ab"), lambda: random_automaton(random.Random(3), 5, 2)]
)
def test_as_many_slots_are_active_at_bos_as_ever(build):
    """Norms are then the same known factor for every token; six levels would magnify what is missing in one."""
    automaton = build()
    model, seen = compile_automaton(automaton).model, []
    hooks = [block.mlp_norm.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for block in model.blocks]
    with torch.no_grad():
        model(torch.tensor([[2, 0, 1, 1, 0, 0, 0, 1]]))
    assert len(hooks) == len(seen) == model.config.num_hidden_layers
    for x in seen:
        power = x.double().square().sum(-1)[0]
        torch.testing.assert_close(power, power[1].expand_as(power), rtol=1e-4, atol=0)


def test_long_words_are_tracked_in_pieces():
    """Nothing adds up: after 50,000 symbols, 10,000 at a time, the labels are still right."""
    automaton = random_automaton(random.Random(5), 5, 3)
    model, rng = compile_automaton(automaton).model, random.Random(0)
    word = [rng.randrange(3) for _ in range(50_000)]
    found, state = [], None
    with torch.no_grad():
        for piece in torch.tensor([[3, *word]]).split(10_000, dim=1):
            logits, state = model(piece, state)
            found.append(logits.argmax(-1)[0])
    assert torch.cat(found)[1:].tolist() == automaton.trace(word)


def test_every_backend_carries_out_a_cascade():
    automaton = random_automaton(random.Random(3), 4, 3)
    model, rng = compile_automaton(automaton).model, random.Random(0)
    words = [[rng.randrange(3) for _ in range(200)] for _ in range(2)]
    for backend in BACKENDS.values():
        if backend.unsupported_reason(torch.device("cpu"), torch.float32) is None:
            assert wrong_labels(model.use_backend(backend.name), automaton, words) == 0, backend.name


@pytest.mark.skipif(cpu.ENGINE is None, reason="native decoding needs the engine")
def test_native_decoding_carries_out_a_cascade():
    automaton = random_automaton(random.Random(3), 5, 3)
    decoder, rng = Decoder(compile_automaton(automaton).model), random.Random(0)
    word = [rng.randrange(3) for _ in range(200)]
    labels = [int(decoder(torch.tensor([symbol])).argmax()) for symbol in (3, *word)]
    assert labels[1:] == automaton.trace(word)


def test_simplex():
    for m in (2, 3, 7):
        corners = simplex(m)
        want = torch.full((m, m), -1 / (m - 1), dtype=torch.float64).fill_diagonal_(1)
        torch.testing.assert_close(corners @ corners.T, want, rtol=0, atol=1e-14)
