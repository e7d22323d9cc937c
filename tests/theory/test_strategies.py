"""The constructions by which a group or an automaton is compiled (theory/compiler.py), each asked for by its name."""

import random

import pytest
import torch
from automaton_cases import from_maps, random_automaton, wrong_labels
from compiled_sizes import most_steps

from deltaproduct.errors import UsageError
from deltaproduct.evaluation import evaluate_length
from deltaproduct.models import SequenceModel
from deltaproduct.ops import BACKENDS
from deltaproduct.tasks import get_task
from deltaproduct.tasks.groups import build_group
from deltaproduct.theory.compiler import compile_automaton, compile_group
from deltaproduct.theory.constructions.circle import lines, points
from deltaproduct.theory.constructions.circuit import MAX_UNITS
from deltaproduct.theory.limits import Limits
from deltaproduct.theory.representations import of_automaton
from deltaproduct.theory.rotations import rotations
from deltaproduct.theory.verification import verify

# Group, strategy, how many Householder factors at most; then layers and factors
GROUPS = [
    ("S4", "permutation", None, 1, 3), ("S5", "permutation", None, 1, 4), ("Z5", "permutation", None, 1, 4),
    ("S4", "rotation", None, 1, 2), ("A5", "rotation", None, 1, 2), ("Z60", "rotation", None, 1, 2),
    ("D12", "rotation", None, 1, 2), ("D60", "rotation", None, 1, 2), ("S3_x_Z2", "rotation", None, 1, 2),
    ("Z3", "two-layer", None, 2, 1), ("Z8", "two-layer", None, 2, 1), ("Z60", "two-layer", None, 2, 1),
    ("S3", "two-layer", None, 2, 1), ("D4", "two-layer", None, 2, 1), ("D6", "two-layer", None, 2, 1),
    ("Z4_x_D3", "two-layer", None, 2, 1), ("D3_x_D4", "two-layer", None, 2, 1), ("Z3_x_Z3", "two-layer", None, 2, 1),
    ("S3_x_Z2", "two-layer", None, 2, 1), ("D9", "two-layer", None, 2, 1), ("D12", "two-layer", None, 2, 1),
    ("S3", "shallow", 1, 4, 1), ("S3", "shallow", None, 3, 2), ("D4", "shallow", 1, 4, 1), ("D4", "shallow", 2, 3, 2),
    ("Z4", "shallow", 1, 4, 1), ("A4", "shallow", 1, 4, 1), ("S4", "shallow", 2, 3, 2), ("S4", "shallow", 3, 3, 3),
    ("S3", "cascade", None, 1, 4), ("S3", "auto", 1, 2, 1), ("S4", "auto", 2, 1, 2), ("Z2", "auto", 1, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "strategy", "at_most", "layers", "steps"), GROUPS)
def test_every_strategy_follows_the_group(name, strategy, at_most, layers, steps):
    compiled = compile_group(name, strategy, Limits(num_householder=at_most))
    config = compiled.model.config
    assert (config.num_hidden_layers, most_steps(config)) == (layers, steps)
    assert compiled.strategy == strategy or strategy == "auto"
    assert evaluate_length(compiled.model, get_task(name), 1000, sequences=4).accuracy == 1


def test_the_weights_make_it_right():
    """With keys in other directions labels are wrong."""
    for strategy in ("rotation", "two-layer", "shallow"):
        model = compile_group("S3", strategy).model
        with torch.no_grad():
            weight = model.blocks[-1].mixer.k_proj.weight
            weight.mul_(1 + torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)))
        assert evaluate_length(model, get_task("S3"), 200, sequences=2).accuracy < 1


@pytest.mark.parametrize(("name", "strategy"), [("S3", "rotation"), ("Z12", "two-layer"), ("S3", "shallow")])
def test_backends_dtypes_and_the_disk_agree(name, strategy, tmp_path):
    """A compiled model is a checkpoint like any other: the same labels from every backend, in float64, and reloaded."""
    compiled = compile_group(name, strategy)
    compiled.save(tmp_path / "model")
    tokens, labels, mask = get_task(name).sample(2, 200, generator=torch.Generator().manual_seed(0))
    for backend in BACKENDS.values():
        for dtype in (torch.float32, torch.float64):
            if backend.unsupported_reason(torch.device("cpu"), dtype) is None:
                model = SequenceModel.from_pretrained(tmp_path / "model").to(dtype).use_backend(backend.name)
                with torch.no_grad():
                    logits, _ = model(tokens)
                assert torch.equal(logits.argmax(-1)[mask], labels[mask]), (backend.name, dtype)


def test_directions_are_chosen_by_elements_that_are_told_apart():
    """In A5 x Z2 each rotation stands for two elements, which must not hide how far apart the others are."""
    margins = [verify(compile_group(name), length=200, words=8).margin for name in ("A5", "A5_x_Z2")]
    assert margins[1] > margins[0] > 20


CUBE = from_maps((1, 2, 3, 0), (1, 0, 2, 3))  # two generators of S4, on four points
ICOSAHEDRON = from_maps((1, 2, 3, 4, 0), (0, 1, 3, 4, 2))  # of A5, on five
HEXAGON = from_maps((1, 2, 3, 4, 5, 0), (0, 5, 4, 3, 2, 1), initial=2)
CLOCK = from_maps(*(tuple((x + step) % 12 for x in range(12)) for step in (1, 5, 6)), initial=3)


@pytest.mark.parametrize(
    ("automaton", "strategy", "layers", "steps"),
    [
        (CUBE, "rotation", 1, 2), (CUBE, "permutation", 1, 3), (CUBE, "auto", 1, 2), (CUBE, "shallow", 3, 2),
        (ICOSAHEDRON, "rotation", 1, 2), (ICOSAHEDRON, "permutation", 1, 4), (HEXAGON, "rotation", 1, 2),
        (HEXAGON, "two-layer", 2, 1), (CLOCK, "rotation", 1, 2), (CLOCK, "two-layer", 2, 1),
        (from_maps((2, 2, 2), (0, 1, 2), (0, 0, 0)), "auto", 1, 1), (from_maps((1, 2, 0), (1, 1, 1)), "auto", 1, 2),
    ],
)  # fmt: skip
def test_every_strategy_follows_the_automaton(automaton, strategy, layers, steps):
    compiled = compile_automaton(automaton, strategy)
    config = compiled.model.config
    assert (config.num_hidden_layers, most_steps(config)) == (layers, steps)
    assert verify(compiled, length=2000, words=4).wrong == 0


@pytest.mark.parametrize("seed", range(8))
def test_any_permutations(seed):
    """Of two to five states: every strategy that takes them is right, and those that refuse say why."""
    rng = random.Random(seed)
    n = rng.randint(2, 5)
    automaton = from_maps(*(rng.sample(range(n), n) for _ in range(2)), initial=rng.randrange(n))
    refused = 0
    for strategy in ("permutation", "rotation", "two-layer", "cascade", "shallow"):
        try:
            compiled = compile_automaton(automaton, strategy)
        except UsageError as e:
            refused += 1
            assert strategy in str(e)
            continue
        words = [[rng.randrange(2) for _ in range(500)] for _ in range(3)]
        assert wrong_labels(compiled.model, automaton, words) == 0, strategy
    assert refused <= 3


@pytest.mark.parametrize(
    "name", ["Z2", "Z4", "Z30", "D3", "D4", "D6", "D15", "Z2_x_Z2", "Z2_x_Z3", "A4", "S4", "A5", "S3"]
)
def test_rotations_are_recognised(name):
    """Orthogonal, faithful together, at most two reflections each; also of a group with its points renamed."""
    group = build_group(name)
    rng, k = random.Random(0), len(group.elements[0])
    names = rng.sample(range(k), k)
    elements = sorted(tuple(names[p[names.index(x)]] for x in range(k)) for p in group.elements)
    found = rotations(elements)
    number = {p: i for i, p in enumerate(elements)}
    for representation in found:
        r = representation.matrices
        torch.testing.assert_close(r @ r.mT, torch.eye(representation.size).double().expand_as(r), rtol=0, atol=1e-12)
        for i, p in enumerate(elements):
            products = [number[tuple(p[x] for x in q)] for q in elements]
            torch.testing.assert_close(r[i] @ r, r[products], rtol=0, atol=1e-11)
        assert all(len(f.betas) <= 2 for f in representation.factors())
    flat = torch.cat([r.matrices.flatten(1) for r in found], 1)
    assert (torch.cdist(flat, flat) + torch.eye(len(elements))).min() > 0.1


@pytest.mark.parametrize("name", ["S5", "A6", "Z3_x_Z3", "D3_x_Z2_x_Z2", "A4_x_Z2", "D4_x_Z2"])
def test_what_is_no_rotation_is_not_taken_for_one(name):
    assert rotations(build_group(name).elements) is None


def test_a_state_is_where_the_product_takes_the_initial_one():
    problem, rng = of_automaton(CUBE), random.Random(0)
    word = [rng.randrange(2) for _ in range(20)]
    (cube,) = problem.representations
    product = torch.eye(3, dtype=torch.float64)
    for symbol in word:
        product = product @ cube.matrices[problem.tokens[symbol]]
    distance = (cube.matrices - product).flatten(1).norm(dim=1)
    assert problem.labels[int(distance.argmin())] == CUBE.trace(word)[-1] and distance.min() < 1e-9
    assert not problem.regular and len(problem.labels) == 24


@pytest.mark.parametrize("q", range(2, 13))
def test_lines_separate_the_corners(q):
    sides = (points(q) @ lines(q).T).sign()
    assert len({tuple(row) for row in sides.tolist()}) == q and len(lines(q)) == (q + 1) // 2
    assert (points(q) @ lines(q).T).abs().min() > 0.9 * torch.tensor(torch.pi / q / (1 + q % 2)).sin()


def test_all_reasons_at_once():
    automaton = random_automaton(random.Random(3), 6, 4)
    with pytest.raises(UsageError) as caught:
        compile_automaton(automaton, limits=Limits(states=5, layers=3, num_householder=2, width=10))
    said = str(caught.value)
    for reason in ("needs 6 states, at most 5", "permutation: symbol", "rotation: symbol", "two-layer: symbol",
                   "shallow: symbol", "cascade: needs 9 layers, at most 3 and needs 4 Householder factors per token, "
                   "at most 2 and needs"):  # fmt: skip
        assert reason in said
    assert "\n" not in said


def test_what_is_too_large_is_refused_though_a_strategy_fits():
    with pytest.raises(UsageError, match="needs 6 states, at most 5"):
        compile_group("S3", limits=Limits(states=5))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: compile_group("S5", limits=Limits(num_householder=2)), ["permutation: needs 4", "57,604 units"]),
        (lambda: compile_group("S5", "rotation"), ["no group of rotations"]),
        (lambda: compile_group("S4", "two-layer"), ["not among the rotations and mirrorings of polygons"]),
        (lambda: compile_group("Z2", "two-layer"), ["one layer of them does"]),
        (lambda: compile_group("S7"), ["5,040 states by 5,040 symbols"]),
        (lambda: compile_group("S3", "magic"), ["no strategy 'magic'"]),
        (lambda: compile_automaton(from_maps((1, 0, 0)), "rotation"), ["takes both '1' and '2' to '0'"]),
        (lambda: compile_group("Z60", "shallow"), [f"at most {MAX_UNITS:,}"]),
        (lambda: Limits(layers=0), ["leave nothing to compile"]),
    ],
)
def test_refusals_give_reasons_and_sizes(make, words):
    with pytest.raises(UsageError) as caught:
        make()
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.slow("exhaustive")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("name", "strategy"),
    [("S5", "permutation"), ("S4", "rotation"), ("A5", "rotation"), ("Z60", "rotation"), ("D12", "rotation"),
     ("Z60", "two-layer"), ("D12", "two-layer"), ("D5", "two-layer")],
)  # fmt: skip
def test_right_at_length_100_000_and_1_000_000(name, strategy):
    compiled = compile_group(name, strategy)
    assert verify(compiled, length=100_000, words=100, seed=1).wrong == 0
    assert verify(compiled, length=1_000_000, words=3, seed=2).wrong == 0
