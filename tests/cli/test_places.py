"""Folders and files on the command line: what is no run is named, and outputs are checked before the work."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run
from corpora import corpus_of_words

import deltaproduct
from deltaproduct.files import beside
from deltaproduct.models import SequenceModel
from deltaproduct.training.folder_kinds import why_not

ROOT = Path(deltaproduct.__file__).parent.parent
TINY = ["--hidden-size", "16", "--num-heads", "2", "--head-dim", "4", "--lengths", "4", "--batch-sizes", "8"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """One folder of every kind that this library writes."""
    from deltaproduct.cli.main import main

    root = tmp_path_factory.mktemp("places")
    main(["train", "--task", "Z2", "--steps", "3", "--out", str(root / "run"), *TINY])
    main(["compile", "--group", "Z2", "--out", str(root / "compiled")])
    corpus = corpus_of_words(root)
    language = ["--steps", "1", "--context", "8", "--batch-size", "2", "--num-hidden-layers", "1", "--head-dim", "8"]
    language += ["--hidden-size", "16", "--num-heads", "1"]
    main(["lm", "train", "--data", str(corpus), "--out", str(root / "language"), *language])
    main(["lm", "convert", str(root / "language"), "--to", "fla", "--out", str(root / "fla")])
    experiment = root / "experiment" / "runs"
    experiment.mkdir(parents=True)
    shutil.copytree(root / "run", experiment / "Z2-seed0")
    for name, file in {"export": "step.json", "conversation": "stream.json", "extracted": "extract.json",
                       "evaluation": "evaluation.json", "unfinished": "unfinished.json"}.items():  # fmt: skip
        (root / name).mkdir()
        (root / name / file).write_text("{}")
    return root


COMMANDS = {  # what a command takes, and the command with a place to give it
    "task model": [["evaluate", "@", "--lengths", "4"], ["extract", "@", "--out", "@new"],
                   ["compile", "--from-run", "@", "--out", "@new"]],
    "language model": [["lm", "evaluate", "@", "--what", "perplexity", "--data", "@corpus"], ["lm", "generate", "@"]],
    "model": [["lm", "export", "@", "--to", "onnx", "--out", "@new"]],
    "any layout": [["lm", "convert", "@", "--to", "fla", "--out", "@new"]],
    "compiled model": [["verify", "@", "--length", "4"]],
    "task run": [["train", "--resume", "--out", "@"]],
}  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "place", "words"),
    [
        ("task model", "language", "of a language model, not of a task; `deltaproduct lm evaluate`"),
        ("task model", "language/checkpoint", "a checkpoint of a language model"),
        ("language model", "run", "a run of a task, not of a language model; `deltaproduct evaluate`"),
        ("language model", "run/checkpoint", "a checkpoint of a task"),
        ("language model", "compiled", "a compiled model, not a language model; `deltaproduct verify`"),
        ("language model", "corpus", "a corpus and goes with --data"),
        ("compiled model", "run", "a run and not a compiled model; `deltaproduct evaluate`"),
        ("compiled model", "language", "a run and not a compiled model; `deltaproduct lm evaluate`"),
        ("task run", "language", "the run of a language model; `deltaproduct lm train --resume`"),
        ("task run", "compiled", "a compiled model, which is not trained and cannot be resumed"),
        ("task run", "run/checkpoint", "a checkpoint and not a run; give the run's folder"),
        ("task run", "nothing", "holds no run to resume; leave out --resume to begin one"),
        ("model", "fla", "a checkpoint of flash-linear-attention"),
        ("any layout", "nothing", "does not exist"),
        ("model", "7.txt", "is a file; give the folder"),
        *((wanted, "corpus", "is a corpus; train a model on it") for wanted in ("task model", "model", "task run")),
        *((wanted, "corpus/tokenizer", "a tokenizer's folder") for wanted in ("task model", "language model")),
        *((wanted, "experiment", "an experiment's folder; give one of its runs, such as") for wanted in COMMANDS),
        *((wanted, "experiment/runs", "holds runs and is none itself; give one") for wanted in COMMANDS),
        *((wanted, "unfinished", "a corpus that is not finished") for wanted in COMMANDS),
        *((wanted, "export", "an exported program and no model") for wanted in COMMANDS),
        *((wanted, "conversation", "--load-state") for wanted in COMMANDS),
        *((wanted, "extracted", "make one: deltaproduct compile --automaton") for wanted in COMMANDS),
        *((wanted, "evaluation", "the report of an evaluation") for wanted in COMMANDS),
    ],
)
def test_what_is_no_run_is_named_with_what_to_type(capsys, places, tmp_path, wanted, place, words):
    for command in COMMANDS[wanted]:
        known = {"@": places / place, "@new": tmp_path / "new", "@corpus": places / "corpus"}
        status, out, err = run(capsys, *(known.get(word, word) for word in command))
        assert status == 2 and out == "" and err.count("\n") == 1 and words in err, err
        assert str(places / place) in err and not (tmp_path / "new").exists()


def test_what_is_wanted_is_let_through(places):
    for wanted, found in {"task model": ("run", "run/checkpoint", "compiled", "experiment/runs/Z2-seed0"),
                          "language model": ("language", "language/checkpoint"),
                          "model": ("run", "language", "compiled"),
                          "any layout": ("run", "fla"),
                          "compiled model": ("compiled",),
                          "task run": ("run",), "language run": ("language", "not yet")}.items():  # fmt: skip
        for place in found:
            assert why_not(places / place, wanted) is None, (wanted, place)
    assert "`deltaproduct train --resume`" in why_not(places / "run", "language run")


def test_a_model_that_does_not_say_what_it_is_is_let_through(places, tmp_path):
    SequenceModel.from_pretrained(places / "run" / "checkpoint").save_pretrained(tmp_path / "alone")
    for wanted in ("model", "task model", "language model", "any layout", "compiled model"):
        assert why_not(tmp_path / "alone", wanted) is None
    assert "only a run can be resumed" in why_not(tmp_path / "alone", "task run")


def test_a_folder_between_a_writers_two_renames_is_let_through(places, tmp_path):
    shutil.copytree(places / "run", tmp_path / "run")
    (tmp_path / "run" / "checkpoint").rename(beside(tmp_path / "run" / "checkpoint", "old"))
    assert why_not(tmp_path / "run" / "checkpoint", "task model") is None
    assert why_not(tmp_path / "run", "task model") is None


# --- Resuming ---------------------------------------------------------------------------------------------------------


def test_resume_of_nothing_is_refused_and_writes_nothing(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    for place in ("nothere", "empty"):
        status, _, err = run(capsys, "train", "--resume", "--out", tmp_path / place)
        assert status == 2
        assert err == f"deltaproduct: {tmp_path / place} holds no run to resume; leave out --resume to begin one.\n"
    assert not (tmp_path / "nothere").exists() and not any((tmp_path / "empty").iterdir())


def test_resume_keeps_the_settings_of_a_run(capsys, places):
    before = {path: path.read_bytes() for path in (places / "run").rglob("*") if path.is_file()}
    resume = ["train", "--resume", "--out", places / "run"]
    status, _, err = run(capsys, *resume, "--steps", "80")
    assert status == 2 and err.count("\n") == 1
    assert "finished with 3 steps, and the steps of a run cannot be changed: start a new run of 80 steps" in err
    status, _, err = run(capsys, *resume, "--lr", "0.5", "--lengths", "4,8")
    assert status == 2 and err.count("\n") == 1
    assert "(--lr 0.5, stored 0.01; --lengths 4,8, stored 4)" in err and "leave out --lr and --lengths" in err
    assert before == {path: path.read_bytes() for path in (places / "run").rglob("*") if path.is_file()}
    assert run(capsys, *resume, "--lr", "0.01", "--log-every", "5")[0] == 0  # the same settings are no others


def test_a_run_that_is_not_finished_keeps_its_steps_too(capsys, places, tmp_path):
    shutil.copytree(places / "run", tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    status, _, err = run(capsys, "train", "--resume", "--out", tmp_path / "run", "--steps", "80")
    assert status == 2 and "(--steps 80, stored 3)" in err and "leave out --steps" in err


# --- Outputs ----------------------------------------------------------------------------------------------------------


NEW_FOLDERS = [["compile", "--group", "S3", "--out"], ["extract", "@run", "--out"],
               ["lm", "export", "@run", "--to", "onnx", "--out"],
               ["lm", "evaluate", "@language", "--what", "perplexity", "--data", "@corpus", "--out"]]  # fmt: skip
FOLDERS = [["train", "--out"], ["lm", "train", "--data", "@corpus", "--out"], ["reproduce", "s3", "--out"],
           ["lm", "convert", "@run", "--to", "fla", "--out"],
           ["lm", "generate", "@language", "--save-state"]]  # fmt: skip
FILES = [["bench", *name.split(), "--quick", "--out"] for name in ("ops", "ops --step", "scaling", "generate", "train")]


def given(places, command, out):
    return [*(places / word[1:] if word.startswith("@") else word for word in command), out]


@pytest.fixture
def no_work(monkeypatch):
    """Fails where anything is computed: a refusal comes before the work."""

    def work(*_, **__):
        raise AssertionError("the work was begun")

    for name in (
        "deltaproduct.theory.certificate.certificates",
        "deltaproduct.analysis.extract",
        "deltaproduct.models.export.export_step",
        "deltaproduct.evaluation.perplexity.perplexity",
        "deltaproduct.training.loop.train",
        "deltaproduct.experiments.runner.run_jobs",
        "deltaproduct.models.fla.checkpoint.write_fla",
        "deltaproduct.models.SequenceModel.from_pretrained",
        *(f"deltaproduct.benchmarks.bench_{name}" for name in ("ops", "scaling", "op_step", "generate", "train")),
    ):
        monkeypatch.setattr(name, work)


@pytest.mark.parametrize("command", NEW_FOLDERS + FOLDERS + FILES, ids=" ".join)
def test_outputs_below_a_file_or_a_locked_folder_are_refused_first(capsys, places, tmp_path, no_work, command):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "x", tmp_path / "file" / "x" / "y"):
        status, printed, err = run(capsys, *given(places, command, out))
        assert status == 2 and printed == "" and err.count("\n") == 1, err
        assert f"cannot be written: {tmp_path / 'file'} is not a folder" in err or "Not a directory" in err


@pytest.mark.parametrize("command", NEW_FOLDERS + FOLDERS + FILES, ids=" ".join)
def test_outputs_that_permissions_forbid_are_refused_first(capsys, places, tmp_path, no_work, monkeypatch, command):
    real = os.access  # root may write everywhere, so the system's answer is what is changed
    monkeypatch.setattr(os, "access", lambda p, mode: Path(p) != tmp_path and real(p, mode))
    status, printed, err = run(capsys, *given(places, command, tmp_path / "x" / "y"))
    assert status == 2 and printed == "" and err.count("\n") == 1
    assert f"the folder {tmp_path} cannot be written to" in err


@pytest.mark.parametrize("command", NEW_FOLDERS, ids=" ".join)
def test_folders_that_are_to_be_new_must_not_exist(capsys, places, tmp_path, no_work, command):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file", tmp_path / "link"):
        status, _, err = run(capsys, *given(places, command, out))
        assert status == 2 and "already exists; choose another folder" in err


@pytest.mark.parametrize("command", FOLDERS, ids=" ".join)
def test_a_folder_to_write_to_is_no_file(capsys, places, tmp_path, no_work, command):
    (tmp_path / "file").write_text("precious")
    status, _, err = run(capsys, *given(places, command, tmp_path / "file"))
    assert status == 2 and err.count("\n") == 1 and "is a file" in err
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("command", FILES, ids=" ".join)
def test_a_report_is_no_folder(capsys, places, tmp_path, no_work, command):
    status, _, err = run(capsys, *given(places, command, tmp_path))
    assert status == 2 and err.count("\n") == 1 and "is a folder; name a file to write" in err


def test_the_figure_beside_a_report_is_no_folder_either(capsys, tmp_path, no_work):
    (tmp_path / "ops.png").mkdir()
    command = ["bench", "ops", "--quick", "--against", "textbook_loop", "--out", tmp_path / "ops.json"]
    status, _, err = run(capsys, *command)
    assert status == 2 and "ops.png is a folder" in err


def test_listing_an_experiment_needs_no_folder(capsys):
    status, out, _ = run(capsys, "reproduce", "s3", "--list")
    assert status == 0 and "n1-pos-seed0" in out.split()
    status, _, err = run(capsys, "reproduce", "s3")
    assert status == 2 and "reproduce needs --out" in err


@pytest.mark.slow("processes")
@pytest.mark.parametrize(
    "command",
    [["compile", "--group", "Z2"], ["extract", "@run", "--max-length", "4", "--max-states", "9"],
     ["lm", "convert", "@language", "--to", "fla"]],
    ids=" ".join,
)  # fmt: skip
def test_a_second_writer_of_a_folder_is_refused_in_one_line(capsys, places, tmp_path, monkeypatch, command):
    """One process holds the lock that every writer takes; the other ends with a line and leaves nothing behind."""
    monkeypatch.setattr("deltaproduct.files.PATIENCE", 0.2)  # seconds that the second waits for the first
    out = tmp_path / "out"
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; from pathlib import Path; from deltaproduct.files import locked\n"
         f"with locked(Path({str(beside(out, 'lock'))!r}), 'it'):\n    print('held', flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "held\n"
        status, _, err = run(capsys, *given(places, command, "--out")[:-1], "--out", out)
        assert status == 2 and err.count("\n") == 1, err
        assert f"is being written by process {holder.pid}" in err and not out.exists()
    finally:
        holder.communicate("")
    assert run(capsys, *given(places, command, "--out")[:-1], "--out", out)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_another_process_made_meanwhile_is_kept(capsys, places, tmp_path, monkeypatch):
    """Both found nothing there; the slower one must not replace what the faster one wrote."""
    import deltaproduct.theory.verification as verification

    out, real = tmp_path / "out", verification.verify

    def slow(*arguments, **options):
        out.mkdir(exist_ok=True)
        (out / "theirs").write_text("precious")
        return real(*arguments, **options)

    monkeypatch.setattr(verification, "verify", slow)
    status, _, err = run(capsys, "compile", "--group", "Z2", "--out", out)
    assert status == 2 and "already exists" in err and (out / "theirs").read_text() == "precious"


def test_the_report_of_a_benchmark_is_still_written(capsys, tmp_path):
    out = tmp_path / "new" / "report.json"
    status, printed, _ = run(capsys, "bench", "ops", "--quick", "--repeats", "1", "--shapes", "B1 T4 H1 K4 N1",
                             "--backends", "reference", "--device", "cpu", "--json", "--out", out)  # fmt: skip
    assert status == 0 and json.loads(printed) == json.loads(out.read_text())
