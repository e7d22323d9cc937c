"""Multi-query associative recall: the layout, a dictionary as oracle, and the distributions of the published code."""

import math

import pytest
import torch

from deltaproduct.errors import UsageError
from deltaproduct.tasks import get_task

NAMES = ["mqar_1_4", "mqar_2_12", "mqar_8_64", "mqar_8_64_random", "mqar_5_33_random", "mqar_31_64"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("more", [0, 1, 2, 7, 60])
def test_labels_are_what_a_dictionary_says(name, more):
    task = get_task(name)
    d = task.pairs
    length = task.min_length + more
    tokens, labels, mask = task.sample(40, length, generator=seeded(more))
    assert task.min_length == 4 * d and tokens.shape == labels.shape == mask.shape == (40, 1 + length)
    assert tokens.dtype == labels.dtype == torch.int64 and mask.dtype == torch.bool
    assert (tokens[:, 0] == task.bos_id).all() and (tokens[:, 1:] < task.bos_id).all() and (tokens >= 0).all()
    assert mask.sum(dim=1).tolist() == [d] * 40 and (labels[~mask] == 0).all()
    fillers = 0
    for row, answer, scored in zip(tokens[:, 1:].tolist(), labels[:, 1:].tolist(), mask[:, 1:].tolist(), strict=True):
        names = [task.token_name(i) for i in row]
        value_of = dict(zip(names[: 2 * d : 2], names[1 : 2 * d : 2], strict=True))
        assert all(k[0] == "k" and v[0] == "v" for k, v in value_of.items())
        assert len(value_of) == len(set(value_of.values())) == d  # each key and each value once
        asked = [t for t in range(length) if scored[t]]
        assert asked[0] >= 2 * d and all(t % 2 == 0 and t + 1 < length for t in asked)
        assert sorted(names[t] for t in asked) == sorted(value_of)
        assert [task.label_name(answer[t]) for t in asked] == [value_of[names[t]] for t in asked]
        rest = [names[t] for t in range(2 * d, length) if not scored[t]]
        fillers += sum(name == "_" for name in rest)
        assert name.endswith("_random") or set(rest) <= {"_"}
    expected = 40 * (length - 3 * d) / (task.vocab_size - 1 if task.random_fillers else 1)
    assert abs(fillers - expected) <= (6 * math.sqrt(expected) if task.random_fillers else 0)


def test_names_and_sizes():
    task = get_task("mqar_2_13")  # an odd vocabulary: one value more than keys and filler
    assert (task.vocab_size, task.num_labels, task.bos_id, task.chance) == (14, 7, 13, 1 / 7)
    assert [task.token_name(i) for i in (0, 1, 5, 6, 12, 13)] == ["_", "k1", "k5", "v0", "v6", "[BOS]"]
    assert [task.label_name(i) for i in (0, 6)] == ["v0", "v6"]
    assert len({task.token_name(i) for i in range(14)}) == 14


def test_keys_and_values_are_uniform():
    tokens, _, _ = get_task("mqar_3_20").sample(6000, 12, generator=seeded())
    for columns, ids in ((slice(1, 7, 2), range(1, 10)), (slice(2, 7, 2), range(10, 20))):
        counts = tokens[:, columns].flatten().bincount(minlength=20)[list(ids)].double()
        assert counts.sum() == 18_000
        # Without replacement the counts vary less than with it, so six deviations are more than enough.
        assert ((counts - 18_000 / len(ids)).abs() < 6 * math.sqrt(18_000 / len(ids))).all()
    pairs = tokens[:, 1] * 20 + tokens[:, 2]
    assert len(pairs.unique()) == 9 * 10  # any value goes with any key


def test_places_follow_the_power_law():
    """Of one query the place g has probability ∝ g^(a−1); with two, the second is drawn among the others in the same
    way, and belongs to the second key."""
    weights = [g ** (0.01 - 1) for g in range(1, 11)]
    share = [w / sum(weights) for w in weights]
    _, _, mask = get_task("mqar_1_8").sample(20_000, 22, generator=seeded())
    found = mask[:, 3:].double().mean(dim=0)[::2].tolist()
    for f, p in zip(found, share, strict=True):
        assert abs(f - p) < 6 * math.sqrt(p / 20_000)

    tokens, _, mask = get_task("mqar_2_8").sample(20_000, 24, generator=seeded(1))
    second_key = (tokens == tokens[:, 3:4]) & mask
    found = second_key[:, 5:].double().mean(dim=0)[::2].tolist()
    for j, f in enumerate(found):
        p = sum(share[i] * share[j] / (1 - share[i]) for i in range(10) if i != j)
        assert abs(f - p) < 6 * math.sqrt(p / 20_000)


def test_the_generator_is_the_only_source_of_randomness():
    task = get_task("mqar_8_64_random")
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = task.sample(6, 50, generator=seeded(7))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, task.sample(6, 50, generator=seeded(7)), strict=True))
    assert not torch.equal(first[0], task.sample(6, 50, generator=seeded(8))[0])


BAD = {
    "mqar_0_64": "no pairs",
    "mqar_8_17": "a vocabulary of 18",
    "mqar_1_3": "a vocabulary of 4",
    "mqar_8_9999999": "at most 1,048,576 tokens",
    "mqar_8": "unknown task",
    "MQAR_8_64": "upper and lower case matter",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_names(name):
    with pytest.raises(UsageError) as error:
        get_task(name)
    assert BAD[name] in str(error.value) and "\n" not in str(error.value)


def test_too_short():
    with pytest.raises(UsageError, match="length must be at least 32, not 31"):
        get_task("mqar_8_64").sample(1, 31, generator=seeded())
