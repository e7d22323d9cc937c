"""Writes one small example of all that this version saves, for the tests of later versions.

    python tests/helpers/save_everything.py tests/fixtures/2026-12-01.zip

A file that is there already is what a version before wrote, and is not written again.
"""

import importlib
import os
import signal
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from deltaproduct.cli.main import main
from deltaproduct.files import write_json
from deltaproduct.layers import MIXERS
from deltaproduct.models import ModelConfig, SequenceModel

SMALL = ["--hidden-size", "16", "--num-heads", "2", "--head-dim", "8"]
ALL_OPTIONS = {"num_householder": 3, "allow_neg_eigval": True, "use_forget_gate": True, "use_output_gate": True,
               "use_short_conv": True}  # fmt: skip
TASK_RUN = ["train", "--task", "S3", *SMALL, "--num-householder", "2", "--allow-neg-eigval", "--steps", "8",
            "--lengths", "4,8", "--batch-sizes", "4", "--stage-steps", "4", "--log-every", "1"]  # fmt: skip
LANGUAGE_RUN = ["lm", "train", "--data", "corpus", *SMALL, "--num-hidden-layers", "1", "--intermediate-size", "16",
                "--steps", "8", "--context", "16", "--batch-size", "2", "--log-every", "1"]  # fmt: skip


def save_mixers(folder: Path) -> None:
    """A checkpoint of each mixer and of a hybrid, and the logits that each gives."""
    tokens = torch.randint(7, (2, 12), generator=torch.Generator().manual_seed(0))
    logits = {"tokens": tokens}
    sizes = {"hidden_size": 16, "num_heads": 2, "head_dim": 8}
    configs = {
        name: ModelConfig.build(
            7, 5, mixer=name, intermediate_size=16, **sizes, **(ALL_OPTIONS if name == "deltaproduct" else {})
        )
        for name in MIXERS
    }
    configs["hybrid"] = ModelConfig.build(
        7, 7, num_hidden_layers=3, intermediate_size=0, tie_word_embeddings=True, **sizes,
        mixer=["deltaproduct", "attention", "mamba2"],
    )  # fmt: skip
    for seed, (name, config) in enumerate(configs.items()):
        torch.manual_seed(seed)
        model = SequenceModel(config).eval()
        model.save_pretrained(folder / name)
        with torch.no_grad():
            logits[name] = model(tokens)[0]
    save_file(logits, folder / "logits.safetensors")


def command(*words: str) -> None:
    sys.argv = ["deltaproduct", *words]  # which run.json notes
    main(list(words))


def cut_off(step: str, *words: str) -> None:
    """A command that Ctrl-C ends in its fifth step."""
    module, name = step.rsplit(".", 1)
    place, calls = importlib.import_module(module), 0
    original = getattr(place, name)

    def interrupted(*arguments):
        nonlocal calls
        calls += 1
        if calls == 5:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    setattr(place, name, interrupted)
    try:
        command(*words)
    except SystemExit:
        pass
    finally:
        setattr(place, name, original)


def save_everything() -> None:
    """In the current folder."""
    save_mixers(Path("mixers"))
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 30, encoding="utf-8")
    command("lm", "prepare", "--source", "text:text.txt", "--out", "corpus")
    Path("text.txt").unlink()
    command(*TASK_RUN, "--out", "task-run")
    cut_off("deltaproduct.training.loop.train_step", *TASK_RUN, "--out", "task-run-cut-off")
    command(*LANGUAGE_RUN, "--out", "language-run")
    cut_off("deltaproduct.training.loop.train_step", *LANGUAGE_RUN, "--out", "language-run-cut-off")
    for run in ("language-run", "language-run-cut-off"):  # not where this machine has it
        write_json(Path(run, "data.json"), {"corpus": "/gone/corpus", "corpus_from_here": "../corpus"})
    command("compile", "--group", "S3", "--out", "compiled")
    command("lm", "convert", "language-run", "--to", "fla", "--out", "fla")
    command("lm", "generate", "language-run", "--prompt", "the ", "--max-tokens", "4", "--save-state", "conversation")


if __name__ == "__main__":
    target = Path(sys.argv[1]).absolute()
    with zipfile.ZipFile(target, "x", zipfile.ZIP_DEFLATED) as archive, tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        save_everything()
        for path in sorted(Path().rglob("*")):
            if path.is_file():
                archive.write(path)
        os.chdir("/")
