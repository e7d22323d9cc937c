"""Effective rank on states whose rank is known, and the trace of states that it is taken of."""

import math

import pytest
import torch
from streams import LiveBytes, Stream, random_stream

from deltaproduct.analysis.effective_rank import effective_rank, effective_ranks
from deltaproduct.analysis.trace import trace
from deltaproduct.errors import UsageError
from deltaproduct.models import ModelConfig, SequenceModel
from deltaproduct.ops import delta_product_states

# In float64 a singular value that should be 0 is some 1e-15 of the largest after the few dozen steps here: p ln p of it
# adds 4e-14 for each of at most 8 dimensions. In float32 it is 1e-7, which adds 2e-6.
EXACT = {"rtol": 0, "atol": 1e-12}
ROUNDED = {"rtol": 0, "atol": 1e-4}


def orthogonal(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q


@pytest.mark.parametrize("rank", range(1, 9))
def test_projections_and_sums_have_their_rank(rank):
    u, v, wide = (orthogonal(n, seed)[:, :rank] for n, seed in ((8, 1), (8, 2), (10, 3)))
    known = torch.tensor(float(rank)).double()
    for matrix in (u @ u.T, u @ v.T, -3e5 * u @ v.T, u @ wide.T, wide @ u.T):
        torch.testing.assert_close(effective_rank(matrix), known, **EXACT)
    torch.testing.assert_close(effective_rank((u @ v.T).float()), known, **ROUNDED)


def test_the_definition_on_unequal_singular_values():
    """σ = 2, 1, 1: p = ½, ¼, ¼, entropy 3/2·ln 2, and so 2^1.5."""
    matrix = orthogonal(8, 1)[:, :3] @ torch.tensor([2.0, 1.0, 1.0]).double().diag() @ orthogonal(5, 2)[:, :3].T
    assert effective_rank(matrix).item() == pytest.approx(2**1.5, rel=1e-12)


def test_zero_what_counts_as_zero_and_what_is_not_finite():
    one, small = torch.eye(3).double(), torch.tensor([1e-3, 2.1e-16, 0.0]).double().diag()
    broken = one.clone()
    broken[1, 2] = math.inf
    states = torch.stack([0 * one, one, small, 2e-16 * one, broken, 3e-16 * one])
    found = effective_rank(states[:, None])
    assert found.shape == (6, 1)
    assert found[0] == 0 and found[2] == 1 and found[3] == 0
    # The threshold is absolute: what lies just above it counts like anything else.
    assert found[1].item() == found[5].item() == pytest.approx(3, rel=1e-12)
    assert found[4].isnan()


def written(keys, values, beta):
    """States after each of the steps, one to a token: keys [T,K], values [T,V], beta [T]."""
    inputs = keys[None, :, None, None], values[None, :, None, None], beta[None, :, None, None]
    return delta_product_states(*inputs, positions=range(1 + len(keys)))[0, :, 0]


def test_orthogonal_keys_add_a_rank_each_and_a_reset_takes_it_away():
    """Written one after another with β = 1 they give ranks 0, 1, 2, …; reflections (β = 2, v = 0) change no singular
    value; erased by β = 1 and v = 0, the ranks go back."""
    keys, values, mirrors = orthogonal(8, 1), orthogonal(8, 2), orthogonal(8, 3)
    nothing, one = torch.zeros(8, 8).double(), torch.ones(8).double()
    states = written(torch.cat((keys, mirrors)), torch.cat((values, nothing)), torch.cat((one, 2 * one)))
    known = torch.tensor([*range(8), *[8] * 9]).double()
    torch.testing.assert_close(effective_rank(states), known, **EXACT)
    states = written(torch.cat((keys, keys)), torch.cat((values, nothing)), torch.cat((one, one)))
    # The last of them is left out: it holds nothing but rounding, which is above 2.2e-16 and has a rank of its own.
    torch.testing.assert_close(effective_rank(states[8:16]), torch.arange(8, 0, -1).double(), **EXACT)


def counting_model():
    """A head whose state is known: token i of 1 … 3 writes its own value at its own key, in the first of three steps;
    token 0, which begins documents, erases all three keys, one in each step. So the rank is how many different tokens
    the document has had so far."""
    config = ModelConfig.build(
        vocab_size=4, num_labels=4, hidden_size=4, num_heads=1, head_dim=3, num_householder=3, intermediate_size=0,
        use_short_conv=False, qkv_activation="identity", mixer=[{"name": "attention", "head_dim": 2}, "deltaproduct"],
    )  # fmt: skip
    model = SequenceModel(config).double().eval()
    mixer = model.blocks[1].mixer
    with torch.no_grad():
        model.embedding.weight.copy_(1e4 * torch.eye(4))
        model.blocks[0].mixer.o_proj.weight.zero_()
        for p in (mixer.k_proj.weight, mixer.v_proj.weight, mixer.b_proj.weight):
            p.zero_()
        for i in range(3):
            # Keys of 1e9, because the normalisation's 1e-6 would leave 1e-6/k² of what is erased.
            mixer.k_proj.weight[i, 1 + i] = 1e9  # token 1+i, step 0
            mixer.k_proj.weight[3 * i + i, 0] = 1e9  # token 0, step i
            mixer.v_proj.weight[i, 1 + i] = 0.25
        mixer.b_proj.weight[1:, 1:] = -1e3  # β: 0 in the other steps of tokens 1 … 3, and 2·sigmoid(0) = 1 elsewhere
    return model


@pytest.mark.parametrize("piece", [1, 5, None])
def test_ranks_of_a_model_whose_states_are_known(piece):
    """In the second layer of a hybrid; documents begin at token 0, and at 0 again after each of them."""
    text = Stream([[0, 1, 1, 2, 3, 2], [0, 3, 3], [0, 2, 1, 2, 1], [0]])
    progress = []
    found = effective_ranks(counting_model(), text, length=14, piece=piece, progress=progress.append)
    assert found.document_starts == [0, 6, 9]  # the fourth begins behind the window
    assert list(found.ranks) == [1] and progress[-1] == 14
    known, had = [], set()
    for token in text.ids[:14].tolist():
        for step in range(3):
            if token == 0:
                had.discard(1 + step)
            else:
                had.add(token)
            known.append(float(len(had)))
    ranks = found.ranks[1]
    assert ranks.shape == (14, 3, 1)
    torch.testing.assert_close(ranks.flatten(), torch.tensor(known).double(), **EXACT)
    assert found.means(6, 9)[1] == pytest.approx([sum(known[18:27]) / 9], abs=1e-12)
    assert found.means()[1] == pytest.approx([sum(known) / len(known)], abs=1e-12)


HARD = {"allow_neg_eigval": True, "beta_bias_init": 20.0, "use_short_conv": False}  # β = 2 to rounding, no decay


@pytest.mark.parametrize(
    "options",
    [
        {"num_householder": 2},
        {"num_householder": 3, "use_forget_gate": True, "num_v_heads": 4, "expand_v": 2.0},
        {"num_householder": 2, **HARD},
        {"mixer": "gated_deltanet"},
        {"mixer": ["deltaproduct", "attention", {"name": "deltaproduct", "num_householder": 1}]},
    ],
    ids=["conv", "gated", "hard", "gated_deltanet", "hybrid"],
)
@pytest.mark.parametrize("piece", [7, None])
def test_the_trace_is_what_the_model_carries(options, piece):
    """The state after each token's last step is the one that the model hands on when it reads token by token; the first
    steps of the trace are those of the reference's loop in one piece."""
    torch.manual_seed(0)
    config = ModelConfig.build(
        vocab_size=3, num_labels=3, hidden_size=16, num_heads=2, head_dim=4, num_hidden_layers=3, intermediate_size=16,
        initializer_range=0.5, **options,
    )  # fmt: skip
    model = SequenceModel(config).double().eval()
    tokens = torch.randint(3, (2, 50))  # three tokens: few keys, which are met again and again
    found: dict[int, list] = {}
    for layer, start, states in trace(model, tokens, piece=piece):
        assert start == sum(x.shape[1] for x in found.get(layer, []))
        found.setdefault(layer, []).append(states)
    assert list(found) == [i for i in range(3) if config.mixers[i].name != "attention"]
    state = None
    with torch.no_grad():
        for t in range(50):
            _, state = model(tokens[:, t : t + 1], state)
            for layer, pieces in found.items():
                # Reflections keep what rounding adds: 50 tokens of a few units of float64 each.
                torch.testing.assert_close(
                    torch.cat(pieces, 1)[:, t, -1], state[layer].recurrent, rtol=1e-10, atol=1e-10
                )
        whole = {t.layer: t.states for t in trace(model.use_backend("reference"), tokens, piece=50)}
    for layer, pieces in found.items():
        torch.testing.assert_close(torch.cat(pieces, 1), whole[layer], rtol=1e-10, atol=1e-10)
    assert not any(block.mixer._forward_pre_hooks for block in model.blocks)


def test_ranks_where_float32_states_are_hard_to_follow():
    """Few correlated keys, β = 2, no decay, 600 tokens: ranks of float32 states are those of float64 ones. A state that
    is off by ε of its norm has singular values off by as much (Weyl); at 600·3 steps of 6e-8 that is below 1e-4, and
    the rank of a 4×4 state moves by less than 4·4·1e-4·ln 1e4 of itself."""
    torch.manual_seed(0)
    config = ModelConfig.build(
        vocab_size=3, num_labels=3, hidden_size=16, num_heads=2, head_dim=4, num_householder=3, intermediate_size=16,
        initializer_range=0.5, **HARD,
    )  # fmt: skip
    model, text = SequenceModel(config).eval(), random_stream(6, 101, 3)
    rounded = effective_ranks(model, text, length=600).ranks[0]
    exact = effective_ranks(model.double(), text, length=600).ranks[0]
    assert exact.min() > 0.9 and exact.std() > 0.1  # not all the same
    torch.testing.assert_close(rounded, exact, rtol=0.015, atol=0)


def test_memory_does_not_grow_with_length():
    """But for the ranks, in 2 layers N·HV = 4 numbers of 8 bytes a token, and the tokens; states would be 8 times as
    much."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_heads": 2, "head_dim": 4, "num_hidden_layers": 2, "intermediate_size": 16}
    model = SequenceModel(ModelConfig.build(vocab_size=5, num_labels=5, **sizes)).eval()
    text, peaks = random_stream(40, 50, 5), {}
    for length in (40, 240):
        with LiveBytes() as memory:
            effective_ranks(model, text, length=length, piece=20)
        peaks[length] = memory.peak
    assert peaks[40] > 20 * 4 * 16 * 4  # the states of a piece were seen
    assert peaks[240] - peaks[40] <= (2 * 4 * 8 + 2 * 8) * 200


def test_what_has_no_ranks():
    sizes = {"hidden_size": 8, "num_heads": 1, "head_dim": 4, "num_hidden_layers": 2}
    text = random_stream(2, 20, 5)
    transformer = SequenceModel(ModelConfig.build(vocab_size=5, num_labels=5, mixer="attention", **sizes))
    with pytest.raises(UsageError, match=r"No layer of this model has states to trace.* Attention\."):
        effective_ranks(transformer, text, length=10)
    with pytest.raises(UsageError, match=r"No layer of this model has states to trace"):
        next(trace(transformer, text.tokens(0, 10)[None]))
    model = SequenceModel(ModelConfig.build(vocab_size=5, num_labels=5, **sizes))
    for length, message in ((0, "at least 1"), (40, "40 tokens; a window of 40")):
        with pytest.raises(UsageError, match=message):
            effective_ranks(model, text, length=length)
    with pytest.raises(UsageError, match="piece must be at least 1"):
        effective_ranks(model, text, length=10, piece=0)
