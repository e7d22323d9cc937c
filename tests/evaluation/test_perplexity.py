"""Loss by position, on models whose loss is known; perplexity per token and byte; what is refused."""

import math
from itertools import pairwise

import pytest
import torch
from streams import LiveBytes, Stream, bigram_model, random_stream

from deltaproduct.errors import UsageError
from deltaproduct.evaluation.perplexity import (
    cumulative_perplexity,
    loss_by_position,
    perplexity,
    perplexity_in_buckets,
    smoothed,
    smoothing_window,
    thinned_curve,
)
from deltaproduct.evaluation.windows import (
    MOST_WINDOWS,
    check_vocabulary,
    consecutive,
    evenly_spaced,
    evenly_spaced_starts,
)
from deltaproduct.models import ModelConfig, SequenceModel

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64, sums of fewer than a thousand terms


def language_model(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_heads": 2, "head_dim": 8, "num_hidden_layers": 2, "intermediate_size": 16}
    config = ModelConfig.build(vocab_size=11, num_labels=11, initializer_range=0.3, **sizes, **options)
    return SequenceModel(config).double().eval()


def one_letter_each(ids):
    return "x" * len(ids)


class Counting(torch.nn.Module):
    """Knows that token i+1 follows token i with probability `sure`, and forgets it after reading `until` tokens; its
    state is how many it has read."""

    def __init__(self, vocab, sure, until):
        super().__init__()
        self.embedding = torch.nn.Embedding(1, 1)
        self.config = ModelConfig.build(vocab_size=vocab, num_labels=vocab)
        self.sure, self.until = sure, until

    def forward(self, tokens, state=None):
        vocab, read = self.config.vocab_size, state or 0
        p = torch.full((*tokens.shape, vocab), (1 - self.sure) / (vocab - 1), dtype=torch.float64)
        p.scatter_(-1, (tokens[..., None] + 1) % vocab, self.sure)
        p[:, max(0, self.until - read) :] = 1 / vocab
        return p.log(), read + tokens.shape[1]


@pytest.mark.parametrize("piece", [1, 7, 64, None])
def test_the_loss_changes_where_the_model_does(piece):
    """Of a text that counts up, each token costs −ln .9 until the model forgets how, and ln V from there on."""
    text = Stream([[i % 5 for i in range(1000)]])
    curve = loss_by_position(Counting(5, sure=0.9, until=60), text, length=100, sequences=11, piece=piece)
    known = torch.tensor([-math.log(0.9)] * 60 + [math.log(5)] * 40, dtype=torch.float64)
    torch.testing.assert_close(curve, known, **EXACT)


@pytest.mark.parametrize("piece", [3, None])
def test_the_loss_of_a_bigram_model_is_known(piece):
    """Weights set so that a logit is the logarithm of a transition's probability, on text of that Markov chain."""
    vocab, length, windows = 6, 50, 9
    torch.manual_seed(1)
    log_p = torch.randn(vocab, vocab, dtype=torch.float64).log_softmax(-1)
    ids = [0]
    for _ in range(4000):
        ids.append(int(torch.multinomial(log_p[ids[-1]].exp(), 1)))
    text = Stream([ids])
    model = bigram_model(log_p)
    curve = loss_by_position(model, text, length=length, sequences=windows, piece=piece)
    starts = [window.start for window in evenly_spaced(text, length, windows)]
    known = [-sum(log_p[ids[s + t], ids[s + t + 1]] for s in starts) / windows for t in range(length)]
    torch.testing.assert_close(curve, torch.stack(known), rtol=1e-8, atol=0)  # eps of the norm: 1e-5/1e8·V relative
    # Over the whole text the loss is the chain's entropy rate but for sampling: the mean of 4,000 losses whose standard
    # deviation is below 1 strays by less than .06 but for once in 10,000 times.
    stationary = torch.linalg.matrix_power(log_p.exp(), 100)[0]
    entropy = -(stationary[:, None] * log_p.exp() * log_p).sum()
    found = perplexity(model, text, one_letter_each, context=length)
    assert abs(found.loss - entropy) < 0.06
    assert found.perplexity == pytest.approx(math.exp(found.loss))


@pytest.mark.parametrize(
    "options",
    [
        {"num_householder": 2},
        {"num_householder": 3, "use_forget_gate": True},
        {"beta_bias_init": 20.0, "use_short_conv": False},  # reflections: β = 2 to rounding, and no decay
        {"mixer": ["deltaproduct", "attention"]},
    ],
    ids=["conv", "gated", "reflections", "hybrid"],
)
def test_pieces_carry_the_state(options):
    """Small pieces give what one pass over each whole window gives."""
    model, text = language_model(**options), random_stream(9, 40, 11)
    curve = loss_by_position(model, text, length=120, sequences=10, piece=17)
    windows = [text.ids[w.start : w.stop + 1] for w in evenly_spaced(text, 120, 10)]
    with torch.no_grad():
        log_p = [model(ids[None, :-1])[0][0].log_softmax(-1) for ids in windows]
    known = -torch.stack([p.gather(1, ids[1:, None])[:, 0] for p, ids in zip(log_p, windows, strict=True)]).mean(0)
    # A reflection keeps all that rounding adds: 120 tokens of a few units of float64 each, in two layers.
    torch.testing.assert_close(curve, known, rtol=1e-10, atol=1e-10)


def test_memory_does_not_grow_with_length():
    """Beside 8 bytes a position in each of three vectors (sums, counts, curve), which the result is made of. What was
    held of one window's logits alone would be 8·32 bytes a position."""
    model, text = language_model(), random_stream(100, 50, 11)
    peaks = {}
    for length in (100, 900):
        with LiveBytes() as memory:
            loss_by_position(model, text, length=length, sequences=2, piece=20)
        peaks[length] = memory.peak
    assert peaks[100] > 2 * 20 * 11 * 8  # the logits of a piece were seen
    assert peaks[900] - peaks[100] <= 3 * 8 * 800


def test_the_model_is_left_in_its_mode():
    model = language_model().train()
    loss_by_position(model, random_stream(2, 40, 11), length=10)
    assert model.training


def test_perplexity_predicts_every_token_but_the_first_once():
    model, text = language_model(), random_stream(7, 33, 11)  # 231 tokens: 4 windows of 50, and one of 30
    found = perplexity(model, text, lambda ids: "é" * len(ids), context=50, piece=8)
    losses = []
    for start in range(0, 230, 50):
        ids = text.ids[start : start + 51]
        with torch.no_grad():
            losses.append(-model(ids[None, :-1])[0][0].log_softmax(-1).gather(1, ids[1:, None])[:, 0])
    every = torch.cat(losses)
    assert found.tokens == len(every) == 230
    assert found.predicted.tolist() == [5] * 30 + [4] * 20
    assert found.loss == pytest.approx(every.mean().item(), rel=1e-10)
    assert found.by_position[29].item() == pytest.approx(sum(x[29] for x in losses).item() / 5, rel=1e-10)
    assert found.by_position[30].item() == pytest.approx(sum(x[30] for x in losses[:4]).item() / 4, rel=1e-10)
    assert found.bytes == 2 * (231 - 7)  # of all but the document tokens
    assert found.bits_per_byte == pytest.approx(every.sum().item() / math.log(2) / found.bytes, rel=1e-10)
    assert found.byte_perplexity == pytest.approx(math.exp(every.sum().item() / found.bytes), rel=1e-10)
    buckets = perplexity_in_buckets(found.by_position, 40, found.predicted)
    assert [(b.start, b.stop) for b in buckets] == [(0, 40), (40, 50)]
    assert buckets[0].perplexity == pytest.approx(math.exp(torch.cat([x[:40] for x in losses]).mean()), rel=1e-10)


def decode_bytes(ids):
    return bytes(i for i in ids if i != 256).decode(errors="replace")


def test_bytes_are_those_of_the_text():
    """Also where windows and documents end within characters of two, three and four bytes."""
    words = ["état", "π ≈ 3", "状態を追う", "🙂🙃" * 9, "plain"]
    documents = [[256, *word.encode()] for word in words]
    text, size = Stream(documents), sum(len(word.encode()) for word in words)
    model = Counting(257, sure=0.5, until=10)
    for context in (1, 2, 3, 7, 50):
        assert perplexity(model, text, decode_bytes, context=context).bytes == size
    apart = perplexity(model, text, decode_bytes, context=7, sequences=5)
    targets = [i for w in evenly_spaced(text, 7, 5) for i in text.ids[w.start + 1 : w.stop + 1].tolist()]
    assert abs(apart.bytes - sum(i != 256 for i in targets)) <= 5 * 2 * 2


def test_windows_are_evenly_spaced_and_always_the_same():
    text = random_stream(10, 100, 11)
    windows = evenly_spaced(text, 64)
    assert windows == evenly_spaced(text, 64)
    assert len(windows) == 1 + (999 - 64) // 8
    assert (windows[0].start, windows[-1].stop) == (0, 999)
    gaps = {b.start - a.start for a, b in pairwise(windows)}
    assert min(gaps) >= 8 and max(gaps) - min(gaps) <= 1
    assert len(evenly_spaced(text, 2)) == MOST_WINDOWS
    apart = evenly_spaced(text, 64, 15)  # the most that do not overlap: 15·64 + 1 ≤ 1,000
    assert min(b.start - a.start for a, b in pairwise(apart)) >= 64
    assert evenly_spaced(text, 999) == [range(999)]
    assert [len(w) for w in consecutive(text, 400)] == [400, 400, 199]
    assert evenly_spaced_starts(10, 3) == [0, 5, 10] and evenly_spaced_starts(10, 1) == [0]
    assert evenly_spaced_starts(10, 5, reach_last=False) == [0, 2, 4, 6, 8]  # as training validates
    assert evenly_spaced_starts(1, 3, reach_last=False) == [0, 0, 0]  # more windows than there are places


@pytest.mark.parametrize("window", [1, 2, 5, 30, 31, 200])
def test_smoothing_is_a_centred_mean(window):
    curve = torch.randn(90, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    naive = []
    for t in range(90):
        near = [curve[s] for s in range(90) if -(window // 2) <= s - t < (window + 1) // 2]
        naive.append(sum(near) / len(near))
    torch.testing.assert_close(smoothed(curve, window), torch.stack(naive), **EXACT)


def test_smoothing_windows_are_the_papers_at_their_length():
    assert smoothing_window(32_768) == 501
    assert [smoothing_window(n) for n in (10, 4096, 10**6)] == [1, 257, 501]


def test_buckets_and_running_perplexity_of_a_known_curve():
    curve = torch.tensor([3.0, 1.0, 2.0, 4.0, 5.0]).log().double()
    buckets = perplexity_in_buckets(curve, 2)
    assert [(b.start, b.stop) for b in buckets] == [(0, 2), (2, 4), (4, 5)]
    assert [b.perplexity for b in buckets] == pytest.approx([3**0.5, 8**0.5, 5.0], rel=1e-6)
    assert cumulative_perplexity(curve).tolist() == pytest.approx(
        [3.0, 3**0.5, 6 ** (1 / 3), 24 ** (1 / 4), 120 ** (1 / 5)], rel=1e-6
    )


def test_a_thinned_curve_has_both_ends():
    curve = torch.arange(5000).double() / 1000
    thin = thinned_curve(curve, 3, points=100)
    assert len(thin["position"]) == 100 and (thin["position"][0], thin["position"][-1]) == (1, 5000)
    inner = thin["loss"][1:-1]  # of a straight line, a centred mean is the line itself
    assert inner == pytest.approx([(n - 1) / 1000 for n in thin["position"][1:-1]], rel=1e-9)
    assert thin["cumulative_perplexity"][-1] == pytest.approx(math.exp(4.999 / 2), rel=1e-9)
    assert thinned_curve(curve[:7], 1)["position"] == [1, 2, 3, 4, 5, 6, 7]


def test_a_model_that_has_come_apart_has_infinite_perplexity():
    found = perplexity(
        bigram_model(torch.tensor([[0.0, -2000.0]] * 2)), Stream([[0] + [1] * 9]), one_letter_each, context=3
    )
    assert found.perplexity == found.byte_perplexity == math.inf


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "at least 1"),
        ({"length": 100}, "100 tokens; a window of 100"),
        ({"length": 10, "sequences": 0}, "from 1 to 90"),
        ({"length": 10, "sequences": 91}, "from 1 to 90"),
        ({"length": 10, "piece": 0}, "piece must be"),
    ],
)
def test_what_cannot_be_evaluated(options, message):
    with pytest.raises(UsageError, match=message):
        loss_by_position(language_model(), random_stream(1, 100, 11), **options)


def test_perplexity_refuses_windows_that_overlap_and_no_windows():
    model, text = language_model(), random_stream(1, 100, 11)
    assert perplexity(model, text, str, context=33, sequences=3).tokens == 99
    for options, message in (
        ({"context": 33, "sequences": 4}, "at most 3"),
        ({"context": 33, "sequences": 0}, "from 1 to"),
        ({"context": 0}, "at least 1"),
        ({"context": 100}, "do not fit"),
    ):
        with pytest.raises(UsageError, match=message):
            perplexity(model, text, str, **options)
    for window in (smoothed, perplexity_in_buckets):
        with pytest.raises(UsageError, match="at least 1"):
            window(torch.ones(3), 0)


def test_another_vocabulary_is_refused():
    check_vocabulary(language_model().config, 11)
    with pytest.raises(UsageError, match="vocab_size=11, but the data have a vocabulary of 257"):
        check_vocabulary(language_model().config, 257)
    with pytest.raises(UsageError, match="num_labels=6"):
        check_vocabulary(ModelConfig.build(vocab_size=7, num_labels=6), 7)
