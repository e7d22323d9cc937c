"""A run's folder: one rule for where its checkpoint is, one writer, an end on Ctrl-C that loses nothing, and files that
are checked."""

import json
import math
import os
import re
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from commands import run as command
from corpora import corpus_of_words
from ranks import on_ranks
from run_folder import metrics, steps_done
from runs import run_config, same, weights

from deltaproduct import files
from deltaproduct.corpus import Corpus
from deltaproduct.errors import UsageError
from deltaproduct.files import MANIFEST, beside, read_json, write_json
from deltaproduct.models import ModelConfig
from deltaproduct.training import LanguageConfig, Run, loop, train
from deltaproduct.training.checkpoint import Progress, save_checkpoint
from deltaproduct.training.distributed import Ranks
from deltaproduct.training.interruption import interruptible
from deltaproduct.training.loop import OneProcess
from deltaproduct.training.objectives.language import LanguageObjective
from deltaproduct.training.objectives.task import Curriculum, TaskObjective
from deltaproduct.training.run_folder import is_finished, locate, trained_as, writing_run

HELPERS = Path(__file__).parents[1] / "helpers"
MODEL = ModelConfig.build(257, 257, hidden_size=16, num_hidden_layers=1, num_heads=2, head_dim=4)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return corpus_of_words(tmp_path_factory.mktemp("corpus"))


def train_on_text(folder, out, resume=False, **changes):
    """A short language run, on the ranks that all call this."""
    opened = Corpus.open(folder)
    steps = {"steps": 12, "context": 16, "batch_size": 4, "warmup_steps": 2} | changes
    config = Run(LanguageConfig(corpus=opened.fingerprint, **steps), MODEL)
    objective = LanguageObjective(config.training, opened)
    with Ranks.started("cpu") as ranks:
        train(config, out, objective, ranks, resume=resume, log_every=1, checkpoint_every=4, show=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    train(run_config(), out, log_every=1, checkpoint_every=4, show=False)
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory, corpus):
    out = tmp_path_factory.mktemp("trained") / "text"
    train_on_text(corpus, out)
    return out


def copied(source, place):
    subprocess.run(["cp", "-r", str(source), str(place)], check=True)
    return place


def cut_between_renames(folder, *, new=False):
    """Leave a folder as a writer leaves it that dies between its two renames."""
    os.rename(folder, beside(folder, "old"))
    if new:
        copied(beside(folder, "old"), beside(folder, "new"))


# ------------------------------------------------------------------------------------------- a run or a checkpoint


@pytest.mark.slow("kills")
@pytest.mark.parametrize(("inner", "new"), [("", False), ("checkpoint", True)])
def test_every_command_finds_the_checkpoint_where_a_writer_died(trained, text, tmp_path, capsys, inner, new):
    task, words = copied(trained, tmp_path / "task"), copied(text, tmp_path / "text")
    for run in (task, words):
        cut_between_renames(run / "checkpoint", new=new)
    calls = [
        ["evaluate", task / inner, "--lengths", "4", "--sequences", "2"],
        ["extract", task / inner, "--max-states", "50", "--out", tmp_path / "extracted"],
        ["lm", "generate", words / inner, "--prompt", "a", "--max-tokens", "2"],
        ["lm", "export", words / inner, "--to", "onnx", "--out", tmp_path / "exported"],
        ["lm", "convert", words / inner, "--to", "fla", "--out", tmp_path / "converted"],
    ]
    for arguments in calls:
        status, _, err = command(capsys, *arguments)
        # What the commands then make of such small models is not asked here.
        assert status == 0 or not re.search(r"checkpoint|corrupt|does not exist|no folder", err), (arguments, err)
    for run in (task, words):
        assert not (run / "checkpoint").exists()  # nobody has renamed anything


def test_one_rule_says_what_a_folder_is(trained, text, tmp_path):
    for run in (trained, text):
        for given in (run, run / "checkpoint"):
            found = locate(given)
            assert (found.checkpoint, found.run) == (run / "checkpoint", run.absolute() if given != run else run)
    assert locate(trained).task() == "S3" and locate(trained / "checkpoint").task() == "S3"
    bare = copied(trained / "checkpoint", tmp_path / "bare")
    assert locate(bare).run is None and locate(bare).task() == "S3"
    with pytest.raises(UsageError, match="does not exist"):
        locate(tmp_path / "nothing")
    begun = tmp_path / "begun"
    with writing_run(run_config(), begun, resume=False):
        pass
    with pytest.raises(UsageError, match="no checkpoint yet"):
        locate(begun)
    with pytest.raises(UsageError, match="lm evaluate"):
        locate(text).task()


# ---------------------------------------------------------------------------------------------------- one writer


@pytest.mark.slow("processes")
def test_a_second_process_that_resumes_a_run_is_refused_and_disturbs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.2)
    code = """
        import sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from runs import run_config
        from deltaproduct.training import train
        train(run_config(steps=400), Path(sys.argv[2]), log_every=1, checkpoint_every=5, show=False)
    """
    out = tmp_path / "run"
    first = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(HELPERS), str(out)])
    while steps_done(out) < 5:
        assert first.poll() is None
        time.sleep(0.01)
    for _ in range(3):
        with pytest.raises(UsageError, match=rf"The run .*run is being written by process {first.pid} on "):
            train(run_config(steps=400), out, resume=True, show=False)
    assert first.wait() == 0
    assert [line["step"] for line in metrics(out)] == list(range(1, 401))
    assert is_finished(out, run_config(steps=400)) and not (out / ".lock").exists()


# ------------------------------------------------------------------------------------------------ Ctrl-C and kill

INTERRUPTED = """
    import sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from runs import run_config
    from deltaproduct.cli import main
    import deltaproduct.training.loop as loop
    from deltaproduct.training import train

    class Train:
        def run(self):
            train(run_config(steps=100_000), Path(sys.argv[2]), log_every=1, checkpoint_every=100_000, show=False)

    main._parse = lambda arguments: Train()
    main.main()
"""


@pytest.mark.slow("kills")
@pytest.mark.ci("2-130")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_kill_save_the_step_that_was_done(tmp_path, number, status):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(INTERRUPTED), str(HELPERS), str(out)], stderr=subprocess.PIPE, text=True
    )
    while steps_done(out) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    err = process.communicate()[1]
    assert process.returncode == status and err.count("\n") == 1
    saved = read_json(out / "checkpoint" / "training.json")["progress"]["step"]
    assert f"interrupted; step {saved} is saved in {out / 'checkpoint'}: the same command with --resume goes on" in err
    assert saved == metrics(out)[-1]["step"] >= 5 and not (out / ".lock").exists()


def test_what_an_interrupted_run_becomes_is_what_it_would_have_been(tmp_path, trained, monkeypatch):
    step = loop.train_step

    def interrupted(*arguments):
        found = step(*arguments)
        if arguments[3].step == 6:
            signal.raise_signal(signal.SIGINT)
        return found

    monkeypatch.setattr(loop, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="step 7 is saved"):
        train(run_config(), tmp_path / "run", log_every=3, show=False)
    monkeypatch.undo()
    train(run_config(), tmp_path / "run", resume=True, log_every=3, show=False)
    assert same(weights(tmp_path / "run"), weights(trained))
    assert [line["step"] for line in metrics(tmp_path / "run")] == [3, 6, 9, 12]


def test_ctrl_c_before_the_first_step_and_after_the_last(tmp_path, trained, monkeypatch):
    save = loop.save_checkpoint
    monkeypatch.setattr(loop, "save_checkpoint", lambda *a: (save(*a), signal.raise_signal(signal.SIGINT)))
    train(run_config(), tmp_path / "run", show=False)  # the last step was saved, and the run is at its end
    assert is_finished(tmp_path / "run", run_config())
    with interruptible() as first, interruptible() as second:
        signal.raise_signal(signal.SIGINT)
        assert first and not second  # who listens already is left alone
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.setattr("deltaproduct.training.interruption.AGAIN", -1.0)
    with pytest.raises(KeyboardInterrupt), interruptible():  # the second of two ends the program at once
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def interrupt_rank(folder, out):
    """Train on several ranks, of which one hears Ctrl-C in the middle."""
    import torch.distributed as dist

    step = loop.train_step

    def interrupted(*arguments):
        found = step(*arguments)
        if arguments[3].step == 5 and dist.get_rank() == 1:
            signal.raise_signal(signal.SIGINT)
        return found

    loop.train_step = interrupted
    try:
        train_on_text(folder, out)
    except KeyboardInterrupt as e:
        return str(e)
    finally:
        loop.train_step = step


@pytest.mark.slow("kills")
def test_ctrl_c_on_one_of_several_ranks_ends_all_of_them_at_the_same_step(corpus, tmp_path):
    said = on_ranks(2, interrupt_rank, corpus, tmp_path / "run")
    assert "step 6 is saved" in said[0] and said[1] == ""
    assert read_json(tmp_path / "run" / "checkpoint" / "training.json")["progress"]["step"] == 6
    on_ranks(2, train_on_text, corpus, tmp_path / "run", True)
    on_ranks(2, train_on_text, corpus, tmp_path / "whole")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


# ------------------------------------------------------------------------------------------------ what is not finite


@pytest.mark.parametrize("where", ["weights", "moments"])
@pytest.mark.parametrize("kind", ["task", "text"])
def test_nothing_that_is_not_finite_is_saved(corpus, tmp_path, monkeypatch, kind, where):
    """Gradients and losses are finite here until the very step that is saved."""
    update = torch.optim.AdamW.step
    count = 0

    def spoiling(self, *arguments):
        nonlocal count
        found, count = update(self, *arguments), count + 1
        if count == 8:
            parameter = self.param_groups[0]["params"][-1]
            spoiled = parameter if where == "weights" else self.state[parameter]["exp_avg_sq"]
            spoiled.data.view(-1)[0] = math.inf
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", spoiling)
    out = tmp_path / "run"
    message = "the optimiser's state of" if where == "moments" else "the weight"
    with pytest.raises(
        UsageError, match=f"After step 8, {message} .* is not finite; the last good checkpoint, of step 4"
    ):
        if kind == "task":
            train(run_config(), out, log_every=1, checkpoint_every=4, show=False)
        else:
            train_on_text(corpus, out)
    monkeypatch.undo()
    assert read_json(out / "checkpoint" / "training.json")["progress"]["step"] == 4
    if kind == "task":
        train(run_config(), out, resume=True, show=False)
        assert is_finished(out, run_config())


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(tmp_path, monkeypatch):
    clip = torch.nn.utils.clip_grad_norm_
    count = 0

    def spoiling(parameters, *arguments):
        nonlocal count
        count += 1
        if count == 6:
            parameters[0].grad.view(-1)[0] = math.nan
        return clip(parameters, *arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoiling)
    with pytest.raises(UsageError, match=r"Step 6 has a loss of .* and a gradient of norm nan; the last good"):
        train(run_config(), tmp_path / "run", checkpoint_every=1, show=False)
    assert all(x.isfinite().all() for x in weights(tmp_path / "run").values())


# ------------------------------------------------------------------------------------------------ files that lie


def unfinished(trained, place, step=8):
    """A run that was cut off after the checkpoint of a step, by a kill."""
    out = place / "run"
    model = loop.new_model(run_config())
    optimizer = loop.new_optimizer(model, run_config().training)
    out.mkdir()
    write_json(out / "config.json", run_config().to_dict())
    progress, objective = Progress(Curriculum()), TaskObjective(run_config().training)
    alone = OneProcess(torch.device("cpu"))
    lines = loop.Metrics(out / "metrics.jsonl", after_step=0)
    while progress.step < step:
        for group in optimizer.param_groups:
            group["lr"] = run_config().training.learning_rate(progress.step)
        sums, _ = loop.train_step(objective, model, optimizer, progress, alone)
        progress.step += 1
        objective.after_step(progress, sums)
        lines.write({"step": progress.step, "loss": sums[0]})
    progress.metrics = lines.synced()
    lines.close()
    save_checkpoint(out / "checkpoint", model, optimizer, progress, run_config(), alone)
    return out


@pytest.mark.parametrize(("field", "value"), [("lr", 0.5), ("seed", 7), ("steps", 99)])
def test_a_configuration_that_was_changed_after_the_run_began_is_refused(trained, tmp_path, field, value):
    out = unfinished(trained, tmp_path)
    values = read_json(out / "config.json")
    values["training"][field] = value
    write_json(out / "config.json", values)
    with pytest.raises(
        UsageError, match=rf"config\.json is not what .*checkpoint was trained with \({field}: {value} and"
    ):
        train(run_config(**{field: value}), out, resume=True, show=False)


def test_metrics_that_were_changed_are_refused_and_may_be_removed(trained, tmp_path):
    out = unfinished(trained, tmp_path)
    good = (out / "metrics.jsonl").read_text()
    for changed in (good.replace('"loss": 1', '"loss": 0', 1), "".join(good.splitlines(True)[1:]), ""):
        assert changed != good
        (out / "metrics.jsonl").write_text(changed)
        with pytest.raises(UsageError, match=r"metrics\.jsonl was changed: its lines up to step 8 .* or remove it"):
            train(run_config(), out, resume=True, show=False)
        assert (out / "metrics.jsonl").read_text() == changed
    (out / "metrics.jsonl").write_text(good + '{"step": 9, "loss": 3.0}\n{"st')  # after the checkpoint, cut off
    train(run_config(), copied(out, tmp_path / "other"), resume=True, log_every=1, show=False)
    assert [line["step"] for line in metrics(tmp_path / "other")] == list(range(1, 13))
    assert same(weights(tmp_path / "other"), weights(trained))
    (out / "metrics.jsonl").unlink()
    train(run_config(), out, resume=True, log_every=1, show=False)
    assert [line["step"] for line in metrics(out)] == [9, 10, 11, 12]


@pytest.mark.parametrize("name", ["run.json", "config.json", "metrics.jsonl"])
def test_the_files_of_a_finished_run_are_sealed(trained, tmp_path, name):
    out = copied(trained, tmp_path / "run")
    assert is_finished(out, run_config())
    text = (out / name).read_text()
    (out / name).write_text(text.replace("1", "2", 1))
    with pytest.raises(UsageError, match=f"{name} does not match its recorded size and sha256.*deltaproduct seal"):
        is_finished(out, run_config())
    (out / name).write_text(text)
    assert is_finished(out, run_config())


def test_a_run_that_says_it_is_finished_and_is_not(trained, tmp_path):
    out = unfinished(trained, tmp_path)
    write_json(out / "run.json", {"finished": True, "command": "x", "wall_seconds": 1.0})
    assert not is_finished(out, run_config())  # its checkpoint is of step 8


def test_resuming_keeps_the_first_command_and_notes_the_others(trained, tmp_path, monkeypatch):
    out = unfinished(trained, tmp_path)
    monkeypatch.setattr(sys, "argv", ["/somewhere/deltaproduct", "train", "--first"])
    monkeypatch.setattr(loop, "train_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    for words in ("--first", "--resume"):
        monkeypatch.setattr(sys, "argv", ["/somewhere/deltaproduct", "train", words])
        with pytest.raises(KeyboardInterrupt):
            train(run_config(), out, resume=True, show=False)
    assert read_json(out / "run.json") == {
        "finished": False, "command": "deltaproduct train --first", "resumed": ["deltaproduct train --resume"]
    }  # fmt: skip
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["deltaproduct", "train", "--resume", "again"])
    train(run_config(), out, resume=True, show=False)
    record = read_json(out / "run.json")
    assert record["finished"] and record["command"] == "deltaproduct train --first" and len(record["resumed"]) == 2
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    train(run_config(), out, resume=True, show=False)  # nothing is left to do, and nothing is written
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


# ---------------------------------------------------------------------------------------------- modes, links, rests


@pytest.mark.parametrize("kind", ["task", "text"])
def test_all_files_of_a_run_have_the_modes_that_the_umask_gives(corpus, tmp_path, kind):
    before = os.umask(0o002)
    try:
        if kind == "task":
            train(run_config(), tmp_path / "run", show=False)
        else:
            train_on_text(corpus, tmp_path / "run")
    finally:
        os.umask(before)
    modes = {str(p): stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "run").rglob("*")}
    assert modes == {name: 0o775 if Path(name).is_dir() else 0o664 for name in modes}


def test_a_checkpoint_on_another_disk_is_saved_there_again_and_again(tmp_path, trained):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint").symlink_to(tmp_path / "disk" / "kept")
    train(run_config(), tmp_path / "run", checkpoint_every=2, show=False)
    assert (tmp_path / "run" / "checkpoint").is_symlink() and (tmp_path / "disk" / "kept" / MANIFEST).is_file()
    assert same(weights(tmp_path / "run"), weights(trained))
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["kept"]
    assert trained_as(tmp_path / "run" / "checkpoint") == run_config()


def test_what_a_killed_process_left_is_cleared_up(tmp_path, trained):
    out = unfinished(trained, tmp_path)
    (out / ".run.json.1234.tmp").write_text("half")
    (out / ".checkpoint.new").mkdir()
    (out / ".checkpoint.new" / "half").write_text("")
    (out / ".lock").write_text("process 1 on elsewhere\n")  # of one that is gone
    train(run_config(), out, resume=True, show=False)
    assert [p.name for p in out.iterdir() if p.name.startswith(".")] == []


def test_old_runs_without_sums_go_on(tmp_path, trained):
    out = unfinished(trained, tmp_path)
    training = json.loads((out / "checkpoint" / "training.json").read_text())
    del training["progress"]["metrics"]
    (out / "checkpoint" / "training.json").write_text(json.dumps(training))
    files.seal_folder(out / "checkpoint")
    train(run_config(), out, resume=True, show=False)
    assert same(weights(out), weights(trained))
