"""`lm train --resume`: where the run's corpus is, and one line for whatever cannot be resumed."""

import json
import os
import shutil
from pathlib import Path

import pytest
from commands import run as command
from corpora import corpus_of_words

from deltaproduct.corpus import Corpus
from deltaproduct.corpus.writer import prepare
from deltaproduct.files import read_json, write_json
from deltaproduct.training.corpus_place import PLACE, find_corpus, note_corpus

FLAGS = ("--context", "16", "--batch-size", "2", "--hidden-size", "16", "--num-hidden-layers", "1", "--num-heads", "1",
         "--head-dim", "8", "--warmup-steps", "1", "--device", "cpu")  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a corpus and a run of four steps on it, `run`, which has finished."""
    folder = tmp_path_factory.mktemp("trained")
    corpus_of_words(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        from deltaproduct.cli.main import main

        main(["lm", "train", "--data", "corpus", "--out", "run", "--steps", "4", *FLAGS])
    return folder


@pytest.fixture
def folder(trained, tmp_path, monkeypatch) -> Path:
    """The same, moved elsewhere as a whole; the place of before holds nothing that could be found."""
    shutil.copytree(trained / "corpus", tmp_path / "corpus")
    shutil.copytree(trained / "run", tmp_path / "run")
    note_corpus(tmp_path / "run", tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(capsys, *arguments: object, status: int = 2) -> str:
    found, out, error = command(capsys, *arguments)
    assert found == status, error
    if status:
        assert out == "" and error.count("\n") == 1 and error.startswith("deltaproduct: "), error
    return error if status else out


def test_a_run_is_resumed_without_its_corpus_being_named(trained, folder, capsys, monkeypatch):
    assert read_json(trained / "run" / PLACE) == {"corpus": str(trained / "corpus"), "corpus_from_here": "../corpus"}
    assert "data" not in json.dumps(read_json(folder / "run" / "config.json"))
    assert said(capsys, "lm", "train", "--resume", "--out", "run", status=0).startswith("run: 128 tokens")
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")  # a relative path would mean another folder here
    said(capsys, "lm", "train", "--resume", "--out", folder / "run", status=0)


def test_an_unfinished_run_goes_on_with_the_corpus_that_it_left(folder, capsys):
    from deltaproduct.training import loop

    save = loop.save_checkpoint

    def cut_off(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    flags = ("lm", "train", "--data", "corpus", "--steps", "6", "--log-every", "1")
    said(capsys, *flags, "--out", "whole", *FLAGS, status=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", cut_off)
        found, _, _ = command(capsys, *flags, "--out", "cut", "--checkpoint-every", "3", *FLAGS)
    assert found == 130
    said(capsys, "lm", "train", "--resume", "--out", "cut", "--log-every", "1", status=0)
    lines = [[json.loads(line)["loss"] for line in Path(out, "metrics.jsonl").read_text().splitlines()]
             for out in ("whole", "cut")]  # fmt: skip
    assert len(lines[0]) == 6 and lines[0] == lines[1]


def test_a_run_and_its_corpus_that_were_moved_together(trained, tmp_path):
    for name in ("corpus", "run"):
        shutil.copytree(trained / name, tmp_path / "there" / name)
    values = read_json(tmp_path / "there" / "run" / PLACE)
    write_json(tmp_path / "there" / "run" / PLACE, values | {"corpus": str(tmp_path / "gone")})
    fingerprint = Corpus.open(trained / "corpus").fingerprint
    assert find_corpus(tmp_path / "there" / "run", fingerprint) == tmp_path / "there" / "corpus"


def test_a_corpus_that_was_moved_or_is_another_now(folder, capsys):
    resume = ("lm", "train", "--resume", "--out", "run")
    (folder / "corpus").rename(folder / "moved")
    error = said(capsys, *resume)
    assert f"run was trained on the corpus {folder}/corpus, which is not there any more; give" in error
    assert "--data" in error
    said(capsys, *resume, "--data", "moved", status=0)
    said(capsys, *resume, status=0)  # it is noted anew
    (folder / "moved").rename(folder / "away")
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("another text " * 100)
    prepare([f"text:{folder}/texts"], "bytes", folder / "moved")
    assert f"run was trained on another corpus than {folder}/moved is now" in said(capsys, *resume)
    error = said(capsys, *resume, "--data", "moved")
    assert "run was trained on another corpus than moved; give that one with --data, or begin a new run" in error
    (folder / "run" / PLACE).unlink()
    assert "run does not say where its corpus is" in said(capsys, *resume)
    assert "not a folder" in said(capsys, *resume, "--data", "nowhere")


NOTES = [
    "", "[]", "7", "{}", "[" * 100_000, '{"corpus": ' + "9" * 5000 + "}", '{"corpus": ["a"]}',
    '{"corpus": 7, "corpus_from_here": "x"}', '{"corpus": "a\\u0000b", "corpus_from_here": "a"}',
    '{"corpus": "", "corpus_from_here": ""}',
]  # fmt: skip


@pytest.mark.parametrize("content", NOTES, ids=range(len(NOTES)))
def test_a_note_that_is_damaged(content, folder, capsys):
    (folder / "run" / PLACE).write_text(content)
    assert PLACE in said(capsys, "lm", "train", "--resume", "--out", "run")
    said(capsys, "lm", "train", "--resume", "--out", "run", "--data", "corpus", status=0)


def test_a_corpus_under_a_name_that_is_no_utf_8(trained, tmp_path):
    name = os.fsdecode(b"caf\xe9")
    try:
        shutil.copytree(trained / "corpus", tmp_path / name)
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    note_corpus(tmp_path, tmp_path / name)
    assert find_corpus(tmp_path, Corpus.open(tmp_path / name).fingerprint) == tmp_path / name


@pytest.mark.parametrize("given", [(), ("--data", "corpus")])
def test_there_is_no_run_to_resume(given, folder, capsys):
    for out in ("nothere", "empty"):
        (folder / "empty").mkdir(exist_ok=True)
        error = said(capsys, "lm", "train", "--resume", "--out", out, *given)
        assert error == f"deltaproduct: {out} holds no run to resume; leave out --resume to begin one.\n"
    assert not (folder / "nothere").exists() and not list((folder / "empty").iterdir())


def test_torchrun_may_begin_a_run_with_resume(folder, monkeypatch):
    """It starts all processes again, with the same command, where one was lost."""
    from deltaproduct.cli.lm_train import stored_run

    monkeypatch.setenv("RANK", "0")
    assert stored_run(folder / "nothere") is None
    assert stored_run(folder / "run").training.steps == 4


@pytest.mark.parametrize("resume", [("--resume",), ()])
def test_a_run_on_a_task_is_called_one(resume, folder, capsys):
    tiny = ("--task", "parity", "--lengths", "4", "--batch-sizes", "2", "--steps", "1", "--hidden-size", "16",
            "--num-heads", "1", "--head-dim", "8", "--num-hidden-layers", "1", "--device", "cpu")  # fmt: skip
    said(capsys, "train", "--out", "task", *tiny, status=0)
    before = {path.name: path.read_bytes() for path in (folder / "task").iterdir() if path.is_file()}
    error = said(capsys, "lm", "train", "--data", "corpus", "--out", "task", *resume)
    assert "task is a run on a task; `deltaproduct train --resume` continues it" in error
    assert {path.name: path.read_bytes() for path in (folder / "task").iterdir() if path.is_file()} == before


def test_other_folders_are_no_run(folder, capsys):
    assert "is a checkpoint and not a run; give the run's folder" in said(
        capsys, "lm", "train", "--resume", "--out", "run/checkpoint"
    )
    assert "is a corpus" in said(capsys, "lm", "train", "--resume", "--out", "corpus")


def test_a_finished_run_has_the_steps_that_it_has(folder, capsys):
    resume = ("lm", "train", "--resume", "--out", "run")
    before = (folder / "run" / "run.json").read_bytes()
    for given in (("--steps", "8"), ("--steps", "2", "--data", "corpus")):
        error = said(capsys, *resume, *given)
        assert "run finished with 4 steps, and the steps of a run cannot be changed: start a new run of" in error
    assert (folder / "run" / "run.json").read_bytes() == before
    said(capsys, *resume, "--steps", "4", status=0)
    assert "another configuration (lr: " in said(capsys, *resume, "--lr", "0.5")
