"""What the training loop asks of an objective, and what every objective has from it."""

import json
import math
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from corpora import corpus_of_words
from ranks import on_ranks
from run_folder import metrics
from runs import run_config, same, weights
from torch import Tensor
from torch.nn import functional as F

import deltaproduct
from deltaproduct.corpus import Corpus
from deltaproduct.errors import UsageError
from deltaproduct.files import read_json, write_json
from deltaproduct.models import ModelConfig
from deltaproduct.training import LanguageConfig, Run, TrainConfig, loop, train
from deltaproduct.training.checkpoint import Progress
from deltaproduct.training.distributed import Ranks
from deltaproduct.training.loop import OneProcess
from deltaproduct.training.objectives.language import LanguageObjective
from deltaproduct.training.objectives.objective import Objective, StepReport
from deltaproduct.training.objectives.task import TaskObjective
from deltaproduct.training.run_folder import read_run

STEPS = 6
TASK_LINE = ["step", "length", "loss", "loss_mean", "accuracy", "lr", "grad_norm", "seconds"]
LANGUAGE_LINE = ["step", "tokens", "loss", "loss_mean", "lr", "grad_norm", "tokens_per_second", "memory_gib", "mfu",
                 "seconds", "validation_loss"]  # fmt: skip
TEXT_MODEL = ModelConfig.build(
    257, 257, hidden_size=16, num_hidden_layers=1, num_heads=2, head_dim=4, intermediate_size=0
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return Corpus.open(corpus_of_words(tmp_path_factory.mktemp("corpus")))


@pytest.fixture(params=["task", "language"])
def kind(request, corpus) -> tuple[Run, Objective]:
    """A run of each kind, with its objective."""
    if request.param == "task":
        run = run_config(steps=STEPS, stage_steps=(3,))
        return run, TaskObjective(run.training)
    settings = LanguageConfig(steps=STEPS, corpus=corpus.fingerprint, context=16, batch_size=2, warmup_steps=2)
    return Run(settings, TEXT_MODEL), LanguageObjective(settings, corpus)


def steady(out: Path) -> list[dict]:
    """The lines of metrics without what time decides."""
    passing = ("seconds", "tokens_per_second", "memory_gib", "mfu")
    return [{k: v for k, v in line.items() if k not in passing} for line in metrics(out)]


# What both have of the loop


def test_a_line_of_metrics_has_its_keys_in_their_order(kind, tmp_path):
    run, objective = kind
    train(run, tmp_path / "run", objective, log_every=2, checkpoint_every=4, show=False)
    found = [list(line) for line in metrics(tmp_path / "run")]
    if isinstance(objective, TaskObjective):
        assert found == [TASK_LINE] * 3
        return
    known = [key for key in LANGUAGE_LINE if key != "mfu" or "mfu" in found[0]]  # where the processor is known
    assert found == [known[:-1], known, known]  # of steps 2, 4 and 6; the last two with a checkpoint


def test_going_on_after_any_step_is_bit_exact(kind, tmp_path, monkeypatch):
    run, objective = kind
    train(run, tmp_path / "whole", objective, log_every=1, checkpoint_every=STEPS, show=False)
    step = loop.train_step
    for last in range(1, STEPS):

        def interrupted(objective, module, optimizer, progress, ranks, last=last):
            if progress.step == last - 1:
                signal.raise_signal(signal.SIGINT)
            return step(objective, module, optimizer, progress, ranks)

        out = tmp_path / f"cut-{last}"
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match=f"step {last} is saved"):
            patch.setattr(loop, "train_step", interrupted)
            train(run, out, objective, log_every=1, checkpoint_every=STEPS, show=False)
        train(run, out, objective, resume=True, log_every=1, checkpoint_every=STEPS, show=False)
        assert same(weights(out), weights(tmp_path / "whole")), last
        assert steady(out) == steady(tmp_path / "whole"), last
        for name in ("optimizer.json", "optimizer-0-of-1.safetensors"):
            whole, cut = ((folder / "checkpoint" / name).read_bytes() for folder in (tmp_path / "whole", out))
            assert whole == cut, (last, name)


def test_gradient_checkpointing_changes_no_loss(kind, tmp_path):
    """The same numbers are computed again: the sums are the same, up to the order that float32 has them in."""
    run, objective = kind
    for name, again in (("plain", False), ("again", True)):
        train(run, tmp_path / name, objective, gradient_checkpointing=again, log_every=1, show=False)
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("plain", "again")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_run_is_read_as_what_it_is(kind, tmp_path):
    run, _ = kind
    write_json(tmp_path / "config.json", run.to_dict())
    assert read_run(tmp_path) == run and Run.from_dict(json.loads(json.dumps(run.to_dict()))) == run
    assert type(read_run(tmp_path).training) is type(run.training)
    other = Run(TrainConfig() if isinstance(run.training, LanguageConfig) else LanguageConfig(), run.model)
    assert run.differences(other) == [f"training on {run.training.kind} and on {other.training.kind}"]
    assert run.differences(replace(run, training=replace(run.training, lr=0.5))) == [f"lr: {run.training.lr} and 0.5"]


def test_a_run_on_a_corpus_needs_the_corpus(corpus, tmp_path):
    run = Run(LanguageConfig(corpus=corpus.fingerprint), TEXT_MODEL)
    with pytest.raises(UsageError, match=r"needs the corpus: train\(run, out, LanguageObjective"):
        train(run, tmp_path / "run", show=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("parallel", ["dpp", ""])
def test_a_way_to_be_parallel_that_is_none(tmp_path, parallel):
    with pytest.raises(UsageError, match="parallel must be one of ddp, fsdp"):
        train(run_config(), tmp_path / "run", parallel=parallel, show=False)


# An objective of somebody else


@dataclass
class Seen:
    batches: int = 0

    def problem(self, settings: TrainConfig, step: int) -> str | None:
        return None if self.batches == step else f"{self.batches} batches were seen in {step} steps"


class Echo:
    """The label of a token is the token: the smallest objective there is."""

    kept = Seen
    validates = True
    name = "echo"

    def __init__(self, settings: TrainConfig, **trouble: int):
        self.settings, self.trouble, self.validated = settings, trouble, 0

    def check(self, model: ModelConfig, ranks: OneProcess) -> None:
        if model.vocab_size > model.num_labels:
            raise UsageError("An echo has a label for every token.")

    def write_files(self, out: Path) -> None:
        (out / "echo.txt").write_text("echo")

    def module(self, model, ranks):
        return model

    def loss(self, module, seed: int) -> Tensor:
        tokens = torch.randint(5, (2, 7), generator=torch.Generator().manual_seed(seed))
        return F.cross_entropy(module(tokens)[0].flatten(0, 1), tokens.flatten())

    def backward(self, module, progress, ranks) -> Tensor:
        loss = self.loss(module, progress.kept.batches)
        loss.backward()
        return loss.detach()[None]

    def after_step(self, progress, sums: list[float]) -> StepReport:
        progress.kept.batches += 1
        diverged = "The echo is too loud" if progress.step == self.trouble.get("diverges") else None
        return StepReport({"loss": sums[0]}, "", diverged, progress.step != self.trouble.get("unsafe"))

    def speed(self) -> Mapping[str, float]:
        return {"speed": 1.0}

    @torch.no_grad()
    def validate(self, module, ranks) -> Mapping[str, float]:
        self.validated += 1
        return {"echo_loss": float(self.loss(module, 10**6))}


def echo(out: Path, *, resume: bool = False, checkpoint_every: int = 2, **trouble: int) -> Echo:
    run = Run(TrainConfig(steps=STEPS, lr=1e-2), ModelConfig.build(5, 5, hidden_size=8, num_heads=1, head_dim=4))
    objective = Echo(run.training, **trouble)
    train(run, out, objective, resume=resume, log_every=1, checkpoint_every=checkpoint_every, show=False)
    return objective


def test_an_objective_of_ones_own_is_trained_saved_and_resumed(tmp_path):
    assert echo(tmp_path / "whole").validated == 3  # at steps 2, 4 and 6
    lines = metrics(tmp_path / "whole")
    assert [list(line) for line in lines[:2]] == [
        ["step", "loss", "lr", "grad_norm", "speed", "seconds"],
        ["step", "loss", "lr", "grad_norm", "speed", "seconds", "echo_loss"],
    ]
    assert lines[-1]["loss"] < lines[0]["loss"] and (tmp_path / "whole" / "echo.txt").read_text() == "echo"
    with pytest.raises(UsageError, match=r"The echo is too loud; the last good checkpoint, of step 4"):
        echo(tmp_path / "cut", diverges=5)
    assert read_json(tmp_path / "cut" / "checkpoint" / "training.json")["progress"]["batches"] == 4
    echo(tmp_path / "cut", resume=True)
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    assert steady(tmp_path / "cut") == steady(tmp_path / "whole")


def test_what_is_not_safe_is_not_saved(tmp_path):
    with pytest.raises(UsageError, match=r"the last good checkpoint, of step 2"):
        echo(tmp_path / "run", unsafe=4, diverges=5)
    assert [line["step"] for line in metrics(tmp_path / "run") if "echo_loss" in line] == [2]


def test_what_is_kept_is_checked(tmp_path):
    with pytest.raises(UsageError, match="too loud"):
        echo(tmp_path / "run", diverges=3)
    checkpoint = tmp_path / "run" / "checkpoint"
    values = read_json(checkpoint / "training.json")
    with deltaproduct.files.replaced_folder(checkpoint) as new:
        for path in checkpoint.iterdir():
            if path.name != "manifest.json":
                (new / path.name).write_bytes(path.read_bytes())
        values["progress"]["batches"] = 1
        write_json(new / "training.json", values)
    with pytest.raises(UsageError, match=r"training\.json is damaged: 1 batches were seen in 2 steps\."):
        echo(tmp_path / "run", resume=True)


def test_a_loss_that_is_infinite_leaves_the_weights_alone(tmp_path, monkeypatch):
    loss = Echo.loss

    def spoiled(self, module, seed):
        return loss(self, module, seed) * (math.inf if seed == 3 else 1)

    monkeypatch.setattr(Echo, "loss", spoiled)
    with pytest.raises(UsageError, match=r"Step 4 has a loss of inf and a gradient of norm nan; .* of step 3"):
        echo(tmp_path / "run", checkpoint_every=1)
    run = Run(TrainConfig(), ModelConfig.build(5, 5, hidden_size=8, num_heads=1, head_dim=4))
    model, alone = loop.new_model(run), OneProcess(torch.device("cpu"))
    optimizer, before = loop.new_optimizer(model, run.training), loop.new_model(run).state_dict()
    for batches, changed in ((3, False), (0, True)):
        loop.train_step(Echo(run.training), model, optimizer, Progress(Seen(batches)), alone)
        assert same(model.state_dict(), before) != changed


# Many processes


def task_losses(out: Path, parallel: str, resume: bool = False) -> list[float]:
    with Ranks.started("cpu") as ranks:
        train(
            run_config(grad_accumulation=2), out, None, ranks, parallel=parallel, resume=resume, log_every=1, show=False
        )
    return [line["loss"] for line in metrics(out)]


@pytest.mark.slow("ranks")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_task_on_two_processes_has_the_losses_of_one(tmp_path, parallel):
    """Sums in another order, as for language runs: Adam divides by small numbers, so that roundings grow."""
    one = task_losses(tmp_path / "one", "ddp")
    two = on_ranks(2, task_losses, tmp_path / "two", parallel)[0]
    assert two == pytest.approx(one, abs=1e-4) and len(one) == 12
    accuracies = [[line["accuracy"] for line in metrics(tmp_path / name)] for name in ("one", "two")]
    assert accuracies[0][0] == accuracies[1][0]  # of the same weights
    assert task_losses(tmp_path / "two", "ddp", resume=True) == two  # one process reads what two wrote: it has ended


def test_a_task_whose_batches_cannot_be_dealt_out(tmp_path):
    refused = {
        "4 sequences .* cannot be dealt out evenly to 3 ranks": Ranks(0, 3, torch.device("cpu")),
        "A task's sequences cannot be divided": Ranks(0, 2, torch.device("cpu"), TwoOfOne()),
    }
    for words, ranks in refused.items():
        with pytest.raises(UsageError, match=words):
            train(run_config(), tmp_path / "run", None, ranks, show=False)
    assert not (tmp_path / "run").exists()


class TwoOfOne(deltaproduct.ops.context_parallel.ContextParallel):
    def __init__(self):
        self.rank, self.size = 0, 2


@pytest.mark.slow("processes")
def test_training_on_one_process_imports_nothing_that_only_many_need(tmp_path):
    """PyTorch imports some of it for an optimiser; the package does not, which takes a second."""
    code = f"""
import sys, torch
heavy = {{"torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint"}} - set(sys.modules)
sys.path.insert(0, {str(Path(__file__).parents[1] / "helpers")!r})
from pathlib import Path
import deltaproduct.training.objectives.language, deltaproduct.training.objectives.task
from runs import run_config
from deltaproduct.training import train
print(*heavy & set(sys.modules))
torch.optim.AdamW([torch.zeros(1)])
heavy -= set(sys.modules)
train(run_config(steps=2), Path({str(tmp_path)!r}) / "run", show=False)
ours = {{"distributed", "pickled_checkpoint", "earlier_optimizer"}}
print(*heavy & set(sys.modules), *(name for name in ours if f"deltaproduct.training.{{name}}" in sys.modules))
"""
    root = Path(deltaproduct.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout == "\n\n"


# Old names (those that are other names of the same thing: tests/test_renamed.py)


def test_the_old_function_for_language_runs_warns_and_trains(corpus, tmp_path):
    from deltaproduct.training.objectives.language import train_language

    run = Run(LanguageConfig(steps=2, corpus=corpus.fingerprint, context=16, batch_size=2), TEXT_MODEL)
    with pytest.warns(DeprecationWarning, match="train_language is now deltaproduct.training.train"):
        train_language(run, corpus, tmp_path / "run", OneProcess(torch.device("cpu")), show=False)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [2]
