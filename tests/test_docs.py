"""What the README and the figures say is true of the code."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from rich.console import Console

from deltaproduct.cli.main import main
from deltaproduct.experiments.tables import accuracy_table
from deltaproduct.models import ModelConfig, SequenceModel
from deltaproduct.ops import BACKENDS
from deltaproduct.plots.figures import accuracy_by_length

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    general, decoding, exact, transformers = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(general, names)
    assert names["o"].shape == (2, 128, 4, 32) and names["logits"].shape == (2, 128, 6)
    if BACKENDS["cpu"].unsupported_reason(torch.device("cpu"), torch.float32) is None:
        exec(decoding, names)
        assert names["logits"].shape == (2, 6)
    exec(exact, {})
    pytest.importorskip("transformers")
    SequenceModel(ModelConfig.build(257, 257, hidden_size=8)).save_pretrained(tmp_path / "runs/lm/checkpoint")
    monkeypatch.chdir(tmp_path)
    exec(transformers, names)
    assert names["written"].shape == (1, 7 + 20)


def test_the_readmes_commands_parse(tmp_path, monkeypatch, capsys):
    """Every `deltaproduct …` line of the README is understood; what it would do is left out."""
    lines = re.findall(r"^(?:torchrun .*-m )?deltaproduct ([^#\n\\]*(?:\\\n[^#\n]*)*)", README, re.MULTILINE)
    assert len(lines) >= 10
    started = []
    commands = ["train.Train", "evaluate.Evaluate", "reproduce.Reproduce"]
    commands += ["compile.Compile", "verify.Verify", "extract.Extract"]
    commands += ["lm_prepare.LmPrepare", "lm_train.LmTrain", "lm_generate.LmGenerate", "lm_evaluate.LmEvaluate"]
    commands += ["lm_convert.LmConvert", "lm_export.LmExport"]
    commands += ["bench.BenchGenerate", "bench.BenchOps", "bench.BenchTrain"]
    for command in commands:
        monkeypatch.setattr(f"deltaproduct.cli.{command}.run", lambda self: started.append(type(self).__name__))
    monkeypatch.chdir(tmp_path)
    for line in lines:
        main(line.replace("\\\n", " ").split())
    assert {"Train", "LmTrain", "LmExport", "Evaluate", "Reproduce", "BenchOps"} <= set(started)


PAGES = sorted((ROOT / "docs" / "theory").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_pages_python_runs(page):
    """Every formula of a page is followed by a block that asserts it; a page's blocks are one program."""
    if page.stem == "extraction":
        pytest.importorskip("aalpy")
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        exec(block, names)
    assert page.stem == "README" or sum(block.count("assert ") for block in blocks) >= 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_pages_links_exist_and_commands_parse(page, tmp_path, monkeypatch):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)h#][^)]*)\)", text):
        assert (page.parent / target).exists(), target
    for command in ("compile.Compile", "verify.Verify", "extract.Extract", "explain.Explain"):
        monkeypatch.setattr(f"deltaproduct.cli.{command}.run", lambda self: None)
    monkeypatch.chdir(tmp_path)
    for line in re.findall(r"^deltaproduct ([^#\n]*)", text, re.MULTILINE):
        main(shlex.split(line))


def test_links_and_folders_of_the_readme_exist():
    links = re.findall(r"\]\(([^)h#][^)]*)\)", README)
    folders = re.findall(r"`((?:deltaproduct|tests|docs)/\w*/?)`", README)
    for target in links + folders:
        assert (ROOT / target).exists(), target


def result(label, seed, accuracy):
    by_length = dict(zip(("128", "512"), accuracy, strict=True))
    curve = {"length": [1, 128, 512], "accuracy": [1.0, *accuracy]}
    times = {"task": "S3", "chance": 1 / 6, "training_length": 128, "wall_seconds": 9}
    return {"label": label, "seed": seed, "accuracy": by_length, "curve": curve, **times}


RUNS = [
    result("DeltaProduct_2[-1,1]", 0, (1.0, 0.99996)),
    result("DeltaProduct_2[-1,1]", 1, (1.0, 0.5)),
    result("DeltaProduct_2[-1,1]", 2, (0.25, 0.25)),
    result("DeltaProduct_1[0,1]", 0, (0.2, 0.1)),
]


def test_table_shows_median_and_range_and_rounds_nothing_up_to_one():
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(accuracy_table(RUNS))
    rows = [line.split() for line in console.export_text().splitlines()]
    assert ["DeltaProduct_2[-1,1]", "1", ".500", "3", "9"] in rows  # brackets are no markup; the median of three
    assert [".250–1", ".250–.999"] in rows
    assert ["DeltaProduct_1[0,1]", ".200", ".100", "1", "9"] in rows


@pytest.mark.parametrize("runs", [RUNS, RUNS[:1]])
def test_figure_is_written_whole(tmp_path, runs):
    pytest.importorskip("matplotlib")
    accuracy_by_length(runs, tmp_path / "a.png", title="t")
    data = (tmp_path / "a.png").read_bytes()
    assert data.startswith(b"\x89PNG") and b"IEND" in data[-12:]
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
