"""Training of language models: on one process, on several, and what goes wrong."""

import math
import random
import re
import resource
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from corpora import corpus_of_words
from ranks import on_ranks, start_ranks
from run_folder import metrics, steps_done
from torch.nn import functional as F

from deltaproduct.corpus import Corpus, PackedDocuments, load_tokenizer
from deltaproduct.errors import UsageError
from deltaproduct.files import read_json
from deltaproduct.models import ModelConfig, SequenceModel
from deltaproduct.ops.context_parallel import ContextParallel
from deltaproduct.training import LanguageConfig, Run, loop, train
from deltaproduct.training.distributed import Ranks
from deltaproduct.training.loop import OneProcess
from deltaproduct.training.objectives.language import LanguageLoss, LanguageObjective, LossTrend

STEPS = 20
MODEL = ModelConfig.build(257, 257, hidden_size=32, num_hidden_layers=2, num_heads=2, head_dim=8, num_householder=2,
                    intermediate_size=48, tie_word_embeddings=True)  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return Corpus.open(corpus_of_words(tmp_path_factory.mktemp("corpus")))


def settings(corpus: Corpus, changed: dict | None = None) -> Run[LanguageConfig]:
    values = {"steps": STEPS, "corpus": corpus.fingerprint, "context": 32, "batch_size": 4, "warmup_steps": 4}
    return Run(LanguageConfig(**(values | (changed or {}))), MODEL)


def run(folder: Path, out: Path, changed: dict | None = None, context_parallel: int = 1, **options) -> list[float]:
    """The losses of all steps of a run, on however many ranks this is called on."""
    corpus = Corpus.open(folder)
    with Ranks.started("cpu", context_parallel=context_parallel) as ranks:
        config = settings(corpus, changed)
        objective = LanguageObjective(config.training, corpus)
        train(config, out, objective, ranks, log_every=1, show=False, **options)
    return [line["loss"] for line in metrics(out)]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return SequenceModel.from_pretrained(out / "checkpoint").state_dict()


def test_a_run_learns_and_its_folder_has_all_that_generating_needs(corpus, tmp_path):
    losses = run(corpus.folder, tmp_path / "run", {"steps": 60, "lr": 1e-2})
    assert losses[0] == pytest.approx(math.log(257), abs=0.3)  # nothing is known at first
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]
    last = metrics(tmp_path / "run")[-1]
    assert last["validation_loss"] == pytest.approx(last["loss"], abs=0.3)
    assert last["tokens"] == 60 * 4 * 32
    assert last["tokens_per_second"] > 0 and 0 < last["mfu"] < 1 and last["memory_gib"] > 0.05
    model = SequenceModel.from_pretrained(tmp_path / "run" / "checkpoint")
    tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer")
    assert model.config == MODEL and tokenizer.vocab_size == 257
    assert read_json(tmp_path / "run" / "run.json")["parameters"] == model.num_parameters
    row = corpus.split("validation").tokens(0, 33)[None]
    assert float(LanguageLoss(model)(row[:, :-1], row[:, 1:]).detach()) / 32 < 0.7 * losses[0]


@pytest.mark.slow("exhaustive")
def test_several_ways_to_the_same_losses_on_one_process(corpus, tmp_path):
    whole = run(corpus.folder, tmp_path / "whole")
    options = {"micro": ({"grad_accumulation": 2}, {}), "again": ({}, {"gradient_checkpointing": True}),
               "other": ({}, {"backend": "chunkwise"})}  # fmt: skip
    for name, (changed, option) in options.items():
        assert run(corpus.folder, tmp_path / name, changed, **option) == pytest.approx(whole, abs=1e-5), name
    assert run(corpus.folder, tmp_path / "seed", {"seed": 1}) != pytest.approx(whole, abs=1e-2)
    coarse = run(corpus.folder, tmp_path / "coarse", {"precision": "bfloat16"})
    assert coarse != whole and coarse == pytest.approx(whole, abs=0.1)


def several(folder: Path, out: Path, way: str) -> list[float] | None:
    context_parallel, options = {
        "ddp": (1, {}),
        "fsdp": (1, {"parallel": "fsdp", "gradient_checkpointing": True}),
        "context_parallel": (2, {}),
    }[way]
    found = run(folder, out, {"grad_accumulation": 2}, context_parallel=context_parallel, **options)
    return found if torch.distributed.get_rank() == 0 else None


@pytest.mark.slow("ranks")
@pytest.mark.ci("fsdp")
@pytest.mark.parametrize("way", ["ddp", "fsdp", "context_parallel"])
def test_two_processes_have_the_losses_of_one(corpus, tmp_path, way):
    one = run(corpus.folder, tmp_path / "one")
    two, _ = on_ranks(2, several, corpus.folder, tmp_path / "two", way)
    assert len(one) == STEPS and two == pytest.approx(one, abs=1e-5)
    for name, x in weights(tmp_path / "one").items():  # Adam divides by small numbers, so that roundings grow
        torch.testing.assert_close(weights(tmp_path / "two")[name], x, atol=1e-3, rtol=1e-3)
    assert metrics(tmp_path / "two")[-1]["validation_loss"] == pytest.approx(
        metrics(tmp_path / "one")[-1]["validation_loss"], abs=1e-4
    )


class CutOff(Exception):
    pass


def cut_off(folder: Path, out: Path, parallel: str, at: int) -> None:
    """Train until the checkpoint of a step, and no further."""

    def saving(*arguments, save=loop.save_checkpoint):
        save(*arguments)
        if arguments[3].step == at:
            raise CutOff

    with pytest.MonkeyPatch.context() as patch, pytest.raises(CutOff):
        patch.setattr(loop, "save_checkpoint", saving)
        run(folder, out, parallel=parallel, checkpoint_every=at)


def go_on(folder: Path, out: Path, parallel: str) -> None:
    run(folder, out, parallel=parallel, resume=True)


@pytest.mark.slow("ranks")
@pytest.mark.parametrize(("before", "after"), [("fsdp", "one"), ("one", "fsdp"), ("ddp", "fsdp")])
def test_a_run_goes_on_with_another_number_of_processes(corpus, tmp_path, before, after):
    whole = run(corpus.folder, tmp_path / "whole")
    for way, work, rest in ((before, cut_off, (8,)), (after, go_on, ())):
        arguments = (corpus.folder, tmp_path / "parts", "ddp" if way == "one" else way, *rest)
        work(*arguments) if way == "one" else on_ranks(2, work, *arguments)
    assert [line["step"] for line in metrics(tmp_path / "parts")] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in metrics(tmp_path / "parts")] == pytest.approx(whole, abs=1e-5)


def stubborn(folder: Path, out: Path, steps: int) -> None:
    run(folder, out, {"steps": steps}, checkpoint_every=3, resume=True)


@pytest.mark.slow("kills")
@pytest.mark.timeout(300)  # seven starts of two processes: 20 s where nothing else runs
def test_killing_a_rank_five_times_changes_no_weight(corpus, tmp_path):
    steps, draw = 60, random.Random(0)
    on_ranks(2, stubborn, corpus.folder, tmp_path / "whole", steps)
    out = tmp_path / "killed"
    for moment in sorted(draw.sample(range(2, steps // 2), 5)):
        ranks, _ = start_ranks(2, stubborn, corpus.folder, out, steps)
        until = time.monotonic() + 60
        while time.monotonic() < until and steps_done(out) < moment:
            time.sleep(0.002)
        draw.choice(ranks).kill()
        time.sleep(0.05 * draw.random())  # the other goes on for a moment, perhaps into a checkpoint
        for rank in ranks:
            rank.kill()
            rank.join()
        assert moment <= steps_done(out) < steps
    on_ranks(2, stubborn, corpus.folder, out, steps)
    whole, killed = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(x, killed[name]) for name, x in whole.items())
    assert [line["loss"] for line in metrics(out)] == [line["loss"] for line in metrics(tmp_path / "whole")]


def refusal(corpus: Corpus, out: Path, changed: dict | None = None, ranks: OneProcess | None = None, **options) -> str:
    with pytest.raises(UsageError) as error:
        config = settings(corpus, changed)
        train(config, out, LanguageObjective(config.training, corpus), ranks, device="cpu", show=False, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


class FourRanks(ContextParallel):
    def __init__(self):
        self.rank, self.size = 0, 4


@pytest.mark.parametrize(
    ("changed", "ranks", "words"),
    [
        ({"corpus": "another"}, {}, "another corpus"),
        ({"context": 0}, {}, "context must be at least 1"),
        ({"context": 10_000}, {}, "too few for a context of 10000"),
        ({}, {"size": 8}, "4 sequences .* cannot be dealt out evenly to 8 ranks"),
        ({"grad_accumulation": 2}, {"size": 4}, "2 sequences"),
        ({"grad_accumulation": 3}, {}, "does not divide batch_size=4"),
        (
            {"context": 30},
            {"size": 4, "context_parallel": FourRanks()},
            "context of 30 cannot be divided evenly over 4",
        ),
        ({"packed": True}, {"size": 4, "context_parallel": FourRanks()}, "Packed documents cannot be divided"),
        ({"max_rise": -1.0}, {}, "max_rise must be 0 or more"),
    ],
)
def test_what_does_not_fit_together_is_said_before_anything_is_written(corpus, tmp_path, changed, ranks, words):
    where = Ranks(0, **({"size": 1, "device": torch.device("cpu")} | ranks))
    message = refusal(corpus, tmp_path / "run", changed, where)
    assert re.search(words, message), message
    assert not (tmp_path / "run").exists()


def test_a_model_of_another_vocabulary(corpus, tmp_path):
    config = replace(settings(corpus), model=replace(MODEL, vocab_size=300, num_labels=300))
    with pytest.raises(UsageError, match="257 tokens, but the model has vocab_size=300"):
        train(config, tmp_path / "run", LanguageObjective(config.training, corpus), device="cpu")


def test_a_changed_configuration_is_named_on_resuming(corpus, tmp_path):
    run(corpus.folder, tmp_path / "run", {"steps": 2})
    assert "already holds a run" in refusal(corpus, tmp_path / "run", {"steps": 2})
    message = refusal(corpus, tmp_path / "run", {"steps": 2, "lr": 0.5, "context": 16}, resume=True)
    assert "lr: 0.5 and 0.002" in message and "context: 16 and 32" in message and "seed" not in message
    before = weights(tmp_path / "run")
    run(corpus.folder, tmp_path / "run", {"steps": 2}, resume=True)  # there is nothing left to do
    assert all(torch.equal(x, before[name]) for name, x in weights(tmp_path / "run").items())


def test_a_loss_that_is_no_number_ends_the_run_with_the_last_good_checkpoint(corpus, tmp_path, monkeypatch):
    step = loop.train_step

    def failing(objective, module, optimizer, progress, ranks):
        sums, norm = step(objective, module, optimizer, progress, ranks)
        return ([float("nan")], norm) if progress.step == 5 else (sums, norm)

    monkeypatch.setattr(loop, "train_step", failing)
    message = refusal(corpus, tmp_path / "run", checkpoint_every=4)
    assert "Step 6 has a loss of nan" in message and "last good checkpoint, of step 4, is in" in message
    assert read_json(tmp_path / "run" / "checkpoint" / "training.json")["progress"]["step"] == 4
    monkeypatch.undo()
    resumed = run(corpus.folder, tmp_path / "run", resume=True)
    assert resumed == run(corpus.folder, tmp_path / "whole")[-len(resumed) :]


def test_a_loss_that_rises_ends_the_run_before_it_spoils_the_checkpoint(corpus, tmp_path):
    changed = {"lr": 3.0, "clip": 0.0, "warmup_steps": 15, "steps": 200, "max_rise": 1.0}
    message = refusal(corpus, tmp_path / "run", changed, checkpoint_every=1)
    assert "mean loss has risen from" in message
    kept = read_json(tmp_path / "run" / "checkpoint" / "training.json")["progress"]
    assert kept["loss_mean"] - kept["lowest_mean"] <= 0.5
    SequenceModel.from_pretrained(tmp_path / "run" / "checkpoint")


def test_the_running_mean():
    trend = LossTrend()
    assert trend.advance(4.0) == (4, 4) and trend == LossTrend(4, 4)
    mean, lowest = trend.advance(2.0)
    assert mean == lowest == trend.loss_mean == pytest.approx(3.9)
    assert trend.advance(5.9) == pytest.approx((4.0, 3.9)) and trend.lowest_mean == pytest.approx(3.9)


def test_a_disk_that_is_full_leaves_the_last_checkpoint(corpus, tmp_path):
    cut_off(corpus.folder, tmp_path / "run", "ddp", 8)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run" / "checkpoint").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name in ("model.safetensors", "optimizer-0-of-1.safetensors"):  # neither does fit; the larger does not
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[name]) // 2, hard))  # to a writer, a disk that is full
        try:
            assert "cannot be written" in refusal(corpus, tmp_path / "run", resume=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert {p.name: p.read_bytes() for p in (tmp_path / "run" / "checkpoint").iterdir()} == before
    assert run(corpus.folder, tmp_path / "run", resume=True) == run(corpus.folder, tmp_path / "whole")


def test_a_damaged_checkpoint(corpus, tmp_path):
    run(corpus.folder, tmp_path / "run", {"steps": 2})
    shard = tmp_path / "run" / "checkpoint" / "optimizer-0-of-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert "optimizer-0-of-1.safetensors does not match" in refusal(corpus, tmp_path / "run", {"steps": 2}, resume=True)


def test_packed_documents_do_not_see_each_other(corpus, tmp_path):
    torch.manual_seed(0)
    model = SequenceModel(MODEL)
    inputs, targets, cuts = PackedDocuments(corpus.split("train"), 200, seed=0).batch(0, 3)
    apart = zip(inputs.split(cuts.diff().tolist(), 1), targets.split(cuts.diff().tolist(), 1), strict=True)
    each = sum(F.cross_entropy(model(x)[0][0], y[0], reduction="sum") for x, y in apart)
    assert len(cuts) > 4  # a document's start lies in at least one window
    torch.testing.assert_close(LanguageLoss(model)(inputs, targets, cuts), each)
    losses = run(corpus.folder, tmp_path / "run", {"packed": True, "steps": 40, "lr": 1e-2})
    assert losses[-1] < 0.8 * losses[0]
