"""`deltaproduct lm evaluate` and its figures, on tiny models and a corpus that lies in memory."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from streams import random_stream

from deltaproduct.errors import UsageError
from deltaproduct.files import replaced_folder, write_json
from deltaproduct.models import ModelConfig, SequenceModel
from deltaproduct.training.config import LanguageConfig, Run

pytest.importorskip("deltaproduct.corpus")
command = pytest.importorskip("deltaproduct.cli.lm_evaluate")
LmEvaluate = command.LmEvaluate
VOCAB, CONTEXT = 11, 16


@pytest.fixture
def corpus(monkeypatch):
    """What `Corpus.open` gives: 400 tokens of validation and no training."""

    def split(name):
        if name == "validation":
            return random_stream(8, 50, VOCAB)
        return SimpleNamespace(num_tokens=0)

    tokenizer = SimpleNamespace(decode=lambda ids: "x" * len(ids), vocab_size=VOCAB)
    opened = SimpleNamespace(tokenizer=tokenizer, vocab_size=VOCAB, fingerprint="f1", split=split)
    monkeypatch.setattr("deltaproduct.corpus.Corpus.open", lambda folder: opened)
    return opened


@pytest.fixture
def run(tmp_path):
    """A run's folder, of a hybrid."""
    return write_run(tmp_path / "run", mixer=["deltaproduct", "attention"])


def write_run(folder, context=CONTEXT, **options):
    torch.manual_seed(0)
    config = ModelConfig.build(
        vocab_size=VOCAB, num_labels=VOCAB, hidden_size=16, num_heads=2, head_dim=4, num_hidden_layers=2,
        intermediate_size=16, **options,
    )  # fmt: skip
    folder.mkdir()
    trained = Run(LanguageConfig(context=context), config).to_dict()
    with replaced_folder(folder / "checkpoint") as fresh:
        SequenceModel(config).write_files(fresh)
        write_json(fresh / "training.json", {"progress": {}, "config": trained})
    write_json(folder / "config.json", trained)
    return folder


def evaluate(capsys, run, what, **flags):
    LmEvaluate(source=run, what=what, data=run, json=True, **flags).run()
    return json.loads(capsys.readouterr().out)


def test_perplexity(corpus, run, tmp_path, capsys):
    report = evaluate(capsys, run, "perplexity", out=tmp_path / "out")
    assert (report["tokens"], report["bytes"]) == (399, 399 - 7)
    assert report["length"] == CONTEXT and report["fingerprint"] == "f1"
    # An untrained model knows next to nothing: its loss is about that of guessing.
    assert report["perplexity"] == pytest.approx(VOCAB, rel=0.05)
    assert [b["stop"] for b in report["buckets"]] == list(range(2, 17, 2))
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == report
    with np.load(tmp_path / "out" / "arrays.npz") as arrays:
        assert arrays["predicted"].sum() == 399
    part = evaluate(capsys, run, "perplexity", sequences=3, length=5)
    assert part["tokens"] == 15


def test_length_extrapolation(corpus, run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    report = evaluate(capsys, run, "length-extrapolation", out=tmp_path / "out")
    assert (report["training_context"], report["length"]) == (16, 128)
    assert report["sequences"] == 1 + (399 - 128) // 16
    assert report["smooth"] == 9 and report["curve"]["position"] == list(range(1, 129))
    with np.load(tmp_path / "out" / "arrays.npz") as arrays:
        assert arrays["loss"].shape == (128,)
        assert report["curve"]["loss"][5] == pytest.approx(arrays["loss"][1:10].mean())
    assert (tmp_path / "out" / "loss_by_position.png").stat().st_size > 5000
    assert evaluate(capsys, run, "length-extrapolation", length=50, smooth=7, sequences=2)["smooth"] == 7


def test_effective_rank(corpus, run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    report = evaluate(capsys, run, "effective-rank", length=120, out=tmp_path / "out")
    assert report["document_starts"] == [0, 50, 100]
    with np.load(tmp_path / "out" / "arrays.npz") as arrays:
        assert list(arrays) == ["layer_0"] and arrays["layer_0"].shape == (120, 2, 2)
        beyond = arrays["layer_0"][16:].mean((0, 1))
    assert report["mean_beyond"]["0"] == pytest.approx(beyond.tolist(), rel=1e-5)
    assert (tmp_path / "out" / "effective_rank.png").stat().st_size > 5000


def test_tables_for_readers(corpus, run, capsys):
    pytest.importorskip("matplotlib")
    for what in ("perplexity", "length-extrapolation", "effective-rank"):
        LmEvaluate(source=run, what=what, data=run, length=32).run()
        assert "of validation" in capsys.readouterr().out


def test_the_harness_gets_the_runs_model_and_tokenizer(run, monkeypatch, capsys):
    calls = []

    def evaluate_harness(model, tokenizer, tasks, *, limit):
        calls.append((model.config.vocab_size, tokenizer.vocab_size, tasks, limit))
        return {"tasks": {"swaps": {"acc": 0.25}}}

    monkeypatch.setitem(
        sys.modules, "deltaproduct.evaluation.harness", SimpleNamespace(evaluate_harness=evaluate_harness)
    )
    monkeypatch.setattr("deltaproduct.corpus.load_tokenizer", lambda folder: SimpleNamespace(vocab_size=VOCAB))
    LmEvaluate(source=run, what="harness").run()
    assert "0.2500" in capsys.readouterr().out
    LmEvaluate(source=run, what="harness", tasks=("piqa",), limit=3, json=True).run()
    assert json.loads(capsys.readouterr().out)["tasks"] == {"swaps": {"acc": 0.25}}
    assert calls == [(VOCAB, VOCAB, ("offline",), None), (VOCAB, VOCAB, ("piqa",), 3)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"what": "perplexity", "data": None}, "needs --data"),
        ({"what": "perplexity", "smooth": 3}, "no use for --smooth"),
        ({"what": "effective-rank", "sequences": 3}, "no use for --sequences"),
        ({"what": "perplexity", "tasks": ("piqa",)}, "it is for harness"),
        ({"what": "length-extrapolation", "smooth": 0}, "smooth must be at least 1"),
        ({"what": "perplexity", "length": 0}, "length must be at least 1"),
        ({"what": "perplexity", "split": "train"}, "no tokens in its split 'train'"),
        ({"what": "length-extrapolation", "length": 400}, "400 tokens; a window of 400"),
        ({"what": "effective-rank"}, "400 tokens; a window of 16,384"),
    ],
)
def test_what_is_refused(corpus, run, flags, message):
    with pytest.raises(UsageError, match=message):
        LmEvaluate(**{"source": run, "data": run, **flags}).run()


def test_what_is_refused_of_runs_and_folders(corpus, run, tmp_path):
    options = {"what": "perplexity", "data": run}
    SequenceModel.from_pretrained(run / "checkpoint").save_pretrained(tmp_path / "bare")
    for source, message in ((tmp_path / "none", "does not exist"), (tmp_path / "bare", "at what context")):
        with pytest.raises(UsageError, match=message):
            LmEvaluate(source=source, **options).run()
    with pytest.raises(UsageError, match="already exists"):
        LmEvaluate(source=run, out=run, **options).run()
    with pytest.raises(UsageError, match="length must be at least 1, not 0"):
        LmEvaluate(source=run, length=0, **options).run()
    transformer = write_run(tmp_path / "transformer", mixer="attention")
    with pytest.raises(UsageError, match="No layer of this model has states to trace"):
        LmEvaluate(source=transformer, what="effective-rank", data=run, length=20).run()
    corpus.vocab_size = 257
    with pytest.raises(UsageError, match="vocabulary of 257"):
        LmEvaluate(source=run, **options).run()


def test_figures_of_several_runs_and_of_many_layers(tmp_path):
    """They are drawn also where seeds differ in number, a run has come apart, and no context is known."""
    pytest.importorskip("matplotlib")
    from deltaproduct.plots.language import effective_rank_figure, loss_by_position_figure

    at = list(range(1, 101))
    curves = {
        "DeltaProduct_2[-1,1]": [{"position": at, "loss": [3 / n + seed for n in at]} for seed in (0, 1, 2)],
        "Transformer": [{"position": at, "loss": [float("nan")] * 100}],
    }
    loss_by_position_figure(curves, tmp_path / "many.png", trained_at=25)
    loss_by_position_figure({"one": curves["Transformer"]}, tmp_path / "one.png")
    ranks = {layer: np.random.default_rng(layer).uniform(1, 8, (50, 2, 7)) for layer in (0, 2, 5)}
    effective_rank_figure(ranks, tmp_path / "ranks.png", document_starts=[0, 30], trained_at=20)
    effective_rank_figure({3: ranks[0]}, tmp_path / "rank.pdf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["many.png", "one.png", "rank.pdf", "ranks.png"]
