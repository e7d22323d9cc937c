"""The tasks against independent oracles: sympy's permutation groups, loops over tuples, and values worked by hand."""

import json
import math
import time

import pytest
import torch
from speed import best_of
from sympy.combinatorics import Permutation as SympyPermutation
from sympy.combinatorics.named_groups import AlternatingGroup, CyclicGroup, DihedralGroup, SymmetricGroup

from deltaproduct.errors import UsageError
from deltaproduct.tasks import Task, get_task, list_tasks
from deltaproduct.tasks.group_tasks import GroupTask
from deltaproduct.tasks.groups import MAX_ELEMENTS, Group, build_group, running_product

PLAIN = ["S2", "S3", "S4", "S5", "A3", "A4", "A5", "Z2", "Z7", "Z60", "D3", "D4", "D7"]
PRODUCTS = ["S3_x_Z2", "Z2_x_Z3", "D4_x_A4", "Z2_x_S3_x_Z3"]
RESTRICTED = ["S5_only_swaps", "S3_only_swaps", "S5_limit_to_3", "S4_limit_to_2"]
BLOCKS = ["S3_2_tokens", "S4_3_tokens", "S3_2_s_tokens", "S5_only_swaps_4_s_tokens", "S3_3_s_tokens_only_input",
          "S3_x_Z2_2_tokens", "S5_limit_to_3_2_s_tokens_only_input", "S5_hard", "S5_only_swaps_hard"]  # fmt: skip
ALL = PLAIN + PRODUCTS + RESTRICTED + BLOCKS

SYMPY = {"S": SymmetricGroup, "A": AlternatingGroup, "Z": CyclicGroup, "D": DihedralGroup}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def then(q: tuple[int, ...], p: tuple[int, ...]) -> tuple[int, ...]:
    """p ∘ q: q first, then p, written without any of the library's tables."""
    return tuple(p[q[x]] for x in range(len(p)))


def loop_products(elements: tuple[tuple[int, ...], ...], row: list[int]) -> list[int]:
    """Indices of the running products of one row of element indices, composing tuples one by one."""
    acc, out = tuple(range(len(elements[0]))), []
    for x in row:
        acc = then(elements[x], acc)
        out.append(elements.index(acc))
    return out


# --------------------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("name", PLAIN)
def test_elements_are_sympys_group(name):
    task = get_task(name)
    oracle = SYMPY[name[0]](int(name[1:]))
    assert set(task.elements) == {tuple(p.array_form) for p in oracle.elements}
    assert len(task.elements) == oracle.order()
    assert list(task.elements) == sorted(task.elements)


@pytest.mark.parametrize("name", PLAIN + PRODUCTS)
def test_compose_is_sympys_product(name):
    task = get_task(name)
    n = len(task.elements)
    for i, j in torch.randint(n, (60, 2), generator=seeded()).tolist():
        # sympy multiplies left to right, (a*b)(x) = b(a(x)), so our p ∘ q is its q * p
        expected = SympyPermutation(task.elements[j]) * SympyPermutation(task.elements[i])
        assert task.elements[task.compose(i, j)] == tuple(expected.array_form)


def test_convention_by_hand():
    s3 = get_task("S3")
    assert s3.elements == ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
    # (0 1) ∘ (1 2): 0 ↦ 0 ↦ 1, 1 ↦ 2 ↦ 2, 2 ↦ 1 ↦ 0; the other order gives the inverse
    assert s3.compose(2, 1) == 3 and s3.compose(1, 2) == 4
    assert [s3.token_name(i) for i in range(7)] == ["e", "(1 2)", "(0 1)", "(0 1 2)", "(0 2 1)", "(0 2)", "[BOS]"]
    z5 = get_task("Z5")
    assert z5.elements[2] == (2, 3, 4, 0, 1) and z5.compose(3, 4) == 2 and z5.label_name(2) == "+2"
    d4 = get_task("D4")
    names = [d4.token_name(i) for i in range(8)]
    r1, m0 = names.index("r1"), names.index("m0")
    assert d4.elements[r1] == (1, 2, 3, 0) and d4.elements[m0] == (0, 3, 2, 1)
    assert names[d4.compose(r1, m0)] == "m1"  # 1 + (0 - x)
    assert names[d4.compose(m0, r1)] == "m3"  # 0 - (1 + x)
    assert get_task("S4").token_name(get_task("S4").elements.index((1, 0, 3, 2))) == "(0 1)(2 3)"


@pytest.mark.parametrize("name", PLAIN + PRODUCTS)
def test_group_axioms(name):
    task = get_task(name)
    table, n = task.table, len(task.elements)
    assert table.dtype == torch.int64 and table.shape == (n, n)
    everything = torch.arange(n)
    assert task.identity == 0
    assert torch.equal(table[0], everything) and torch.equal(table[:, 0], everything)
    assert torch.equal(table.sort(dim=0).values, everything[:, None].expand(n, n))  # so every element has an inverse
    assert torch.equal(table.sort(dim=1).values, everything.expand(n, n))
    a, b, c = torch.randint(n, (3, 2000), generator=seeded())
    assert torch.equal(table[table[a, b], c], table[a, table[b, c]])


@pytest.mark.parametrize("name", PRODUCTS)
def test_direct_product_acts_factor_by_factor(name):
    task = get_task(name)
    factors = [get_task(part) for part in name.split("_x_")]
    assert len(task.elements) == math.prod(len(f.elements) for f in factors)
    # lexicographic order makes the index of a tuple of factor elements its mixed-radix number, first factor slowest
    sizes = [len(f.elements) for f in factors]
    pick = [torch.randint(size, (2, 50), generator=seeded(k)) for k, size in enumerate(sizes)]

    def index(parts):
        total = torch.zeros_like(parts[0])
        for part, size in zip(parts, sizes, strict=True):
            total = total * size + part
        return total

    together = task.table[index([p[0] for p in pick]), index([p[1] for p in pick])]
    apart = index([f.table[p[0], p[1]] for f, p in zip(factors, pick, strict=True)])
    assert torch.equal(together, apart)
    assert len(task.elements[0]) == sum(len(f.elements[0]) for f in factors)


def test_permutations_that_are_no_group_are_refused():
    with pytest.raises(UsageError, match="not a group"):
        _ = Group("half", ((0, 1, 2), (0, 2, 1), (1, 0, 2)), ("e", "(1 2)", "(0 1)")).table


def test_token_and_label_ids():
    for name in ALL:
        task = get_task(name)
        n = len(task.elements)
        assert task.bos_id == n and task.token_name(n) == "[BOS]"
        filler = "_s_tokens" in name
        own_label = filler and not name.endswith("only_input")
        assert task.vocab_size == n + 1 + filler and task.num_labels == n + own_label
        if filler:
            assert task.filler_id == n + 1 and task.token_name(n + 1) == "[FILL]"
        if own_label:
            assert task.filler_label == n and task.label_name(n) == "[FILL]"
        names = [task.token_name(i) for i in range(task.vocab_size)]
        assert len(set(names)) == task.vocab_size
        assert len({task.label_name(i) for i in range(task.num_labels)}) == task.num_labels


# ------------------------------------------------------------------------------------------------------ running product


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 8, 9, 10, 15, 16, 17, 48, 49, 50, 101])
def test_running_product_is_the_loop(length):
    s4 = get_task("S4")  # not commutative, so an exchanged order shows
    tokens = torch.randint(24, (3, length), generator=seeded(length))
    out = running_product(s4.table, tokens)
    assert out.dtype == torch.int64 and out.is_contiguous()
    assert out.tolist() == [loop_products(s4.elements, row) for row in tokens.tolist()]


def test_running_product_continues_from_a_start():
    s4 = get_task("S4")
    tokens = torch.randint(24, (5, 40), generator=seeded())
    whole = running_product(s4.table, tokens)
    assert torch.equal(running_product(s4.table, tokens[:, 13:], whole[:, 12]), whole[:, 13:])
    assert torch.equal(running_product(s4.table, tokens[:1, 13:], int(whole[0, 12])), whole[:1, 13:])


def test_running_product_leaves_its_input_alone():
    tokens = torch.randint(24, (2, 16), generator=seeded())
    before = tokens.clone()
    running_product(get_task("S4").table, tokens)
    assert torch.equal(tokens, before)


# ------------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("length", [5, 12, 33])
def test_contract(name, length):
    task = get_task(name)
    assert isinstance(task, Task) and task.name == name
    tokens, labels, mask = task.sample(7, length, generator=seeded())
    assert tokens.shape == labels.shape == mask.shape == (7, 1 + length)
    assert tokens.dtype == labels.dtype == torch.int64 and mask.dtype == torch.bool
    assert (tokens[:, 0] == task.bos_id).all() and (tokens[:, 1:] != task.bos_id).all()
    assert (labels[:, 0] == 0).all() and not mask[:, 0].any() and mask[:, 1:].all()
    assert tokens.min() >= 0 and tokens.max() < task.vocab_size
    assert labels.min() >= 0 and labels.max() < task.num_labels


@pytest.mark.parametrize("name", PLAIN + PRODUCTS + RESTRICTED)
def test_labels_are_the_naive_product(name):
    task = get_task(name)
    tokens, labels, _ = task.sample(4, 37, generator=seeded(3))
    assert labels[:, 1:].tolist() == [loop_products(task.elements, row) for row in tokens[:, 1:].tolist()]
    assert set(tokens[:, 1:].flatten().tolist()) <= set(task.inputs)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("offset", [0, 1, 2, 7])
def test_block_labels_are_the_naive_product(name, offset):
    """Rebuilt from the tokens alone, position by position, as the docstring says it in words."""
    task = get_task(name)
    k, n = task.block, len(task.elements)
    tokens, labels, _ = task.sample(4, k + offset, generator=seeded(offset))
    for row, answer in zip(tokens[:, 1:].tolist(), labels[:, 1:].tolist(), strict=True):
        products = [0, *loop_products(task.elements, row[::k])]
        for t, (token, label) in enumerate(zip(row, answer, strict=True)):
            if t % k:
                assert token == {"repeat": row[t - t % k], "filler": n + 1, "identity": 0}[task.filling]
            complete = (t + 1) // k
            hidden = task.labels_filler and (t + 1) % k != 0
            assert label == (n if hidden else products[complete])


BY_HAND = {  # S3: 1 = (1 2), 2 = (0 1), 5 = (0 2); (0 1) ∘ (1 2) = 3, and 3 ∘ (0 2): 0↦2↦0, 1↦1↦2, 2↦0↦1, so 1
    "S3": ([2, 1, 5], 3, [6, 2, 1, 5], [0, 2, 3, 1]),
    "S3_only_swaps": ([2, 1, 5], 3, [6, 2, 1, 5], [0, 2, 3, 1]),
    "S3_limit_to_2": ([2, 1, 5], 3, [6, 2, 1, 5], [0, 2, 3, 1]),
    "S3_2_tokens": ([2, 1, 5], 6, [6, 2, 2, 1, 1, 5, 5], [0, 0, 2, 2, 3, 3, 1]),
    "S3_3_tokens": ([2, 1, 5], 8, [6, 2, 2, 2, 1, 1, 1, 5, 5], [0, 0, 0, 2, 2, 2, 3, 3, 3]),
    "S3_2_s_tokens": ([2, 1, 5], 5, [6, 2, 7, 1, 7, 5], [0, 6, 2, 6, 3, 6]),
    "S3_3_s_tokens": ([2, 1], 6, [6, 2, 7, 7, 1, 7, 7], [0, 6, 6, 2, 6, 6, 3]),
    "S3_2_s_tokens_only_input": ([2, 1, 5], 5, [6, 2, 7, 1, 7, 5], [0, 0, 2, 2, 3, 3]),
    # draws 2 1 0 5 collapse to 1; then 2 0 0 1 to 3, and 1 ∘ 3: 0↦1↦2, 1↦2↦1, 2↦0↦0, so 5
    "S3_hard": ([2, 1, 0, 5, 2, 0, 0, 1], 8, [6, 1, 0, 0, 0, 3, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1, 5]),
    "S3_only_swaps_hard": ([2, 1, 0, 5, 2, 0, 0, 1], 7, [6, 1, 0, 0, 0, 3, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]),
    # Z3 × Z2 with index 2a + b: (1,1) (2,0) (2,1) add up to (1,1) (0,1) (2,0)
    "Z3_x_Z2": ([3, 4, 5], 3, [6, 3, 4, 5], [0, 3, 1, 4]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_worked_by_hand(name, monkeypatch):
    draws, length, tokens, labels = BY_HAND[name]
    asked = []

    def draw(self, batch, count, generator):
        asked.append((batch, count))
        return torch.tensor([draws])

    monkeypatch.setattr(GroupTask, "_draw", draw)
    got_tokens, got_labels, mask = get_task(name).sample(1, length, generator=seeded())
    assert asked == [(1, len(draws))]
    assert got_tokens.tolist() == [tokens] and got_labels.tolist() == [labels]
    assert mask.tolist() == [[False] + [True] * length]


@pytest.mark.parametrize(("name", "count"), [("S5_only_swaps", 11), ("S4_only_swaps", 7), ("S5_limit_to_3", 31),
                                             ("S5_limit_to_4", 76), ("S6_limit_to_3", 56)])  # fmt: skip
def test_restricted_inputs(name, count):
    """Counts from the derangements D(j): sum over j ≤ k of C(n, j) D(j), with D = 1, 0, 1, 2, 9."""
    task = get_task(name)
    n, k = int(name[1]), 2 if "swaps" in name else int(name[-1])
    assert count == sum(math.comb(n, j) * (1, 0, 1, 2, 9)[j] for j in range(k + 1))
    assert len(task.inputs) == count and list(task.inputs) == sorted(task.inputs)
    assert all(len(SympyPermutation(task.elements[i]).support()) <= k for i in task.inputs)
    assert len(task.elements) == math.factorial(n)
    drawn = task.sample(64, 64, generator=seeded())[0][:, 1:]
    assert set(drawn.flatten().tolist()) == set(task.inputs)


def chi_square(values: torch.Tensor, categories: list[int]) -> float:
    counts = torch.bincount(values.flatten(), minlength=max(categories) + 1).double()[categories]
    expected = values.numel() / len(categories)
    assert counts.sum() == values.numel()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("name", ["S3", "S5", "Z60", "S3_x_Z2", "S5_only_swaps", "S5_limit_to_3", "S3_2_tokens"])
def test_sampling_is_uniform(name):
    """Under uniformity the statistic has mean d = categories - 1 and variance 2d; to be six deviations off has a chance
    below 3e-4 even for d = 5, the smallest here. The seed is fixed, so the test cannot flicker."""
    task = get_task(name)
    block = getattr(task, "block", 1)
    tokens, labels, _ = task.sample(1000, 40 * block, generator=seeded(11))
    inputs = list(task.inputs)
    d = len(inputs) - 1
    symbols = tokens[:, 1::block]
    for part in (symbols, symbols[:, :1], symbols[:, -1:]):  # all of it, and the two ends
        assert abs(chi_square(part, inputs) - d) < 6 * math.sqrt(2 * d)
    # After 40 draws the product has forgotten its start: what lasts longest is the sign in the walk of S5's swaps, with
    # eigenvalue (1 - 10)/11, and (9/11)**40 = 3e-4 is far below what 1,000 sequences can show.
    everything = list(range(len(task.elements)))
    d = len(everything) - 1
    assert abs(chi_square(labels[:, -1:], everything) - d) < 6 * math.sqrt(2 * d)


def test_hard_symbols_are_products_of_four_swaps():
    task = get_task("S5_hard")
    tokens, _, _ = task.sample(2000, 8, generator=seeded())
    symbols = tokens[:, 1::4].flatten()
    counts = torch.bincount(symbols, minlength=120)[:120].double() / symbols.numel()
    swaps = torch.zeros(120, dtype=torch.double)
    swaps[list(task.inputs)] = 1 / 11
    exact = swaps
    for _ in range(3):  # the distribution of a product is the convolution of its factors' distributions
        exact = torch.zeros_like(swaps).index_add(0, task.table.flatten(), torch.outer(exact, swaps).flatten())
    # each frequency is binomial: its deviation is at most sqrt(p/4000), and 6 of them cover 120 elements
    assert ((counts - exact).abs() <= 6 * (exact / 4000).sqrt()).all()
    assert (exact > 0).all()


def test_chance():
    """The best answer that reads no input, measured: always element 0, and filler where the position gives it away."""
    for name in ("S3", "Z7", "S3_x_Z2", "S3_2_tokens", "S3_3_s_tokens", "S3_3_s_tokens_only_input", "S3_hard"):
        task = get_task(name)
        _, labels, mask = task.sample(200, 600, generator=seeded(5))
        guess = torch.zeros_like(labels)
        if getattr(task, "labels_filler", False):
            position = torch.arange(labels.shape[1])
            guess[:, position % task.block != 0] = task.filler_label
        accuracy = (guess == labels)[mask].double().mean()
        # 200 × 600/4 independent answers at least: deviation ≤ .5/sqrt(30000) = .003; the opening identities add 3/600
        assert abs(accuracy - task.chance) < 5 * 0.003 + 0.005, name


# ---------------------------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("name", ["S3", "S5_only_swaps", "S3_2_s_tokens", "S5_hard"])
def test_the_generator_is_the_only_source_of_randomness(name):
    task = get_task(name)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = task.sample(4, 50, generator=seeded(7))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    again = task.sample(4, 50, generator=seeded(7))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = task.sample(4, 50, generator=seeded(8))
    assert not torch.equal(first[0], other[0])
    generator = seeded(7)
    task.sample(4, 50, generator=generator)
    assert not torch.equal(first[0], task.sample(4, 50, generator=generator)[0])  # the generator moves on
    rows = {tuple(row) for row in first[0].tolist()}
    assert len(rows) == 4 and rows.isdisjoint(tuple(row) for row in other[0].tolist())


def test_tasks_are_shared_and_immutable():
    assert get_task("S3") is get_task("S3")
    with pytest.raises(AttributeError):
        get_task("S3").name = "other"


def test_worked_example():
    text = get_task("S3_2_s_tokens").worked_example(length=4, seed=1)
    tokens, labels, _ = get_task("S3_2_s_tokens").sample(1, 4, generator=seeded(1))
    lines = text.splitlines()
    assert lines[0].startswith("S3_2_s_tokens: ") and "length 4, seed 1" in lines[1]
    assert lines[3].split() == ["position", "token", "label", "scored"]
    assert lines[4].split() == ["0", "[BOS]", "-", "no"]
    task = get_task("S3_2_s_tokens")
    for t in range(1, 5):
        assert lines[4 + t].startswith(str(t)) and lines[4 + t].endswith("yes")
        assert f"  {task.token_name(int(tokens[0, t]))} " in lines[4 + t]
        assert f"  {task.label_name(int(labels[0, t]))} " in lines[4 + t]
    assert len(lines) == 9
    for name in ALL:
        assert get_task(name).worked_example()


# ---------------------------------------------------------------------------------------------------------------- speed


@pytest.mark.parametrize("name", ["S5", "S5_only_swaps", "S5_hard", "S5_4_s_tokens"])
def test_a_training_batch_takes_milliseconds(name, one_thread):
    task, generator = get_task(name), seeded()
    assert best_of(10, lambda: task.sample(1024, 128, generator=generator)) < 0.020


def test_a_million_tokens_take_less_than_a_second(one_thread):
    task = get_task("S5")
    assert best_of(2, lambda: task.sample(1, 1_000_000, generator=seeded())) < 1.0


def test_s6_builds_in_less_than_a_second():
    def build():
        build_group.cache_clear()
        assert build_group("S6").table.shape == (720, 720)

    assert best_of(2, build) < 1.0


# ---------------------------------------------------------------------------------------------------------------- names


REFUSED = {
    "S1": "S1 cannot be used because it has nothing to track; the smallest is S2",
    "A1": "the smallest is A3",
    "A2": "the smallest is A3",
    "Z1": "the smallest is Z2",
    "S0": "the smallest is S2",
    "D1": "fewer than 3 corners",
    "D2": "fewer than 3 corners",
    "S0_x_Z2": "S0 in S0_x_Z2 cannot be used",
    "S3_x_Z1": "Z1 in S3_x_Z1 cannot be used",
    "S5_limit_to_5": "no element of S5 moves more than 5 points",
    "S5_limit_to_1": "only the identity moves fewer than 2 points",
    "S2_only_swaps": "no element of S2 moves more than 2 points",
    "A5_only_swaps": "needs one symmetric group",
    "S3_x_Z2_limit_to_2": "needs one symmetric group",
    "S3_1_tokens": "the number of tokens per symbol must be at least 2, not 1",
    "S3_0_s_tokens": "at least 2, not 0",
    "S3_1_s_tokens_only_input": "at least 2, not 1",
    "A5_hard": "needs one symmetric group",
    "S2_hard": "no element of S2 moves more than 2 points",
    "S8": "S8 has 40,320 elements, and a group may have at most 5,040",
    "S8_only_swaps": "40,320 elements",
    "S99": "more than 10^18 elements",
    "Z5041": "5,041 elements",
    "D999999999": "1,999,999,998 elements",
    "S6_x_S3_x_Z2": "8,640 elements",
    "s3": "upper and lower case matter",
    "S5_Only_Swaps": "upper and lower case matter",
    "S5_only_swap": "did you mean 'S5_only_swaps'",
    "S3_2_token": "did you mean 'S3_2_tokens'",
    "S99x": "`deltaproduct tasks list` shows them",
    "S03": "unknown task 'S03'",
    "S3 ": "unknown task 'S3 '",
    "S3\n": "unknown task",
    "S٣": "unknown task",
    "S3_x_": "unknown task",
    "S" + "9" * 5000: "unknown task",
    "": "unknown task ''",
}


@pytest.mark.parametrize("name", REFUSED, ids=lambda name: repr(name[:30]))
def test_bad_names(name):
    start = time.process_time()
    with pytest.raises(UsageError) as error:
        get_task(name)
    assert REFUSED[name] in str(error.value)
    assert "\n" not in str(error.value)
    assert time.process_time() - start < 1.0  # refused before anything is built


def test_largest_group_is_allowed():
    assert math.factorial(7) == MAX_ELEMENTS
    assert len(get_task("S7").elements) == 5040  # the table is only built when it is needed


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("batch", "length", "message"), [
    (1, 0, "length must be at least {least}, not 0"),
    (1, -3, "length must be at least {least}, not -3"),
    (0, 5, "batch must be at least 1, not 0"),
])  # fmt: skip
def test_bad_sizes(name, batch, length, message):
    task = get_task(name)
    with pytest.raises(UsageError) as error:
        task.sample(batch, length, generator=seeded())
    assert str(error.value).startswith(message.format(least=task.min_length))
    with pytest.raises(UsageError):
        task.sample(1, task.min_length - 1, generator=seeded())
    task.sample(1, task.min_length, generator=seeded())
    assert task.min_length == getattr(task, "block", 1)


def test_list_tasks_examples_work(tmp_path, monkeypatch):
    pytest.importorskip("automata")
    automaton = {"alphabet": ["0", "1"], "states": ["even", "odd"], "initial": 0, "accepting": [0],
                 "transitions": [[0, 1], [1, 0]]}  # fmt: skip
    (tmp_path / "machine.json").write_text(json.dumps(automaton))
    monkeypatch.chdir(tmp_path)
    rows = list_tasks()
    assert len({pattern for pattern, _, _ in rows}) == len(rows) == 39
    for pattern, description, example in rows:
        assert pattern and description and "\n" not in description
        task = get_task(example)
        assert task.name == example
        lines = task.worked_example().splitlines()
        assert lines[0] == f"{example}: {task.summary}" and len(lines) == 5 + max(8, task.min_length)
