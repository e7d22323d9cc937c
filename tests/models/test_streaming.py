"""Conversations (models/streaming.py): in pieces and token by token is one pass; saved ones go on exactly.

Tolerances. In float32: 1e-4 of the largest logit, against one pass of the reference in float64 (issue 6). The bound of
test_decoding.py, 8·u·L·(√n + T·N), is 1.7e-4 for the largest model here and is not reached by far: what is kept
is the stricter. In float64: 1e-10, rounding of 1e-16 times T·N steps, times what norms enlarge (test_mixers.py).
"""

import copy
import json
import math
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

from deltaproduct.errors import UsageError
from deltaproduct.layers import MIXERS
from deltaproduct.models import ModelConfig, SequenceModel, streaming
from deltaproduct.models.decoding import ModelDecoder
from deltaproduct.models.sampling import Sampling, draw, probabilities
from deltaproduct.models.states import named_tensors
from deltaproduct.models.streaming import Stream
from deltaproduct.ops import cpu

V = 13
GREEDY, GREEDY_SEED_1 = Sampling(temperature=0), Sampling(temperature=0, seed=1)
HYBRID = {"mixer": ["deltaproduct", "attention"]}


@pytest.fixture(params=["native", "model"])
def way(request, monkeypatch):
    """Both ways of decoding: the native engine, and the model itself."""
    if request.param == "model":
        monkeypatch.setattr(streaming, "decoder_for", ModelDecoder)
    elif reason := cpu.unsupported_reason(torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def short_pieces(monkeypatch):
    monkeypatch.setattr(streaming, "PIECE", 7)


def build(**changes) -> SequenceModel:
    """A model where state tracking is hard: β near 2, no decay unless asked for, keys that are much alike."""
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 8, "beta_bias_init": 5.0}
    torch.manual_seed(0)
    model = SequenceModel(ModelConfig.build(vocab_size=V, num_labels=V, defaults=settings, **changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
        model.embedding.weight[:] = model.embedding.weight[:1] + 0.3 * model.embedding.weight
        model.head.weight.mul_(8)  # so that sampling prefers something
    return model


def prompt(length: int) -> list[int]:
    return torch.randint(V, (length,), generator=torch.Generator().manual_seed(1)).tolist()


@torch.no_grad()
def one_pass(model: SequenceModel, tokens: list[int]) -> torch.Tensor:
    return copy.deepcopy(model).double().use_backend("reference")(torch.tensor([tokens]))[0][0]


def read_and_write(stream: Stream, read: list[int], write: int) -> tuple[list[int], torch.Tensor]:
    """The tokens, and the logits before the first, after the first, … and after the last written one."""
    stream.prefill(read)
    logits, written = [stream.logits], []
    for token in stream.generate(write):
        written.append(token)
        logits.append(stream.logits)
    assert len(written) == write and stream.position == len(read) + write
    return written, torch.stack(logits)


def check_one_pass(model: SequenceModel, tolerance: float) -> None:
    read = prompt(38)
    written, logits = read_and_write(Stream(model, GREEDY), read, 40)
    want = one_pass(model, read + written)[len(read) - 1 :]
    assert (logits - want).abs().max() <= tolerance * want.abs().max()
    assert written == want.argmax(-1)[:-1].tolist()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("num_householder", [1, 2, 3, 4])
def test_prefill_and_decoding_is_one_pass(num_householder, gated, way, short_pieces):
    model = build(num_householder=num_householder, use_forget_gate=gated, use_output_gate=gated)
    assert model.config.mixer.use_short_conv and Stream(model).is_native == (way == "native")
    assert not Stream(model.use_backend("reference")).is_native  # what was asked for
    check_one_pass(model.use_backend("auto"), 1e-4)


@pytest.mark.parametrize("changes", [{"mixer": name} for name in MIXERS] + [HYBRID], ids=[*MIXERS, "hybrid"])
def test_every_mixer_in_pieces_is_one_pass(changes, short_pieces):
    model = build(**changes).double()
    assert not Stream(model).is_native
    check_one_pass(model, 1e-10)


def test_both_ways_write_the_same(monkeypatch):
    if reason := cpu.unsupported_reason(torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    model, texts = build(), []
    for decoder in (streaming.decoder_for, ModelDecoder):
        monkeypatch.setattr(streaming, "decoder_for", decoder)
        texts.append(read_and_write(Stream(model, GREEDY), prompt(20), 200)[0])
    assert texts[0] == texts[1] and len(set(texts[0])) > 1


def test_a_prompt_may_be_anything_that_yields_tokens(short_pieces):
    """Cut differently, with single tokens between: to rounding the same state, and the same draws."""
    model, tokens, texts = build(), prompt(50), []
    for parts in ([tokens], [torch.tensor(tokens)], [iter(tokens)], [tokens[:1], tokens[1:22], [], tokens[22:]]):
        stream = Stream(model, Sampling(seed=3))
        for part in parts:
            stream.prefill(part)
        assert stream.position == 50
        texts.append(list(stream.generate(30)))
    assert all(text == texts[0] for text in texts)


def test_whoever_leaves_the_loop_goes_on_from_there(way):
    model = build()
    whole, stream = Stream(model, Sampling(seed=5)), Stream(model, Sampling(seed=5))
    for s in (whole, stream):
        s.prefill(prompt(10))
    want = list(whole.generate(20))
    got = list(islice(stream.generate(20), 3))
    assert stream.position == 13
    got += list(stream.generate(17))
    assert got == want and torch.equal(stream.logits, whole.logits)


def test_a_stop_token_is_neither_written_nor_read():
    model = build()
    stream, again = Stream(model, GREEDY), Stream(model, GREEDY)
    stream.prefill(prompt(10))
    text = list(stream.generate(50))
    stop = next(token for token in text if token != text[0])
    again.prefill(prompt(10))
    before = text[: text.index(stop)]
    assert list(again.generate(50, stop=[stop])) == before and again.position == 10 + len(before)
    assert list(again.generate(50, stop=[stop])) == []  # it is still what comes next
    assert list(again.generate(len(text) - len(before))) == text[len(before) :]


@pytest.mark.parametrize("changes", [{"mixer": name} for name in MIXERS] + [HYBRID], ids=[*MIXERS, "hybrid"])
def test_a_saved_conversation_goes_on_exactly(changes, tmp_path):
    model, sampling = build(**changes), Sampling(temperature=0.9, top_k=9, top_p=0.95, seed=11)
    stream = Stream(model, sampling)
    stream.prefill(prompt(20))
    list(stream.generate(10))
    stream.save(tmp_path / "saved")
    want, end = list(stream.generate(25)), stream.logits
    loaded = Stream.load(tmp_path / "saved", model)
    assert loaded.position == 30 and loaded.sampling == sampling
    assert list(loaded.generate(25)) == want and torch.equal(loaded.logits, end)
    for name, x in named_tensors(loaded.state).items():
        assert torch.equal(x, named_tensors(stream.state)[name]), name
    loaded.save(tmp_path / "saved")  # in place of the first
    assert Stream.load(tmp_path / "saved", model).position == 55


def test_a_save_is_as_large_as_the_state(tmp_path):
    """Whatever has been read: 4 bytes a number, and 8 kB for the generator (5,056 bytes) and the file's header."""
    model = build()
    sizes = []
    for length in (3, 3000):
        stream = Stream(model)
        stream.prefill(prompt(length))
        stream.save(tmp_path / "saved")
        sizes.append((tmp_path / "saved" / streaming.TENSORS).stat().st_size)
    assert sizes[0] == sizes[1] and 0 <= sizes[0] - 4 * model.state_size <= 8192


def test_resample_keeps_the_random_numbers_unless_the_seed_changes():
    model = build()

    def text(*changes: Sampling) -> list[int]:
        stream = Stream(model, Sampling(seed=1))
        stream.prefill(prompt(5))
        list(stream.generate(4))
        for change in changes:
            stream.resample(change)
        return list(stream.generate(20))

    assert text() == text(Sampling(seed=1)) == text(GREEDY_SEED_1, Sampling(seed=1))
    assert text() != text(Sampling(seed=2))
    assert text(GREEDY_SEED_1) != text()


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def state_bytes(stream: Stream) -> int:
    return sum(x.numel() * x.element_size() for x in named_tensors(stream.state).values())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it reads /proc")
@pytest.mark.parametrize(
    "decoder",
    [
        streaming.decoder_for,
        pytest.param(ModelDecoder, marks=[pytest.mark.slow("exhaustive"), pytest.mark.timeout(900)]),
    ],
)
def test_ten_thousand_tokens_take_no_memory(decoder, monkeypatch):
    """State (here 4 kB), logits and program are as large at the end as at the beginning. Keeping one state of every
    token would take 40 MB; the slack is 8 MB, for what allocators and interpreter keep to themselves."""
    monkeypatch.setattr(streaming, "decoder_for", decoder)
    model = build(head_dim=16, num_hidden_layers=1)
    stream = Stream(model, Sampling(seed=0))
    stream.prefill(prompt(2000))
    for _ in stream.generate(500):  # until everything has been allocated once
        pass
    size, before, written = state_bytes(stream), resident(), 0
    for _ in stream.generate(10_000):
        written += 1
    assert written == 10_000 and stream.position == 12_500
    assert state_bytes(stream) == size == 4 * model.state_size > 3_900
    assert resident() - before < 8 << 20


LOGITS = torch.tensor([1.0, -0.5, 2.0, 0.0, 2.0, -3.0])


def drawn_shares(sampling: Sampling, draws: int) -> torch.Tensor:
    generator = sampling.generator()
    counts = torch.bincount(
        torch.tensor([draw(LOGITS, sampling, generator) for _ in range(draws)]), minlength=len(LOGITS)
    )
    return counts / draws


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5, seed=1),
        Sampling(temperature=3.0, seed=2),
        Sampling(top_k=3, seed=3),
        Sampling(top_p=0.9, seed=4),
        Sampling(temperature=2.0, top_k=5, top_p=0.7, seed=5),
    ],
    ids=str,
)
def test_draws_have_the_probabilities(sampling, draws=2000):
    """Pearson's X² over the m tokens that may be drawn has mean m − 1 and variance at most 2 (m − 1) + Σ 1/(n p);
    the bound lies 6 standard deviations above the mean. What has probability 0 is never drawn."""
    p = probabilities(LOGITS, sampling)
    shares = drawn_shares(sampling, draws)
    assert (shares[p == 0] == 0).all()
    p, shares = p[p > 0], shares[p > 0]
    free = len(p) - 1
    deviation = math.sqrt(2 * free + float((1 / (draws * p)).sum()))
    assert draws * float(((shares - p) ** 2 / p).sum()) <= free + 6 * deviation


def test_what_is_drawn_from():
    plain = LOGITS.double().softmax(-1)
    torch.testing.assert_close(probabilities(LOGITS, Sampling()), plain)
    torch.testing.assert_close(probabilities(LOGITS, Sampling(temperature=2)), (LOGITS.double() / 2).softmax(-1))
    assert probabilities(LOGITS, GREEDY).tolist() == [0, 0, 1, 0, 0, 0]  # of equals the first
    assert probabilities(LOGITS, Sampling(top_k=1)).tolist() == [0, 0, 1, 0, 0, 0]
    assert probabilities(LOGITS, Sampling(top_p=1e-9)).tolist() == [0, 0, 1, 0, 0, 0]
    assert probabilities(LOGITS, Sampling(temperature=1e-300)).tolist() == [0, 0, 0.5, 0, 0.5, 0]
    for everything in (Sampling(top_k=6), Sampling(top_k=100), Sampling(top_p=1.0)):
        torch.testing.assert_close(probabilities(LOGITS, everything), plain)
    three = torch.tensor([1, 0, 1, 0, 1, 0]) * plain
    torch.testing.assert_close(probabilities(LOGITS, Sampling(top_k=3)), three / three.sum())
    # 0.39, 0.39, 0.14, 0.05, …: two tokens reach 0.78, so that 0.79 takes the third. After top_k, shares are of what is
    # left: the three reach 0.79 · 0.93, and two of them 0.78 / 0.93 = 0.84.
    assert (probabilities(LOGITS, Sampling(top_p=0.77)) > 0).tolist() == [False, False, True, False, True, False]
    assert (probabilities(LOGITS, Sampling(top_p=0.80)) > 0).tolist() == [True, False, True, False, True, False]
    both = probabilities(LOGITS, Sampling(top_k=3, top_p=0.83))
    assert (both > 0).tolist() == [False, False, True, False, True, False]
    batch = torch.stack((LOGITS, LOGITS.flip(0)))
    rows = probabilities(batch, Sampling(top_k=3, top_p=0.9))
    torch.testing.assert_close(rows[0], probabilities(batch[0], Sampling(top_k=3, top_p=0.9)))
    torch.testing.assert_close(rows.sum(-1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("top_k", -1), ("top_p", 0.0),
     ("top_p", 1.5), ("top_p", math.nan), ("seed", -1), ("seed", 2**32)],
)  # fmt: skip
def test_refused_sampling(field, value):
    with pytest.raises(UsageError, match=field):
        Sampling(**{field: value})


def test_logits_that_are_not_finite():
    for bad in (math.nan, math.inf):
        with pytest.raises(UsageError, match="not all finite"):
            draw(torch.tensor([0.0, bad]), GREEDY, GREEDY.generator())


def test_refused_reading_and_writing(tmp_path):
    with pytest.raises(UsageError, match="vocab_size equal to num_labels"):
        Stream(SequenceModel(ModelConfig.build(vocab_size=4, num_labels=3)))
    stream = Stream(build())
    with pytest.raises(UsageError, match="document token"):
        stream.generate(3)
    with pytest.raises(UsageError, match="no conversation to save"):
        stream.save(tmp_path / "nothing")
    assert stream.state is None and not (tmp_path / "nothing").exists()
    for wrong, word in (
        ([1, V], f"Token {V} "),
        ([-1], "Token -1 "),
        ([0.5], "ints"),
        (torch.zeros(1, 2).int(), "ints"),
    ):
        with pytest.raises(UsageError, match=word):
            stream.prefill(wrong)
    assert stream.position == 0
    stream.prefill([1])
    with pytest.raises(UsageError, match="0 or more"):
        stream.generate(-1)
    assert list(stream.generate(0)) == []


def test_refused_saves(tmp_path):
    model = build()
    stream = Stream(model)
    stream.prefill([1, 2])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("x")
    for taken in ("mine", "file"):
        with pytest.raises(UsageError, match="other than"):
            stream.save(tmp_path / taken)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"

    saved = tmp_path / "saved"
    saved.mkdir()  # an empty folder may be filled
    stream.save(saved)
    with pytest.raises(UsageError, match="num_householder is 2, this model's 3"):
        Stream.load(saved, build(num_householder=3))
    other = build()
    with torch.no_grad():
        other.blocks[1].mixer.o_proj.weight[3, 5] += 1e-6
    with pytest.raises(UsageError, match="other weights"):
        Stream.load(saved, other)
    with pytest.raises(UsageError, match="other weights"):
        Stream.load(saved, build().double())
    with pytest.raises(UsageError, match="not a folder"):
        Stream.load(tmp_path / "none", model)
    model.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(UsageError, match=r"has no stream\.json"):
        Stream.load(tmp_path / "checkpoint", model)
    values = json.loads((saved / streaming.STREAM).read_text())
    (saved / streaming.STREAM).write_text(json.dumps(values | {"position": 7}))
    with pytest.raises(UsageError, match="corrupt"):
        Stream.load(saved, model)


def test_a_stream_reads_and_writes_under_its_old_names():
    model = build()
    old, new = Stream(model), Stream(model)
    with pytest.warns(DeprecationWarning, match=r"Stream.read is now Stream.prefill; the old name goes") as caught:
        old.read(prompt(10))
    new.prefill(prompt(10))
    with pytest.warns(DeprecationWarning, match=r"Stream.write is now Stream.generate"):
        written = old.write(5)
    assert list(written) == list(new.generate(5)) and caught[0].filename == __file__
