"""`deltaproduct extract`: what it prints and writes, and its mistakes."""

import json

import pytest
import torch
from commands import run

from deltaproduct.tasks.automata import Automaton
from deltaproduct.tasks.dot import automaton_from_dot
from deltaproduct.theory.compiler import compile_automaton, compile_group
from deltaproduct.training import Run, TrainConfig
from deltaproduct.training.checkpoint import Progress, save_checkpoint
from deltaproduct.training.loop import OneProcess
from deltaproduct.training.objectives.task import Curriculum

# (ab)*: after anything else, the third state for good
AB = Automaton(("a", "b"), ("even", "odd", "lost"), 0, (0,), ((1, 2), (2, 0), (2, 2)))


@pytest.fixture(autouse=True)
def libraries():
    pytest.importorskip("aalpy")
    pytest.importorskip("matplotlib")


def test_extract_writes_a_folder(capsys, tmp_path):
    pytest.importorskip("pydot")
    compiled = compile_group("S3")
    alone, config = OneProcess(torch.device("cpu")), Run(TrainConfig(task="S3"), compiled.model.config)
    optimizer = torch.optim.AdamW(compiled.model.parameters())
    save_checkpoint(tmp_path / "run" / "checkpoint", compiled.model, optimizer, Progress(Curriculum()), config, alone)
    status, out, err = run(capsys, "extract", tmp_path / "run", "--out", tmp_path / "found")
    assert status == 0 and err == ""
    assert "6 states, 6 symbols" in out and "agreement with the model: 1 of" in out
    assert "transition monoid: S3; the automaton is its word problem" in out
    files = {p.name for p in (tmp_path / "found").iterdir()}
    assert files == {"automaton.json", "automaton.dot", "automaton.png", "extract.json", "manifest.json"}
    read = Automaton.from_dict(json.loads((tmp_path / "found" / "automaton.json").read_text()))
    assert read == compiled.automaton == automaton_from_dot((tmp_path / "found" / "automaton.dot").read_text())
    assert (tmp_path / "found" / "automaton.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "found" / "extract.json").read_text())
    assert report["task"] == "S3" and report["method"] == "lstar" and report["states"] == 6 and report["seed"] == 0
    assert report["agreement"] == 1 and report["monoid"] == "S3" and report["isomorphic"] and report["word_problem"]
    assert report["queries"] > 0 and "command" in report and report["machine"]["torch"] == torch.__version__
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    status, _, err = run(capsys, "extract", tmp_path / "run", "--out", tmp_path / "found")
    assert status == 2 and "already exists" in err and err.count("\n") == 1
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}


def test_extract_of_a_bare_checkpoint_and_of_a_compiled_automaton(capsys, tmp_path):
    compile_group("Z3").model.save_pretrained(tmp_path / "bare")
    status, _, err = run(capsys, "extract", tmp_path / "bare", "--out", tmp_path / "a")
    assert status == 2 and "--task" in err
    arguments = ["--method", "clustering", "--max-length", "20", "--seed", "1", "--json"]
    status, out, _ = run(capsys, "extract", tmp_path / "bare", "--task", "Z3", "--out", tmp_path / "a", *arguments)
    report = json.loads(out)
    assert status == 0 and report == json.loads((tmp_path / "a" / "extract.json").read_text())
    assert report["monoid"] == "Z3" and report["agreement_length"] == 20 and report["seed"] == 1
    compile_automaton(AB).save(tmp_path / "ab")
    status, out, _ = run(capsys, "extract", tmp_path / "ab", "--out", tmp_path / "b")
    assert status == 0 and "3 states, 2 symbols" in out and "transition monoid: 6 elements\n" in out
    assert Automaton.from_dict(json.loads((tmp_path / "b" / "automaton.json").read_text())) == AB


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["@/nowhere", "--out", "@/new"], "does not exist"),
        (["@/bare", "--task", "S4", "--out", "@/new"], "vocab_size"),
        (["@/bare", "--task", "Z3", "--max-states", "2", "--out", "@/new"], "more than 2"),
        (["@/bare", "--task", "Z3", "--method", "guess", "--out", "@/new"], "method"),
        (["@/bare", "--task", "Z3", "--max-length", "0", "--out", "@/new"], "max_length"),
    ],
)
def test_a_refused_extraction_is_one_line_and_leaves_nothing(capsys, tmp_path, arguments, word):
    compile_group("Z3").model.save_pretrained(tmp_path / "bare")
    status, out, err = run(capsys, "extract", *[a.replace("@/", f"{tmp_path}/") for a in arguments])
    assert status == 2 and out == "" and word in err and err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["bare"]
