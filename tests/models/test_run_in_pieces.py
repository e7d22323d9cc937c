"""One walk over a sequence in pieces (`run_in_pieces`): the same as the whole; and `evaluating`, which gives modes
back."""

import pytest
import torch
from mixer_cases import CASES
from torch.utils._pytree import tree_leaves

from deltaproduct.errors import UsageError
from deltaproduct.models import ModelConfig, SequenceModel, evaluating, run_in_pieces
from deltaproduct.models import sequence_model as module

pytestmark = pytest.mark.numerical

B, T, LABELS = 3, 23, 5
# float64: sums of some dozen terms, 1e-14, in two layers, and up to 1/√norm_eps ≈ 300 times that where a head's output
# is almost zero and its norm enlarges it.
EXACT = 1e-11
FIRST_CASES = list({case.values[0]: case for case in reversed(CASES)}.values())  # of each mixer, without options


def build(mixer="deltaproduct", **options) -> SequenceModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_heads": 2, "head_dim": 4, "num_hidden_layers": 2, "intermediate_size": 8}
    config = ModelConfig.build(7, LABELS, mixer=mixer, defaults=sizes, **options)
    return SequenceModel(config).double().eval()


def words(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(7, shape, generator=torch.Generator().manual_seed(seed))


def assert_same(got, want) -> None:
    got, want = tree_leaves(got), tree_leaves(want)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b.numel():
            assert a.shape == b.shape and (a - b).abs().max() <= EXACT * max(b.abs().max(), 1)


@pytest.mark.parametrize(("name", "options"), FIRST_CASES)
def test_pieces_are_the_whole(name, options):
    """Of every mixer: the logits, what the head sees, and the state at the end, from any state."""
    model, tokens = build(name, **options), words(B, T)
    with torch.no_grad():
        _, before = model(words(B, 3, seed=2))
        for state in (None, before):
            logits, end = model(tokens, state)
            x, _ = model.hidden(tokens, state)
            for piece in (1, 7, T, 100, None):
                pieces = list(model.run_in_pieces(tokens, state, piece=piece))
                assert [p.start for p in pieces] == list(range(0, T, piece or T))
                assert_same((torch.cat([p.x for p in pieces], 1), pieces[-1].state), (logits, end))
            assert_same(torch.cat([p.x for p in model.run_in_pieces(tokens, state, piece=5, hidden=True)], 1), x)


@pytest.mark.parametrize(("name", "options"), FIRST_CASES)
def test_padding_is_read_past(name, options):
    """Rows of lengths T, 9 and 2: each ends as it does by itself, whatever pieces its padding lies in."""
    model, tokens, lengths = build(name, **options), words(B, T), (T, 9, 2)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    pieces = list(model.run_in_pieces(tokens, piece=4, mask=mask))
    logits = torch.cat([p.x for p in pieces], 1)
    after = words(B, 1, seed=3)
    (ends,) = (p.x for p in model.run_in_pieces(after, pieces[-1].state))
    for row, length in enumerate(lengths):
        (own,) = model.run_in_pieces(tokens[row : row + 1, :length])
        assert_same(logits[row, :length], own.x[0])
        assert_same(ends[row], next(model.run_in_pieces(after[row : row + 1], own.state)).x[0])


def test_pieces_may_come_one_after_the_other():
    """From whatever yields them, of any lengths, and no sooner than they are asked for."""
    model, tokens, made = build(), words(B, T), []

    def parts():
        for lo, hi in ((0, 1), (1, 12), (12, T)):
            made.append(hi)
            yield tokens[:, lo:hi]

    walk = run_in_pieces(model, parts())
    assert made == []
    first = next(walk)
    assert made == [1] and first.start == 0 and first.x.shape == (B, 1, LABELS)
    rest = list(walk)
    assert [p.start for p in rest] == [1, 12]
    assert_same(torch.cat([p.x for p in (first, *rest)], 1), model(tokens)[0].detach())


def test_as_many_tokens_at_once_as_are_allowed(monkeypatch):
    monkeypatch.setattr(module, "PIECE_TOKENS", 10)
    assert [p.x.shape[1] for p in run_in_pieces(build(), words(4, 5))] == [2, 2, 1]
    assert [p.x.shape[1] for p in run_in_pieces(build(), words(20, 2))] == [1, 1]
    assert list(run_in_pieces(build(), words(4, 0))) == []
    with pytest.raises(UsageError, match="piece must be at least 1, not 0"):
        next(run_in_pieces(build(), words(1, 5), piece=0))


def test_neither_gradients_nor_autocast_reach_the_model():
    model = build().float()
    with torch.no_grad():  # with gradients, another kernel may round otherwise
        want = model(words(1, 6))[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = model.run_in_pieces(words(1, 6))
    assert torch.equal(found.x, want) and not found.x.requires_grad
    assert torch.is_grad_enabled()  # between the pieces the caller's own setting holds
    for _ in model.run_in_pieces(words(1, 6), piece=2):
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("training", [True, False])
def test_every_module_has_its_mode_again(training):
    model = build().train(training)
    model.blocks[0].train(not training)  # a frozen part, say
    modes = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == modes and torch.is_grad_enabled()
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert [module.training for module in model.modules()] == modes and torch.is_grad_enabled()
