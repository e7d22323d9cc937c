"""The command line: what each command prints and writes, and one clear line with status 2 for every mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import run

from deltaproduct.cli.main import main
from deltaproduct.models import SequenceModel

TINY = ["--hidden-size", "16", "--num-heads", "2", "--head-dim", "4", "--lengths", "4,8", "--batch-sizes", "8,4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    main(["train", "--task", "S3", "--steps", "4", "--out", str(out), *TINY])
    return out


def test_train_writes_a_run(trained):
    assert {"config.json", "metrics.jsonl", "run.json", "checkpoint"} <= {p.name for p in trained.iterdir()}
    config = json.loads((trained / "config.json").read_text())
    assert config["training"]["task"] == "S3" and config["model"]["mixer"]["num_householder"] == 2
    assert SequenceModel.from_pretrained(trained / "checkpoint").config.hidden_size == 16


def test_evaluate_prints_one_json_object(capsys, trained):
    for source in (trained, trained / "checkpoint"):
        status, out, _ = run(capsys, "evaluate", source, "--lengths", "8,16", "--sequences", "4", "--json")
        scores = json.loads(out)
        assert status == 0 and set(scores) == {"accuracy", "sequence_accuracy"}
        assert set(scores["accuracy"]) == {"8", "16"} and all(0 <= a <= 1 for a in scores["accuracy"].values())
    status, out, _ = run(capsys, "evaluate", trained, "--lengths", "8", "--sequences", "4")
    assert status == 0 and "token accuracy" in out


def test_a_saved_model_alone_needs_its_task_named(capsys, trained, tmp_path):
    SequenceModel.from_pretrained(trained / "checkpoint").save_pretrained(tmp_path / "alone")
    status, _, err = run(capsys, "evaluate", tmp_path / "alone", "--lengths", "8")
    assert status == 2 and "--task" in err
    status, out, _ = run(capsys, "evaluate", tmp_path / "alone", "--task", "S3", "--lengths", "8", "--json")
    assert status == 0 and json.loads(out)


def test_resume_takes_the_runs_own_settings(capsys, tmp_path):
    arguments = ["train", "--task", "Z2", "--steps", "3", "--out", tmp_path / "r", *TINY]
    assert run(capsys, *arguments)[0] == 0
    assert run(capsys, *arguments)[0] == 2
    assert run(capsys, "train", "--resume", "--out", tmp_path / "r")[0] == 0
    status, _, err = run(capsys, "train", "--resume", "--out", tmp_path / "r", "--lr", "0.5")
    assert status == 2 and "lr" in err


TINY_PARITY = ["train", "--task", "parity", "--hidden-size", "8", "--num-heads", "1", "--head-dim", "8", "--steps", "2"]
TINY_PARITY += ["--lengths", "6", "--batch-sizes", "4", "--min-length", "3"]


def test_tasks_and_doctor(capsys):
    status, out, _ = run(capsys, "tasks", "list")
    assert status == 0 and "S5_only_swaps" in out
    status, out, _ = run(capsys, "tasks", "show", "S3")
    assert status == 0 and "[BOS]" in out and "vocabulary 7" in out
    status, out, _ = run(capsys, "doctor")
    assert status == 0 and torch.__version__ in out and "chunkwise" in out and "triton  no" in out


def test_evaluate_over_a_range_of_lengths(capsys, tmp_path):
    run(capsys, *TINY_PARITY, "--out", tmp_path / "p")
    arguments = ["evaluate", tmp_path / "p", "--length-range", "5,9", "--sequences", "40"]
    status, out, _ = run(capsys, *arguments, "--json")
    figures = json.loads(out)
    assert status == 0 and figures["scaled_accuracy"] == pytest.approx(2 * figures["accuracy"] - 1)
    status, out, _ = run(capsys, *arguments)
    assert status == 0 and f"{figures['scaled_accuracy']:.4f}" in out and "lengths 5 to 9" in out
    for wrong, word in (("9,5", "9 to 5"), ("5", "length_range"), ("1,9", "begins at 2")):
        status, _, err = run(capsys, "evaluate", tmp_path / "p", "--length-range", wrong)
        assert status == 2 and word in err


@pytest.mark.slow("processes")
def test_reproduce_writes_summary_and_figure_and_reuses_what_is_done(capsys, tmp_path):
    out = tmp_path / "s3"
    arguments = ["reproduce", "s3", "--out", out, "--seeds", "1", "--steps", "2", "--lengths", "16,32"]
    arguments += ["--sequences", "4", "--only", "n1-pos-*,n2-neg-*"]
    status, first, _ = run(capsys, *arguments, "--jobs", "1")
    assert status == 0 and "DeltaProduct_2[-1,1]" in first
    summary = json.loads((out / "summary.json").read_text())
    assert [p for p in out.rglob("summary.json")] == [out / "summary.json"]
    assert len(summary["runs"]) == 2 and summary["failed"] == {}
    for entry in summary["runs"]:
        assert {"num_householder", "allow_neg_eigval", "seed", "steps", "wall_seconds"} <= set(entry)
        assert set(entry["accuracy"]) == set(entry["sequence_accuracy"]) == {"16", "32"}
        model = SequenceModel.from_pretrained(out / entry["checkpoint"])
        assert model.config.mixer.num_householder == entry["num_householder"]
        assert model.config.mixer.allow_neg_eigval == entry["allow_neg_eigval"]
    asked = {(entry["num_householder"], entry["allow_neg_eigval"]) for entry in summary["runs"]}
    assert asked == {(1, False), (2, True)}
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    before = {p: p.stat().st_mtime_ns for p in (out / "runs").rglob("*.*")}
    assert run(capsys, *arguments, "--jobs", "1")[0] == 0
    assert before == {p: p.stat().st_mtime_ns for p in (out / "runs").rglob("*.*")}
    status, _, err = run(capsys, *arguments, "--jobs", "1", "--steps", "3")
    assert status == 2 and "steps: 3 and 2" in err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["train", "--task", "S99x", "--out", "@/a"], "unknown task"),
        (["train", "--task", "S1", "--out", "@/a"], "S1"),
        (["train", "--lengths", "0", "--out", "@/a"], "lengths"),
        (["train", "--num-householder", "0", "--out", "@/a"], "num_householder"),
        (["train", "--head-dim", "0", "--out", "@/a"], "head_dim"),
        (["train", "--mixer", "mystery", "--out", "@/a"], "mixer"),
        (["train", "--mixer", "lstm", "--num-householder", "3", "--out", "@/a"], "--num-householder"),
        (["train", "--mixer=gla", "--no-allow-neg-eigval", "--out", "@/a"], "--no-allow-neg-eigval"),
        (["train", "--backend", "triton", "--out", "@/a"], "GPU"),
        (["train", "--backend", "nonsense", "--out", "@/a"], "backend"),
        (["train", "--device", "cuda", "--out", "@/a"], "GPU"),
        (["train", "--steps", "many", "--out", "@/a"], "steps"),
        (["train", "--log-every", "0", "--out", "@/a"], "log_every"),
        (["train", "--out", "@file/run"], "cannot be written"),
        (["train", "--out", "@file"], "cannot be written"),
        (["train"], "out"),
        (["evaluate", "@/nothing"], "does not exist"),
        (["evaluate", "@run", "--lengths", "0"], "lengths"),
        (["evaluate", "@run", "--lengths", "a,b"], "lengths"),
        (["evaluate", "@run", "--task", "S4"], "S4"),
        (["evaluate", "@run", "--sequences", "0"], "sequences"),
        (["reproduce", "s9", "--out", "@/a"], "s9"),
        (["reproduce", "s3", "--out", "@/a", "--seeds", "0"], "seeds"),
        (["reproduce", "s3", "--out", "@file"], "cannot be written"),
        (["tasks", "show", "S5_limit_to_5"], "limit"),
        (["tasks", "show", "S3", "--length", "0"], "length"),
        (["nonsense"], "nonsense"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="some of these are no mistakes where there is a GPU")
def test_mistakes_get_one_line_and_status_2(capsys, tmp_path, trained, arguments, word):
    (tmp_path / "file").write_text("not a folder")
    places = {"@/": f"{tmp_path}/", "@file": str(tmp_path / "file"), "@run": str(trained)}
    for short, path in places.items():
        arguments = [a.replace(short, path) for a in arguments]
    status, out, err = run(capsys, *arguments)
    assert status == 2 and out == ""
    assert err.count("\n") == 1 and word in err and "Traceback" not in err
    assert not (tmp_path / "a").exists(), "a refused command left a folder behind"


def test_a_flag_of_every_block_goes_with_any_mixer(capsys, tmp_path):
    flags = ["--mixer", "lstm", "--norm-eps", "1e-3", "--steps", "1", "--lengths", "4", "--batch-sizes", "2"]
    assert run(capsys, "train", *flags, "--out", tmp_path / "run")[0] == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["norm_eps"] == 1e-3


def test_a_flipped_byte_is_found(capsys, trained, tmp_path):
    copy = tmp_path / "run"
    for file in trained.rglob("*"):
        if file.is_file():
            target = copy / file.relative_to(trained)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    weights = copy / "checkpoint" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    status, _, err = run(capsys, "evaluate", copy, "--lengths", "8")
    assert status == 2 and "corrupt" in err and err.count("\n") == 1


@pytest.mark.slow("processes")
def test_the_installed_program_answers():
    """The console script itself, once, in a process of its own."""
    program = Path(sys.executable).with_name("deltaproduct")
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("deltaproduct ")
