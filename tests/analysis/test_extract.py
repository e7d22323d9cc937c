"""From models to automata (analysis/): exact models give back what they were compiled from, broken ones what is wrong
with them."""

import copy
import random
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deltaproduct.analysis import automaton as extraction
from deltaproduct.analysis import compare_with_group, extract, vocabulary
from deltaproduct.analysis.moore import probing_words
from deltaproduct.errors import UsageError
from deltaproduct.evaluation import evaluate_lengths
from deltaproduct.experiments.word_problems import s3
from deltaproduct.models import ModelConfig, SequenceModel
from deltaproduct.tasks import get_task
from deltaproduct.tasks.automata import Automaton
from deltaproduct.theory.compiler import compile_automaton, compile_group
from deltaproduct.training import train

METHODS = extraction.METHODS
# (ab)*: after anything else, the third state for good
AB = Automaton(("a", "b"), ("even", "odd", "lost"), 0, (0,), ((1, 2), (2, 0), (2, 2)))


@pytest.fixture(autouse=True)
def libraries():
    pytest.importorskip("aalpy")


def random_automaton(seed, n, s):
    """With all of n states in reach."""
    rng = random.Random(seed)
    while True:
        rows = tuple(tuple(rng.randrange(n) for _ in range(s)) for _ in range(n))
        accepting = tuple(q for q in range(n) if rng.random() < 0.5)
        found = Automaton(tuple("abcde"[:s]), tuple(f"q{i}" for i in range(n)), 0, accepting, rows)
        if found.reachable() == found:
            return found


def verdict(found, model, task):
    known = vocabulary(model.config, task)
    return compare_with_group(found.automaton, known.group, known.elements, found.outputs)


class Pretend(torch.nn.Module):
    """In place of a model: labels by a rule of the automaton's state, the number of symbols read and a hash of them."""

    state_size = 3

    def state_size_after(self, tokens):
        return self.state_size

    def __init__(self, automaton, rule):
        super().__init__()
        self.table, self.start, self.rule = torch.tensor(automaton.transitions), automaton.initial, rule
        n, s = self.table.shape
        self.bos, self.embedding = s, torch.nn.Embedding(s + 1, 1)
        self.config = SimpleNamespace(vocab_size=s + 1, num_labels=n)

    def forward(self, tokens, state=None):
        state = torch.tensor([[self.start, 0, 0]]).repeat(len(tokens), 1) if state is None else state[0].long()
        q, count, mixed = state.T
        labels = []
        for token in tokens.T:
            read = token != self.bos
            q = torch.where(read, self.table[q, token.clamp(max=self.bos - 1)], q)
            count, mixed = count + read, (mixed * 8191 + token * 131 + 71) % 100_003
            labels.append(self.rule(q, count, mixed))
        logits = torch.nn.functional.one_hot(torch.stack(labels, dim=1), self.config.num_labels).float()
        return logits, (torch.stack([q, count, mixed], dim=1).float(),)


# ----------------------------------------------------------------------------------------------------- exact models


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["S3", "Z5", "D4", "A4", "S4", "S3_x_Z2"])
def test_a_groups_model_gives_back_its_word_problem(name, method):
    compiled, task = compile_group(name), get_task(name)
    found = extract(compiled.model, task, method=method)
    assert found.automaton == compiled.automaton  # states and symbols by name, and in the same order
    assert found.outputs == tuple(range(len(compiled.automaton.states)))
    assert found.agreement == 1 and found.learned_length == found.length == 64 and found.queries > 0
    compared = verdict(found, compiled.model, task)
    assert str(compared) == name and compared.isomorphic and compared.word_problem
    unnamed = extract(compiled.model, method=method)
    assert unnamed.automaton.transitions == compiled.automaton.transitions
    assert unnamed.automaton.states == tuple(map(str, found.outputs)) and unnamed.automaton.accepting == (0,)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(2))
def test_an_automatons_model_gives_back_the_automaton(seed, method):
    automaton = random_automaton(seed, 5, 3)
    compiled = compile_automaton(automaton)
    found = extract(compiled.model, automaton, method=method, seed=seed)
    assert found.automaton == automaton and found.agreement == 1
    nothing = replace(automaton, accepting=())
    assert extract(compiled.model, nothing, method="clustering").automaton == nothing


def acceptor(compiled):
    """The model with a head of two labels: whether the state accepts, by least squares on what the old head reads."""
    automaton, heard = compiled.automaton, []
    words = np.random.default_rng(0).integers(len(automaton.alphabet), size=(256, 12))
    hook = compiled.model.head.register_forward_pre_hook(lambda module, given: heard.append(given[0]))
    with torch.no_grad():
        bos = torch.full((256, 1), len(automaton.alphabet))
        states = compiled.model(torch.cat([bos, torch.from_numpy(words)], 1))[0].argmax(-1)
    hook.remove()
    read = heard[0].flatten(0, 1).double()
    wanted = torch.isin(states.flatten(), torch.tensor(automaton.accepting)).double() * 2 - 1
    yes = torch.linalg.lstsq(read, wanted[:, None], driver="gelsd").solution[:, 0].float()
    weights = compiled.model.state_dict() | {"head.weight": torch.stack([-yes, yes])}
    model = SequenceModel(replace(compiled.model.config, num_labels=2))
    model.load_state_dict(weights)
    return model.eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", ["(ab)*", "A4", "S3", 0, 1])
def test_states_with_one_label_are_told_apart(case, method):
    """A model that says only whether the word is in the language, of an automaton with more than two states."""
    if case in ("A4", "S3"):
        compiled = compile_group(case)
    else:
        compiled = compile_automaton(AB if case == "(ab)*" else random_automaton(10 + case, 5, 2))
    want = compiled.automaton.minimal()
    found = extract(acceptor(compiled), method=method)
    assert len(found.automaton.states) == len(want.states) > 2 and found.agreement == 1
    assert len(set(found.automaton.states)) == len(want.states)
    accepting = {state for state, output in enumerate(found.outputs) if output == 1}
    rng = random.Random(0)
    for _ in range(300):
        word = [rng.randrange(len(want.alphabet)) for _ in range(rng.randint(0, 15))]
        assert want.accepts(word) == ((found.automaton.initial, *found.automaton.trace(word))[-1] in accepting)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_said_at_bos_counts_only_where_no_task_is_known(method):
    """The head is made to say label 2 at BOS, which is where the identity belongs."""
    compiled = compile_group("S3")
    model = compiled.model
    with torch.no_grad():
        model.head.weight[2] += 100 * model.embedding.weight[-1]
        assert model(torch.tensor([[6, 0, 1]]))[0].argmax(-1).tolist() == [[2, 0, 1]]
    assert extract(model, get_task("S3"), method=method).automaton == compiled.automaton
    found = extract(model, method=method)
    assert sorted(found.outputs) == [0, 1, 2, 2, 3, 4, 5] and found.outputs[found.automaton.initial] == 2
    assert {"2 #1", "2 #2", "0", "5"} < set(found.automaton.states)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_extraction(method, monkeypatch):
    """And the words of the check are not those that were learned from."""
    learning, checking = [], []

    def draws(rng):
        return copy.deepcopy(rng).integers(1000, size=20).tolist()

    def learn(teacher, *, rng, **limits):
        learning.append(draws(rng))
        return METHODS[method](teacher, rng=rng, **limits)

    def check(machine, words, length, rng):
        checking.append(draws(rng))
        return probing_words(machine, words, length, rng)

    monkeypatch.setattr(extraction, "METHODS", {method: learn})
    monkeypatch.setattr(extraction, "probing_words", check)
    model = acceptor(compile_group("S3"))
    first, again, other = (extract(model, method=method, seed=seed) for seed in (3, 3, 4))
    assert first == again and first.automaton == other.automaton
    assert learning[0] == learning[1] != learning[2] and checking[0] == checking[1] != checking[2]
    assert learning[0] != checking[0]


def test_symbols_are_what_the_task_draws_in_blocks_of_its_tokens():
    """S3's model reads a block x e e e as x, x x as its square, and a task of swaps only asks about swaps."""
    model = compile_group("S3").model
    for name, symbols, text, right in (
        ("S3_hard", 6, "S3", True),
        ("S3_only_swaps", 4, "S3", True),
        ("S3_2_tokens", 6, "not S3: 3 elements", False),
    ):
        task = get_task(name)
        found = extract(model, task)
        assert len(found.automaton.alphabet) == symbols and found.agreement == 1
        compared = verdict(found, model, task)
        assert (str(compared), compared.word_problem) == (text, right)
    filled = get_task("S3_2_s_tokens")
    known = vocabulary(SimpleNamespace(vocab_size=8, num_labels=7), filled)
    assert known.spelling[4] == (4, 7) and known.bos == 6 and known.labels[6] == "[FILL]"


# ---------------------------------------------------------------------------------------------------- broken models


@pytest.mark.parametrize("method", METHODS)
def test_exchanged_labels_leave_the_group_and_not_the_word_problem(method):
    compiled, task = compile_group("S3"), get_task("S3")
    with torch.no_grad():
        compiled.model.head.weight[:] = compiled.model.head.weight[[0, 2, 1, 3, 4, 5]]
    found = extract(compiled.model, task, method=method)
    assert found.agreement == 1 and found.automaton != compiled.automaton
    compared = verdict(found, compiled.model, task)
    assert str(compared) == "S3" and compared.isomorphic and not compared.word_problem


@pytest.mark.parametrize("method", METHODS)
def test_symbols_that_act_as_others_are_no_group_of_theirs(method):
    task = get_task("S3")
    for source, elements in (([0, 2, 2, 3, 4, 5, 6], 6), ([0, 0, 0, 3, 4, 0, 6], 3), ([0] * 6 + [6], 1)):
        model = compile_group("S3").model
        with torch.no_grad():
            model.embedding.weight[:] = model.embedding.weight[source]
        found = extract(model, task, method=method)
        compared = verdict(found, model, task)
        assert found.agreement == 1 and not compared.isomorphic and not compared.word_problem
        assert str(compared) == f"not S3: {elements} element{'s' if elements > 1 else ''}"


@pytest.mark.slow("exhaustive")
def test_a_model_that_drifts_is_learned_from_words_on_which_it_does_not():
    task, table = get_task("S3"), compile_group("S3").automaton
    model = Pretend(table, lambda q, count, mixed: torch.where(count > 20, mixed % 6, q))
    found = extract(model, task)
    assert found.automaton == table and found.learned_length == 16
    assert found.agreement == pytest.approx((20 + 44 / 6) / 64, abs=0.01)


def test_a_few_mistakes_do_not_mislead_the_majority():
    task, table = get_task("S3"), compile_group("S3").automaton
    model = Pretend(table, lambda q, count, mixed: torch.where(mixed % 400 == 0, (q + 1) % 6, q))
    found = extract(model, task, method="clustering")
    assert found.automaton == table and 0.995 < found.agreement < 1


@pytest.mark.parametrize("method", METHODS)
def test_what_is_no_small_automaton_is_refused(method):
    noise = Pretend(AB, lambda q, count, mixed: mixed % 3)
    kind = {"lstar": "states on words of 8 symbols", "clustering": "clusters"}[method]
    with pytest.raises(UsageError, match=f"more than 40 {kind}"):
        extract(noise, method=method, max_states=40)
    with pytest.raises(UsageError, match="more than 5"):
        extract(compile_group("S3").model, method=method, max_states=5)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"method": "guess"}, "lstar and clustering"),
        ({"max_length": 0}, "max_length"),
        ({"max_states": 0}, "max_states"),
        ({"seed": -1}, "seed"),
        ({"source": get_task("S4")}, "vocab_size"),
        ({"source": AB}, "3 tokens and 3 labels"),
    ],
)
def test_mistakes_are_one_clear_line(change, word):
    with pytest.raises(UsageError, match=word) as e:
        extract(compile_group("S3").model, **change)
    assert str(e.value).endswith(".") and "\n" not in str(e.value)


def test_without_aalpy_there_is_clustering(monkeypatch):
    monkeypatch.setitem(sys.modules, "aalpy", None)
    model = compile_group("Z2").model
    with pytest.raises(UsageError, match="pip install"):
        extract(model)
    assert len(extract(model, method="clustering").automaton.states) == 2


# ------------------------------------------------------------------------------------------------- a trained model


@pytest.mark.slow("exhaustive")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", METHODS)
def test_a_trained_model_that_drifts_has_learned_s3_all_the_same(tmp_path, method, s3_run):
    model, task = s3_run, get_task("S3")
    assert evaluate_lengths(model, task, (8192,), sequences=16)[8192].accuracy < 0.9
    found = extract(model, task, method=method)
    assert found.automaton == compile_group("S3").automaton and found.agreement == 1
    compared = verdict(found, model, task)
    assert str(compared) == "S3" and compared.word_problem


@pytest.fixture(scope="module")
def s3_run(tmp_path_factory):
    """DeltaProduct_2[-1,1] of `reproduce s3`, seed 0."""
    job = s3("cpu", [0])[0]
    return train(job.config, tmp_path_factory.mktemp("s3") / job.name, show=False)


def test_a_cache_is_nothing_to_cluster():
    """Attention keeps its tokens, alone or beside other layers: such a model can be asked, not watched."""
    for mixer in ("attention", ["attention", "deltaproduct"]):
        torch.manual_seed(0)
        sizes = {"vocab_size": 3, "num_labels": 2, "hidden_size": 8, "num_heads": 2, "head_dim": 4}
        config = ModelConfig.build(**sizes, mixer=mixer, num_hidden_layers=2)
        model = SequenceModel(config)
        assert model.state_size_after(5) > model.state_size
        with pytest.raises(UsageError, match="keeps a cache; use lstar"):
            extract(model, method="clustering", max_length=8, max_states=50)
