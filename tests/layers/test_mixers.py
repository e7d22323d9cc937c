"""Every registered mixer with every option of its own: whole = streamed = packed = padded, and its gradients.

A new mixer is under test as soon as it is in the registry; options that it does not take are left out. Everything is
compared in float64, where the ways of running differ by rounding alone: 1e-14 of sums, times up to 1/√norm_eps ≈ 300
where a head's output is almost zero and its norm enlarges it.
"""

import math
from copy import deepcopy

import pytest
import torch
from mixer_cases import CASES, OPTIONS, assert_same, build, noise
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from deltaproduct.errors import UsageError
from deltaproduct.layers import (
    MIXERS,
    AttentionState,
    DeltaNet,
    DeltaProduct,
    DeltaProductOptions,
    GatedDeltaNet,
    get_mixer,
)
from deltaproduct.layers.options import option_names

pytestmark = pytest.mark.numerical

B, T = 3, 23
SCANNED = ("linear_attention", "gla", "mlstm", "mamba2", "mamba", "titans", "ttt_linear")


def in_pieces(mixer, x, state, cuts):
    outputs = []
    for lo, hi in zip((0, *cuts), (*cuts, x.shape[1])):
        y, state = mixer(x[:, lo:hi], state)
        outputs.append(y)
    return torch.cat(outputs, 1), state


def floats(state) -> int:
    return sum(a.numel() for a in tree_leaves(state) if a is not None and a.is_floating_point())


def select(state, row: int):
    one = tree_map(lambda a: None if a is None else a[row : row + 1], state)
    return one.trimmed() if isinstance(one, AttentionState) else one


@pytest.mark.parametrize(("name", "options"), CASES)
def test_whole_is_streamed_is_packed_is_padded(name, options):
    mixer = build(name, options)
    x = noise(B, T, 12)
    _, start = mixer(noise(B, 3, 12, seed=2))  # so that what is carried in is not zero
    for state in (None, start):
        y, end = mixer(x, state)
        assert y.abs().max() > 1e-3  # the comparisons below are of something

        assert_same(in_pieces(mixer, x, state, sorted(torch.randint(1, T, (4,)).unique().tolist())), (y, end))
        with torch.no_grad():
            assert_same(in_pieces(mixer, x, state, range(1, T)), (y, end))

        # Packed: the three sequences cut to lengths 0, T and 5, with an empty one more between.
        row = select(state if state is not None else mixer.init_state(B), 0)
        beginnings = tree_map(lambda a: None if a is None else torch.cat([a] * 4), row)
        cu = torch.tensor([0, 0, T, T, T + 5])
        packed, ends = mixer(torch.cat((x[:1], x[1:2, :5]), 1), beginnings, cu_seqlens=cu)
        whole, whole_end = mixer(x[:1], row)
        short, short_end = mixer(x[1:2, :5], row)
        assert_same(packed, torch.cat((whole, short), 1))
        assert_same([select(ends, s) for s in range(4)], [row, whole_end, row, short_end])

        # Padded: row 0 on the left, row 1 on the right, row 2 in gaps. What stands in the padding is never looked at.
        mask = torch.zeros(B, T + 9, dtype=torch.bool)
        mask[0, 9:] = mask[1, :T] = True
        mask[2, torch.randperm(T + 9)[:T]] = True
        padded = noise(B, T + 9, 12, seed=3).masked_scatter(mask[..., None], x)
        out, end_of_real = mixer(padded, state, mask=mask)
        assert_same(out[mask].view_as(y), y)
        assert_same(end_of_real, end)
        assert (out[~mask] == 0).all()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_gradients_state_size_and_causality(name, options):
    mixer = build(name, options, hidden_size=3, num_heads=1, head_dim=2)
    if "num_v_heads" in options:
        mixer = build(name, options | {"num_v_heads": 2}, hidden_size=3, num_heads=1, head_dim=2)
    assert floats(mixer.init_state(1)) == mixer.state_size == mixer.state_size_after(0)
    assert floats(mixer(noise(1, 7, 3))[1]) == mixer.state_size_after(7)
    _, state = mixer(noise(2, 2, 3, seed=2))
    x = noise(2, 5, 3)
    flat, spec = tree_flatten(state)
    there = [i for i, a in enumerate(flat) if a is not None and a.is_floating_point()]
    names = [n for n, _ in mixer.named_parameters()]

    def f(x, *tensors):
        pieces = list(flat)
        for i, a in zip(there, tensors):
            pieces[i] = a
        weights = dict(zip(names, tensors[len(there) :]))
        y, end = torch.func.functional_call(mixer, weights, (x, tree_unflatten(pieces, spec)))
        return y, *(a for a in tree_leaves(end) if a is not None and a.numel())

    tensors = [x, *(flat[i] for i in there), *(p for _, p in mixer.named_parameters())]
    # relu's kink is nowhere near with these values; fast mode compares one random projection of each Jacobian.
    tensors = [a.detach().clone().requires_grad_() for a in tensors]
    assert torch.autograd.gradcheck(f, tensors, fast_mode=True)

    x = noise(1, 9, 3).requires_grad_()
    y, _ = mixer(x)
    (grad,) = torch.autograd.grad(y[0, 4].sum(), x)
    assert (grad[0, 5:] == 0).all() and (grad[0, 4] != 0).any()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_float32_and_bfloat16(name, options):
    exact = build(name, options)
    single = deepcopy(exact).float()
    x = noise(B, 50, 12).float()
    y, _ = exact(x.double())
    # The operator's 1e-5 (test_operator.py), the norm dividing both it and the output by the same root mean square.
    assert_same(single(x)[0].double(), y, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        out, state = single(x)
        step, state = single(x[:, :1], state)
        padded, _ = single(x, mask=torch.ones(B, 50, dtype=torch.bool))
    assert out.dtype == step.dtype == padded.dtype == torch.bfloat16
    # About ten roundings to 8 bits between x and y (projections, convolution, activation, norm, output): 10 · 2⁻⁸, in
    # the mean square, because the norm enlarges the error of the few outputs that cancel to almost nothing.
    assert (out.double() - y).norm() <= 10 * 2**-8 * y.norm()
    assert (padded.double() - out.double()).norm() <= 2**-8 * y.norm()


@pytest.mark.parametrize("name", SCANNED)
def test_bfloat16_weights(name):
    """A model that is bfloat16 throughout: its outputs are, its states are not."""
    exact = build(name, {}).bfloat16().double()  # weights rounded once, so that only the computing differs
    low, x = deepcopy(exact).bfloat16(), noise(B, 50, 12).bfloat16()
    with torch.no_grad():
        y, _ = exact(x.double())
        out, state = low(x)
        _, state = low(x[:, :1], state)
    assert out.dtype == torch.bfloat16 and state[0].dtype == torch.float32
    assert (out.double() - y).norm() <= 10 * 2**-8 * y.norm()


DELTA = [c for c in CASES if issubclass(MIXERS[c.values[0]], DeltaProduct)]


@pytest.mark.parametrize(("name", "options"), DELTA)
def test_what_the_operator_is_given(name, options):
    mixer = build(name, options, torch.float32)
    x = 100 * noise(B, 50, 12).float()  # so large that β comes near both its ends
    top = 2.0 if options.get("allow_neg_eigval", True) else 1.0
    for cast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            q, k, v, beta, g, _ = mixer.project(x, mixer.init_state(B))
        assert beta.dtype == torch.float32 and (g is None or (g.dtype == torch.float32 and (g <= 0).all()))
        assert 0 <= beta.min() < 0.01 and 0.99 * top < beta.max() <= top
        n, heads, value_heads = mixer.num_householder, 2, options.get("num_v_heads", 2)
        assert q.shape == (B, 50, heads, 4) and k.shape == (B, 50, n, heads, 4)
        assert v.shape == (B, 50, n, value_heads, int(4 * options.get("expand_v", 1)))
        assert beta.shape == (B, 50, n, value_heads)
    if options.get("beta_bias_init") is not None:
        biased = mixer.project(torch.zeros(1, 2, 12), mixer.init_state(1))[3]
        assert (biased - top / (1 + math.exp(-options["beta_bias_init"]))).abs().max() < 1e-6


@pytest.mark.parametrize("length", [1, 7])
def test_keys_and_queries_are_normalised(length):
    """A projection's scale must not matter, in a token as in a sequence: otherwise transitions could grow."""
    mixer = build("deltaproduct", {"use_short_conv": False, "qkv_activation": "identity"})
    x = noise(B, length, 12)
    with torch.no_grad():
        want, _ = mixer(x)
        mixer.q_proj.weight *= 100
        mixer.k_proj.weight *= 100
        got, _ = mixer(x)
    assert mixer.project(x, mixer.init_state(B))[1].norm(dim=-1).max() > 10  # the operator does it, not `project`
    assert (got - want).abs().max() < 1e-3 * want.abs().max()  # but for the 1e-6 of the norm


@pytest.mark.parametrize(
    "options", [o for o in OPTIONS if set(o) <= {*option_names(DeltaProductOptions)} - {"num_householder"}], ids=str
)
@pytest.mark.parametrize(
    ("preset", "gates"),
    [(DeltaNet, {}), (GatedDeltaNet, {"use_forget_gate": True, "use_output_gate": True})],
)
def test_presets_are_deltaproduct_with_one_step(preset, gates, options):
    options = {n: v for n, v in options.items() if n not in preset.fixed}
    one = DeltaProduct(12, 2, 4, num_householder=1, **(options | gates)).double()
    other = preset(12, 2, 4, **options).double()
    other.load_state_dict(one.state_dict())
    x = noise(B, T, 12)
    got, want = other(x), one(x)
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(got), tree_leaves(want)) if a is not None)


def test_a_gate_that_never_forgets_is_no_gate():
    gated = build("deltaproduct", {"use_forget_gate": True})
    plain = build("deltaproduct", {})
    gated.A_log.data.fill_(-torch.inf)  # g = −exp(A_log)·softplus(…) = 0
    plain.load_state_dict({n: a for n, a in gated.state_dict().items() if n in plain.state_dict()})
    x = noise(B, T, 12)
    assert_same(gated(x), plain(x))


def test_backends_agree_inside_the_layer():
    mixer, x = build("deltaproduct", {"use_forget_gate": True}), noise(B, T, 12)
    want = mixer(x)
    mixer.backend = "reference"
    assert_same(mixer(x), want)


@pytest.mark.parametrize("name", MIXERS)
def test_no_tokens_at_all(name):
    mixer = build(name, {})
    start = mixer(noise(1, 3, 12))[1]
    for run in (
        lambda: mixer(noise(1, 0, 12), start),
        lambda: mixer(noise(1, 0, 12), start, cu_seqlens=torch.tensor([0, 0])),
        lambda: mixer(noise(1, 4, 12), start, mask=torch.zeros(1, 4, dtype=torch.bool)),
    ):
        y, end = run()
        assert (y == 0).all()
        assert_same(end, start)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("hidden_size", {"hidden_size": 0}),
        ("num_heads", {"num_heads": 0}),
        ("head_dim", {"head_dim": 0}),
        ("num_householder", {"num_householder": 0}),
        ("num_v_heads", {"num_v_heads": 3}),
        ("num_v_heads", {"num_v_heads": 0}),
        ("expand_v", {"expand_v": 0.1}),
        ("conv_size", {"conv_size": 0}),
        ("qkv_activation", {"qkv_activation": "gelu"}),
    ],
)
def test_impossible_sizes_are_refused(name, changed):
    with pytest.raises(UsageError, match=rf"\b{name}\b") as refusal:
        DeltaProduct(**({"hidden_size": 12, "num_heads": 2, "head_dim": 4} | changed))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("mixer", "name", "changed"),
    [
        *((m, "hidden_size", {"hidden_size": 0}) for m in SCANNED),
        *((m, "head_dim", {"head_dim": 0}) for m in SCANNED if "head_dim" in option_names(MIXERS[m].options)),
        *((m, "norm_eps", {"norm_eps": 0}) for m in SCANNED if MIXERS[m].takes_norm_eps),
        *((m, "num_heads", {"num_heads": 0}) for m in ("linear_attention", "gla", "mlstm")),
        *((m, "expand_v", {"expand_v": bad}) for m in ("linear_attention", "gla", "mlstm") for bad in (0.1, math.inf)),
        *((m, n, {n: 0}) for m in ("mamba2", "mamba") for n in ("expand", "ssm_state_size", "conv_size")),
        ("mamba2", "head_dim", {"head_dim": 5}),
        ("mamba", "time_step_rank", {"time_step_rank": 0}),
        ("gla", "gate_low_rank_dim", {"gate_low_rank_dim": 0}),
        ("gla", "gate_logit_normalizer", {"gate_logit_normalizer": 0}),
        ("linear_attention", "feature_map", {"feature_map": "exp"}),
    ],
)
def test_impossible_sizes_of_scanned_mixers_are_refused(mixer, name, changed):
    with pytest.raises(UsageError, match=rf"\b{name}\b") as refusal:
        build(mixer, changed)
    assert "\n" not in str(refusal.value)


def test_impossible_calls_are_refused():
    mixer, x = build("deltaproduct", {}), noise(1, 5, 12)
    real = torch.ones(1, 5, dtype=torch.bool)
    for match, arguments in (
        ("not both", {"mask": real, "cu_seqlens": torch.tensor([0, 5])}),
        ("mask must be bool", {"mask": real[:, :4]}),
        ("mask must be bool", {"mask": real.float()}),
    ):
        with pytest.raises(UsageError, match=match):
            mixer(x, **arguments)
    with pytest.raises(UsageError, match=r"There is no mixer 'mambo' \(did you mean 'mamba'\?\); choose from "):
        get_mixer("mambo")


@pytest.mark.parametrize(("batch", "cu"), [(1, [0, 2, 4]), (1, [0, 9, 5]), (2, [0, 5])])
@pytest.mark.parametrize("conv", [True, False], ids=["conv", "no conv"])
def test_impossible_packings_are_refused(batch, cu, conv):
    with pytest.raises(UsageError, match=r"\bcu_seqlens\b"):
        build("deltaproduct", {"use_short_conv": conv})(noise(batch, 5, 12), cu_seqlens=torch.tensor(cu))
