"""What the rules of theory/theorems/ rest on, in numbers: spectra, repeated symbols, and the constructions' steps."""

import itertools
import math

import pytest
import torch

from deltaproduct.models import ModelConfig, SequenceModel
from deltaproduct.ops import delta_product
from deltaproduct.tasks.groups import build_group, running_product
from deltaproduct.theory.householder import Factors, from_rotation, spectrum
from deltaproduct.theory.theorems.group_facts import generated, group_facts

pytestmark = pytest.mark.numerical

ROUNDING = 1e-9  # float64 eigenvalues of products of a few factors, some of them close to each other


def draw(n, count, most, rng):
    """Factors with β uniform in [0, most], every fourth at an end."""
    keys = torch.nn.functional.normalize(torch.randn(count, n, generator=rng, dtype=torch.float64), dim=-1)
    betas = most * torch.rand(count, generator=rng, dtype=torch.float64)
    ends = torch.rand(count, generator=rng) < 0.25
    return Factors(keys, torch.where(ends, most * (betas > most / 2), betas))


def drawn_spectra(count, most, draws=400):
    rng = torch.Generator().manual_seed(count)
    return [spectrum(draw(n, count, most, rng)) for n in (2, 3, 5) for _ in range(draws)]


# ------------------------------------------------------------------------------------------------------------- spectra


@pytest.mark.parametrize(("count", "most"), [(1, 1.0), (1, 2.0), (2, 1.0)])
def test_where_all_eigenvalues_are_real(count, most):
    """P2, Proposition 1: what Theorems 1 and 2 need of one factor, and of two in [0,1]."""
    values = torch.cat(drawn_spectra(count, most))
    assert values.imag.abs().max() < ROUNDING
    assert values.real.max() < 1 + ROUNDING
    assert (values.real.min() > -ROUNDING) == (most == 1.0)


@pytest.mark.parametrize(("count", "most"), [(2, 2.0), (3, 1.0), (4, 1.0)])
def test_where_they_are_not(count, most):
    assert max(float(values.imag.abs().max()) for values in drawn_spectra(count, most)) > 0.01


def test_three_projections_can_have_a_negative_eigenvalue():
    """So neither Theorem 1 nor 2 says anything about three factors in [0,1]."""
    turn = math.pi / 3
    keys = torch.tensor([[math.cos(i * turn), math.sin(i * turn)] for i in range(3)], dtype=torch.float64)
    values = spectrum(Factors(keys, torch.ones(3, dtype=torch.float64)))
    assert values.real.tolist() == pytest.approx([-1 / 8, 0], abs=ROUNDING) and values.imag.abs().max() < ROUNDING


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_in_zero_one_all_but_the_eigenvalue_one_are_inside_the_unit_circle(count):
    for values in drawn_spectra(count, 1.0):
        assert (((values - 1).abs() < 1e-6) | (values.abs() < 1)).all()


# ---------------------------------------------------------------------------------------------------- repeated symbols


def states_of_a_repeated_symbol(factors, steps, rng):
    """Every state [steps,n,n] of one layer that reads the same symbol again and again, in float64."""
    count, n = factors.keys.shape
    v = torch.randn(1, 1, count, 1, n, generator=rng, dtype=torch.float64)
    state = torch.randn(1, 1, n, n, generator=rng, dtype=torch.float64)
    k, beta, seen = factors.keys.view(1, 1, count, 1, n), factors.betas.view(1, 1, count, 1), []
    for _ in range(steps):
        q = torch.zeros(1, 1, 1, n, dtype=torch.float64)
        _, state = delta_product(q, k, v, beta, initial_state=state, output_final_state=True, backend="reference")
        seen.append(state[0, 0])
    return torch.stack(seen)


def period(states):
    """The least period ≤ 8 of the last 24 states, rounded to bfloat16; None if there is none."""
    last = states[-24:].to(torch.bfloat16)
    return next((p for p in range(1, 9) if torch.equal(last[p:], last[:-p])), None)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("count", "most", "longest"), [(1, 1, 1), (2, 1, 1), (3, 1, 1), (6, 1, 1), (1, 2, 2)])
def test_a_repeated_symbol_settles(count, most, longest, seed):
    """One layer, rounded: constant with eigenvalues in [0,1], of a period that divides 2 with one factor in [-1,1]."""
    rng = torch.Generator().manual_seed(seed)
    keys = torch.nn.functional.normalize(torch.randn(count, 4, generator=rng, dtype=torch.float64), dim=-1)
    betas = torch.full((count,), 2.0, dtype=torch.float64)
    if most == 1:  # away from 0, so that a few hundred steps are many
        betas = 0.3 + 0.7 * torch.rand(count, generator=rng, dtype=torch.float64)
    assert period(states_of_a_repeated_symbol(Factors(keys, betas), 1000, rng)) == longest


@pytest.mark.parametrize("m", [3, 4, 5])
def test_two_reflections_count_modulo_m(m):
    """What forbids one factor does not forbid two: else the rule would say too much."""
    rng = torch.Generator().manual_seed(0)
    assert period(states_of_a_repeated_symbol(from_rotation(2 * math.pi / m), 60, rng)) == m


@pytest.mark.parametrize(
    ("num_householder", "layers", "allow_neg_eigval", "gated", "settles_every"),
    [(1, 1, False, False, 1), (2, 2, False, True, 1), (3, 2, False, False, 1), (4, 3, False, True, 1),
     (1, 1, True, False, 2), (1, 1, True, True, 2)],
)  # fmt: skip
def test_a_whole_models_scores_settle(num_householder, layers, allow_neg_eigval, gated, settles_every):
    """Any depth in [0,1], and one layer with one factor in [-1,1]: on a repeated symbol the scores stop counting."""
    torch.manual_seed(0)
    model = SequenceModel(ModelConfig.build(
        vocab_size=4, num_labels=3, hidden_size=16, num_heads=2, head_dim=4, num_hidden_layers=layers,
        num_householder=num_householder, allow_neg_eigval=allow_neg_eigval, use_forget_gate=gated,
        initializer_range=0.5, beta_bias_init=20.0,
    )).double()  # fmt: skip
    symbols = torch.cat([torch.tensor([[3]]), torch.ones(1, 20_000, dtype=torch.int64)], 1)
    with torch.no_grad():
        scores, _ = model(symbols)
    last = scores[0, -64:]
    assert scores[0, :64].std(0).max() > 1e-3, "they never moved, which would show nothing"
    if settles_every == 2 and not gated:
        # It does count modulo 2, and only so far: 1e-6 in the keys' normalisation shrinks the eigenvalue −1 a little.
        assert (last[1:] - last[:-1]).abs().max() > 1
        assert (last[2:] - last[:-2]).abs().max() < 1e-3
    else:
        assert (last[settles_every:] - last[:-settles_every]).abs().max() < 1e-6


# ------------------------------------------------------------------------------------------------------- constructions


def reflection(angle):
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, s], [s, -c]], dtype=torch.float64)


def on_circle(angle):
    return torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)


@pytest.mark.parametrize("m", [3, 4, 5, 12, 60])
def test_two_layers_of_single_reflections_add_modulo_m(m):
    """P2, Theorem 6: the second layer reflects by an angle that depends on whether the position is odd."""
    rng = torch.Generator().manual_seed(m)
    state, total = on_circle(0), 0
    for position, x in enumerate(torch.randint(m, (300,), generator=rng).tolist(), start=1):
        odd = position % 2
        state = reflection((1 - 2 * x if odd else 1 + 2 * x) * math.pi / m) @ state
        total = (total + x) % m
        wanted = on_circle((1 - 2 * total if odd else 2 * total) * math.pi / m)
        assert (state - wanted).norm() < 1e-9


def dihedral_accuracy(m, exchanged):
    """Share of 300 products of D_m that P1's Theorem 7 (i) gets right, with the mirrorings' two angles exchanged."""
    rng = torch.Generator().manual_seed(m)
    numbers, mirrored = torch.randint(m, (300,), generator=rng).tolist(), torch.rand(300, generator=rng) < 0.5
    starts = {**{i: on_circle(2 * i * math.pi / m) for i in range(m)},
              **{~i: on_circle((1 - 2 * i) * math.pi / m) for i in range(m)}}  # fmt: skip
    state, odd_turns, odd_mirrors, right, product = on_circle(0), 0, 0, 0, (0, 0)
    for i, mirror in zip(numbers, mirrored.int().tolist()):
        odd_turns, odd_mirrors = odd_turns ^ (1 - mirror), odd_mirrors ^ mirror
        if mirror:
            angle = 2 + 2 * i if odd_turns == exchanged else -2 * i
        else:
            angle = 1 - 2 * i if odd_turns else 1 + 2 * i
        state = reflection(angle * math.pi / m) @ state
        nearest = max(starts, key=lambda j: float(starts[j] @ state))
        nearest = ~nearest if nearest < 0 else nearest
        answer = ((m - nearest) % m if odd_mirrors else nearest, odd_mirrors)
        # x_1 x_2 … with r_i r_j = r_(i+j), r_i s_j = s_(i+j), s_i r_j = s_(i−j), s_i s_j = r_(i−j)
        product = ((product[0] + (-i if product[1] else i)) % m, product[1] ^ mirror)
        right += answer == product
    return right / 300


@pytest.mark.parametrize("m", [3, 4, 5, 12])
def test_two_layers_of_single_reflections_follow_d_m(m):
    assert dihedral_accuracy(m, exchanged=True) == 1
    assert dihedral_accuracy(m, exchanged=False) < 0.8  # as printed


@pytest.mark.parametrize("name", ["Z2", "Z4", "Z8", "D4", "D8", "Z2_x_Z4", "D4_x_Z2"])
def test_layers_of_parities_follow_groups_of_two_to_the_p(name):
    """Only signs are kept, and a layer reads the symbol and the signs below: `_parities`, step by step."""
    table = build_group(name).table
    n = len(table)
    series = [torch.arange(n)]
    while len(series[-1]) > 1:
        series.append(generated(table, table[series[-1], series[-1]]))
    assert len(series) - 1 == group_facts(name).parity_layers

    words = torch.randint(n, (4, 200), generator=torch.Generator().manual_seed(0))
    symbols, decoded = words.clone(), None
    for group, normal in itertools.pairwise(series):
        # Signs of g's coset: a homomorphism to ±1 for each of enough subgroups of index 2 that contain `normal`.
        signs = _signs(table, group, normal)  # [n,r], of the elements of `group`
        seen = signs[symbols].cumprod(1)  # [B,T,r]: all that this layer keeps, one product of ±1 each
        representative = {tuple(signs[g].tolist()): int(g) for g in group.flip(0)}
        after = torch.tensor([[representative[tuple(s)] for s in row] for row in seen.tolist()])
        before = torch.cat([torch.full((4, 1), representative[(1,) * signs.shape[1]]), after[:, :-1]], 1)
        rest = table[table[before, symbols], _inverse(table)[after]]  # t x = n' t', so n' = t x t'^-1
        assert torch.isin(rest, normal).all()
        decoded = [after] if decoded is None else [*decoded, after]
        symbols = rest
    product = decoded[-1]
    for t in decoded[-2::-1]:
        product = table[product, t]
    assert torch.equal(product, running_product(table, words))


def _inverse(table):
    return (table == 0).int().argmax(1)


def _signs(table, group, normal):
    """[n,r] of ±1: homomorphisms of `group` that are 1 on `normal` and together tell its cosets apart."""
    columns = []
    kernel_of_all = group
    for g in group:
        if len(kernel_of_all) == len(normal):
            break
        if not torch.isin(g, kernel_of_all) or torch.isin(g, normal):
            continue
        # A subgroup of index 2 without g: grow one from `normal` by elements that do not bring g in.
        kernel = normal
        for h in group:
            larger = generated(table, torch.cat([kernel, h[None]]))
            kernel = kernel if torch.isin(g, larger) else larger
        sign = torch.ones(len(table), dtype=torch.int64)
        sign[group[~torch.isin(group, kernel)]] = -1
        columns.append(sign)
        kernel_of_all = kernel_of_all[torch.isin(kernel_of_all, kernel)]
    assert len(kernel_of_all) == len(normal)
    return torch.stack(columns, 1)
