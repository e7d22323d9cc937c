"""What earlier versions saved is read as they would have read it: tests/fixtures, by helpers/save_everything.py."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from commands import run as command
from run_folder import metrics
from safetensors.torch import load_file

from deltaproduct.models import SequenceModel
from deltaproduct.models.fla.checkpoint import read_fla

ARCHIVES = sorted((Path(__file__).parent / "fixtures").glob("*.zip"))
# Of logits of size about 1, from float32 sums whose order is the processor's.
TOLERANCE = 1e-4

pytestmark = pytest.mark.numerical


@pytest.fixture(scope="module", params=ARCHIVES, ids=lambda path: path.stem)
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with zipfile.ZipFile(request.param) as archive:
        archive.extractall(folder)
    return folder


def test_every_mixer_gives_the_logits_that_it_gave(saved):
    logits = load_file(saved / "mixers" / "logits.safetensors")
    tokens = logits.pop("tokens")
    assert len(logits) >= 17
    for name, want in logits.items():
        model = SequenceModel.from_pretrained(saved / "mixers" / name)
        with torch.no_grad():
            torch.testing.assert_close(model(tokens)[0], want, rtol=TOLERANCE, atol=TOLERANCE, msg=name)


@pytest.mark.parametrize(("kind", "words"), [("task", ["train"]), ("language", ["lm", "train"])])
def test_a_run_that_was_cut_off_comes_to_what_the_whole_one_came_to(saved, capsys, kind, words):
    whole, cut_off = saved / f"{kind}-run", saved / f"{kind}-run-cut-off"
    assert len(metrics(cut_off)) == 5
    status, _, err = command(capsys, *words, "--resume", "--log-every", "1", "--out", cut_off)
    assert status == 0, err
    lines = [[line["loss"] for line in metrics(folder)] for folder in (whole, cut_off)]
    assert lines[0][:5] == lines[1][:5]  # as they were written
    assert lines[1] == pytest.approx(lines[0], rel=1e-3)  # 3 steps later, perhaps on another processor
    status, _, err = command(capsys, *words, "--resume", "--out", whole)  # it has ended, and stays as it is
    assert status == 0, err


def test_every_command_reads_what_it_read(saved, capsys, tmp_path):
    for words in (
        ["evaluate", saved / "task-run", "--lengths", "8", "--sequences", "2"],
        ["verify", saved / "compiled", "--length", "100"],
        ["lm", "generate", saved / "language-run", "--load-state", saved / "conversation", "--max-tokens", "2"],
        ["lm", "convert", saved / "language-run", "--to", "fla", "--out", tmp_path / "fla"],
        ["lm", "evaluate", saved / "language-run", "--what", "perplexity", "--data", saved / "corpus"],
    ):
        status, _, err = command(capsys, *words)
        assert status == 0, (words, err)
    tokens = torch.arange(20)[None]
    ours, theirs = SequenceModel.from_pretrained(saved / "language-run" / "checkpoint"), read_fla(saved / "fla")
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens)[0], theirs(tokens)[0])
    assert json.loads((saved / "task-run" / "run.json").read_text())["finished"]
